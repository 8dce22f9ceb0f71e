"""Values that a model must copy rather than know: names, places, expressions, queries, times."""

from random import Random

from nextn.demo.corpus.facts import CAPITALS

CITIES = [
    *CAPITALS.values(), "New York", "Los Angeles", "San Francisco", "Chicago", "Boston", "Seattle", "Miami", "Denver",
    "Toronto", "Vancouver", "Montreal", "Sydney", "Melbourne", "Shanghai", "Shenzhen", "Hong Kong", "Singapore",
    "Osaka", "Kyoto", "Mumbai", "Milan", "Venice", "Naples", "Barcelona", "Valencia", "Porto", "Lyon", "Nice",
    "Hamburg", "Munich", "Cologne", "Zurich", "Geneva", "Basel", "Salzburg", "Prague", "Krakow", "Bergen", "Malmo",
    "Antwerp", "Rotterdam", "Amsterdam", "Utrecht", "Bristol", "Leeds", "Glasgow", "Belfast", "Cape Town", "Lagos",
    "Casablanca", "Dakar", "Dubai", "Doha", "Tehran", "Karachi", "Manila", "Taipei", "Sao Paulo", "Rio de Janeiro",
]  # fmt: skip

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yusuf", "Zoe", "Li Wei", "Mei", "Hiro", "Priya",
    "Omar", "Lena", "Maria", "John", "Alice", "Bob", "Carlos", "Diana",
]  # fmt: skip

_SYLLABLES = [
    "ba", "be", "bo", "da", "de", "do", "fa", "fi", "ga", "go", "ha", "ka", "ki", "ko", "la", "le", "lo", "lu",
    "ma", "mi", "mo", "na", "ni", "no", "pa", "pe", "ra", "ri", "ro", "sa", "se", "su", "ta", "ti", "to", "va",
    "vi", "za", "zo", "ren", "lin", "dar", "mel", "tor", "vin", "sol", "bek",
]  # fmt: skip
_ADJECTIVES = [
    "red", "blue", "old", "new", "small", "large", "cheap", "famous", "local", "modern", "wild", "green", "best",
    "early", "electric", "wooden",
]  # fmt: skip
_TOPICS = [
    "bicycles", "castles", "chess openings", "solar panels", "bread recipes", "train tickets", "jazz music", "tulips",
    "mountain trails", "history of paper", "garden tools", "space telescopes", "pasta sauce", "language models",
    "chess clubs", "river boats", "cat breeds", "coffee beans", "violin lessons", "board games", "running shoes",
    "ocean waves", "bird songs", "tea houses", "star maps", "rain coats", "poetry books", "ice skating", "sail boats",
    "paper planes", "honey bees", "clay pots", "film cameras", "winter tires", "apple trees", "science museums",
]  # fmt: skip
_EVENTS = [
    "meeting", "lunch", "dinner", "dentist", "review", "party", "call", "workshop", "lesson", "training",
    "interview", "concert", "walk",
]  # fmt: skip


def made_up_word(rng: Random) -> str:
    """A capitalised word of two to four syllables, so that copying cannot rest on a list learnt by heart."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else made_up_word(rng)


def name(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else made_up_word(rng)


def expression(rng: Random) -> str:
    """One or two operations on numbers of up to four digits, such as `412 * 7 + 3`."""
    parts = [str(rng.randint(1, 10 ** rng.randint(1, 4) - 1))]
    for _ in range(rng.choice((1, 1, 1, 2))):
        parts += [rng.choice("+-*/"), str(rng.randint(1, 10 ** rng.randint(1, 3) - 1))]
    return " ".join(parts)


def query(rng: Random) -> str:
    topic = rng.choice(_TOPICS)
    if rng.random() < 0.6:
        topic = f"{rng.choice(_ADJECTIVES)} {topic}"
    if rng.random() < 0.5:
        topic = f"{topic} in {city(rng)}"
    return topic


def event(rng: Random) -> str:
    kind = rng.choice(_EVENTS)
    return f"{kind} with {name(rng)}" if rng.random() < 0.7 else kind


def clock_time(rng: Random) -> str:
    return f"{rng.randint(7, 21):02d}:{rng.choice(('00', '15', '30', '45'))}"
