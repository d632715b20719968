"""Pictures with alpha and a name: icon sets from npm, photographic stamps from Debian.

Nothing of them is kept in the repository; they are rasterised once into a cache folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skia
from nouns import ICONS, NOUNS, STAMP_WORDS

CACHE = Path(os.environ.get("NANO_ASSETS", ".cache/nano-assets"))
SIDE = 160
"""Longer side of a cached sprite, pixels."""
ICON_SETS = {
    "noto": ("1.2.9", "Apache-2.0"),
    "fluent-emoji": ("1.2.7", "MIT"),
    "fluent-emoji-flat": ("1.2.6", "MIT"),
    "fxemoji": ("1.2.2", "Apache-2.0"),
    "emojione": ("1.2.3", "CC-BY-4.0"),
    "twemoji": ("1.2.5", "CC-BY-4.0"),
}
"""npm package ``@iconify-json/<set>``: pinned version, licence of the artwork."""
HELD_OUT_STYLE = "twemoji"
NOT_SHOWN = {"trophy", "coral_tree", "propeller_beanie"}
"""Stamps whose title has a noun that the picture does not show."""
STAMPS = Path("/usr/share/tuxpaint/stamps")


@dataclass
class Sprite:
    """One picture: ``rgba`` uint8 [h, w, 4] (straight alpha), its noun or None, its source."""

    rgba: np.ndarray
    noun: str | None
    style: str
    name: str


def rasterise(body: str, width: float, height: float) -> np.ndarray | None:
    """SVG body -> RGBA uint8 cropped to its alpha, or None when it is empty."""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" '
        f'width="{SIDE}" height="{SIDE}">{body}</svg>'
    )
    dom = skia.SVGDOM.MakeFromStream(skia.MemoryStream(svg.encode()))
    if dom is None:
        return None
    dom.setContainerSize(skia.Size(SIDE, SIDE))
    surface = skia.Surface(SIDE, SIDE)
    with surface as canvas:
        canvas.clear(skia.ColorTRANSPARENT)
        dom.render(canvas)
    image = surface.makeImageSnapshot().toarray(colorType=skia.kRGBA_8888_ColorType)
    return crop(image)


def crop(rgba: np.ndarray) -> np.ndarray | None:
    rows, columns = np.nonzero(rgba[..., 3] > 12)
    if len(rows) < 200:
        return None
    cut = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = SIDE / max(cut.shape[:2])
    if scale < 1:
        premultiplied = cut.astype(np.float32)
        premultiplied[..., :3] *= premultiplied[..., 3:] / 255
        small = cv2.resize(premultiplied, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        small[..., :3] *= 255 / np.maximum(small[..., 3:], 1)
        cut = np.clip(small, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(cut)


def _install_icons() -> Path:
    folder = CACHE / "npm"
    missing = [s for s in ICON_SETS if not (folder / "node_modules/@iconify-json" / s).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        packages = [f"@iconify-json/{s}@{ICON_SETS[s][0]}" for s in missing]
        subprocess.run(["npm", "install", "--silent", *packages], cwd=folder, check=True)
    return folder / "node_modules/@iconify-json"


def _icon_sprites(style: str, folder: Path) -> list[Sprite]:
    icons = json.loads((folder / style / "icons.json").read_text())
    bodies = icons["icons"]
    noun_of = {icon: noun for noun, names in ICONS.items() for icon in names}
    rng = np.random.default_rng(5)
    skip = re.compile(
        "flag|skin|clock|thirty|face|hand|button|square|circle|arrow|man|person|heart|"
        "keycap|kiss|family|people|letter|japanese|fist|finger|couple|input|sign"
    )
    others = sorted(n for n in bodies if n not in noun_of and not skip.search(n))
    # Distractors must not show a noun of the table under another name.
    words = set(NOUNS)
    others = [n for n in others if not words & set(n.split("-"))]
    chosen = list(noun_of) + list(rng.choice(others, min(160, len(others)), replace=False))
    sprites = []
    for name in chosen:
        target = name
        if name not in bodies:
            alias = icons.get("aliases", {}).get(name)
            if alias is None:
                continue
            target = alias["parent"]
        icon = bodies[target]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        rgba = rasterise(icon["body"], width, height)
        if rgba is not None:
            sprites.append(Sprite(rgba, noun_of.get(name), style, name))
    return sprites


def _stamp_sprites() -> list[Sprite]:
    sprites = []
    for file in sorted(STAMPS.rglob("*.png")):
        text = file.with_suffix(".txt")
        if "symbols" in file.parts or "cartoon" in file.parts or not text.exists():
            continue
        title = text.read_text(errors="replace").splitlines()[0].lower().strip().rstrip(".!")
        rgba = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        if rgba is None or rgba.ndim != 3 or rgba.shape[2] != 4:
            continue
        rgba = crop(cv2.cvtColor(rgba, cv2.COLOR_BGRA2RGBA))
        if rgba is None:
            continue
        found = [
            noun
            for noun, words in STAMP_WORDS.items()
            if any(re.search(rf"\b{word}(e?s)?$", title) for word in words)
        ]
        # "palm tree" is a palm, "rose flower" a rose: general words give way.
        found.sort(key=lambda noun: noun in ("tree", "flower", "bird", "fish", "hat", "ball"))
        noun = found[0] if found and file.stem not in NOT_SHOWN else None
        sprites.append(Sprite(rgba, noun, "stamps", file.stem))
    return sprites


def load_sprites() -> list[Sprite]:
    """Every sprite of every style, from the cache when it is there."""
    packed = CACHE / "sprites.npz"
    if not packed.exists():
        folder = _install_icons()
        sprites = [s for style in ICON_SETS for s in _icon_sprites(style, folder)]
        sprites += _stamp_sprites()
        labels = [[s.noun, s.style, s.name] for s in sprites]
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            packed, labels=json.dumps(labels), **{f"s{i}": s.rgba for i, s in enumerate(sprites)}
        )
    with np.load(packed) as saved:
        labels = json.loads(str(saved["labels"]))
        return [Sprite(saved[f"s{i}"], *row) for i, row in enumerate(labels)]
