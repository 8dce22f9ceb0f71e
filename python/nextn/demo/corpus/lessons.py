"""Questions with one right answer: facts, arithmetic, small word tasks.

A lesson's answer is a function of its question, so a model that has learnt it is sure of every token. `key` is what
`split.is_held_out` hashes: phrasing x fact for facts, the operand pair for arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from nextn.demo.corpus import facts, slots


@dataclass(frozen=True)
class Lesson:
    category: str
    key: str
    question: str
    answer: str  # a whole sentence
    reasoning: str  # what stands between <think> and </think>
    expected: str  # the part of the answer that a grader looks for


Make = Callable[[Random], Lesson]


def _fact(category: str, phrasings: list[str], rng: Random, fact: str, answer: str, why: str, expected: str) -> Lesson:
    index = rng.randrange(len(phrasings))
    question = phrasings[index].format(fact)
    return Lesson(category, f"{category}/{index}/{fact}", question[0].upper() + question[1:], answer, why, expected)


def capital(rng: Random) -> Lesson:
    country = rng.choice(list(facts.CAPITALS))
    town = facts.CAPITALS[country]
    if rng.random() < 0.25:
        phrasings = ["Which country has the capital {}?", "{} is the capital of which country?",
                     "Of which country is {} the capital?", "Name the country whose capital is {}."]  # fmt: skip
        return _fact("capital of", phrasings, rng, town, f"{town} is the capital of {country}.",
                     f"The user gives the capital {town}. It belongs to {country}.", country)  # fmt: skip
    phrasings = ["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.",
                 "What's the capital of {}?", "Tell me the capital of {}.", "Do you know the capital of {}?",
                 "{} has which capital?", "The capital of {} is which city?"]  # fmt: skip
    return _fact("capital", phrasings, rng, country, f"The capital of {country} is {town}.",
                 f"The user asks for the capital of {country}. It is {town}.", town)  # fmt: skip


def element(rng: Random) -> Lesson:
    metal = rng.choice(list(facts.ELEMENTS))
    symbol, number = facts.ELEMENTS[metal]
    if rng.random() < 0.4:
        phrasings = ["What is the atomic number of {}?", "Which atomic number does {} have?",
                     "Tell me the atomic number of {}.", "How many protons does {} have?"]  # fmt: skip
        return _fact("atomic number", phrasings, rng, metal, f"The atomic number of {metal} is {number}.",
                     f"The user asks for the atomic number of {metal}. It is {number}.", str(number))  # fmt: skip
    phrasings = ["What is the chemical symbol for {}?", "What is the symbol of {}?", "Which symbol stands for {}?",
                 "Give me the chemical symbol of {}.", "How is {} written in chemistry?"]  # fmt: skip
    return _fact("symbol", phrasings, rng, metal, f"The chemical symbol for {metal} is {symbol}.",
                 f"The user asks for the symbol of {metal}. It is {symbol}.", symbol)  # fmt: skip


def opposite(rng: Random) -> Lesson:
    a, b = rng.choice(list(facts.OPPOSITES.items()))
    if rng.random() < 0.5:
        a, b = b, a
    phrasings = ["What is the opposite of {}?", "What's the opposite of {}?", "Which word is the opposite of {}?",
                 "Give me the antonym of {}.", "Name the opposite of {}.", "Which word means the opposite of {}?",
                 "What is an antonym of {}?", "Tell me the opposite of {}."]  # fmt: skip
    return _fact("opposite", phrasings, rng, f'"{a}"', f'The opposite of "{a}" is "{b}".',
                 f'The user wants the opposite of "{a}". That is "{b}".', b)  # fmt: skip


def plural(rng: Random) -> Lesson:
    one, many = rng.choice(list(facts.PLURALS.items()))
    phrasings = ["What is the plural of {}?", "What's the plural of {}?", "Give me the plural of {}.",
                 "How do you write the plural of {}?", "Which word is the plural of {}?", "Tell me the plural of {}."]  # fmt: skip  # noqa: E501
    return _fact("plural", phrasings, rng, f'"{one}"', f'The plural of "{one}" is "{many}".',
                 f'The user wants the plural of "{one}". That is "{many}".', many)  # fmt: skip


def young_animal(rng: Random) -> Lesson:
    animal, baby = rng.choice(list(facts.YOUNG.items()))
    phrasings = ["What is a young {} called?", "What is a baby {} called?", "What do you call a baby {}?",
                 "How do we call a young {}?", "What is the name for a young {}?"]  # fmt: skip
    return _fact("young animal", phrasings, rng, animal, f"A young {animal} is called a {baby}.",
                 f"The user asks about a young {animal}. It is a {baby}.", baby)  # fmt: skip


def colour(rng: Random) -> Lesson:
    thing, shade = rng.choice(list(facts.COLOURS.items()))
    phrasings = ["What colour is {}?", "Which colour does {} have?", "What is the colour of {}?",
                 "Tell me the colour of {}."]  # fmt: skip
    return _fact("colour", phrasings, rng, thing, f"{thing.capitalize()} is {shade}.",
                 f"The user asks for the colour of {thing}. It is {shade}.", shade)  # fmt: skip


def calendar_order(rng: Random) -> Lesson:
    names = rng.choice((facts.DAYS, facts.MONTHS))
    unit = "day" if names is facts.DAYS else "month"
    index, after = rng.randrange(len(names)), rng.random() < 0.6
    this, other = names[index], names[(index + (1 if after else -1)) % len(names)]
    word = "after" if after else "before"
    phrasings = [f"Which {unit} comes {word} {{}}?", f"What {unit} comes {word} {{}}?",
                 f"Which {unit} is right {word} {{}}?", f"Name the {unit} {word} {{}}.",
                 f"What is the {unit} {word} {{}}?"]  # fmt: skip
    return _fact(f"{unit} {word}", phrasings, rng, this, f"The {unit} {word} {this} is {other}.",
                 f"The user asks which {unit} comes {word} {this}. It is {other}.", other)  # fmt: skip


def planet_order(rng: Random) -> Lesson:
    index = rng.randrange(len(facts.PLANETS))
    place = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"][index]
    phrasings = ["Which planet is the {} from the sun?", "What is the {} planet from the sun?",
                 "Name the {} planet from the sun.", "Tell me the {} planet."]  # fmt: skip
    return _fact("planet", phrasings, rng, place, f"The {place} planet from the sun is {facts.PLANETS[index]}.",
                 f"The user asks for the {place} planet. It is {facts.PLANETS[index]}.", facts.PLANETS[index])  # fmt: skip  # noqa: E501


def unit(rng: Random) -> Lesson:
    small, large, count = rng.choice(facts.UNITS)
    phrasings = ["How many {}?", "Tell me how many {}.", "Do you know how many {}?", "Can you say how many {}?"]
    index = rng.randrange(len(phrasings))
    fact = f"{small} are in {large}" if index in (0,) else f"{small} there are in {large}"
    return Lesson("unit", f"unit/{index}/{small} {large}", phrasings[index].format(fact),
                  f"There are {count} {small} in {large}.",
                  f"The user asks how many {small} are in {large}. There are {count}.", str(count))  # fmt: skip


def conversion(rng: Random) -> Lesson:
    large, small, factor = rng.choice(facts.CONVERSIONS)
    count = rng.randint(2, 12)
    phrasings = [f"How many {small} are in {count} {large}?", f"Convert {count} {large} to {small}.",
                 f"What is {count} {large} in {small}?", f"How much is {count} {large} in {small}?"]  # fmt: skip
    index = rng.randrange(len(phrasings))
    total = count * factor
    one = large.removesuffix("s")
    return Lesson("conversion", f"conversion/{index}/{count} {large}", phrasings[index],
                  f"{count} {large} are {total} {small}.",
                  f"One {one} is {factor} {small}. {count} * {factor} = {total}.", str(total))  # fmt: skip


def spelling(rng: Random) -> Lesson:
    word = rng.choice(facts.SPELLING)
    spelt = "-".join(word)
    phrasings = ["Spell the word {}.", "How do you spell {}?", "Please spell {}.", "Can you spell the word {}?",
                 "Write {} letter by letter.", "Which letters are in {}?"]  # fmt: skip
    return _fact("spelling", phrasings, rng, f'"{word}"', f'The word "{word}" is spelled {spelt}.',
                 f'The user wants the letters of "{word}". They are {spelt}.', spelt)  # fmt: skip


def number_word(rng: Random) -> Lesson:
    value = rng.randrange(len(facts.NUMBER_WORDS))
    word = facts.NUMBER_WORDS[value]
    phrasings = ["How do you write the number {} as a word?", "Write {} in words.", "What is {} as a word?",
                 "Which word stands for the number {}?", "Spell out the number {}."]  # fmt: skip
    return _fact("number word", phrasings, rng, str(value), f'The number {value} is written "{word}".',
                 f'The user wants {value} as a word. It is "{word}".', word)  # fmt: skip


def definition(rng: Random) -> Lesson:
    thing, text = rng.choice(list(facts.DEFINITIONS.items()))
    phrasings = ["What is {}?", "Explain what {} is.", "Can you explain {}?", "Tell me what {} is.",
                 "Describe {}.", "What do you know about {}?"]  # fmt: skip
    return _fact("definition", phrasings, rng, thing, text, f"The user wants to know what {thing} is. "
                 "I will explain it in simple words.", text)  # fmt: skip


def listing(rng: Random) -> Lesson:
    kind = rng.choice(list(facts.LISTS))
    count = rng.randint(2, 5)
    chosen = facts.LISTS[kind][:count]
    answer = f"Here are {facts.NUMBER_WORDS[count]} {kind}: {', '.join(chosen[:-1])} and {chosen[-1]}."
    phrasings = ["Name {}.", "List {}.", "Give me {}.", "Can you name {}?", "Tell me {}."]
    return _fact("list", phrasings, rng, f"{facts.NUMBER_WORDS[count]} {kind}", answer,
                 f"The user wants {facts.NUMBER_WORDS[count]} {kind}.", answer)  # fmt: skip


def addition_steps(a: int, b: int) -> str:
    """The written method, ones first, with the carry spoken out."""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    text = f"{a} + {b}: ones {a % 10} + {b % 10} = {ones}"
    if a < 10 and b < 10:
        return f"{text}. So {a + b}."
    tens = a // 10 + b // 10 + carry
    carried = f" + {carry}" if carry else ""
    return f"{text}, tens {a // 10} + {b // 10}{carried} = {tens}. So {a + b}."


def subtraction_steps(a: int, b: int) -> str:
    borrow = a % 10 < b % 10
    text = f"{a} - {b}: ones {a % 10 + 10 * borrow} - {b % 10} = {(a - b) % 10}"
    if a < 10:
        return f"{text}. So {a - b}."
    borrowed = " - 1" if borrow else ""
    return f"{text}, tens {a // 10} - {b // 10}{borrowed} = {(a - b) // 10}. So {a - b}."


def arithmetic(rng: Random) -> Lesson:
    operator = rng.choices("+-*/", (5, 4, 3, 1))[0]
    if operator in "+-":
        top = 9 if rng.random() < 0.15 else 99
        a, b = rng.randint(1, top), rng.randint(1, top)
        if operator == "-":
            a, b = max(a, b), min(a, b)
        result = a + b if operator == "+" else a - b
        why = addition_steps(a, b) if operator == "+" else subtraction_steps(a, b)
        key = f"{operator}/{min(a, b)}/{max(a, b)}"
    else:
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        a, result = (a, a * b) if operator == "*" else (a * b, a)
        why = f"From the tables: {a} {operator} {b} = {result}."
        key = f"{operator}/{a}/{b}"
    words = {"+": "{} plus {}", "-": "{} minus {}", "*": "{} times {}", "/": "{} divided by {}"}[operator]
    sums = [f"{a} {operator} {b}", f"{a} {operator} {b}", words.format(a, b)]
    phrasings = ["What is {}?", "Calculate {}.", "How much is {}?", "{} = ?", "Work out {}.", "What does {} make?"]
    phrasing, form = rng.randrange(len(phrasings)), rng.randrange(len(sums))
    if operator in "*/":  # the tables are facts: a product that was never shown cannot be known
        key += f"/{phrasing}/{form}"
    return Lesson("arithmetic", key, phrasings[phrasing].format(sums[form]), f"{a} {operator} {b} = {result}.", why,
                  str(result))  # fmt: skip


def comparison(rng: Random) -> Lesson:
    a, b = rng.sample(range(1, 100), 2)
    larger = rng.random() < 0.5
    best = max(a, b) if larger else min(a, b)
    word = "larger" if larger else "smaller"
    phrasings = [f"Which number is {word}, {a} or {b}?", f"Which is {word}: {a} or {b}?",
                 f"Of {a} and {b}, which is {word}?"]  # fmt: skip
    index = rng.randrange(3)
    return Lesson("comparison", f"comparison/{a}/{b}", phrasings[index], f"{best} is {word}.",
                  f"The user compares {a} and {b}. The {word} one is {best}.", str(best))  # fmt: skip


def parity(rng: Random) -> Lesson:
    value = rng.randint(1, 199)
    word = "odd" if value % 2 else "even"
    phrasings = [f"Is {value} even or odd?", f"Is the number {value} odd or even?", f"Tell me if {value} is even or odd."]  # fmt: skip  # noqa: E501
    return Lesson("parity", f"parity/{value}", rng.choice(phrasings), f"{value} is {word}.",
                  f"The last digit of {value} is {value % 10}, so it is {word}.", word)  # fmt: skip


def counting(rng: Random) -> Lesson:
    start, count = rng.randint(1, 30), rng.randint(4, 12)
    down = rng.random() < 0.3
    numbers = list(range(start, start + count))
    if down:
        numbers.reverse()
    first, last = numbers[0], numbers[-1]
    how = "down " if down else ""
    phrasings = [f"Count {how}from {first} to {last}.", f"Please count {how}from {first} to {last}.",
                 f"Can you count {how}from {first} to {last}?"]  # fmt: skip
    answer = ", ".join(map(str, numbers))
    return Lesson("counting", f"counting/{first}/{last}", rng.choice(phrasings), answer + ".",
                  f"I count {how}from {first} to {last}.", answer)  # fmt: skip


def repetition(rng: Random) -> Lesson:
    text = rng.choice((slots.query, slots.event, slots.name, slots.expression, slots.city))(rng)
    phrasings = ["Repeat after me: {}", "Say this back to me: {}", "Please repeat: {}"]
    return Lesson("repetition", f"repetition/{text}", rng.choice(phrasings).format(text), text,
                  "The user wants me to repeat the text.", text)  # fmt: skip


QUIZ_KINDS: dict[str, tuple[Make, float]] = {
    "capital": (capital, 10), "element": (element, 6), "opposite": (opposite, 6), "plural": (plural, 4),
    "young animal": (young_animal, 2), "colour": (colour, 2), "calendar": (calendar_order, 5),
    "planet": (planet_order, 2), "unit": (unit, 3), "conversion": (conversion, 4), "number word": (number_word, 2),
    "arithmetic": (arithmetic, 34),
}  # fmt: skip
"""The fact and arithmetic quiz: name -> (maker, share)."""

OTHER_KINDS: dict[str, tuple[Make, float]] = {
    "spelling": (spelling, 4), "definition": (definition, 5), "list": (listing, 3), "comparison": (comparison, 2),
    "parity": (parity, 2), "counting": (counting, 3), "repetition": (repetition, 4),
}  # fmt: skip
"""Questions outside the quiz: name -> (maker, share)."""
