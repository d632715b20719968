"""A mask in the answer that a client cannot read, or that is not the mask that was made."""

from __future__ import annotations

import base64
import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from serving import encoded

from kestrel.config import RefinerConfig
from kestrel.overlay import decode_mask
from kestrel.seg_refiner import SegmentRefiner, _encode_mask_png_base64

ORIENTATION = 0x0112
BOX = {"x_min": 0.25, "y_min": 0.2, "x_max": 0.75, "y_max": 0.6}
SQUARE = "M0 0H1V1H0Z"

# The same examples on every run, however busy the machine is.
steady = settings(derandomize=True, deadline=None, max_examples=150)

# Sides that are no multiple of anything, and those around a byte, a word and a block.
sides = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 255, 256, 257])


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Bool [H, W]: noise, all of one value, or a block that leaves blank rows and columns."""
    height, width = draw(sides), draw(sides)
    kind = draw(st.sampled_from(["noise", "empty", "full", "block"]))
    if kind == "noise":
        seed = draw(st.integers(0, 2**32 - 1))
        return np.random.default_rng(seed).random((height, width)) < draw(st.floats(0, 1))
    mask = np.full((height, width), kind == "full")
    if kind == "block":
        y0, x0 = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        y1, x1 = draw(st.integers(y0 + 1, height)), draw(st.integers(x0 + 1, width))
        mask[y0:y1, x0:x1] = True
    return mask


def pillow(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.array(image)


def chunks(text: str) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of every chunk; signature, lengths and checksums must be right."""
    content = base64.b64decode(text, validate=True)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        checksum = content[at + 8 + length : at + 12 + length]
        assert checksum == struct.pack(">I", zlib.crc32(kind + body))
        yield kind, body
        at += 12 + length
    assert at == len(content)


def header(text: str) -> tuple[int, ...]:
    """Width, height, bit depth, colour type, compression, filter, interlace."""
    return struct.unpack(">IIBBBBB", dict(chunks(text))[b"IHDR"])


@steady
@given(masks())
def test_no_mask_changes_on_its_way_through_the_answer(mask: np.ndarray) -> None:
    text = _encode_mask_png_base64(mask)
    assert np.array_equal(decode_mask(text), mask)
    assert np.array_equal(pillow(text), mask * np.uint8(255))


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 4099), (4099, 1), (7, 13)])
def test_thin_and_tiny_masks_keep_their_shape_and_value(shape: tuple[int, int], fill: int) -> None:
    picture = pillow(_encode_mask_png_base64(np.full(shape, fill, np.uint8)))
    assert picture.shape == shape
    assert np.unique(picture).tolist() == [255 * fill]


@pytest.mark.parametrize(
    ("shape", "row"),
    # Blank rows are written in runs of 2**18 bytes, a row being its pixels and one filter byte.
    [((1024, 511), 512), ((1024, 511), 513), ((1025, 511), 512), ((2000, 700), 1999),
     ((2000, 700), 0), ((3, 600_001), 2), ((3, 600_001), 0), ((600_001, 3), 300_000)],
)  # fmt: skip
def test_a_lone_row_in_a_large_blank_mask_stays_where_it_is(
    shape: tuple[int, int], row: int
) -> None:
    mask = np.zeros(shape, np.uint8)
    mask[row, ::2] = 1
    text = _encode_mask_png_base64(mask)
    assert np.array_equal(decode_mask(text), mask != 0)
    # OpenCV does not mind a wrong checksum; other readers do.
    assert len(zlib.decompress(dict(chunks(text))[b"IDAT"])) == shape[0] * (shape[1] + 1)


@steady
@given(masks())
def test_the_picture_is_eight_bit_grey_of_the_masks_size(mask: np.ndarray) -> None:
    text = _encode_mask_png_base64(mask)
    assert header(text) == (mask.shape[1], mask.shape[0], 8, 0, 0, 0, 0)
    assert [kind for kind, _ in chunks(text)] == [b"IHDR", b"IDAT", b"IEND"]
    values = np.unique(cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), -1))
    assert set(values.tolist()) <= {0, 255}


@steady
@given(masks())
def test_the_text_is_bare_base64_on_one_line(mask: np.ndarray) -> None:
    text = _encode_mask_png_base64(mask)
    assert isinstance(text, str)
    assert re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text)
    assert base64.b64encode(base64.b64decode(text)).decode() == text


@steady
@given(masks())
def test_every_spelling_of_a_mask_gives_the_same_bytes(mask: np.ndarray) -> None:
    ones = mask.astype(np.uint8)
    spellings = [
        mask,
        ones,
        ones * 255,
        np.asfortranarray(ones),
        np.repeat(ones, 2, axis=1)[:, ::2],
        np.flip(np.flip(mask, 0).copy(), 0),
    ]
    assert len({_encode_mask_png_base64(spelling) for spelling in spellings}) == 1


def test_bytes_differ_neither_between_threads_nor_between_processes() -> None:
    script = (
        "import numpy as np\n"
        "from kestrel.seg_refiner import _encode_mask_png_base64\n"
        "mask = np.random.default_rng(7).random((301, 203)) < 0.3\n"
        "print(_encode_mask_png_base64(mask))\n"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    mask = np.random.default_rng(7).random((301, 203)) < 0.3
    with ThreadPoolExecutor(4) as pool:
        here = set(pool.map(_encode_mask_png_base64, [mask] * 16))
    assert here == {elsewhere.stdout.strip()}


def test_encoding_leaves_the_mask_as_it_is() -> None:
    mask = np.zeros((9, 7), np.uint8)
    mask[2:5, 1:6] = 1
    mask.setflags(write=False)
    assert decode_mask(_encode_mask_png_base64(mask)).sum() == mask.sum() == 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("refiner", ["none", "guided"])
def test_masks_have_the_size_that_the_picture_is_seen_at(refiner: str, orientation: int) -> None:
    pixels = np.full((31, 45, 3), 40, np.uint8)
    pixels[6:19, 11:34] = 220
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = encoded(Image.fromarray(pixels), "JPEG", exif=exif.tobytes())
    result = SegmentRefiner(RefinerConfig(refiner=refiner)).refine_encoded(
        file, SQUARE, BOX, return_base64=True
    )
    width, height = (45, 31) if orientation < 5 else (31, 45)
    assert result.coarse_mask_base64 is not None
    coarse = decode_mask(result.coarse_mask_base64)
    assert coarse.shape == (height, width)
    # The box is normalised to the picture as it is seen, so the mask lies upright in it.
    rows, columns = np.flatnonzero(coarse.any(axis=1)), np.flatnonzero(coarse.any(axis=0))
    assert abs(columns[0] - BOX["x_min"] * width) <= 1
    assert abs(columns[-1] + 1 - BOX["x_max"] * width) <= 1
    assert abs(rows[0] - BOX["y_min"] * height) <= 1
    assert abs(rows[-1] + 1 - BOX["y_max"] * height) <= 1
    if refiner == "none":
        assert result.refined_mask_base64 == result.coarse_mask_base64
    elif result.refined_mask_base64 is not None:
        assert decode_mask(result.refined_mask_base64).shape == (height, width)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(5, np.uint8), "2-D"),
        (np.zeros((3, 4, 1), np.uint8), "2-D"),
        (np.uint8(1), "2-D"),
        ([[0, 1]], "2-D"),
        (None, "2-D"),
        (np.zeros((0, 5), np.uint8), "pixel"),
        (np.zeros((5, 0), bool), "pixel"),
        (np.zeros((2, 2), np.float32), "float32"),
        (np.zeros((2, 2), np.int8), "int8"),
        (np.zeros((2, 2), np.uint16), "uint16"),
        (np.full((2, 2), 2, np.uint8), "0 and 1"),
        (np.full((2, 2), 254, np.uint8), "0 and 1"),
        (np.array([[0, 128, 255]], np.uint8), "0 and 255"),
        (np.array([[0, 1, 255]], np.uint8), "0 and 255"),
    ],
)
def test_what_is_no_mask_is_refused_and_not_guessed_at(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _encode_mask_png_base64(mask)


@steady
@given(arrays(np.uint8, (3, 5), elements=st.sampled_from([0, 1, 2, 127, 128, 254, 255])))
def test_no_grey_value_ever_comes_out(mask: np.ndarray) -> None:
    levels = set(np.unique(mask).tolist())
    if levels <= {0, 1} or levels <= {0, 255}:
        assert np.array_equal(pillow(_encode_mask_png_base64(mask)), (mask > 0) * np.uint8(255))
    else:
        with pytest.raises(ValueError):
            _encode_mask_png_base64(mask)


@pytest.mark.parametrize("shape", [(1, 1_000_003), (1_000_003, 3)])
def test_masks_of_very_long_pictures_are_read_back(shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, bool)
    mask.flat[5:1_000_001] = True
    assert np.array_equal(decode_mask(_encode_mask_png_base64(mask)), mask)


def test_reading_back_a_picture_in_colour_is_a_value_error() -> None:
    done, png = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))
    assert done
    with pytest.raises(ValueError, match="one channel"):
        decode_mask(base64.b64encode(png.tobytes()).decode())


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", "data:image/png;base64,AAAA"])
def test_reading_back_what_is_no_mask_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        decode_mask(text)
