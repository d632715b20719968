"""The nouns of the shipped model: which pictures show them, and other words for them."""

from __future__ import annotations

# noun -> icon names (any that a set lacks is skipped), other words, words of photographic stamps.
_TABLE: dict[str, tuple[str, str, str]] = {
    "dog": ("dog guide-dog service-dog", "puppy,hound", "dog"),
    "cat": ("cat black-cat", "kitten,kitty", "cat,kitten"),
    "horse": ("horse", "pony,stallion", "horse"),
    "cow": ("cow ox", "cattle", "cow"),
    "pig": ("pig", "hog", "pig"),
    "sheep": ("ewe", "lamb", "sheep,ram"),
    "rabbit": ("rabbit", "bunny,hare", "rabbit"),
    "elephant": ("elephant", "", "elephant"),
    "giraffe": ("giraffe", "", "giraffe"),
    "zebra": ("zebra", "", "zebra"),
    "tiger": ("tiger", "", "tiger"),
    "camel": ("camel two-hump-camel", "", "camel"),
    "monkey": ("monkey", "ape", "monkey"),
    "mouse": ("mouse rat", "rat", "mouse,rat"),
    "turtle": ("turtle", "tortoise", "turtle,tortoise"),
    "snake": ("snake", "serpent", "snake"),
    "crocodile": ("crocodile", "alligator", "crocodile,alligator"),
    "whale": ("whale spouting-whale", "", "whale"),
    "dolphin": ("dolphin", "", "dolphin"),
    "fish": ("fish tropical-fish", "goldfish", "fish"),
    "octopus": ("octopus", "", "octopus"),
    "crab": ("crab", "", "crab"),
    "snail": ("snail", "", "snail"),
    "butterfly": ("butterfly", "", "butterfly"),
    "bee": ("honeybee", "honeybee,wasp", "bee"),
    "ladybug": ("lady-beetle", "ladybird,beetle", "ladybug,lady bug,ladybird"),
    "bird": ("bird dove", "pigeon", "bird"),
    "duck": ("duck", "", "duck"),
    "penguin": ("penguin", "", "penguin"),
    "owl": ("owl", "", "owl"),
    "chicken": ("rooster", "rooster,hen", "rooster,chicken,hen"),
    "tree": ("deciduous-tree evergreen-tree", "", "tree"),
    "palm": ("palm-tree", "palm tree", "palm"),
    "cactus": ("cactus", "cacti", "cactus"),
    "flower": ("hibiscus blossom cherry-blossom sunflower", "blossom", "flower"),
    "rose": ("rose", "", "rose"),
    "tulip": ("tulip", "", "tulip"),
    "mushroom": ("mushroom", "fungus", "mushroom"),
    "leaf": ("maple-leaf fallen-leaf", "leaves", "leaf"),
    "apple": ("red-apple green-apple", "", "apple"),
    "pear": ("pear", "", "pear"),
    "orange": ("tangerine", "tangerine,mandarin", "orange,mandarin"),
    "lemon": ("lemon", "citron", "lemon"),
    "banana": ("banana", "", "banana"),
    "grapes": ("grapes", "grape", "grapes"),
    "strawberry": ("strawberry", "strawberries", "strawberry"),
    "cherry": ("cherries", "cherries", "cherry"),
    "pineapple": ("pineapple", "", "pineapple"),
    "carrot": ("carrot", "", "carrot"),
    "tomato": ("tomato", "tomatoes", "tomato"),
    "corn": ("ear-of-corn", "maize", "corn"),
    "bread": ("bread baguette-bread", "loaf,baguette", "bread"),
    "pizza": ("pizza", "", "pizza"),
    "hamburger": ("hamburger", "burger", "hamburger"),
    "cake": ("birthday-cake shortcake", "", "cake"),
    "ice cream": ("ice-cream soft-ice-cream", "icecream,sundae", "ice cream"),
    "cup": ("hot-beverage", "mug,coffee", "cup,mug"),
    "car": ("automobile sport-utility-vehicle", "automobile,auto", "car"),
    "bus": ("bus", "coach", "bus"),
    "truck": ("delivery-truck", "lorry", "truck"),
    "bicycle": ("bicycle", "bike,cycle", "bicycle"),
    "airplane": ("airplane small-airplane", "plane,aeroplane", "airplane,jet"),
    "helicopter": ("helicopter", "chopper", "helicopter"),
    "boat": ("sailboat", "sailboat,yacht", "boat,sailboat"),
    "rocket": ("rocket", "spaceship", "rocket,shuttle"),
    "house": ("house house-with-garden", "home,cottage", "house"),
    "key": ("key old-key", "", "key"),
    "hammer": ("hammer", "", "hammer"),
    "scissors": ("scissors", "shears", "scissors"),
    "umbrella": ("umbrella", "parasol", "umbrella"),
    "guitar": ("guitar", "", "guitar"),
    "book": ("closed-book green-book blue-book orange-book", "", "book"),
    "chair": ("chair", "seat", "chair"),
    "bell": ("bell", "", "bell"),
    "balloon": ("balloon", "", "balloon"),
    "ball": ("soccer-ball basketball volleyball", "football,basketball", "ball"),
    "clock": ("alarm-clock", "alarm clock", "clock"),
    "hat": ("top-hat", "", "hat"),
    "shoe": ("running-shoe mans-shoe", "sneaker,trainer", "shoe"),
    "star": ("star glowing-star", "", ""),
}

NOUNS: tuple[str, ...] = tuple(_TABLE)


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


_IRREGULAR = {
    "mouse": "mice",
    "sheep": "sheep",
    "fish": "fishes",
    "leaf": "leaves",
    "grapes": "grapes",
    "scissors": "scissors",
    "cactus": "cactuses",
    "corn": "corn",
    "bread": "breads",
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    noun: tuple(
        dict.fromkeys([*(w for w in words.split(",") if w), _IRREGULAR.get(noun, _plural(noun))])
    )
    for noun, (_, words, _) in _TABLE.items()
}
"""Other words, plurals included, that a person would type for a noun."""

ICONS: dict[str, tuple[str, ...]] = {noun: tuple(row[0].split()) for noun, row in _TABLE.items()}
STAMP_WORDS: dict[str, tuple[str, ...]] = {
    noun: tuple(w for w in row[2].split(",") if w) for noun, row in _TABLE.items()
}


def vocabulary_words() -> list[str]:
    """Every noun, synonym and plural, nouns first: the whole-word pieces of the tokenizer."""
    words = dict.fromkeys(NOUNS)
    for others in SYNONYMS.values():
        words.update(dict.fromkeys(others))
    return list(words)
