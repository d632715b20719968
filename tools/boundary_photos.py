"""Photographs under licences that let weights trained on them be shipped.

From Debian's packages of wallpapers, puzzles and lessons, and from inside scikit-image; no account,
no hub.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from assets import CACHE, _debian_folder
from rcc import stored_files

SHORT_SIDE = 560
"""Shorter side of a stored photograph, px."""
SMALLEST, SMALLEST_WITH_OUTLINES = 300, 180
"""Least shorter side of a photograph to be enlarged to that, px; for objects outlined by hand."""


@dataclass(frozen=True)
class Photographs:
    """Those of a Debian package whose path below ``/usr/share/<below>`` begins with a name."""

    package: str
    below: str
    licence: str
    names: str


DEBIAN = (
    Photographs(
        "mate-backgrounds",
        "backgrounds/mate/nature",
        "GPL-2+",
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood "
        "YellowFlower",
    ),
    Photographs(
        "lomiri-wallpapers-16.04",
        "backgrounds",
        "CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0, file by file",
        "Bridge_by Dragonfly_by Picture_0B Picture_1A Wine_by aitzgorri_by analogpattern free_by "
        "friends_by greentock_by life_by picosdeeuropa_by seeding_by sunset_by",
    ),
    Photographs("lomiri-wallpapers-20.04", "backgrounds", "CC-BY-SA-3.0", "Kleiber_by"),
    Photographs(
        "plasma-workspace-wallpapers",
        "wallpapers",
        "LGPL-3, in the package's copyright file GPL-2+",
        "Autumn/ BytheWater/ ColdRipple/ ColorfulCups/ DarkestHour/ EveningGlow/ FallenLeaf/ Grey/ "
        "Kite/ OneStandsOut/ Path/",
    ),
    Photographs(
        "palapeli-data",
        "palapeli/collection",
        "public domain and GFDL, file by file",
        "castle- cincinnati- citrus- european- panther-",
    ),
)


@dataclass(frozen=True)
class Lessons:
    """Those in ``/usr/share/gcompris-qt/rcc/<name>.rcc`` of Debian's ``gcompris-qt-data``."""

    name: str
    licence: str


GCOMPRIS = (
    Lessons("erase", "GPL-3+, the package's own: its copyright file has no entry for these"),
    Lessons("explore_farm_animals", "GPL-3+, CC-BY-SA-4.0"),
    Lessons("explore_monuments", "public domain, CC-BY-SA-4.0; the package's GPL-3+"),
    Lessons("explore_world_animals", "CC-BY-SA-2.0 to -4.0, GFDL-1.2 and others, file by file"),
    Lessons("explore_world_music", "GPL-3+, the package's own"),
)
LESSONS = ("gcompris-qt-data", "gcompris-qt/rcc")
"""Their package, and where it is below ``/usr/share``."""
SMALL_GCOMPRIS = (
    Lessons("categorization", "CC-BY-SA, CC-BY, CC0 and public domain, file by file"),
)
"""Of about 320 x 214 px, for outlined objects alone."""
SCIKIT_IMAGE = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "rocket")
"""Public domain or CC0, in ``skimage/data``."""


def _files() -> list[Path]:
    files: list[Path] = []
    for source in DEBIAN:
        root = _debian_folder(source.package, source.below)
        if root is None:
            continue
        names = tuple(source.names.split())
        for path in sorted(root.rglob("*.jpg")) + sorted(root.rglob("*.png")):
            below = path.relative_to(root).as_posix()
            if below.startswith(names) and "screenshot" not in below and "vertical" not in below:
                files.append(path)
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return files + [path for name in SCIKIT_IMAGE for path in sorted(folder.glob(f"{name}.*"))]


def _lessons(sources: tuple[Lessons, ...]) -> Iterator[tuple[str, bytes]]:
    """Subject and file of every picture in them."""
    root = _debian_folder(*LESSONS)
    for lessons in sources if root else ():
        for name, picture in sorted(stored_files(root / f"{lessons.name}.rcc")):
            if name.endswith(".webp"):
                yield f"{lessons.name}/{Path(name).stem}", picture


def _pictures() -> Iterator[tuple[str, bytes]]:
    """Subject and file of every picture; a wallpaper comes in several sizes."""
    for path in _files():
        yield path.parts[-4] if "contents" in path.parts else path.stem, path.read_bytes()
    yield from _lessons(GCOMPRIS)


def _fetched(sources: tuple[Photographs | Lessons, ...]) -> bool:
    """Whether the packages of these are there."""
    folders = {(s.package, s.below) for s in sources if isinstance(s, Photographs)}
    if len(folders) < len(sources):
        folders.add(LESSONS)
    return all(_debian_folder(*folder) is not None for folder in folders)


def _stored(
    name: str,
    pictures: Callable[[], Iterator[tuple[str, bytes]]],
    smallest: int,
    rules: object,
    sources: tuple[Photographs | Lessons, ...],
) -> dict[str, np.ndarray]:
    key = zlib.crc32(repr((rules, smallest, SHORT_SIDE)).encode())
    file = CACHE / f"{name}-{key:08x}.npz"
    if not file.exists():
        images: dict[str, np.ndarray] = {}
        for subject, picture in pictures():
            if subject in images:
                continue
            read = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
            if read is None or min(read.shape[:2]) < smallest:
                continue
            scale = SHORT_SIDE / min(read.shape[:2])
            size = (round(read.shape[1] * scale), round(read.shape[0] * scale))
            kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            resized = cv2.resize(read, size, interpolation=kind)
            images[subject] = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)
        if not _fetched(sources):  # what is kept would hide what comes later
            return images
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, **images)
        partial.replace(file)
    with np.load(file) as stored:
        return {subject: stored[subject] for subject in stored.files}


@lru_cache(maxsize=1)
def photographs() -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] RGB by subject, shorter side ``SHORT_SIDE`` px; kept in the cache."""
    rules = (DEBIAN, GCOMPRIS, SCIKIT_IMAGE)
    return _stored("photographs", _pictures, SMALLEST, rules, (*DEBIAN, *GCOMPRIS))


def small_photographs() -> dict[str, np.ndarray]:
    """Like :func:`photographs`, of those that come too small to be among them."""
    return _stored(
        "small-photographs",
        lambda: _lessons(SMALL_GCOMPRIS),
        SMALLEST_WITH_OUTLINES,
        SMALL_GCOMPRIS,
        SMALL_GCOMPRIS,
    )
