"""A part of a JPEG: the whole one's pixels, and the whole one's refusals."""

from __future__ import annotations

import io
import random
import sys
import threading
import time
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from kestrel.api import InvalidRequest, RequestError, TooLarge
from kestrel.config import Limits
from kestrel.image import decode, probe
from kestrel.seg_refiner import jpeg_box

ORIENTATION = 0x0112
WIDTH, HEIGHT = 333, 250
BOXES = [(0, 0, 1, 1), (40, 30, 200, 140), (0, 0, 90, 250), (332, 249, 333, 250), (100, 0, 333, 60)]
"""Each lies in a picture of that size, and in part in one on its side."""


def file(mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    picture = small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)
    content = io.BytesIO()
    picture.save(content, **{"format": "JPEG", "exif": exif.tobytes(), **options})
    return content.getvalue()


def pixels(content: bytes, box: tuple[int, int, int, int], reduction: int = 1) -> np.ndarray:
    x0, y0, x1, y1 = box
    return decode(content, reduction=reduction)[y0:y1, x0:x1]


def decode_box(
    content: bytes, box: tuple[int, int, int, int], limits: Limits | None = None, **named: Any
) -> np.ndarray:
    return jpeg_box.decode_box(content, box, limits or Limits(), **named)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that are decoded whole."""
    seen: list[bytes] = []

    def noted(content: bytes, *arguments: Any, **named: Any) -> np.ndarray:
        seen.append(content)
        return decode(content, *arguments, **named)

    monkeypatch.setattr(jpeg_box, "decode", noted)
    return seen


@pytest.fixture
def skia() -> Any:
    return pytest.importorskip("skia", exc_type=ImportError)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_a_box_has_the_pixels_of_the_whole_picture(
    box: tuple[int, int, int, int], restarts: int, subsampling: str, whole: list[bytes], skia: Any
) -> None:
    content = file(subsampling=subsampling, restart_marker_blocks=restarts)
    part = decode_box(content, box)
    assert not whole
    assert part.flags.c_contiguous and part.flags.writeable
    assert np.array_equal(part, pixels(content, box))


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_box_of_a_smaller_picture_has_its_pixels(
    orientation: int, subsampling: str, reduction: int, whole: list[bytes], skia: Any
) -> None:
    content = file(subsampling=subsampling, orientation=orientation)
    reduction = min(reduction, probe(content).reduction)
    height, width = decode(content, reduction=reduction).shape[:2]
    for box in ((0, 0, 1, 1), (width - 9, height - 5, width, height), (7, 3, 22, 19)):
        part = decode_box(content, box, reduction=reduction)
        assert np.array_equal(part, pixels(content, box, reduction))
    assert not whole


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("without", ["", "skia"])
def test_boxes_lie_in_the_picture_as_it_is_seen(
    orientation: int, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        monkeypatch.setitem(sys.modules, without, None)
    content = file(orientation=orientation)
    for box in ((40, 30, 200, 140), (0, 0, 9, 250), (100, 3, 250, 60)):
        assert np.array_equal(decode_box(content, box), pixels(content, box))


@pytest.mark.parametrize("rows", [0, 7, 40, 100])
@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
def test_rows_of_any_number_are_gone_through_in_a_call(
    subsampling: str,
    reduction: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    whole: list[bytes],
    skia: Any,
) -> None:
    monkeypatch.setattr(jpeg_box, "CALL_PIXELS", rows * WIDTH)
    factor = getattr(cv2, "IMWRITE_JPEG_SAMPLING_FACTOR_" + subsampling.replace(":", ""))
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    content = cv2.imencode(".jpg", decode(file()), sampling)[1].tobytes()
    height, width = decode(content, reduction=reduction).shape[:2]
    for top in (height - 3, height * 2 // 3, height // 3 + 1, 0):
        box = (width // 4, top, width * 3 // 4, min(height, top + height // 3))
        part = decode_box(content, box, reduction=reduction)
        assert np.array_equal(part, pixels(content, box, reduction)), box
    assert not whole


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_large_picture_s_box_lies_where_the_whole_one_s_does(
    subsampling: str, reduction: int, whole: list[bytes], skia: Any
) -> None:
    rng = np.random.default_rng(6)
    small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    content = io.BytesIO()
    small.resize((4000, 3000)).save(content, "JPEG", quality=80, subsampling=subsampling)
    box = tuple(side // reduction for side in (700, 1900, 1300, 2700))
    part = decode_box(content.getvalue(), box, reduction=reduction)
    assert not whole
    assert np.array_equal(part, pixels(content.getvalue(), box, reduction))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "PNG"},
        {"format": "WEBP", "lossless": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"progressive": True},
    ],
    ids=str,
)
def test_what_is_no_plain_jpeg_is_cut_out_of_the_whole(
    options: dict[str, Any], whole: list[bytes]
) -> None:
    content = file(**options)
    for box in BOXES:
        assert np.array_equal(decode_box(content, box), pixels(content, box))
    assert len(whole) == len(BOXES)


def test_most_of_a_picture_is_cut_out_of_the_whole(whole: list[bytes]) -> None:
    content = file()
    part = decode_box(content, (5, 5, WIDTH, HEIGHT))
    assert whole and np.array_equal(part, pixels(content, (5, 5, WIDTH, HEIGHT)))


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"], ids=["cut", "cut and ended"])
@pytest.mark.parametrize("box", [(40, 10, 200, 40), (40, 200, 200, 240)], ids=str)
def test_a_cut_file_is_refused_wherever_the_box_lies(
    box: tuple[int, int, int, int], end: bytes
) -> None:
    content = file()
    for at in range(0, len(content) - 2, 97):
        cut = content[:at] + end
        try:
            expected = pixels(cut, box)
        except InvalidRequest:
            with pytest.raises(InvalidRequest):
                decode_box(cut, box)
        else:  # libjpeg fills what is missing where the end mark is there
            assert end
            assert np.array_equal(decode_box(cut, box), expected)


def test_a_damaged_file_is_decoded_or_refused_as_the_whole_one_is() -> None:
    content, rng = file(), random.Random(2)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(20, len(damaged) - 2)] = rng.randrange(256)
        box = (40, 30, 100, 80)
        try:
            expected = pixels(bytes(damaged), box)
        except RequestError as error:
            with pytest.raises(type(error)):
                decode_box(bytes(damaged), box)
            continue
        # What damaged data comes to differs between builds of libjpeg-turbo.
        assert decode_box(bytes(damaged), box).shape == expected.shape


def test_a_file_of_another_size_than_its_header_s_is_left_to_the_whole(skia: Any) -> None:
    content = file()
    assert jpeg_box.decode_stored_box(content, (WIDTH, HEIGHT), (0, 0, 9, 9)) is not None
    assert jpeg_box.decode_stored_box(content, (WIDTH, HEIGHT + 1), (0, 0, 9, 9)) is None
    for box in ((0, 0, WIDTH + 1, 9), (-1, 0, 9, 9), (5, 5, 5, 9), (0, 9, 9, HEIGHT + 1)):
        assert jpeg_box.decode_stored_box(content, (WIDTH, HEIGHT), box) is None


def test_the_limit_is_for_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg_box, "decode_stored_box", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooLarge, match="333 x 250"):
        decode_box(file(), (0, 0, 9, 9), Limits(max_image_pixels=WIDTH * HEIGHT - 1))


def test_other_threads_go_on_meanwhile(skia: Any) -> None:
    content = io.BytesIO()
    picture = Image.effect_noise((4000, 3000), 60).convert("RGB")
    picture.save(content, "JPEG", quality=90)
    longest, done = 0.0, threading.Event()

    def wait() -> None:
        nonlocal longest
        while not done.is_set():
            began = time.thread_time(), time.perf_counter()
            time.sleep(0.001)
            longest = max(longest, time.perf_counter() - began[1])

    thread = threading.Thread(target=wait)
    thread.start()
    began = time.perf_counter()
    decode_box(content.getvalue(), (0, 0, 2000, 2990))
    took = time.perf_counter() - began
    done.set()
    thread.join()
    assert longest < took / 3
