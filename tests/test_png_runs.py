"""A mask written from its runs is the picture that zlib would have been given, byte for byte."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from kestrel.overlay import decode_mask
from kestrel.seg_refiner import _encode_mask_png_base64, png
from kestrel.seg_refiner.deflate import zlib_of_runs


def rows(mask: np.ndarray) -> bytes:
    """Filter byte and pixels of each row, as a PNG holds them."""
    return np.pad(mask, ((0, 0), (1, 0))).tobytes()


def from_runs(content: bytes, value: int) -> bytes:
    bits = np.frombuffer(content, np.uint8) != 0
    edges = np.flatnonzero(np.diff(bits.astype(np.int8), prepend=0, append=0))
    return zlib_of_runs(edges.astype(np.int64), len(content), value)


def runs(*lengths: int, value: int = 255) -> bytes:
    """Zeros, then the value, then zeros ..."""
    return b"".join(bytes([value * (i & 1)]) * n for i, n in enumerate(lengths))


@pytest.mark.parametrize("value", [1, 143, 144, 255])
@pytest.mark.parametrize(
    "length", [*range(1, 20), 114, 115, 257, 258, 259, 260, 261, 262, 516, 775]
)
def test_runs_of_every_kind_of_length(length: int, value: int) -> None:
    for lengths in ((length,), (length, 1), (1, length), (1, length, 1), (length, length, length)):
        content = runs(*lengths, value=value)
        assert zlib.decompress(from_runs(content, value)) == content


def test_every_match_length_in_one_stream() -> None:
    content = runs(*range(1, 600))
    assert zlib.decompress(from_runs(content, 255)) == content


def test_symbols_of_very_unequal_counts_keep_their_codes_within_the_format_s_limit() -> None:
    # Fibonacci's numbers as counts make the deepest trees: 20 lengths, each with its own symbol.
    counts = [1, 1]
    while len(counts) < 20:
        counts.append(counts[-2] + counts[-1])
    matches = [*range(3, 11), *range(11, 19, 2), *range(19, 35, 4), *range(35, 67, 8)]
    content = runs(*np.repeat(matches, counts) + 1)
    assert zlib.decompress(from_runs(content, 255)) == content


def test_long_blank_streams() -> None:
    for size in (1, 2, 255, 10**7 + 1):
        assert zlib.decompress(from_runs(bytes(size), 255)) == bytes(size)


def test_checksum_holds_for_the_largest_picture() -> None:
    """zlib compares the Adler-32 itself; sums of a hundred million bytes must not overflow."""
    size = 100_000_000
    edges = np.array([1, size // 2, size // 2 + 1, size], np.int64)
    stream = zlib_of_runs(edges, size, 255)
    content = np.full(size, 255, np.uint8)
    content[[0, size // 2]] = 0
    assert struct.unpack(">I", stream[-4:])[0] == zlib.adler32(content.data)


@pytest.mark.parametrize("seed", range(40))
def test_both_ways_of_writing_give_the_same_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    mask = (rng.random((height, width)) < rng.choice([0, 0.001, 0.1, 0.5, 1])).astype(np.uint8)
    content = rows(mask * np.uint8(255))
    written = zlib_of_runs(png._edges(mask), len(content), 255)
    assert zlib.decompress(written) == zlib.decompress(png._deflated_rows(mask, 255)) == content


@pytest.mark.parametrize("limit", [1e-9, 1e9])
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_masks_come_back_whichever_way_they_were_written(
    monkeypatch: pytest.MonkeyPatch, limit: float, dtype: type
) -> None:
    monkeypatch.setattr(png, "RUNS_WORTH_IT", limit)
    y, x = np.mgrid[:120, :151]
    for top in (1, 255):
        mask = (((x - 70) ** 2 + (y - 60) ** 2 < 50**2) * top).astype(dtype)
        for view in (mask, mask[::-1, ::2], mask[:1], mask[:, 70:71], mask.T):
            again = decode_mask(_encode_mask_png_base64(view))
            assert np.array_equal(again, view != 0)


def test_writing_runs_takes_no_more_bytes_than_zlib() -> None:
    y, x = np.mgrid[:1213, :1546]
    mask = ((x - 700) ** 2 + (y - 600) ** 2 < 400**2).astype(np.uint8)
    written = zlib_of_runs(png._edges(mask), 1213 * 1547, 255)
    assert len(written) <= 1.02 * len(png._deflated_rows(mask, 255))
