"""A JPEG decoded smaller: where its pixels lie, and what is refused as before."""

from __future__ import annotations

import io
import sys
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from kestrel import image as image_module
from kestrel.api import InvalidRequest, TooLarge
from kestrel.config import Limits
from kestrel.image import REDUCTIONS, decode, probe

ORIENTATION = 0x0112


def smooth(width: int, height: int) -> np.ndarray:
    """Every pixel differs from those a reduced pixel away, by no more than a few levels."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 240 / width, y * 240 / height, (x + y) * 240 / (width + height)]
    return np.stack(planes, axis=2).astype(np.uint8)


def file(
    width: int = 160, height: int = 96, mode: str = "RGB", orientation: int = 1, **options: Any
) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = io.BytesIO()
    picture = Image.fromarray(smooth(width, height)).convert(mode)
    options = {"format": "JPEG", "quality": 95, **options}
    picture.save(content, exif=exif.tobytes(), **options)
    return content.getvalue()


def means(pixels: np.ndarray, reduction: int) -> np.ndarray:
    """Of the pixels that each reduced one stands for, from the upper left corner on."""
    height, width = pixels.shape[:2]
    below, right = -height % reduction, -width % reduction
    padded = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
    size = (padded.shape[1] // reduction, padded.shape[0] // reduction)
    return cv2.resize(padded, size, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(160, 96), (161, 99), (164, 90)])
def test_a_pixel_is_the_mean_of_those_it_stands_for(
    size: tuple[int, int], orientation: int, reduction: int
) -> None:
    content = file(*size, orientation=orientation)
    header, whole = probe(content), decode(content)
    reduction = min(reduction, header.reduction)
    smaller = decode(content, reduction=reduction)
    assert smaller.flags.c_contiguous
    expected = means(whole, reduction)
    assert smaller.shape == expected.shape
    # A pixel too far to one side would differ by the ramp's whole step, 1.5 levels times 8.
    inside = np.s_[: whole.shape[0] // reduction, : whole.shape[1] // reduction]
    assert np.abs(smaller[inside].astype(int) - expected[inside]).mean() < 0.6


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grey_and_cmyk_are_reduced_too(mode: str, reduction: int) -> None:
    content = file(mode=mode)
    whole, smaller = decode(content), decode(content, reduction=reduction)
    assert np.abs(smaller.astype(int) - means(whole, reduction)).mean() < 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("progressive", [False, True])
def test_pillow_makes_the_same_of_what_opencv_is_not_given(
    reduction: int, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file(161, 99, progressive=progressive)
    fast = decode(content, reduction=reduction).astype(int)
    # Two builds of one decoder: equal here, at most 1 apart with a build without its SIMD.
    assert np.abs(decode(content + b"\0", reduction=reduction) - fast).max() <= 1
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert np.abs(decode(content, reduction=reduction) - fast).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_other_formats_are_not_reduced(format: str) -> None:
    assert probe(file(format=format)).reduction == 1


@pytest.mark.parametrize(
    ("size", "orientation", "most"),
    [
        ((4032, 3024), 6, 8),
        ((164, 96), 1, 8),
        ((164, 96), 2, 4),
        ((164, 96), 4, 8),
        ((164, 90), 3, 2),
        ((161, 96), 3, 1),
        ((161, 96), 8, 1),
        ((161, 96), 5, 8),
        ((160, 5), 1, 4),
        ((1, 1), 1, 1),
    ],
)
def test_a_picture_that_is_turned_is_reduced_by_what_divides_it(
    size: tuple[int, int], orientation: int, most: int
) -> None:
    content = file(*size, orientation=orientation)
    assert probe(content).reduction == most
    height, width = decode(content).shape[:2]
    smaller = decode(content, reduction=most)
    assert smaller.shape == (-(-height // most), -(-width // most), 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_is_cut_is_refused_at_every_size(reduction: int, progressive: bool) -> None:
    whole = file(progressive=progressive)
    for end in range(0, len(whole), 97):
        with pytest.raises(InvalidRequest):
            decode(whole[:end], reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_limit_is_for_the_picture_s_own_pixels_and_comes_first(
    reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file()
    monkeypatch.setattr(image_module, "_fast_jpeg", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooLarge, match="160 x 96"):
        decode(content, Limits(max_image_pixels=160 * 96 - 1), reduction=reduction)
