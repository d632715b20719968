"""Memory at its peak while one picture is decoded, refined or cropped, in bytes per pixel.

    python benchmarks/decode_memory.py --out decode_memory.json

Every kind of file is decoded in a process of its own, which has decoded a small one before. What is
counted beyond that: the decoder's memory and the result (3 bytes per pixel), not the file. Then the
decoded picture is given to refiners, with a path that fills it, and to the model's cropping; these
3 bytes are counted there too. Exits 1 for what takes more than ``ALLOWED``, which
``docs/operations.md`` states. Needs Linux.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ALLOWED = {"JPEG": 8.0, "JPEG progressive": 13.0, "PNG": 8.0, "WEBP": 17.0}
"""Bytes per pixel by format, at most; half a byte to one of it is room for noise. A JPEG that has
its channels in several scans is as progressive ones."""
ALLOWED_LATER = {"boundary": 12.0, "guided": 12.0, "crops": 7.0}
"""The same for what is done with the decoded picture."""
SIZE = (4000, 3000)
SMALL = (400, 300)
ORIENTATION = 0x0112


def _picture(mode: str, size: tuple[int, int]) -> Image.Image:
    """A picture with something to see in every tile of it; fast to make and to encode."""
    width, height = size
    if mode == "I;16":
        row = np.linspace(0, 65535, width).astype(np.uint16)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(row, (height, width))))
    tile = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    small = Image.fromarray(tile).resize((128, 128), Image.Resampling.BICUBIC)
    pixels = np.tile(np.asarray(small), (height // 128 + 1, width // 128 + 1, 1))
    return Image.fromarray(np.ascontiguousarray(pixels[:height, :width])).convert(mode)


def _file(size: tuple[int, int], form: str, mode: str, turned: bool, **options: object) -> bytes:
    content = io.BytesIO()
    if turned:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        options["exif"] = exif.tobytes()
    _picture(mode, size).save(content, form, **options)
    return content.getvalue()


def _scan_by_scan(size: tuple[int, int], channels: int) -> bytes:
    """A grey baseline JPEG that has its channels one after the other, as Pillow writes none."""

    def segment(code: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data

    width, height = size
    frame = struct.pack(">BHHB", 8, height, width, channels)
    frame += b"".join(bytes([number, 0x11, 0]) for number in range(channels))
    one_code = bytes([1, *[0] * 15, 0])
    # A block is two bits: the mean of the one before, and nothing else.
    pixels = bytes(-(-(-(-width // 8) * -(-height // 8)) // 4))
    content = b"\xff\xd8" + segment(0xDB, bytes([0, *[8] * 64])) + segment(0xC0, frame)
    content += segment(0xC4, b"\x00" + one_code) + segment(0xC4, b"\x10" + one_code)
    for number in range(channels):
        content += segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + pixels
    return content + b"\xff\xd9"


Make = Callable[[tuple[int, int]], bytes]


def _kinds() -> dict[str, tuple[str, Make]]:
    """Name of a kind of file to its entry in ``ALLOWED`` and what makes one of a size."""
    kinds: dict[str, tuple[str, Make]] = {}

    def add(bound: str, form: str, mode: str, turned: bool = False, **options: object) -> None:
        extra = " ".join(key for key, on in (*options.items(), ("turned", turned)) if on is True)
        name = f"{form} {mode} {extra}".strip()
        kinds[name] = (bound, lambda size: _file(size, form, mode, turned, **options))

    for mode in ("RGB", "L", "CMYK"):
        add("JPEG", "JPEG", mode, subsampling=0)
        add("JPEG progressive", "JPEG", mode, subsampling=0, progressive=True)
    for mode, channels in (("RGB", 3), ("CMYK", 4)):
        make = functools.partial(_scan_by_scan, channels=channels)
        kinds[f"JPEG {mode} scan by scan"] = ("JPEG progressive", make)
    add("JPEG", "JPEG", "RGB", turned=True)
    add("JPEG progressive", "JPEG", "CMYK", turned=True, progressive=True)
    for mode in ("RGB", "L", "LA", "P", "RGBA", "1", "I;16"):
        add("PNG", "PNG", mode, compress_level=1)
    add("PNG", "PNG", "RGBA", turned=True, compress_level=1)
    for mode in ("RGB", "RGBA"):
        add("WEBP", "WEBP", mode, method=0)
        add("WEBP", "WEBP", mode, method=0, quality=0, lossless=True)
    add("WEBP", "WEBP", "RGBA", turned=True, method=0)
    return kinds


KINDS = _kinds()


def resident(key: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def decode_here(small: Path, large: Path) -> float:
    """Decode in this process; bytes per pixel of the large picture at the peak."""
    from kestrel.image import decode

    decode(small.read_bytes())
    content = large.read_bytes()
    # The peak so far is that of the small one, if any of it is above what is held now.
    before = resident("VmRSS")
    pixels = decode(content)
    return (resident("VmHWM") - before) / (pixels.shape[0] * pixels.shape[1])


def work_here(what: str) -> float:
    """Refine or crop a picture in this process; bytes per pixel at the peak, the picture's too."""
    work = cropping() if what == "crops" else refining(what)
    work(np.ascontiguousarray(_picture("RGB", SMALL)))
    # A long strip: what cropping keeps of it depends on one side only.
    width, height = (SIZE[0] * 3, SIZE[1] // 3) if what == "crops" else SIZE
    pixels = np.empty((height, width, 3), np.uint8)  # made in place, or that would be the peak
    pixels[:] = np.asarray(_picture("RGB", (width, 1)))
    before = resident("VmRSS")
    work(pixels)
    return 3 + (resident("VmHWM") - before) / (SIZE[0] * SIZE[1])


def refining(name: str) -> Callable[[np.ndarray], object]:
    import cv2

    from kestrel.config import RefinerConfig
    from kestrel.seg_refiner import SegmentRefiner

    cv2.setNumThreads(1)
    refiner = SegmentRefiner(RefinerConfig(refiner=name, selectable=(), min_agreement=0.0))
    box = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    path = "M.5 0L1 .5L.9 1L.1 1L0 .2Z"
    return lambda pixels: refiner.refine_with_bitmaps(pixels, path, box, return_base64=True)


def cropping() -> Callable[[np.ndarray], object]:
    from kestrel.moondream.config import MOONDREAM_3
    from kestrel.moondream.crops import overlap_crops

    return lambda pixels: overlap_crops(pixels, MOONDREAM_3.vision)


def _in_a_process(*arguments: str) -> float:
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(kind: str, size: tuple[int, int] = SIZE) -> float:
    """Bytes per pixel while a file of a kind is decoded."""
    _, make = KINDS[kind]
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, "small"), Path(name, "large")]
        for file, asked in zip(files, (SMALL, size), strict=True):
            file.write_bytes(make(asked))
        return _in_a_process("--decode", *map(str, files))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--decode", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", choices=ALLOWED_LATER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode is not None or args.work is not None:
        print(work_here(args.work) if args.decode is None else decode_here(*args.decode))
        return 0
    allowed = {kind: ALLOWED[bound] for kind, (bound, _) in KINDS.items()} | ALLOWED_LATER
    found, over = {}, []
    for what, bound in allowed.items():
        taken = measure(what) if what in KINDS else _in_a_process("--work", what)
        found[what] = round(taken, 2)
        over += [what] if taken > bound else []
        print(f"{what:<32}{taken:6.1f} of {bound:.0f} bytes per pixel", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"size": SIZE, "bytes_per_pixel": found}, indent=2) + "\n")
    if over:
        print(f"more than is stated: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
