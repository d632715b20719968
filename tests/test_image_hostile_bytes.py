"""Pictures from strangers: cut, damaged, oversized, oddly encoded."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kestrel.api import InvalidRequest, RequestError, TooLarge
from kestrel.config import Limits
from kestrel.image import decode, probe

ORIENTATION = 0x0112


def picture(width: int = 30, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def file_of(format: str) -> bytes:
    return encoded(picture(), format, **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_cut_picture_is_refused_wherever_it_is_cut(format: str) -> None:
    whole = file_of(format)
    # The last bytes of a PNG are checksums and an end mark: every pixel is there without them.
    trailer = 20 if format == "PNG" else 0
    for end in range(0, len(whole) - trailer, 7):
        with pytest.raises(InvalidRequest) as caught:
            decode(whole[:end])
        assert caught.value.field == "image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_picture_is_decoded_or_refused_and_never_a_fault(format: str) -> None:
    whole = file_of(format)
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            header, pixels = probe(bytes(damaged)), decode(bytes(damaged))
        except RequestError:
            continue
        assert pixels.shape == (header.height, header.width, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_header_and_pixels_alike(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(picture(), format, exif=exif.tobytes())
    header, pixels = probe(content), decode(content)
    assert (header.width, header.height) == ((30, 20) if orientation < 5 else (20, 30))
    assert pixels.shape == (header.height, header.width, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_becomes_the_rgb_that_pillow_makes_of_it(mode: str) -> None:
    content = encoded(picture().convert(mode), "PNG")
    pixels = decode(content)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_cmyk_jpeg_becomes_rgb() -> None:
    assert decode(encoded(picture().convert("CMYK"), "JPEG")).shape == (20, 30, 3)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    pixels = decode(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(pixels[:, :, 0], ramp >> 8)
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animation_gives_its_first_frame(format: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(red, format, save_all=True, append_images=[blue], **options)
    assert tuple(decode(content)[4, 4]) == (255, 0, 0)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(InvalidRequest, match="JPEG, PNG or WebP"):
        probe(encoded(picture(), format))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"<svg/>"])
def test_bytes_that_are_no_picture_are_refused(content: bytes) -> None:
    for read in (probe, decode):
        with pytest.raises(InvalidRequest):
            read(content)


def test_pixel_bomb_is_refused_from_its_header() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    for read in (probe, decode):
        with pytest.raises(TooLarge) as caught:
            read(bomb)
        assert (caught.value.status, caught.value.field) == (413, "image")


def test_pixel_limit_is_the_configured_one() -> None:
    assert probe(file_of("PNG"), Limits(max_image_pixels=600)).width == 30
    with pytest.raises(TooLarge, match="30 x 20"):
        probe(file_of("PNG"), Limits(max_image_pixels=599))


@pytest.mark.parametrize("array", [
    np.zeros((3, 4)), np.zeros((3, 4), np.uint8), np.zeros((3, 4, 4), np.uint8),
    np.zeros((3, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), "picture.png", 5, [[1]],
])  # fmt: skip
def test_array_that_is_no_rgb_picture_is_a_value_error(array: Any) -> None:
    with pytest.raises(ValueError, match="image"):
        decode(array)


def test_turned_array_becomes_contiguous() -> None:
    turned = np.asarray(picture()).transpose(1, 0, 2)
    pixels = decode(turned)
    assert pixels.flags.c_contiguous and np.array_equal(pixels, turned)
