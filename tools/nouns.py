"""The nouns the shipped model knows, their pictures in each style, and other ways to say them."""

from __future__ import annotations

from dataclasses import dataclass

EMOJI_STYLES = ("noto", "fluent", "flat", "emojione", "twemoji")
"""Styles that share Unicode's names; ``fxemoji`` and ``stamps`` have names of their own."""


@dataclass(frozen=True)
class Pictures:
    """Names of one noun's pictures: shared emoji names, fxemoji names, stamp paths."""

    emoji: tuple[str, ...]
    fxemoji: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    """``style:name`` pairs that look like something else in that style."""

    def names(self, style: str) -> tuple[str, ...]:
        if style in EMOJI_STYLES:
            return tuple(n for n in self.emoji if f"{style}:{n}" not in self.skip)
        return self.fxemoji if style == "fxemoji" else self.stamps


def _row(emoji: str, fxemoji: str = "", stamps: str = "", skip: str = "") -> Pictures:
    return Pictures(*(tuple(part.split()) for part in (emoji, fxemoji, stamps, skip)))


_BIRDS, _FRUIT, _CARS = "animals/birds/", "food/fruit/", "vehicles/auto/"

NOUNS: dict[str, Pictures] = {
    # Animals
    "dog": _row("dog guide-dog service-dog", "dogside", "animals/mammals/dogs/dog"),
    "cat": _row("cat black-cat", "catside", "animals/mammals/cats/kitten.svg"),
    "horse": _row("horse", "", "animals/mammals/equines/horse"),
    "cow": _row("cow ox", "", "animals/mammals/bovines/cow animals/mammals/bovines/cow_white"),
    "pig": _row("pig", "pigside", "animals/mammals/pig animals/mammals/pig_golden2"),
    "sheep": _row("ewe", "sheep", "animals/mammals/bovines/sheep"),
    "rabbit": _row(
        "rabbit",
        "bunnyside",
        "animals/mammals/rabbit_little animals/mammals/rodents/rabbit seasonal/easter/bunny",
    ),
    "elephant": _row("elephant", "elephant", "animals/mammals/elephant"),
    "tiger": _row("tiger", "tigerside", "animals/mammals/cats/tiger"),
    "giraffe": _row("giraffe", "", "animals/mammals/giraffe"),
    "camel": _row(
        "camel two-hump-camel",
        "dromedarycamel bactriancamel",
        "animals/mammals/camel/camel animals/mammals/camel/dromedary",
        "emojione:camel",
    ),
    "penguin": _row("penguin", "penguin", f"{_BIRDS}penguin {_BIRDS}magellanic_penguin"),
    "rooster": _row("rooster", "rooster", f"{_BIRDS}rooster {_BIRDS}chicken_profile"),
    "duck": _row("duck", "", f"{_BIRDS}duck {_BIRDS}drake household/rubberduck", "emojione:duck"),
    "bird": _row(
        "bird blackbird black-bird dove",
        "doveofpeace",
        f"{_BIRDS}blackbird {_BIRDS}pigeon {_BIRDS}seagull {_BIRDS}lark",
    ),
    "owl": _row("owl", "", f"{_BIRDS}owl"),
    "flamingo": _row("flamingo", "", f"{_BIRDS}pink_flamingo"),
    "turtle": _row("turtle", "turtle"),
    "snake": _row("snake", "snake"),
    "fish": _row(
        "fish tropical-fish",
        "fish tropicalfish",
        "animals/fish/clownfish animals/fish/coraltrout animals/fish/butterflyfish "
        "animals/fish/bluegroper animals/fish/stripedfish",
    ),
    "dolphin": _row("dolphin", "dolphin", "animals/mammals/aquatic/dolphin", "emojione:dolphin"),
    "whale": _row("whale spouting-whale", "whale spurtingwhale", "animals/mammals/aquatic/whale"),
    "octopus": _row("octopus", "octopus"),
    "crab": _row("crab"),
    "snail": _row("snail", "snail", "animals/insects/cartoon/snail animals/insects/cartoon/snail2"),
    "butterfly": _row(
        "butterfly",
        "",
        "animals/insects/cartoon/butterfly animals/insects/cartoon/monarchbutterfly.svg "
        "seasonal/easter/butterfly",
    ),
    "bee": _row("honeybee", "honeybee", "animals/insects/bee animals/insects/hornet"),
    "ladybug": _row(
        "lady-beetle",
        "ladybeetle",
        "animals/insects/cartoon/ladybug animals/insects/cartoon/ladybug-2",
    ),
    # Food
    "apple": _row(
        "red-apple green-apple",
        "redapple greenapple",
        f"{_FRUIT}apple_red {_FRUIT}apple_green {_FRUIT}apple_fuji {_FRUIT}cartoon/apple",
    ),
    "banana": _row("banana", "banana", f"{_FRUIT}banana {_FRUIT}cartoon/banana"),
    "grapes": _row("grapes", "grapes", f"{_FRUIT}grapes {_FRUIT}cartoon/grapes"),
    "lemon": _row("lemon", "lemon", f"{_FRUIT}lemon {_FRUIT}cartoon/lemon"),
    "orange": _row("tangerine", "tangerine", f"{_FRUIT}orange {_FRUIT}cartoon/orange"),
    "pear": _row("pear", "pear", f"{_FRUIT}pear {_FRUIT}cartoon/pear"),
    "pineapple": _row("pineapple", "pineapple", f"{_FRUIT}pineapple {_FRUIT}cartoon/pineapple"),
    "strawberry": _row(
        "strawberry",
        "strawberry",
        f"{_FRUIT}strawberry {_FRUIT}Strawberry2 {_FRUIT}cartoon/strawberry",
    ),
    "cherries": _row("cherries", "cherries", f"{_FRUIT}Cherry_Stella {_FRUIT}cartoon/cherries"),
    "watermelon": _row("watermelon", "watermelon", f"{_FRUIT}cartoon/watermelon.svg"),
    "tomato": _row("tomato", "tomato", "food/vegetables/tomato"),
    "carrot": _row("carrot", "", "food/vegetables/carrot"),
    "corn": _row("ear-of-corn", "earofmaize", "food/vegetables/corn"),
    "mushroom": _row(
        "mushroom",
        "mushroom",
        "food/vegetables/mushroom plants/mushrooms/cep plants/toadstool.svg",
    ),
    "eggplant": _row("eggplant", "aubergine", "food/vegetables/eggplant"),
    "bread": _row("bread", "bread", "food/bread.svg food/loaf_of_bread.svg"),
    "pizza": _row("pizza", "sliceofpizza", "food/pizza"),
    "hamburger": _row("hamburger", "hamburger"),
    "cake": _row(
        "birthday-cake shortcake",
        "birthdaycake shortcake",
        "food/dessert/cartoon/birthday_cake food/dessert/cartoon/pink_cake",
    ),
    "donut": _row("doughnut", "doughnut"),
    # Household
    "cup": _row(
        "hot-beverage teacup-without-handle",
        "hotbeverage",
        "household/dishes/coffeecup.svg household/dishes/expresso.svg household/dishes/mug",
    ),
    "key": _row("key old-key", "key oldkey", "household/key", "noto:old-key emojione:old-key"),
    "lock": _row(
        "locked unlocked",
        "lock openlock",
        "household/padlock_closed.svg household/padlock_open.svg",
    ),
    "hammer": _row("hammer", "hammer", "household/tools/hammer household/tools/hammer2.svg"),
    "wrench": _row("wrench", "wrench", "household/tools/wrench household/tools/wrench_adjustable"),
    "scissors": _row("scissors", "blackscissors", "household/arttools/scissors_small_open"),
    "pencil": _row(
        "pencil",
        "lowerleftpencil pencil",
        "household/arttools/Pencil.svg household/arttools/pencil2.svg",
    ),
    "book": _row(
        "closed-book green-book blue-book orange-book", "closedbook greenbook bluebook orangebook"
    ),
    "camera": _row(
        "camera",
        "camera",
        "hobbies/camera_35mm household/electronics/DSLR_Camera.svg "
        "household/electronics/digitalcamera.svg",
    ),
    "phone": _row("mobile-phone", "cellphone", "household/electronics/mobile.svg"),
    "television": _row("television", "television", "household/electronics/monitor.svg"),
    "clock": _row("alarm-clock mantelpiece-clock", "alarmclock"),
    "bulb": _row("light-bulb", "lightbulb", "household/Lightbulb"),
    "candle": _row("candle", "candle"),
    "umbrella": _row("umbrella", "umbrella", "household/umbrella.svg"),
    "gift": _row("wrapped-gift", "present", "seasonal/christmas/present.svg"),
    "balloon": _row("balloon", "balloon", "seasonal/balloon.svg"),
    "trophy": _row("trophy", "trophy", "sports/trophy_cup"),
    "bell": _row("bell", "bell"),
    "guitar": _row(
        "guitar",
        "guitar",
        "hobbies/music/string/guitar_classical hobbies/music/string/guitar_electric "
        "hobbies/music/string/guitar2",
    ),
    "violin": _row("violin", "violin", "hobbies/music/string/violin"),
    "trumpet": _row("trumpet", "trumpet", "hobbies/music/brass/trumpet"),
    "ball": _row(
        "soccer-ball basketball volleyball baseball",
        "soccerball baseball",
        "sports/soccer sports/basketball sports/cartoon/volleyball",
        "emojione:basketball emojione:baseball",
    ),
    # Clothes
    "hat": _row(
        "top-hat womans-hat",
        "tophat",
        "clothes/hats/tophat clothes/hats/blue_fedora clothes/hats/cowboy_hat.svg "
        "clothes/hats/brownhat.svg",
    ),
    "crown": _row("crown", "crown", "clothes/hats/crown2.svg"),
    "shoe": _row("mans-shoe running-shoe", "mensshoe mensrunner", ""),
    "shirt": _row(
        "t-shirt",
        "mansshirt",
        "clothes/t-shirt_01.svg clothes/t_tshirt clothes/t_poloshirt",
    ),
    "dress": _row("dress", "dress", "clothes/black_dress.svg"),
    "glasses": _row("glasses sunglasses", "darksunglasses", skip="emojione:glasses"),
    # Vehicles
    "car": _row(
        "automobile sport-utility-vehicle taxi police-car",
        "automobile taxi policecar",
        f"{_CARS}beetle {_CARS}sedan {_CARS}sportscar.svg {_CARS}sportscar2 {_CARS}sportscar3.svg",
    ),
    "bus": _row(
        "bus trolleybus",
        "bus trolleybus",
        "vehicles/iso_bus.svg vehicles/masstransit/cartoon/schoolbus.svg "
        "vehicles/masstransit/green_korean_bus",
    ),
    "truck": _row(
        "delivery-truck articulated-lorry",
        "deliverytruck articulatedlorry",
        "vehicles/blue_truck.svg vehicles/iso_lorry1.svg vehicles/iso_lorry3.svg "
        "vehicles/toy_truck.svg vehicles/garbagetruck",
    ),
    "tractor": _row("tractor", "tractor", "vehicles/farming/cartoon/tractor.svg"),
    "train": _row(
        "locomotive",
        "steamlocomotive",
        "vehicles/locomotive/cartoon/toy_train vehicles/locomotive/white_train.svg",
    ),
    "airplane": _row(
        "airplane small-airplane",
        "airplane",
        "vehicles/flight/planes/747 vehicles/flight/planes/plane.svg",
    ),
    "helicopter": _row("helicopter", "helicopter", "vehicles/flight/cartoon/eddieCopter"),
    "rocket": _row("rocket", "rocket", "space/rocket1.svg space/rocket2.svg space/rocket3.svg"),
    "boat": _row(
        "sailboat speedboat",
        "",
        "vehicles/ship/sail_boat1.svg vehicles/ship/sail_boat2.svg vehicles/ship/chineseJunk",
        "fluent:speedboat flat:speedboat emojione:speedboat twemoji:speedboat",
    ),
    "bicycle": _row("bicycle", "bicycle", "vehicles/cycle/bluebike.svg"),
    "motorcycle": _row("motorcycle", "", "vehicles/cycle/motorbike.svg", "emojione:motorcycle"),
    # Places and plants
    "house": _row(
        "house",
        "housebuilding",
        "town/houses/cartoon/pinkhome town/houses/cartoon/swisshome "
        "town/houses/cartoon/wooden_cottage",
    ),
    "castle": _row("castle", "europeancastle", "town/houses/cartoon/fairytale_castle"),
    "tent": _row("tent", "", "town/houses/cartoon/tent", "emojione:tent"),
    "tree": _row(
        "deciduous-tree evergreen-tree",
        "deciduoustree evergreen",
        "plants/trees/birch plants/trees/holm_oak seasonal/christmas/tree",
    ),
    "palm": _row("palm-tree", "palmtree", "plants/trees/liberia-palm"),
    "cactus": _row("cactus", "cactus"),
    "flower": _row(
        "rose tulip hibiscus",
        "rose tulip hibiscus",
        "plants/flowers/rose plants/flowers/yellow-flower plants/flowers/daffodil "
        "plants/flowers/flower1 plants/flowers/flower2 plants/flowers/flower5 "
        "plants/flowers/red-gazania plants/flowers/anemone_red",
    ),
    "sunflower": _row("sunflower", "sunflower"),
    "leaf": _row(
        "maple-leaf fallen-leaf",
        "mapleleaf",
        skip="noto:fallen-leaf fluent:fallen-leaf flat:fallen-leaf twemoji:fallen-leaf",
    ),
    # Others
    "star": _row("star", "whitemediumstar", "seasonal/christmas/star"),
    "heart": _row("red-heart", "redheart", "symbols/shapes/heart.svg"),
    "snowman": _row(
        "snowman-without-snow",
        "snowmanwithoutsnow",
        "seasonal/winter/snowman.svg seasonal/winter/snowman2.svg",
    ),
    "robot": _row("robot"),
    "ghost": _row("ghost", "ghost"),
    "pumpkin": _row(
        "jack-o-lantern",
        "jackolantern",
        "seasonal/halloween/jackolantern_mean food/vegetables/pumpkin_small",
    ),
}
"""Noun to pictures, in the order of the dense head's classes."""


def wanted_names(style: str) -> set[str]:
    """Names of a style's pictures that the noun table uses."""
    return {name for pictures in NOUNS.values() for name in pictures.names(style)}


_CORE = """
dog cat horse cow pig rabbit elephant giraffe penguin rooster owl flamingo turtle fish octopus crab
snail butterfly bee ladybug apple banana grapes lemon pear pineapple strawberry cherries watermelon
carrot corn mushroom eggplant pizza hamburger donut key scissors book camera candle umbrella gift
balloon trophy guitar crown shoe car bus tractor helicopter rocket airplane bicycle motorcycle house
tree cactus sunflower star heart snowman pumpkin
"""
CORE: tuple[str, ...] = tuple(_CORE.split())
"""What the shipped checkpoint is trained to find ..."""

CORE_STYLES = ("noto", "fluent", "flat", "fxemoji", "emojione", "stamps")
"""... in these styles: drawings, and photographic cut-outs."""
