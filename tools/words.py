"""Other words for the nouns, and names of pictures that are too like one of them."""

from __future__ import annotations

import re

from nouns import NOUNS

_SAID_OTHERWISE = {
    "dog": "dogs puppy hound",
    "cat": "cats kitten kitty",
    "horse": "horses pony",
    "cow": "cows bull ox cattle",
    "pig": "pigs hog",
    "sheep": "lamb ewe",
    "rabbit": "rabbits bunny hare",
    "elephant": "elephants",
    "tiger": "tigers",
    "giraffe": "giraffes",
    "camel": "camels dromedary",
    "penguin": "penguins",
    "rooster": "roosters chicken cock",
    "duck": "ducks duckling",
    "bird": "birds pigeon dove",
    "owl": "owls",
    "flamingo": "flamingos",
    "turtle": "turtles tortoise",
    "snake": "snakes serpent",
    "fish": "fishes",
    "dolphin": "dolphins",
    "whale": "whales",
    "octopus": "octopuses squid",
    "crab": "crabs",
    "snail": "snails",
    "butterfly": "butterflies",
    "bee": "bees wasp honeybee",
    "ladybug": "ladybugs ladybird beetle",
    "apple": "apples",
    "banana": "bananas",
    "grapes": "grape",
    "lemon": "lemons citrus",
    "orange": "oranges tangerine mandarin",
    "pear": "pears",
    "pineapple": "pineapples",
    "strawberry": "strawberries",
    "cherries": "cherry",
    "watermelon": "watermelons melon",
    "tomato": "tomatoes",
    "carrot": "carrots",
    "corn": "maize corncob",
    "mushroom": "mushrooms toadstool",
    "eggplant": "eggplants aubergine",
    "bread": "loaf toast",
    "pizza": "pizzas",
    "hamburger": "burger hamburgers cheeseburger",
    "cake": "cakes",
    "donut": "donuts doughnut",
    "cup": "cups mug coffee tea",
    "key": "keys",
    "lock": "locks padlock",
    "hammer": "hammers",
    "wrench": "wrenches spanner",
    "scissors": "shears",
    "pencil": "pencils",
    "book": "books",
    "camera": "cameras",
    "phone": "phones smartphone cellphone",
    "television": "tv televisions monitor screen",
    "clock": "clocks alarm",
    "bulb": "bulbs lightbulb lamp light",
    "candle": "candles",
    "umbrella": "umbrellas parasol",
    "gift": "gifts present presents",
    "balloon": "balloons",
    "trophy": "trophies",
    "bell": "bells",
    "guitar": "guitars",
    "violin": "violins fiddle",
    "trumpet": "trumpets",
    "ball": "balls football basketball",
    "hat": "hats",
    "crown": "crowns",
    "shoe": "shoes sneaker",
    "shirt": "shirts tshirt",
    "dress": "dresses gown",
    "glasses": "sunglasses spectacles eyeglasses",
    "car": "cars automobile taxi",
    "bus": "buses",
    "truck": "trucks lorry",
    "tractor": "tractors",
    "train": "trains locomotive",
    "airplane": "airplanes plane aeroplane jet aircraft",
    "helicopter": "helicopters chopper",
    "rocket": "rockets spaceship",
    "boat": "boats sailboat ship",
    "bicycle": "bicycles bike",
    "motorcycle": "motorcycles motorbike",
    "house": "houses home cottage",
    "castle": "castles fortress",
    "tent": "tents",
    "tree": "trees",
    "palm": "palms",
    "cactus": "cacti cactuses",
    "flower": "flowers rose tulip blossom",
    "sunflower": "sunflowers",
    "leaf": "leaves",
    "star": "stars",
    "heart": "hearts",
    "snowman": "snowmen",
    "robot": "robots",
    "ghost": "ghosts",
    "pumpkin": "pumpkins",
}

SYNONYMS: dict[str, tuple[str, ...]] = {
    noun: tuple(words.split()) for noun, words in _SAID_OTHERWISE.items()
}
"""Noun to other words for it: synonyms and plurals, each of one word."""


_RELATED = (
    "telephone landline pisces pinata piata poodle wolf fox dingo leopard panther lion cheetah "
    "lynx jaguar zebra donkey mule unicorn moose deer bison buffalo yak zebu bull blackbuck gnu "
    "goat ram boar llama mammoth hippo hamster chick hen turkey swan goose parrot peacock peahen "
    "eagle crow crane heron pelican vulture ostrich magpie toucan tucan gull cuckoo quetzal "
    "rosella lorikeet swallow fowl drake gander dodo phoenix feather nandou rhea lark lizard "
    "dragon shark blowfish wrasse fishing orca seal squid lobster shrimp shell slug fly bug moth "
    "beetle hornet wasp kiwi lime mandarin melon prune cherimoya apricot peach mango pomegranate "
    "tamarillo blueberr raspberr bagel croissant baguette pretzel sandwich hotdog pancake cupcake "
    "pie cookie bagle tart pudding beverage mug glass coffee tea teapot sake beer tools tool pick "
    "pen crayon brush notebook ledger notepad video movie photo screen desktop computer laptop "
    "monitor mobile receiver pager watch hourglass lantern lamp flashlight torch diya package "
    "parcel bouquet medal vibration musical banjo harp cello bass horn saxophone fiddle baseball "
    "softball rugby football tennis volleyball basketball bowling billiard cricket sports helmet "
    "cap fedora sombrero boot sandal heel slipper skate sneaker shorts kimono coat jacket sari "
    "gown bikini goggles vest automobile police taxi van minibus suv vehicle auto ambulance "
    "engine lorry railway rail metro tram monorail locomotive carriage boxcar caboose tender "
    "tanker tug canoe ferry ship boat yacht raft scooter tricycle cycle jet satellite spaceship "
    "shuttle building office hotel school hospital bank store church mosque temple shrine "
    "synagogue home hut tower fortress inn tavern cottage farm stable jail circus camping tepee "
    "tipi island park desert city sunrise sunset plant herb seedling flower blossom hibiscus "
    "lotus anemone daffodil iris gazania petunia marigold hyacinth adeenia anthoorium holly "
    "bolsom chemparathi shamrock clover leafy lettuce wood tanabata pine sparkl sun moon dizzy "
    "shooting love alien invader monster skull gourd squash turnip potato onion radish pepper "
    "chil beet yam avocado broccoli bento loudspeaker megaphone mailbox postbox card heartbeat "
    "anatomical spade club drum toy teddy fungi blacksmith university warehouse windmill hunter "
    "cathedral igloo townhall monastery well fishery docks shipwreck ruins lighthouse gate mine "
    "obelisk statue totem pyramid tux pengwin cub baby spider worm bunny hare mandrill rat "
    "squirrel chipmunk beaver badger skunk otter raccoon marmot capybara ferret weasel wombat "
    "koala possum hedgehog echidna sloth bear panda kangaroo monkey gorilla chimp orangutan "
    "tamarin rhino walrus crocodile alligator dinosaur sauropod t-rex trex wheel tyre truck "
    "bulldozer forklift dumper cement race racing f1 indy bradley stryker mustang raptor plane "
    "wright stars medical coin"
)

LOOKALIKES = re.compile(
    "|".join(
        [rf"(?<![a-z]){word}(?![a-z])" for word in _RELATED.split()]
        + [rf"(?<![a-z]){w}s?(?![a-z])" for n in NOUNS for w in (n, *SYNONYMS.get(n, ()))]
        # Sets without hyphens in their names: longer words count anywhere.
        + [word for word in _RELATED.split() if len(word) > 3]
        + [w for n in NOUNS for w in (n, *SYNONYMS.get(n, ())) if len(w) > 3]
    )
)
"""Names of pictures that show a noun of the table, part of one, or something too like one."""


KINDS: dict[str, tuple[str, ...]] = {
    "rooster": ("bird",),
    "duck": ("bird",),
    "owl": ("bird",),
    "flamingo": ("bird",),
    "penguin": ("bird",),
    "sunflower": ("flower",),
    "palm": ("tree",),
}
"""Noun to nouns that are not to be called absent where it is seen: a duck is a bird too."""


def vocabulary_words() -> list[str]:
    """Every noun and synonym once, nouns first, in a fixed order."""
    words = dict.fromkeys(NOUNS)
    for others in SYNONYMS.values():
        words.update(dict.fromkeys(others))
    return list(words)
