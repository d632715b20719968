"""Pictures from strangers: cut, damaged, oversized, oddly encoded."""

from __future__ import annotations

import io
import random
import struct
import time
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

import kestrel.image as image_module
from kestrel import image_parts
from kestrel.api import InvalidRequest, RequestError, TooLarge
from kestrel.config import Limits
from kestrel.image import check_array, decode, plain_jpeg, probe
from kestrel.image_parts import MOST_PARTS, MOST_SCANS

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


@pytest.mark.parametrize("dispose", [1, 2])
def test_the_header_of_an_animation_makes_no_canvas_of_its_size(
    monkeypatch: pytest.MonkeyPatch, dispose: int
) -> None:
    """Pillow before 13 fills one to clear the first frame away: 16 GB for a hundred bytes."""
    two = [picture(), Image.new("RGB", (30, 20))]
    small = encoded(two[0], "PNG", save_all=True, append_images=two[1:], disposal=dispose)
    made = []
    monkeypatch.setattr(Image.core, "fill", lambda *arguments: made.append(arguments))
    size = struct.pack(">II", 65_000, 65_000)
    frame = bytes(4) + size + bytes(8) + b"\0\1\0\1" + bytes([dispose, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size + b"\x08\6\0\0\0")
    bomb += png_chunk(b"acTL", struct.pack(">II", 2, 0)) + png_chunk(b"fcTL", frame)
    bomb += png_chunk(b"IDAT", zlib.compress(b"\0"))
    with pytest.raises(TooLarge, match="65000 x 65000"):
        probe(bomb)
    assert not made
    opened, _ = image_module._open(small, Limits(), "image")
    assert opened.info["disposal"] == 0
    assert np.array_equal(decode(small), np.asarray(two[0]))
    assert not made


def test_pixel_limit_is_the_configured_one() -> None:
    assert probe(file_of("PNG"), Limits(max_image_pixels=600)).width == 30
    with pytest.raises(TooLarge, match="30 x 20"):
        probe(file_of("PNG"), Limits(max_image_pixels=599))


def test_pixel_limit_is_for_arrays_too() -> None:
    array = np.asarray(picture())
    assert np.array_equal(decode(array, Limits(max_image_pixels=600)), array)
    for read in (decode, check_array):
        with pytest.raises(TooLarge, match="30 x 20 pixels; the limit is 599"):
            read(array, Limits(max_image_pixels=599))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pillow_s_own_limit_warns_of_nothing_and_no_filter_is_touched(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters of warnings belong to the process: set and set back in two threads at once, they stay
    set for good."""
    content = file_of(format)
    with warnings.catch_warnings(), monkeypatch.context() as patched:
        warnings.simplefilter("error")
        patched.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        patched.setattr(image_module, "_BAND_PIXELS", 300)
        patched.setattr(warnings, "catch_warnings", lambda **_: pytest.fail("it sets filters"))
        assert probe(content).width == 30 and decode(content).shape == (20, 30, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_refusal_of_any_size_names_size_and_limit(format: str) -> None:
    content = bytearray(file_of(format))
    at, size = (16, ">II") if format == "PNG" else (content.index(b"\xff\xc0") + 5, ">HH")
    struct.pack_into(size, content, at, 60_000, 60_000)
    if format == "PNG":
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(TooLarge, match="60000 x 60000 pixels; the limit is 100000000"):
        probe(bytes(content))


def test_several_pictures_in_one_jpeg_give_the_first_without_a_look_at_their_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = encoded(picture(), "MPO", save_all=True, append_images=[picture(16, 16)])
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format == "MPO"
        first = np.asarray(opened.convert("RGB"))
    monkeypatch.setattr(
        TiffImagePlugin.ImageFileDirectory_v2, "load", lambda *_: pytest.fail("Pillow reads it")
    )
    assert probe(content).format == "JPEG"
    for end in (b"", b"\0"):
        assert np.array_equal(decode(content + end), first)


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
        ("JPEG", SMALL_EXIF * MANY),
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


def of_scans(frame: int, scans: int, side: int = 8, between: bytes = b"") -> bytes:
    """A JPEG of three channels, with those scans of the first one: each breaks off at once, which
    decoders warn of and go on."""
    channels = 3
    start = struct.pack(">BHHB", 8, side, side, channels)
    start += b"".join(bytes([number + 1, 0x11, 0]) for number in range(channels))
    one_code = bytes([1] + [0] * 15)
    tables = segment(0xDB, b"\0" + bytes([1] * 64)) + segment(frame, start)
    tables += segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\0")
    first, last = (0, 63) if frame == 0xC0 else (0, 0)
    scan = segment(0xDA, bytes([1, 1, 0, first, last, 0])) + b"\0"
    return b"\xff\xd8" + tables + (scan + between) * scans + b"\xff\xd9"


@pytest.mark.parametrize("frame", [0xC0, 0xC2])
@pytest.mark.parametrize(
    "between",
    [b"", segment(0xFE, b"a"), b"\xff\0" * 9 + b"\xff\xd3"],
    ids=["nothing", "a comment", "pixels"],
)
def test_a_jpeg_of_many_scans_is_refused_before_they_are_decoded(
    frame: int, between: bytes
) -> None:
    # Each of them makes decoders go through every pixel again: two million would fit into a body.
    assert decode(of_scans(frame, MOST_SCANS, between=between)).shape == (8, 8, 3)
    content = of_scans(frame, MOST_SCANS + 1, between=between)
    with pytest.raises(InvalidRequest, match=f"over {MOST_SCANS} scans") as caught:
        probe(content, name="image_url")
    assert caught.value.field == "image_url"


def test_very_many_parts_between_scans_are_refused_too() -> None:
    content = of_scans(0xC2, 2, between=segment(0xFE) * 1_000_000 + b"\xff\xda" * MOST_SCANS)
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=f"over {MOST_PARTS} chunks"):
        probe(content)
    assert time.process_time() - began < 1


def test_what_only_looks_like_scans_is_none() -> None:
    """A film behind the picture, as telephones write it, or other pictures within its metadata."""
    content = encoded(picture(), "JPEG", progressive=True)
    looks = b"\xff\xda" * 2 * MOST_SCANS
    assert probe(content[:2] + segment(0xFE, looks) + content[2:]).width == 30
    assert decode(content + looks).shape == (20, 30, 3)


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


def exif_block(
    entries: list[tuple[int, int, int, bytes]], order: str = "<", rest: bytes = b""
) -> bytes:
    """One directory of (tag, type, count, four bytes), and what stands behind it."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHL4s", *e) for e in entries) + bytes(4) + rest


def with_exif(format: str, block: bytes) -> bytes:
    """A picture that has it, in as many segments of a JPEG as it takes."""
    if format == "PNG":
        return with_parts(format, png_chunk(b"eXIf", block))
    if format == "late PNG":
        return with_parts("PNG", png_chunk(b"eXIf", block), -12)
    if format == "text in PNG":
        text = (
            f"Raw profile type exif\0\nexif\n{len(block):8}\n{(b'Exif' + bytes(2) + block).hex()}"
        )
        return with_parts("PNG", png_chunk(b"tEXt", text.encode()))
    if format == "WEBP":
        return encoded(picture(), "WEBP", lossless=True, exif=block)
    parts = [block[i : i + 60_000] for i in range(0, len(block), 60_000)]
    return with_parts(format, b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts))


EXIF_PLACES = ["JPEG", "PNG", "late PNG", "text in PNG", "WEBP"]
INTEGERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}


def orientation_entries(order: str, start: int) -> list[tuple[list, bytes, int]]:
    """Entries that tell an orientation in every way, what they point to at ``start``, and what
    Pillow takes them for."""
    found = []
    for kind, letter in INTEGERS.items():
        for count in (1, 2, 5):
            data = struct.pack(order + letter * count, *([6, 3, 8, 1, 1][:count]))
            inline = data if len(data) <= 4 else struct.pack(order + "L", start)
            entry = (ORIENTATION, kind, count, inline.ljust(4, b"\0"))
            found.append(([entry], data if len(data) > 4 else b"", 6))
    short = struct.pack(order + "HH", 6, 0)
    other = (0x010E, 2, 8, struct.pack(order + "L", start))
    unknown = (0x010E, 99, 8, struct.pack(order + "L", 2**31))
    entry = (ORIENTATION, 3, 1, short)
    found += [([other, unknown, entry], bytes(8), 6), ([entry, other], bytes(8), 6)]
    found += [([(ORIENTATION, 3, 1, struct.pack(order + "HH", n, 0))], b"", 1) for n in (0, 9, 600)]
    # Text, bytes and fractions are no orientation, and an entry without data is none.
    found += [([(ORIENTATION, kind, 1, b"\6\0\0\0")], b"", 1) for kind in (1, 2, 7, 11)]
    found += [([(ORIENTATION, 5, 1, struct.pack(order + "L", start))], b"\1\0\0\0" * 2, 1)]
    found += [([(ORIENTATION, 3, 0, short)], b"", 1), ([], b"", 1)]
    # What is cut off ends the directory.
    cut = (0x010E, 2, 8, struct.pack(order + "L", start))
    return [*found, ([cut, entry], bytes(7), 1)]


@pytest.mark.parametrize("place", EXIF_PLACES)
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_what_pillow_reads_and_pillow_reads_no_exif(
    place: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for entries, rest, expected in orientation_entries(order, 8 + 2 + 12 + 4):
        if len(entries) > 1:
            start = 8 + 2 + 12 * len(entries) + 4
            entries = [
                (tag, kind, count, struct.pack(order + "L", start) if kind == 2 else data)
                for tag, kind, count, data in entries
            ]
        content = with_exif(place, exif_block(entries, order, rest))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of entries that are broken
            with Image.open(io.BytesIO(content)) as opened:
                seen = ImageOps.exif_transpose(opened).convert("RGB")
        assert (seen.width > 20) == (expected == 1)
        files.append((content, np.asarray(seen)))

    def read(*_: Any) -> None:
        raise AssertionError("Pillow reads a directory")

    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", read)
    for content, pixels in files:
        header = probe(content)
        assert (header.height, header.width) == pixels.shape[:2]
        for end in (b"", b"\0"):  # with another end than a JPEG has, Pillow decodes it
            assert np.array_equal(decode(content + end), pixels)


def test_a_jpeg_is_searched_for_the_name_of_exif_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A search goes through all of the file, while the process that checks requests waits.
    searched = []
    search = image_parts.places_of

    def counted(data: bytes, word: bytes) -> Any:
        searched.append(word)
        return search(data, word)

    monkeypatch.setattr(image_parts, "places_of", counted)
    turn = exif_block([(ORIENTATION, 3, 1, b"\6\0\0\0")])
    for content, width in ((file_of("JPEG"), 30), (with_exif("JPEG", turn), 20)):
        searched.clear()
        assert probe(content).width == width
        assert searched == [b"Exif\0"]


@pytest.mark.parametrize("part", [b"Ex", b"Exif", b"Exif\0", b"\xff\xe1\0\x08Exif\0\0"])
def test_names_of_exif_without_end_keep_nobody_waiting(part: bytes) -> None:
    content = file_of("JPEG")
    content = content[:-2] + part * (16_000_000 // len(part)) + content[-2:]
    began = time.process_time()
    if part.endswith(b"\0"):
        with pytest.raises(InvalidRequest, match=f"over {MOST_PARTS} chunks") as caught:
            probe(content, name="image_url")
        assert caught.value.field == "image_url"
    else:
        assert probe(content).width == 30
    assert time.process_time() - began < 0.4


def test_orientation_of_xmp_holds_where_exif_has_none() -> None:
    def xmp(form: str) -> bytes:
        return b"http://ns.adobe.com/xap/1.0/\0<r tiff:Orientation%s" % form.encode()

    other = exif_block([(0x0128, 3, 1, b"\2\0\0\0")])
    own = exif_block([(ORIENTATION, 3, 1, b"\3\0\0\0")])
    for form, block, width in [
        ('="6"/>', None, 20),
        (">6<", other, 20),
        ('="6"/>', own, 30),
        ('="6"/>', b"no TIFF header", 30),
        ('="x"', None, 30),
    ]:
        exif = b"" if block is None else segment(0xE1, b"Exif\0\0" + block)
        content = with_parts("JPEG", exif + segment(0xE1, xmp(form)))
        assert probe(content).width == width
        text = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(form)[29:])
        exif = b"" if block is None else png_chunk(b"eXIf", block)
        assert probe(with_parts("PNG", exif + text)).width == width


@pytest.mark.parametrize("place", EXIF_PLACES)
def test_entries_of_exif_that_are_there_count(place: str) -> None:
    entry = (0x010E, 2, 2_000_000, struct.pack("<L", 8))
    many = with_exif(place, exif_block([entry] * (MOST_PARTS + 1)))
    for read in (probe, decode):
        with pytest.raises(InvalidRequest, match=f"over {MOST_PARTS} chunks.*metadata"):
            read(many)
    named = bytearray(exif_block([(ORIENTATION, 3, 1, b"\6\0\0\0")]))
    named[8:10] = b"\xff\xff"
    assert probe(with_exif(place, bytes(named))).width == 20


@pytest.mark.parametrize("place", EXIF_PLACES)
def test_an_entry_of_exif_that_says_to_be_larger_than_all_of_it_is_passed_over(place: str) -> None:
    larger = (0x010E, 2, 10**6, struct.pack("<L", 8))
    turn = (ORIENTATION, 3, 1, b"\6\0\0\0")
    assert probe(with_exif(place, exif_block([larger, turn]))).width == 20


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
