"""The facts: plain tables, written for this project from common knowledge."""

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik", "Poland": "Warsaw", "Austria": "Vienna",
    "Hungary": "Budapest", "Greece": "Athens", "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Morocco": "Rabat", "Ghana": "Accra", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "South Korea": "Seoul",
    "Indonesia": "Jakarta", "Australia": "Canberra", "New Zealand": "Wellington", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Peru": "Lima", "Colombia": "Bogota", "Belgium": "Brussels", "Switzerland": "Bern", "Romania": "Bucharest",
}  # fmt: skip

ELEMENTS: dict[str, tuple[str, int]] = {
    "hydrogen": ("H", 1), "helium": ("He", 2), "lithium": ("Li", 3), "carbon": ("C", 6), "nitrogen": ("N", 7),
    "oxygen": ("O", 8), "fluorine": ("F", 9), "neon": ("Ne", 10), "sodium": ("Na", 11), "magnesium": ("Mg", 12),
    "aluminium": ("Al", 13), "silicon": ("Si", 14), "sulfur": ("S", 16), "chlorine": ("Cl", 17),
    "potassium": ("K", 19), "calcium": ("Ca", 20), "iron": ("Fe", 26), "nickel": ("Ni", 28), "copper": ("Cu", 29),
    "zinc": ("Zn", 30), "silver": ("Ag", 47), "tin": ("Sn", 50), "gold": ("Au", 79), "lead": ("Pb", 82),
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "happy": "sad", "old": "young", "early": "late",
    "hard": "soft", "high": "low", "open": "closed", "wet": "dry", "full": "empty", "rich": "poor", "near": "far",
    "strong": "weak", "thick": "thin", "clean": "dirty", "loud": "quiet", "first": "last", "up": "down",
    "left": "right", "inside": "outside", "always": "never", "love": "hate", "buy": "sell", "win": "lose",
    "push": "pull", "begin": "end", "day": "night", "true": "false",
}  # fmt: skip

PLURALS: dict[str, str] = {
    "cat": "cats", "dog": "dogs", "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "man": "men", "woman": "women", "box": "boxes", "bus": "buses", "city": "cities",
    "baby": "babies", "leaf": "leaves", "knife": "knives", "wolf": "wolves", "sheep": "sheep", "fish": "fish",
    "tree": "trees", "book": "books", "glass": "glasses", "potato": "potatoes", "key": "keys", "story": "stories",
}  # fmt: skip

YOUNG: dict[str, str] = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "horse": "foal", "sheep": "lamb", "pig": "piglet",
    "duck": "duckling", "goose": "gosling", "bear": "cub", "frog": "tadpole", "deer": "fawn", "swan": "cygnet",
}  # fmt: skip

COLOURS: dict[str, str] = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a banana": "yellow", "a carrot": "orange",
    "a tomato": "red", "chocolate": "brown", "a lemon": "yellow", "milk": "white", "a plum": "purple",
    "a frog": "green",
}  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]

UNITS: list[tuple[str, str, int]] = [
    ("minutes", "an hour", 60), ("seconds", "a minute", 60), ("hours", "a day", 24), ("days", "a week", 7),
    ("months", "a year", 12), ("days", "a leap year", 366), ("centimeters", "a meter", 100),
    ("meters", "a kilometer", 1000), ("grams", "a kilogram", 1000), ("millimeters", "a centimeter", 10),
    ("inches", "a foot", 12), ("feet", "a yard", 3), ("eggs", "a dozen", 12), ("years", "a century", 100),
    ("years", "a decade", 10), ("legs", "a spider's body", 8), ("cents", "a dollar", 100), ("sides", "a triangle", 3),
    ("sides", "a square", 4), ("sides", "a hexagon", 6),
]  # fmt: skip

CONVERSIONS: list[tuple[str, str, int]] = [
    ("meters", "centimeters", 100), ("kilometers", "meters", 1000), ("kilograms", "grams", 1000),
    ("weeks", "days", 7), ("dozens", "eggs", 12), ("decades", "years", 10), ("yards", "feet", 3),
    ("centimeters", "millimeters", 10),
]  # fmt: skip

SPELLING = [
    "apple", "bread", "chair", "dance", "earth", "friend", "garden", "house", "island", "jungle", "kitten", "lemon",
    "music", "night", "ocean", "paper", "queen", "river", "school", "table", "under", "violin", "water", "yellow",
    "zebra", "bridge", "castle", "dragon", "flower", "guitar", "hammer", "orange", "pencil", "rabbit", "silver",
    "train", "window", "winter", "summer", "monkey",
]  # fmt: skip

DEFINITIONS: dict[str, str] = {
    "a volcano": "A volcano is an opening in the ground where hot melted rock and gas can escape.",
    "a river": "A river is a long stream of fresh water that flows toward a lake or the sea.",
    "gravity": "Gravity is the force that pulls things toward each other. It keeps us on the ground.",
    "a star": "A star is a huge ball of hot gas that gives off light. The sun is a star.",
    "a planet": "A planet is a large round body that moves around a star. The Earth is a planet.",
    "photosynthesis": "Photosynthesis is how plants use sunlight, water and air to make their food.",
    "an island": "An island is a piece of land with water all around it.",
    "a computer": "A computer is a machine that follows instructions to store and change information.",
    "a program": "A program is a list of instructions that a computer can follow.",
    "a token": "A token is a small piece of text, such as a word or part of a word.",
    "a language model": "A language model is a program that learned from text to predict the next token.",
    "speculative decoding": "Speculative decoding lets a small draft guess several tokens, and the big model checks "
    "them all at once.",
    "an expert": "In a mixture of experts, an expert is a small network that works on some of the tokens.",
    "a library": "A library is a place where people can read and borrow books.",
    "a desert": "A desert is a very dry place where little rain falls and few plants grow.",
    "a glacier": "A glacier is a large mass of ice that moves slowly down a mountain.",
    "a rainbow": "A rainbow is an arc of colours that appears when sunlight shines through drops of water.",
    "a mammal": "A mammal is a warm animal with hair that feeds its young with milk.",
    "an insect": "An insect is a small animal with six legs and a body in three parts.",
    "a triangle": "A triangle is a shape with three straight sides and three corners.",
    "an atom": "An atom is the smallest piece of an element. It has a nucleus and electrons.",
    "a cache": "A cache keeps results close at hand, so that the same work is not done twice.",
    "the moon": "The moon is a ball of rock that moves around the Earth about once a month.",
    "electricity": "Electricity is a kind of energy that comes from moving charges. It powers lamps and machines.",
}

LISTS: dict[str, list[str]] = {
    "fruits": ["apple", "banana", "cherry", "grape", "orange"],
    "colours": ["red", "blue", "green", "yellow", "purple"],
    "animals": ["cat", "dog", "horse", "lion", "bear"],
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter"],
    "vegetables": ["carrot", "potato", "onion", "pea", "cabbage"],
    "metals": ["iron", "copper", "gold", "silver", "tin"],
    "instruments": ["piano", "violin", "guitar", "drum", "flute"],
    "tools": ["hammer", "saw", "drill", "axe", "wrench"],
}

NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]  # fmt: skip
