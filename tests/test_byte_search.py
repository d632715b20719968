"""Bytes are counted and found as ``bytes`` itself does, across stretches too."""

from __future__ import annotations

import random
import re

import pytest

from kestrel.byte_search import _STRETCH, count_of, places_of

LENGTHS = [0, 1, 4, 1000, _STRETCH - 1, _STRETCH, _STRETCH + 3, 3 * _STRETCH + 17]


@pytest.mark.parametrize("length", LENGTHS)
def test_counts_and_places_are_those_of_bytes(length):
    chance = random.Random(length)
    data = bytearray(chance.choices(b"Exif\0,[{ab", k=length))
    for at in (0, _STRETCH - 1, _STRETCH - 4, _STRETCH, 2 * _STRETCH - 2, length - 5):
        if 0 <= at <= length - 5:
            data[at : at + 5] = b"Exif\0"
    data = bytes(data)
    assert count_of(data, b",[{") == sum(map(data.count, (b",", b"[", b"{")))
    found = [match.start() for match in re.finditer(rb"(?=Exif\0)", data)]
    assert list(places_of(data, b"Exif\0")) == found


def test_overlapping_words_are_found_each():
    assert list(places_of(b"aaaa", b"aa")) == [0, 1, 2]
