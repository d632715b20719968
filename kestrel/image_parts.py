"""The parts of a picture's file: how many there are, counted before Pillow reads them one by one in
Python, and the EXIF blocks that it is not to read, or would overlook.

A file may consist of nothing but empty chunks or markers: a few megabytes of them take seconds, in
which the process that checks a request does nothing else. libwebp reads a WebP's by itself, fast.
Or a JPEG of nothing but scans: decoders go through the whole picture for each, and none of them can
be stopped.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

from kestrel.byte_search import places_of
from kestrel.errors import InvalidRequest

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
MOST_PARTS = 4096
"""Parts at most, about a microsecond of Pillow's time each; files of cameras and editors have up to
some hundreds."""
MOST_SCANS = 100
"""Scans of a JPEG at most, as many as Skia takes too. Encoders make up to 20; one of a dozen bytes
has libjpeg go through every pixel again, 20 to 50 ms for 16 megapixels."""
_IN_PASSING = 1 / 16
"""What a byte between two markers counts, or a small chunk of pixels, of which some encoders make
one a row."""
_LARGE = 4096
"""Bytes of a chunk of pixels that counts nothing."""
_PROFILE = 256
"""What an ICC profile of a PNG counts: a megabyte may come out of each. Texts have a bound in
Pillow."""
_DISPOSAL = 24
"""Where a frame control chunk of a PNG says what becomes of the frame."""
_FILL = re.compile(rb"\xff+")
_EXIF_NAME = b"Exif\0"
_START_OF_SCAN, _EXIF, _PHOTOSHOP = 0xDA, 0xE1, 0xED
_ALONE = (0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE), 0x00)
"""Markers without a length, and the escaped byte."""
_LISTS = (*(code for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC)), 0xDB, 0xDE)
"""Frames and quantization tables: Pillow goes through what they list."""
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
"""Frames of which libjpeg reads one scan alone, where that has all of their channels."""
_END_OF_IMAGE = 0xD9
_WITH_LENGTH = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""What libjpeg takes for the next marker wherever it looks for one, but for those of no length that
it passes over; the end mark too."""


def check_parts(data: bytes, name: str) -> None:
    """``InvalidRequest`` where a JPEG or PNG has over ``MOST_PARTS``, or a JPEG ``MOST_SCANS``. Of
    a JPEG the parts before its pixels count, and by themselves the markers before its last scan. A
    file that is neither, or is broken, passes: reading it will tell."""
    if data.startswith(JPEG):
        check_count(_jpeg_parts(data), name)
        _check_scans(data, name)
    elif data.startswith(PNG):
        check_count(_png_parts(data), name)


def check_count(parts: float, name: str) -> None:
    """``InvalidRequest`` for more than ``MOST_PARTS``."""
    if parts > MOST_PARTS:
        raise InvalidRequest(
            f"{name} has over {MOST_PARTS} chunks, markers or entries beside its pixels; "
            "save it without metadata",
            name,
        )


def jpeg_exif(data: bytes) -> bytes | None:
    """The EXIF block of a JPEG, which may be spread over several segments; None without one. For a
    file that ``check_parts`` has passed, and in which ``without_exif`` found a name."""
    blocks = [
        data[at + 8 : at + size]
        for code, at, size in _jpeg_markers(data)
        if code == _EXIF and data.startswith(b"Exif\0\0", at + 2)
    ]
    return b"".join(blocks) if blocks else None


def without_exif(data: bytes, name: str) -> tuple[io.BytesIO, bool]:
    """The file, of a JPEG without EXIF blocks that Pillow knows as such, as it reads them at once;
    and whether there was the name of one. ``InvalidRequest`` where it stands in the file over
    ``MOST_PARTS`` times.

    The name is changed wherever it may stand as one: that Pillow sees the same markers as
    ``jpeg_exif`` need not be true.
    """
    file, named = io.BytesIO(data), False
    places = places_of(data, _EXIF_NAME) if data.startswith(JPEG) else ()
    for number, at in enumerate(places, 1):
        check_count(number, name)
        if data[at - 4 : at - 2] == b"\xff\xe1":
            file.seek(at)
            file.write(b"none")
            named = True
    file.seek(0)
    return file, named


def without_disposal(data: bytes, file: io.BytesIO) -> None:
    """Have ``file``, which holds ``data``, say that no frame of an animated PNG is cleared away
    after it: with the first one's header Pillow before 13 makes the canvas that is to clear it, of
    whatever size the picture is said to have. For one that ``check_parts`` has passed."""
    for kind, start, size in _png_chunks(data) if data.startswith(PNG) else ():
        if kind == b"IDAT":
            break
        if kind == b"fcTL" and size > _DISPOSAL and start + size <= len(data):
            control = data[start : start + size]
            control = control[:_DISPOSAL] + b"\0" + control[_DISPOSAL + 1 :]
            file.seek(start)
            file.write(control + struct.pack(">I", zlib.crc32(kind + control)))
    file.seek(0)


def late_exif(data: bytes) -> bytes | None:
    """The EXIF block of a PNG that has it behind its pixels, where it may be too; else None. For a
    file that ``check_parts`` has passed."""
    # Mostly there is none, which is found out faster than by going through the chunks.
    if not data.startswith(PNG) or b"eXIf" not in data:
        return None
    pixels = False
    for kind, start, size in _png_chunks(data):
        pixels = pixels or kind == b"IDAT"
        if kind == b"eXIf":
            return data[start : start + size] if pixels else None
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and size of each chunk of a PNG before the end mark."""
    at = len(PNG)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            break
        yield kind, at + 8, size
        at += 12 + size


def _png_parts(data: bytes) -> float:
    parts = 0.0
    for kind, _, size in _png_chunks(data):
        if kind in (b"IDAT", b"fdAT"):
            parts += 0 if size >= _LARGE else _IN_PASSING
        else:
            parts += _PROFILE if kind == b"iCCP" else 1
        if parts > MOST_PARTS:
            break
    return parts


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Code, start and size of each marker's segment, its length included, of a JPEG before its
    pixels; of markers without one the size is 0. The last is where Pillow stops too."""
    at = len(JPEG) - 1
    while True:
        marker = _FILL.search(data, at)
        if marker is None or marker.end() == len(data):
            return
        code, at = data[marker.end()], marker.end() + 1
        size = 0 if code in _ALONE else max(2, int.from_bytes(data[at : at + 2], "big"))
        yield code, at, size
        if _is_last(code):
            return
        at = min(at + size, len(data))


def _check_scans(data: bytes, name: str) -> None:
    scans = 0
    for number, code in enumerate(_codes_for_libjpeg(data)):
        check_count(number, name)
        scans += code == _START_OF_SCAN
        if scans > MOST_SCANS:
            raise InvalidRequest(
                f"{name} is a JPEG of over {MOST_SCANS} scans; save it with fewer", name
            )


def _codes_for_libjpeg(data: bytes) -> Iterator[int]:
    """Codes of a JPEG's markers with a length, those between its scans too, as far as libjpeg goes.
    ``_jpeg_markers`` goes as Pillow does, which need not be the same."""
    at, channels = 2, 256
    while (marker := _WITH_LENGTH.search(data, at)) is not None:
        code, at = data[marker.end() - 1], marker.end()
        if code == _END_OF_IMAGE:
            return
        yield code
        size = int.from_bytes(data[at : at + 2], "big")
        if code in _SEQUENTIAL and size > 7:
            channels = int.from_bytes(data[at + 7 : at + 8], "big")
        elif code == _START_OF_SCAN and int.from_bytes(data[at + 2 : at + 3], "big") >= channels:
            return
        at += max(2, size)


def _is_last(code: int) -> bool:
    return code == _START_OF_SCAN or (code < 0xC0 and code not in _ALONE)


def _jpeg_parts(data: bytes) -> float:
    parts, end = 0.0, len(JPEG) - 1
    for code, at, size in _jpeg_markers(data):
        parts += 1 + (at - 2 - end) * _IN_PASSING
        end = min(at + size, len(data))
        if _is_last(code) or parts > MOST_PARTS:
            return parts
        if code in _LISTS:
            parts += size / 3
        elif code == _PHOTOSHOP and data.startswith(b"Photoshop 3.0\0", at + 2):
            parts += data.count(b"8BIM", at, end)
    return parts + (len(data) - end) * _IN_PASSING
