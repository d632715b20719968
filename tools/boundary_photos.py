"""Photographs under licences that let weights trained on them be shipped.

From Debian's wallpaper packages and from inside scikit-image; no account, no hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from assets import CACHE, _debian_folder

SHORT_SIDE = 560
"""Shorter side of a stored photograph, px."""


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
)
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


@lru_cache(maxsize=1)
def photographs() -> list[np.ndarray]:
    """uint8 [H, W, 3] RGB, shorter side ``SHORT_SIDE`` px; read once, kept in the cache."""
    file = CACHE / f"photographs-{SHORT_SIDE}.npz"
    if not file.exists():
        images, seen = [], set()
        for path in _files():
            # A wallpaper comes in several sizes.
            subject = path.parts[-4] if "contents" in path.parts else path.stem
            read = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if subject in seen or read is None or min(read.shape[:2]) < 300:
                continue
            seen.add(subject)
            scale = SHORT_SIDE / min(read.shape[:2])
            size = (round(read.shape[1] * scale), round(read.shape[0] * scale))
            kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            resized = cv2.resize(read, size, interpolation=kind)
            images.append(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB))
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, *images)
        partial.replace(file)
    with np.load(file) as stored:
        return [stored[name] for name in stored.files]
