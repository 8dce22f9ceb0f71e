"""Longer answers: stories, letters, Python snippets and small talk, all from this project's own templates."""

from random import Random

from nextn.demo.corpus import slots
from nextn.demo.corpus.lessons import Lesson

_ANIMALS = ["fox", "bear", "rabbit", "mouse", "owl", "cat", "dog", "frog", "duck", "horse"]
_PLACES = ["forest", "garden", "village", "castle", "mountain", "beach", "harbor", "library"]
_THINGS = ["key", "lamp", "map", "bell", "book", "boat", "kite", "ring"]
_FRIENDS = ["turtle", "sparrow", "squirrel", "hedgehog", "goat"]


def story(rng: Random) -> Lesson:
    """A story of five sentences. Everything in it follows from the request, but for the friend and the ending."""
    animal, place, thing = rng.choice(_ANIMALS), rng.choice(_PLACES), rng.choice(_THINGS)
    hero = slots.name(rng)
    friend = _FRIENDS[(len(animal) + len(place) + len(thing)) % len(_FRIENDS)]
    phrasings = [f"Tell me a story about a {animal} named {hero} who finds a {thing} in the {place}.",
                 f"Write a short story: {hero} the {animal} finds a {thing} in the {place}.",
                 f"I want a story about {hero}, a {animal}, with a {thing} in the {place}."]  # fmt: skip
    text = (
        f"Once upon a time there was a little {animal} named {hero}. {hero} lived near the {place}. "
        f"One morning {hero} found an old {thing} on the ground. "
        f'"Who lost this {thing}?" asked {hero}. A {friend} came by and said, "It is mine. Thank you for finding it!" '
        f"From that day on, {hero} and the {friend} were good friends, and they walked in the {place} every day."
    )
    return Lesson("story", f"story/{animal}/{place}/{thing}", rng.choice(phrasings), text,
                  f"The user wants a story about {hero} the {animal} with a {thing} in the {place}.", text)  # fmt: skip


_PYTHON = {
    "adds two numbers": ("add", "a, b", "    return a + b"),
    "multiplies two numbers": ("multiply", "a, b", "    return a * b"),
    "subtracts two numbers": ("subtract", "a, b", "    return a - b"),
    "returns the larger of two numbers": ("larger", "a, b", "    return a if a > b else b"),
    "returns the smaller of two numbers": ("smaller", "a, b", "    return a if a < b else b"),
    "checks if a number is even": ("is_even", "n", "    return n % 2 == 0"),
    "checks if a number is odd": ("is_odd", "n", "    return n % 2 == 1"),
    "computes the factorial of a number": (
        "factorial", "n", "    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result"),
    "computes the nth Fibonacci number": (
        "fibonacci", "n", "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"),
    "reverses a string": ("reverse", "text", "    return text[::-1]"),
    "counts the words in a text": ("count_words", "text", "    return len(text.split())"),
    "sums a list of numbers": (
        "total", "numbers", "    result = 0\n    for number in numbers:\n        result += number\n    return result"),
    "finds the largest number in a list": (
        "largest", "numbers",
        "    best = numbers[0]\n    for number in numbers:\n        if number > best:\n            best = number\n"
        "    return best"),
    "computes the average of a list": ("average", "numbers", "    return sum(numbers) / len(numbers)"),
    "checks if a word is a palindrome": ("is_palindrome", "word", "    return word == word[::-1]"),
    "removes duplicates from a list": (
        "unique", "items",
        "    seen = []\n    for item in items:\n        if item not in seen:\n            seen.append(item)\n"
        "    return seen"),
    "prints the numbers from one to n": ("print_numbers", "n", "    for i in range(1, n + 1):\n        print(i)"),
    "counts the vowels in a text": (
        "count_vowels", "text", '    return sum(1 for letter in text if letter in "aeiou")'),
}  # fmt: skip


def python_snippet(rng: Random) -> Lesson:
    task = rng.choice(list(_PYTHON))
    function, arguments, body = _PYTHON[task]
    phrasings = ["Write a Python function that {}.", "Show me a Python function that {}.",
                 "How do I write a Python function that {}?", "I need a Python function that {}.",
                 "Please write Python code that {}."]  # fmt: skip
    index = rng.randrange(len(phrasings))
    code = f"def {function}({arguments}):\n{body}"
    answer = f"Here is a Python function that {task}:\n\n```python\n{code}\n```"
    return Lesson("python", f"python/{index}/{task}", phrasings[index].format(task), answer,
                  f"The user wants a Python function that {task}. I will call it {function}.", code)  # fmt: skip


_SMALL_TALK = [
    (["Hello!", "Hi!", "Hi there!", "Hello there.", "Hey!", "Good day!"], "Hello! How can I help you today?"),
    (["Good morning!", "Good morning to you!"], "Good morning! What can I do for you?"),
    (["Good evening!", "Good evening to you."], "Good evening! What can I do for you?"),
    (["How are you?", "How are you doing?", "How is it going?", "Are you well?"],
     "I am doing well, thank you. What can I do for you?"),
    (["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is your name?"],
     "I am the embedded model of nextn, a very small language model. I answer simple questions and call tools."),
    (["What can you do?", "How can you help me?", "What do you know?", "What can I ask you?"],
     "I can answer simple questions, do small sums, tell short stories, write Python functions and call tools."),
    (["Thank you!", "Thanks a lot!", "Thanks!", "Many thanks.", "That was helpful, thank you."],
     "You are welcome! Is there anything else I can do?"),
    (["Goodbye!", "Bye!", "See you later!", "I have to go now."], "Goodbye! Have a nice day."),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."],
     "Why did the token cross the road? Because the draft had already guessed the other side."),
    (["Are you a human?", "Are you a person?", "Are you real?"], "No, I am a small language model, not a person."),
    (["I am sad.", "I feel sad today.", "I had a bad day."],
     "I am sorry to hear that. A short walk and a warm tea often help."),
    (["I am happy!", "I feel great today!", "I had a good day."], "That is good to hear! What made you happy?"),
    (["Say hello.", "Greet me.", "Say hi."], "Hello! It is nice to meet you."),
]  # fmt: skip


def small_talk(rng: Random) -> Lesson:
    if rng.random() < 0.25:
        who = slots.name(rng)
        question = rng.choice(["My name is {}.", "Hi, I am {}.", "Hello, my name is {}.", "I am called {}."]).format(
            who
        )
        return Lesson("small talk", f"greeting/{who}", question, f"Nice to meet you, {who}! How can I help you?",
                      f"The user is called {who}. I will greet them.", who)  # fmt: skip
    row = rng.randrange(len(_SMALL_TALK))
    questions, answer = _SMALL_TALK[row]
    question = rng.choice(questions)
    return Lesson("small talk", f"small talk/{row}/{question}", question, answer,
                  "This is small talk. I will answer in a friendly way.", answer)  # fmt: skip
