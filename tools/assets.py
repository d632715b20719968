"""Pictures with alpha and a name, for generated scenes: emoji sets from npm, stamps from Debian.

Each source is downloaded or located once, rasterised once and kept as a *pack* in a cache folder
(``.cache/nano-assets``, or ``$NANO_ASSETS``): a flat array of premultiplied RGBA pixels that any
number of processes map into memory, and a JSON index beside it.

    python tools/assets.py            # build what is missing, print the licences
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import resvg

CACHE = Path(
    os.environ.get("NANO_ASSETS", Path(__file__).resolve().parents[1] / ".cache" / "nano-assets")
)
SIDE = 256
"""Longer side of a stored sprite, px."""
LEVELS = 5
"""Sizes stored of each sprite, each half the one before: 256, 128, 64, 32, 16 px."""


@dataclass(frozen=True)
class Source:
    """Where the pictures of one style come from and under which terms."""

    package: str
    """npm package (with ``version``) or Debian package (without)."""
    version: str
    licence: str
    author: str
    redistributable: bool
    """A rendered scene may be shipped with attribution alone."""


SOURCES: dict[str, Source] = {
    "noto": Source("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc", True),
    "fluent": Source("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation", True),
    "flat": Source(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation", True
    ),
    # The package says Apache-2.0, which upstream gives its code; the drawings are CC-BY-4.0.
    "fxemoji": Source("@iconify-json/fxemoji", "1.2.2", "CC-BY-4.0", "Mozilla", True),
    "emojione": Source("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One", True),
    "twemoji": Source("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter", True),
    # A collection: mostly GPL-2+ and public domain, file by file in the package's copyright file.
    "stamps": Source(
        "tuxpaint-stamps-default", "", "GPL-2+ and others", "Tux Paint contributors", False
    ),
}
"""Styles, in a fixed order. ``twemoji`` is never trained on."""

BACKGROUND_PACKAGES = {
    "mate-backgrounds": "GPL-2+ and CC-BY-SA, file by file",
    "gnome-backgrounds": "CC-BY-SA-3.0",
}
SKIPPED_BACKGROUNDS = (
    *("LadyBird", "FreshFlower", "YellowFlower", "TwoWings", "Garden"),
    *("Elephants_", "symbolic", "Waves", "Spring", "Transparent", "Flow", "Stripes", "Gulp"),
)
"""Photos of things that have a noun, larger copies of others, and drawings that are see-through."""

UNNAMED = re.compile(
    r"flag|skin-tone|tone[1-5]|person|people|\bman\b|woman|\bmen\b|women|boy|girl|hand|face|clock"
    r"|family|button|-(dark|light|medium)|couple|letter|arrow|square|sign$|kiss|moon|keycap|region"
    r"|digit|japanese|ideograph|smil|frown|grin|eyes|mouth|cat-with|cry|circle|diamond|thirty|note"
    r"|finger|heartttip|^(up|down|left|right)|alphabets|symbols/|asl|mirror$|roadsigns|confetti"
    r"|document|page|overlap|caution|cartoon/tux|^[0-9]+$|bearing|guy|wry|sick|tired|angry"
)
"""Icons that are neither an object of the noun table nor fit for clutter."""


def _unpack_npm(source: Source) -> dict:
    """icons.json of an npm icon package, downloaded once."""
    folder = CACHE / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    flat = source.package.lstrip("@").replace("/", "-")
    archive = folder / f"{flat}-{source.version}.tgz"
    if not archive.exists():
        subprocess.run(
            ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        return json.load(io.TextIOWrapper(member, "utf-8"))


def _debian_folder(package: str, below: str) -> Path | None:
    """The folder ``/usr/share/<below>`` of a Debian package, installed or unpacked in the cache."""
    installed = Path("/usr/share") / below
    if installed.exists():
        return installed
    root = CACHE / "debian" / package
    if not (root / "usr/share" / below).exists():
        root.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "-qq", package], cwd=root, check=True)
            for archive in root.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=root, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"without {package}: {error}", file=sys.stderr)
            return None
    return root / "usr/share" / below


def render_svg(svg: str) -> np.ndarray | None:
    """uint8 [H, W, 4] RGBA (straight alpha) at the size the document gives; None when broken."""
    try:
        tree = resvg.usvg.Tree.from_str(svg, resvg.usvg.Options.default())
        # The wheel takes affine maps row by row: x' = a·x + b·y + c, then y'.
        png = resvg.render(tree, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    except BaseException as error:
        # A panic of the Rust code is no subclass of Exception.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.shape[2] != 4:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)


def premultiplied(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] with straight alpha to premultiplied."""
    alpha = image[..., 3:].astype(np.uint16)
    return np.dstack([(image[..., :3] * alpha + 127) // 255, alpha]).astype(np.uint8)


def alpha_box(image: np.ndarray) -> tuple[int, int, int, int] | None:
    """(x0, y0, x1, y1) px of what is not transparent."""
    solid = image[..., 3] > 16
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _draw(icon: dict, per_unit: float) -> np.ndarray | None:
    """The whole icon with ``per_unit`` px for each of its own units; straight alpha."""
    width, height = round(icon["width"] * per_unit), round(icon["height"] * per_unit)
    view = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    return render_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def _draw_box(icon: dict, box: tuple[float, float, float, float], side: int) -> np.ndarray | None:
    """Box (x0, y0, x1, y1, shares of the icon's sides) drawn ``side`` px long, premultiplied.

    The whole icon is drawn and then cut: a viewBox that cuts would clip filters wrongly.
    """
    x0, y0, x1, y1 = box
    longer = max((x1 - x0) * icon["width"], (y1 - y0) * icon["height"])
    image = _draw(icon, side / longer)
    if image is None:
        return None
    h, w = image.shape[:2]
    left, top = max(0, round(x0 * w)), max(0, round(y0 * h))
    return premultiplied(image[top : round(y1 * h), left : round(x1 * w)])


def _fit(w: float, h: float, side: int) -> tuple[int, int]:
    """Pixel size of a w × h picture whose longer side becomes ``side``."""
    scale = side / max(w, h)
    return max(1, round(w * scale)), max(1, round(h * scale))


Entry = tuple[str, np.ndarray, tuple[float, float, float, float]]
"""Name, premultiplied pixels at ``SIDE``, and the box cut out, in shares of the picture."""


def _icons(style: str) -> dict[str, dict]:
    """Name to icon (body, left, top, width, height) of an npm set, aliases included."""
    data = _unpack_npm(SOURCES[style])
    icons: dict[str, dict] = {}
    shared = {"width": data.get("width", 16), "height": data.get("height", 16)}
    for name, icon in data["icons"].items():
        icons[name] = {"left": 0, "top": 0, **shared, **icon}
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in icons and not ({"rotate", "hFlip", "vFlip"} & set(alias)):
            icons.setdefault(name, icons[alias["parent"]])
    return icons


def _icon_entries(style: str, wanted: set[str]) -> Iterator[Entry]:
    for name, icon in _icons(style).items():
        if name not in wanted and UNNAMED.search(name):
            continue
        image = _draw(icon, SIDE / max(icon["width"], icon["height"]))
        box = alpha_box(image) if image is not None else None
        if image is None or box is None or min(box[2] - box[0], box[3] - box[1]) < 6:
            continue
        h, w = image.shape[:2]
        shares = (box[0] / w, box[1] / h, box[2] / w, box[3] / h)
        cut = _draw_box(icon, shares, SIDE)
        if cut is not None:
            yield name, cut, shares


def _stamp_entries(root: Path, wanted: set[str]) -> Iterator[Entry]:
    names = sorted({str(p.relative_to(root))[:-4] for p in root.rglob("*.png")}) + sorted(
        {str(p.relative_to(root)) for p in root.rglob("*.svg")}
    )
    for name in names:
        if name not in wanted and UNNAMED.search(name):
            continue
        path = root / name if name.endswith(".svg") else root / f"{name}.png"
        if name.endswith(".svg"):
            # Many drawings ship as PNG too: the PNG of the same name is the same picture.
            if path.with_suffix(".png").exists():
                continue
            image = render_svg(path.read_text("utf-8", errors="replace"))
        else:
            read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if read is None or read.ndim != 3 or read.shape[2] != 4:
                continue
            image = cv2.cvtColor(read, cv2.COLOR_BGRA2RGBA)
        box = alpha_box(image) if image is not None else None
        if image is None or box is None:
            continue
        x0, y0, x1, y1 = box
        cut = premultiplied(image[y0:y1, x0:x1])
        if min(cut.shape[:2]) < 12 or max(cut.shape[:2]) < (40 if name in wanted else 60):
            continue
        size = _fit(x1 - x0, y1 - y0, SIDE)
        kind = cv2.INTER_AREA if max(cut.shape[:2]) > SIDE else cv2.INTER_CUBIC
        cut = cv2.resize(cut, size, interpolation=kind)
        cut[..., :3] = np.minimum(cut[..., :3], cut[..., 3:])
        h, w = image.shape[:2]
        yield name, cut, (x0 / w, y0 / h, x1 / w, y1 / h)


def _write_pack(style: str, wanted: set[str]) -> bool:
    """Whether there is a pack now: without its Debian package there is none, until that comes."""
    if style == "stamps":
        root = _debian_folder(SOURCES[style].package, "tuxpaint/stamps")
        if root is None:
            return False
        entries = list(_stamp_entries(root, wanted))
    else:
        entries = list(_icon_entries(style, wanted))
    pixels: list[np.ndarray] = []
    index: list[dict] = []
    start = 0
    for name, image, box in entries:
        sizes, starts = [], []
        for level in range(LEVELS):
            if level:
                h, w = image.shape[:2]
                half = (max(1, (w + 1) // 2), max(1, (h + 1) // 2))
                image = cv2.resize(image, half, interpolation=cv2.INTER_AREA)
            pixels.append(image.reshape(-1, 4))
            sizes.append(image.shape[:2])
            starts.append(start)
            start += len(pixels[-1])
        index.append({"name": name, "sizes": sizes, "starts": starts, "box": box})
    flat = np.concatenate(pixels) if pixels else np.zeros((0, 4), np.uint8)
    partial = CACHE / f"{style}.partial.npy"
    np.save(partial, flat)
    partial.replace(CACHE / f"{style}.npy")
    (CACHE / f"{style}.json").write_text(
        json.dumps({"key": _pack_key(style, wanted), "sprites": index})
    )
    return True


def _pack_key(style: str, wanted: set[str]) -> int:
    """Changes when the pack has to be built again."""
    parts = [SOURCES[style].version, UNNAMED.pattern, str(SIDE), str(LEVELS), *sorted(wanted)]
    return zlib.crc32("\n".join(parts).encode())


class Pack:
    """The sprites of one style, mapped from the cache."""

    def __init__(self, style: str, wanted: set[str]) -> None:
        self.style = style
        self.pixels = np.zeros((0, 4), np.uint8)
        self.sprites: list[dict] = []
        self.number: dict[str, int] = {}
        index_file = CACHE / f"{style}.json"
        index = json.loads(index_file.read_text()) if index_file.exists() else {}
        if index.get("key") != _pack_key(style, wanted):
            CACHE.mkdir(parents=True, exist_ok=True)
            print(f"building sprites: {style}", file=sys.stderr, flush=True)
            if not _write_pack(style, wanted):
                return
            index = json.loads(index_file.read_text())
        self.pixels = np.load(CACHE / f"{style}.npy", mmap_mode="r")
        self.sprites = index["sprites"]
        self.number = {sprite["name"]: i for i, sprite in enumerate(self.sprites)}

    def image(self, name: str, level: int = 0) -> np.ndarray:
        """uint8 [H, W, 4] premultiplied RGBA, longer side ``SIDE >> level``."""
        sprite = self.sprites[self.number[name]]
        (h, w), start = sprite["sizes"][level], sprite["starts"][level]
        return np.asarray(self.pixels[start : start + h * w]).reshape(h, w, 4)

    def large(self, name: str, side: int) -> np.ndarray:
        """The sprite drawn anew with a longer side of ``side`` px; stored size for photos."""
        if self.style == "stamps":
            return self.image(name)
        return _large(self.style, name, tuple(self.sprites[self.number[name]]["box"]), side)


@lru_cache(maxsize=4)
def _all_icons(style: str) -> dict[str, dict]:
    return _icons(style)


@lru_cache(maxsize=64)
def _large(style: str, name: str, box: tuple[float, float, float, float], side: int) -> np.ndarray:
    image = _draw_box(_all_icons(style)[name], box, side)
    assert image is not None, name
    return image


def held_out(name: str) -> bool:
    """Whether a stamp belongs to the 15 % that only held-out scenes show."""
    return zlib.crc32(name.encode()) % 100 < 15


def backgrounds(side: int = 512) -> list[np.ndarray]:
    """Wallpapers, uint8 [H, W, 3] RGB with the shorter side ``side`` px; empty without Debian."""
    key = zlib.crc32("|".join((*BACKGROUND_PACKAGES, *SKIPPED_BACKGROUNDS)).encode())
    file = CACHE / f"backgrounds-{side}-{key:08x}.npz"
    if not file.exists():
        images: list[np.ndarray] = []
        complete = True
        for package in BACKGROUND_PACKAGES:
            below = f"backgrounds/{package.split('-')[0]}"
            root = _debian_folder(package, below)
            complete &= root is not None
            for path in sorted(root.rglob("*")) if root else []:
                if not path.is_file() or any(word in path.name for word in SKIPPED_BACKGROUNDS):
                    continue
                if path.suffix == ".svg":
                    drawn = render_svg(path.read_text("utf-8"))
                    image = None if drawn is None else drawn[..., :3]
                else:
                    read = cv2.imread(str(path), cv2.IMREAD_COLOR)
                    image = None if read is None else cv2.cvtColor(read, cv2.COLOR_BGR2RGB)
                if image is None:
                    continue
                if image.std() < 3:
                    continue
                scale = side / min(image.shape[:2])
                size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
                images.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        if not complete:  # what is kept would hide what comes later
            return images
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, *images)
        partial.replace(file)
    with np.load(file) as stored:
        return [stored[name] for name in stored.files]


def main() -> None:
    from nouns import wanted_names

    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for style, source in SOURCES.items():
        pack = Pack(style, wanted_names(style))
        terms = "" if source.redistributable else " (training only)"
        print(f"{style:9} {len(pack.sprites):5} sprites  {source.licence}{terms}, {source.author}")
    print(f"backgrounds {len(backgrounds())} pictures")


if __name__ == "__main__":
    main()
