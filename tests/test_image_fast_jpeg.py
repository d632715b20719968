"""The faster JPEG decoder gives Pillow's pixels, and leaves to Pillow what it cannot judge."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from kestrel import image as image_module
from kestrel.api import InvalidRequest
from kestrel.image import decode

ORIENTATION = 0x0112


def jpeg(mode: str = "RGB", size: tuple[int, int] = (61, 43), **options: Any) -> bytes:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    content = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return jpeg(exif=exif.tobytes())


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as opened:
        return np.array(ImageOps.exif_transpose(opened).convert("RGB"))


def taken_fast(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as opened:
        return image_module._fast_jpeg(content, opened, 1) is not None


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_pixels_are_pillow_s(subsampling: str, progressive: bool, quality: int) -> None:
    content = jpeg(subsampling=subsampling, progressive=progressive, quality=quality)
    assert taken_fast(content)
    pixels, reference = decode(content), by_pillow(content)
    assert pixels.shape == reference.shape and pixels.flags.c_contiguous
    # Two builds of one decoder: equal here, at most 1 apart with a build without its SIMD.
    assert np.abs(pixels.astype(int) - reference).max() <= 1
    assert np.mean((pixels != reference).any(axis=2)) <= 0.002


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (17, 8), (1546, 1213)])
def test_every_size_comes_back_as_it_is(size: tuple[int, int]) -> None:
    content = jpeg(size=size)
    assert np.array_equal(decode(content), by_pillow(content))


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_turns_the_picture_as_pillow_turns_it(orientation: int) -> None:
    content = turned(orientation)
    assert taken_fast(content)
    assert np.array_equal(decode(content), by_pillow(content))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_are_left_to_pillow(mode: str) -> None:
    content = jpeg(mode)
    assert not taken_fast(content)
    assert np.array_equal(decode(content), by_pillow(content))


def test_a_file_that_does_not_end_as_a_jpeg_is_left_to_pillow() -> None:
    whole = jpeg()
    assert not taken_fast(whole + b"\0")
    assert np.array_equal(decode(whole + b"\0"), decode(whole))
    # Cut in its last tenth: every header is there, pixels are missing.
    with pytest.raises(InvalidRequest):
        decode(whole[: -len(whole) // 10])


def test_without_opencv_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    content = turned(6)
    assert not taken_fast(content)
    assert np.array_equal(decode(content), by_pillow(content))


def test_arrays_of_the_fast_decoder_can_be_written_to() -> None:
    pixels = decode(jpeg())
    pixels[0, 0] = 7
    assert pixels[0, 0].tolist() == [7, 7, 7]
