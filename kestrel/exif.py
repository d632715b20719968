"""The orientation in an EXIF block, read without the rest of it.

Pillow copies the data of every entry, and entries may share their bytes: of a megabyte of EXIF it
can make gigabytes.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_ORIENTATION = 0x0112
_PREFIX = re.compile(rb"(?:Exif\0\0){0,2}")
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}
"""By a TIFF header's start; the latter two are wrong and are found too."""
_ENTRY = "HHL4s"
_ENTRY_BYTES = 12
_IN_PLACE = 4
"""Bytes of data that stand in the entry itself; of more it has the offset."""
_UNIT_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8,
}  # fmt: skip
"""By TIFF's data type; entries of another are passed over."""
_INTEGERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}


@dataclass(frozen=True)
class Directory:
    """The first directory of an EXIF block, which describes the picture itself."""

    block: memoryview
    """From the TIFF header on."""
    byte_order: str
    start: int
    """Where the first entry is."""
    entries: int
    """Those that the block has in full."""


def first_directory(exif: bytes) -> Directory | None:
    """None of an empty block; ``ValueError`` where it has no TIFF header."""
    prefix = _PREFIX.match(exif)
    block = memoryview(exif)[prefix.end() if prefix else 0 :]
    if not block:
        return None
    byte_order = _BYTE_ORDERS.get(bytes(block[:4]))
    if byte_order is None or len(block) < 8:
        raise ValueError("EXIF without a TIFF header")
    (start,) = struct.unpack_from(byte_order + "L", block, 4)
    if start + 2 > len(block):
        return Directory(block, byte_order, len(block), 0)
    (named,) = struct.unpack_from(byte_order + "H", block, start)
    return Directory(
        block, byte_order, start + 2, min(named, (len(block) - start - 2) // _ENTRY_BYTES)
    )


def exif_orientation(found: Directory) -> int | None:
    """The number that the orientation entry has, which need not be one of 1 to 8; 0 where it has
    none, and None without one. Entries behind one whose data is cut off are not looked at."""
    block, end = found.block, found.start + found.entries * _ENTRY_BYTES
    for at in range(found.start, end, _ENTRY_BYTES):
        tag, kind, count, data = struct.unpack_from(found.byte_order + _ENTRY, block, at)
        size = count * _UNIT_BYTES.get(kind, 0)
        if size > len(block):
            continue
        if size > _IN_PLACE:
            (offset,) = struct.unpack(found.byte_order + "L", data)
            if offset + size > len(block):
                return None
            data = block[offset:]
        if tag == _ORIENTATION and size:
            if kind not in _INTEGERS:
                return 0
            return int(struct.unpack_from(found.byte_order + _INTEGERS[kind], data)[0])
    return None
