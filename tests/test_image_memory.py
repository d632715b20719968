"""What a picture takes of memory while it is decoded, and what only its header takes."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.decode_memory import (
    ALLOWED,
    ALLOWED_LATER,
    KINDS,
    _in_a_process,
    measure,
)
from kestrel import image as image_module
from kestrel.image import decode, probe

ORIENTATION = 0x0112


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_file_takes_more_than_is_stated(kind: str) -> None:
    assert measure(kind, (3000, 2000)) <= ALLOWED[KINDS[kind][0]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", [(1, 8_000_000), (8_000_000, 1)])
def test_a_png_of_one_row_or_column_takes_no_more_than_is_stated(
    size: tuple[int, int], tmp_path: Path
) -> None:
    files = []
    for name, asked in (("small", (40, 40)), ("large", size)):
        files.append(str(tmp_path / name))
        Image.new("RGB", asked).save(files[-1], "PNG")
    assert _in_a_process("--decode", *files) <= 17


THIN = [(3_000_000, 1), (1, 4_000_000), (500_000, 6)]
# Each in a process of its own. What they load takes longer than what they do: all fork from one.
CROPPED = """
import os
import sys
import numpy as np
from benchmarks.decode_memory import resident
from kestrel.moondream.config import MOONDREAM_3
from kestrel.moondream.crops import overlap_crops
from kestrel.ops import lanczos

lanczos._passes()
for case in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        by, *shape = case.split()
        if by == "pillow":
            lanczos._passes = lambda: None
        rows, columns = map(int, shape)
        overlap_crops(np.zeros((400, 300, 3), np.uint8), MOONDREAM_3.vision)
        pixels = np.full((rows, columns, 3), 7, np.uint8)
        before = resident("VmRSS")
        overlap_crops(pixels, MOONDREAM_3.vision)
        print(3 + (resident("VmHWM") - before) / (rows * columns))
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(case)
"""


@pytest.fixture(scope="module")
def cropped() -> dict[str, float]:
    """Bytes per pixel that cropping a thin picture takes, by what resizes it and its shape."""
    cases = [f"{by} {rows} {columns}" for by in ("compiled", "pillow") for rows, columns in THIN]
    command = [sys.executable, "-c", CROPPED, *cases]
    taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(cases, map(float, taken), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("by", "allowed"), [("compiled", ALLOWED_LATER["crops"]), ("pillow", 3 + 12 + 12)]
)
@pytest.mark.parametrize("shape", THIN)
def test_a_long_thin_picture_takes_no_more_to_crop_than_another(
    shape: tuple[int, int], by: str, allowed: float, cropped: dict[str, float]
) -> None:
    # Pillow holds 4 bytes of a pixel and 8 of a row, of what it reads and of what it makes.
    assert cropped[f"{by} {shape[0]} {shape[1]}"] <= allowed


def encoded(mode: str, format: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, format, exif=exif.tobytes())
    return content.getvalue()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG RGB", "PNG LA", "PNG P", "PNG 1", "JPEG CMYK", "WEBP RGBA"])
def test_bands_make_the_picture_that_pillow_makes_of_it_whole(
    kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "_BAND_PIXELS", 5 * 53 + 2)
    format, mode = kind.split()
    content = encoded(mode, format, orientation)
    with Image.open(io.BytesIO(content)) as opened:
        whole = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    pixels = decode(content)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert np.array_equal(pixels, whole)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sixteen_bits_are_scaled_in_every_band(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "_BAND_PIXELS", 64)
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = io.BytesIO()
    Image.fromarray(ramp).save(content, "PNG", exif=exif.tobytes())
    turned = {1: ramp, 3: ramp[::-1, ::-1], 6: np.rot90(ramp, -1)}[orientation]
    assert np.array_equal(decode(content.getvalue()), np.repeat((turned >> 8)[..., None], 3, 2))


def test_the_header_of_a_png_is_read_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.BytesIO()
    Image.new("RGB", (37, 53)).save(plain, "PNG")
    files = [plain.getvalue(), encoded("RGB", "PNG", 6), encoded("RGB", "WEBP", 6)]
    loads: list[Any] = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: loads.append(self) or load(self))
    for content in files:
        header = probe(content)
        assert (header.width, header.height) == (37, 53)
    assert loads == []


@pytest.mark.parametrize("large, at_once", [(True, 1), (False, 4)])
def test_large_pictures_are_decoded_one_at_a_time(
    large: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded("RGB", "PNG")
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 37 * 53 - large)
    inside, most, lock = 0, 0, threading.Lock()

    def slow(*_: Any) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.1)
        with lock:
            inside -= 1

    monkeypatch.setattr(image_module, "_fast_jpeg", slow)
    threads = [threading.Thread(target=decode, args=(content,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == at_once


def test_a_broken_large_picture_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 1)
    content = encoded("RGB", "PNG")
    for _ in range(2):
        with pytest.raises(ValueError, match="truncated or broken"):
            decode(content[: len(content) // 2])
    assert decode(content).shape == (37, 53, 3)


# In a process of its own: one that has worked before has memory left over.
SHORT = """
import io
import resource
from PIL import Image
from benchmarks.decode_memory import resident
from kestrel.config import RefinerConfig
from kestrel.seg_refiner import SegmentRefiner

refiner = SegmentRefiner(RefinerConfig(refiner="none", selectable=()))
refiner.self_check()
content = io.BytesIO()
Image.new("L", (6000, 6000)).save(content, "PNG")
box = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
# The picture takes 36 MB until it is converted, and then 108 more.
most = resident("VmSize") + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
result = refiner.refine_encoded(content.getvalue(), "M0 0H1V1Z", box)
print(result.reason, result.refined_svg_path)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_picture_that_memory_does_not_hold_leaves_the_models_path() -> None:
    """In the graph it was an answer of 500, in process one with the model's own path."""
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True)
    assert done.stdout == "refine_failed None\n", done.stderr
    assert "memory" in done.stderr and "Traceback" in done.stderr
