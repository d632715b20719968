"""A zlib stream straight from the runs of a two-valued picture: no byte of it is ever laid out.

What zlib's own run-length strategy gives (RFC 1951: each run a literal and matches at distance 1,
one block of Huffman codes made for them), at a cost by run instead of by pixel.
"""

from __future__ import annotations

import functools
import heapq
import struct

import numpy as np

_LONGEST = 258  # bytes of the longest match
_END = 256  # symbol that ends a block; literals below, match lengths above
_ADLER_MODULUS = 65521  # RFC 1950
_RARE = 512
"""No symbol counts as rarer than one in this many: a code is then at most 14 bits (Buro, "On the
maximum length of Huffman codes", 1993: log of 512 to the base of the golden ratio is 13)."""


def zlib_of_runs(edges: np.ndarray, size: int, value: int) -> bytes:
    """zlib stream (RFC 1950) of ``size`` bytes that are ``value`` in some runs and 0 elsewhere.

    ``edges``: int64 [2 n], ascending, begin and end (exclusive) of each run in turn. Byte 0 is not
    in a run, and no two runs touch.
    """
    lengths = np.diff(edges, prepend=0, append=size)
    if lengths[-1] == 0:  # the last run goes to the end
        lengths = lengths[:-1]
    symbols, extra, extra_bits, counts = _tokens(lengths, value)
    used = np.bincount(symbols, counts, minlength=_END + 1).astype(np.int64)
    used[_END] = 1
    sizes = _code_sizes(used)
    codes = _canonical(sizes)

    # A match's distance code follows its extra bits; there is one code only, a bit that is 0.
    bits = codes[symbols] | extra << sizes[symbols]
    widths = sizes[symbols] + extra_bits + (symbols > _END)
    head, head_widths = _block_head(sizes)
    content = _pack(
        np.concatenate((head, np.repeat(bits, counts), codes[_END:][:1])),
        np.concatenate((head_widths, np.repeat(widths, counts), sizes[_END:][:1])),
    )
    return b"\x78\x01" + content + struct.pack(">I", _adler(edges, size, value))


def _tokens(
    lengths: np.ndarray, value: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Symbol, extra bits, their number, and how often in a row; three for each run, int64.

    The first run is of zeros, then they alternate. A run is a literal, the longest matches, and
    what is left: nothing, a literal, two, or a match.
    """
    literals = np.zeros(len(lengths), np.int64)
    literals[1::2] = value
    longest, left = np.divmod(lengths - 1, _LONGEST)
    symbols, extra, extra_bits = (table[left] for table in _length_codes())
    short = left < 3
    symbols = np.where(short, literals, symbols)
    zero, one = np.zeros_like(left), np.ones_like(left)
    columns = (
        (literals, np.full_like(left, 285), symbols),
        (zero, zero, extra),
        (zero, zero, extra_bits),
        (one, longest, np.where(short, left, 1)),
    )
    first, second, third, fourth = (np.stack(c, axis=1).ravel() for c in columns)
    return first, second, third, fourth


@functools.cache
def _length_codes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By match length, 0 to 258: symbol, extra bits, how many (RFC 1951, 3.2.5)."""
    symbols, extra, extra_bits = np.zeros((3, _LONGEST + 1), np.int64)
    length = 3
    for symbol in range(257, 285):
        bits = max(0, (symbol - 261) // 4)
        for offset in range(min(1 << bits, _LONGEST + 1 - length)):
            symbols[length], extra[length], extra_bits[length] = symbol, offset, bits
            length += 1
    symbols[_LONGEST], extra[_LONGEST], extra_bits[_LONGEST] = 285, 0, 0
    return symbols, extra, extra_bits


def _code_sizes(used: np.ndarray) -> np.ndarray:
    """Bits of each symbol's Huffman code, 0 for one that is not used; int64."""
    sizes = [0] * len(used)
    least = int(used.sum()) // _RARE
    # The position breaks ties: symbols are not compared.
    heap = [(max(int(used[s]), least), s, [s]) for s in np.flatnonzero(used).tolist()]
    heapq.heapify(heap)
    while len(heap) > 1:
        count_a, order, a = heapq.heappop(heap)
        count_b, _, b = heapq.heappop(heap)
        for symbol in a + b:
            sizes[symbol] += 1
        heapq.heappush(heap, (count_a + count_b, order, a + b))
    return np.array(sizes)


def _canonical(sizes: np.ndarray) -> np.ndarray:
    """Codes of those sizes (RFC 1951, 3.2.2), first bit lowest, as they are packed; int64."""
    codes = np.zeros_like(sizes)
    code = previous = 0
    for size, symbol in sorted((int(sizes[s]), int(s)) for s in np.flatnonzero(sizes)):
        code <<= size - previous
        codes[symbol] = int(f"{code:0{size}b}"[::-1], 2)
        code, previous = code + 1, size
    return codes


def _block_head(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fields and widths that begin a final block with codes of those sizes (RFC 1951, 3.2.7)."""
    # The sizes are themselves coded: here 0 to 14 and "11 to 138 zeros" (18), in 4 bits each.
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    fields = [(1, 1), (2, 2), (len(sizes) - 257, 5), (0, 5), (len(order) - 4, 4)]
    fields += [(0 if symbol in (16, 17, 15) else 4, 3) for symbol in order]
    spell = _canonical(np.array([4] * 15 + [0, 0, 0, 4]))
    # One distance code, of one bit.
    left = [*sizes.tolist(), 1]
    at = 0
    while at < len(left):
        used = at
        while used < min(len(left), at + 138) and not left[used]:
            used += 1
        if used - at >= 11:
            fields += [(int(spell[18]), 4), (used - at - 11, 7)]
            at = used
        else:
            fields.append((int(spell[left[at]]), 4))
            at += 1
    values, widths = np.array(fields, np.int64).T
    return values, widths


def _pack(values: np.ndarray, widths: np.ndarray) -> bytes:
    """The fields one after another, each from its lowest bit on, low bits of a byte first."""
    ends = np.cumsum(widths)
    within = np.arange(ends[-1]) - np.repeat(ends - widths, widths)
    bits = np.repeat(values, widths) >> within & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _adler(edges: np.ndarray, size: int, value: int) -> int:
    """Adler-32: each byte counts once in the low sum, and in the high one as often as it stays."""
    begins, ends = edges[::2], edges[1::2]
    covered = ends - begins
    low = 1 + value * int(covered.sum())
    # Sum of (size - i) over the run, halved: the product of two numbers of unlike parity is even.
    stays = covered * (2 * size - begins - ends + 1) // 2
    high = size + value * int((stays % _ADLER_MODULUS).sum())
    return high % _ADLER_MODULUS << 16 | low % _ADLER_MODULUS
