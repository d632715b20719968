"""Qt's resource files (``.rcc``, what ``rcc --binary`` writes): the files that are in one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

DIRECTORY, PLAIN = 2, 0
"""Flags of an entry: a folder; a file stored as it is."""


def stored_files(resource: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file that is stored uncompressed, as pictures are."""
    raw = resource.read_bytes()
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", raw)
    if magic != b"qres":
        raise ValueError(f"{resource} is no Qt resource file")
    entry_size = 22 if version >= 2 else 14

    def walk(number: int, path: str) -> Iterator[tuple[str, bytes]]:
        entry = tree + number * entry_size
        flags, first, second = struct.unpack_from(">4xHII", raw, entry)
        if flags & DIRECTORY:
            for child in range(second, second + first):
                (name,) = struct.unpack_from(">I", raw, tree + child * entry_size)
                (length,) = struct.unpack_from(">H", raw, names + name)
                start = names + name + 6  # past the length and a hash
                yield from walk(
                    child, f"{path}/{raw[start : start + 2 * length].decode('utf-16-be')}"
                )
        elif flags == PLAIN:
            (size,) = struct.unpack_from(">I", raw, contents + second)
            start = contents + second + 4
            yield path, raw[start : start + size]

    return walk(0, "")
