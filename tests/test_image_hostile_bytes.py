"""Pictures from strangers: cut, damaged, oversized, oddly encoded."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kestrel.api import InvalidRequest, RequestError, TooLarge
from kestrel.config import Limits
from kestrel.image import decode, plain_jpeg, probe
from kestrel.image_parts import MOST_PARTS

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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block", [bytes(32), b"II*\0\xff\xff\xff\xff", b"", b"II*\0\x08\0\0\0\x01\0"]
)
def test_a_broken_exif_block_is_no_reason_to_refuse_the_picture(format: str, block: bytes) -> None:
    # With a resolution in JFIF's own segment Pillow does not look at EXIF before it is asked.
    options = {"dpi": (72, 72)} if format == "JPEG" else {"lossless": True}
    content = encoded(picture(), format, exif=b"Exif\0\0" + block, **options)
    assert probe(content).width == 30
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decode(content), expected)
    if format == "JPEG":
        assert plain_jpeg(content) == ((30, 20), 1)
        assert decode(content, reduction=4).shape == (5, 8, 3)
        # Not as a JPEG ends: Pillow decodes it.
        assert np.array_equal(decode(content + b"\0"), expected)


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_behind_the_pixels_turns_header_and_pixels_alike(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    before = encoded(picture(), "PNG", exif=exif)
    plain = file_of("PNG")
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    behind = plain[:-12] + chunk + plain[-12:]
    assert probe(behind) == probe(before)
    assert np.array_equal(decode(behind), decode(before))


def test_metadata_behind_the_pixels_parts_header_and_pixels() -> None:
    """XMP may tell an orientation too."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    text = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    for broken in (text, png_chunk(b"eXIf", b"no TIFF header"), png_chunk(b"eXIf")):
        whole = file_of("PNG")
        whole = whole[:-12] + broken + whole[-12:]
        header, pixels = probe(whole), decode(whole)
        assert (header.height, header.width) == pixels.shape[:2] == (20, 30)


def segment(code: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data


def with_parts(format: str, parts: bytes, at: int | None = None) -> bytes:
    """A picture with these before its pixels: after the header of a PNG, after a JPEG's start."""
    content = file_of(format)
    at = (33 if format == "PNG" else 2) if at is None else at
    return content[:at] + parts + content[at:]


PHOTOSHOP = segment(0xED, b"Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 5000)
FRAME = segment(0xC0, bytes.fromhex("08 0014 001e 03 012200 021101 031101") + bytes(60_000))
TABLES = segment(0xDB, bytes(65 * 1000))
EXIF = segment(0xE1, b"Exif\0\0" + bytes(60_000))
SMALL_EXIF = segment(0xE1, b"Exif\0\0")
PROFILE = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6), 9))
MANY = 2 * MOST_PARTS


@pytest.mark.parametrize(
    ("format", "parts"),
    [
        ("PNG", png_chunk(b"abCd") * MANY),
        ("PNG", png_chunk(b"tEXt", b"a\0b") * MANY),
        ("PNG", PROFILE * 100),
        ("JPEG", segment(0xFE) * MANY),
        ("JPEG", segment(0xE5) * MANY),
        ("JPEG", b"\xff\xd0" * MANY),
        ("JPEG", b"\xff" * 100 * MANY),
        ("JPEG", segment(0xFE) + bytes(100 * MANY)),
        ("JPEG", b"\xff\0" * MANY),
        ("JPEG", PHOTOSHOP * 2),
        ("JPEG", FRAME * 2),
        ("JPEG", TABLES * 2),
        ("JPEG", EXIF * 100),
        ("JPEG", EXIF * 40 + SMALL_EXIF * 500),
    ],
)
def test_a_file_of_many_parts_is_refused_before_they_are_read(format: str, parts: bytes) -> None:
    content = with_parts(format, parts)
    with pytest.raises(InvalidRequest, match=f"over {MOST_PARTS} chunks.*metadata") as caught:
        probe(content, name="image_url")
    assert caught.value.field == "image_url"


@pytest.mark.parametrize("part", [b"abCd", b"IDAT", b"fdAT"])
def test_parts_after_the_first_pixels_count_too(part: bytes) -> None:
    content = file_of("PNG")
    with pytest.raises(InvalidRequest, match="chunks"):
        decode(content[:-12] + png_chunk(part) * (20 * MANY) + content[-12:])


@pytest.mark.parametrize(
    ("format", "part"),
    [
        ("PNG", png_chunk(b"abCd")),
        ("PNG", PROFILE),
        ("JPEG", segment(0xFE)),
        ("JPEG", b"\xff"),
        ("JPEG", segment(0xFE) + bytes(100_000)),
        ("JPEG", PHOTOSHOP),
        ("JPEG", SMALL_EXIF),
    ],
)
def test_a_header_without_end_keeps_nobody_waiting(format: str, part: bytes) -> None:
    content = with_parts(format, part * (24_000_000 // len(part)))
    start = time.thread_time()
    with pytest.raises(InvalidRequest, match="chunks"):
        probe(content)
    assert time.thread_time() - start < 0.2


def test_metadata_of_real_files_is_accepted() -> None:
    icc = b"".join(
        segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 255)) + bytes(65_000)) for i in range(1, 256)
    )
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000))
    more_xmp = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) * 100
    resources = b"8BIM\x04\x04\0\0\0\0\0\x08" + bytes(8)
    photoshop = segment(0xED, b"Photoshop 3.0\0" + resources * 100)
    filled = b"\xff" * 5000
    for parts in (icc, xmp + more_xmp, photoshop, EXIF * 16, segment(0xFE, b"a") * 500, filled):
        content = with_parts("JPEG", parts)
        assert probe(content).width == 30 and decode(content).shape == (20, 30, 3)
    text = b"".join(png_chunk(b"tEXt", b"key%d\0value" % i) for i in range(2000))
    packed = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000))) * 200
    for parts in (text, packed, PROFILE, png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>")):
        for at in (None, -12):
            content = with_parts("PNG", parts, at)
            assert probe(content).width == 30 and decode(content).shape == (20, 30, 3)


def test_pixels_in_many_chunks_are_accepted() -> None:
    content = file_of("PNG")
    size = struct.unpack(">I", content[33:37])[0]
    pixels = content[41 : 41 + size]
    rows = b"".join(png_chunk(b"IDAT", pixels[i : i + 1]) for i in range(size))
    empty = png_chunk(b"IDAT") * (8 * MOST_PARTS)
    large = png_chunk(b"abCd", bytes(5000)) * 10
    assert np.array_equal(
        decode(content[:33] + large + rows + empty + content[-12:]), decode(content)
    )
