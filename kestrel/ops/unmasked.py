"""Attention in which every position sees all others, as those of an image do, compiled by Numba.

torch multiplies a head's short rows by calls made for large matrices. Here a head's keys and values
are laid out once, as float32, and a few queries at a time go over them; scores stay in the first
cache. Sums are float32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from kestrel.ops.compiled import OPTIONS, exps
from kestrel.ops.jit import compiled
from kestrel.ops.lanes import (
    LANES,
    WIDE,
    add_times,
    larger,
    largest,
    load,
    load_one,
    plus,
    splat,
    store,
    times,
    total,
)

COLUMNS = 2 * LANES if WIDE else LANES
"""Numbers that are summed at once for each query."""
QUERIES = 4 if WIDE else 6
"""Queries that share the reading of keys and values. The last ones may be the same."""


@njit(inline="always", **OPTIONS)
def _four(rows, length, count, numbers, start, step, out, to, width):
    """For each of four rows the sum of ``count`` times two vectors of ``numbers``, from ``start``
    on and ``step`` apart, each time by the next number of the row; into ``out`` from ``to`` on.
    Rows lie ``length`` apart in ``rows``, and ``width`` apart in ``out``."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = splat(np.float32(0))
    for n in range(count):
        place = start + n * step
        left, right = load(numbers, place), load(numbers, place + LANES)
        number = splat(rows[n])
        a0, a1 = add_times(a0, number, left), add_times(a1, number, right)
        number = splat(rows[length + n])
        b0, b1 = add_times(b0, number, left), add_times(b1, number, right)
        number = splat(rows[2 * length + n])
        c0, c1 = add_times(c0, number, left), add_times(c1, number, right)
        number = splat(rows[3 * length + n])
        d0, d1 = add_times(d0, number, left), add_times(d1, number, right)
    store(out, to, a0)
    store(out, to + LANES, a1)
    store(out, width + to, b0)
    store(out, width + to + LANES, b1)
    store(out, 2 * width + to, c0)
    store(out, 2 * width + to + LANES, c1)
    store(out, 3 * width + to, d0)
    store(out, 3 * width + to + LANES, d1)


@njit(inline="always", **OPTIONS)
def _six(rows, length, count, numbers, start, step, out, to, width):
    """``_four`` of six rows and one vector."""
    a = b = c = d = e = f = splat(np.float32(0))
    for n in range(count):
        vector = load(numbers, start + n * step)
        a = add_times(a, splat(rows[n]), vector)
        b = add_times(b, splat(rows[length + n]), vector)
        c = add_times(c, splat(rows[2 * length + n]), vector)
        d = add_times(d, splat(rows[3 * length + n]), vector)
        e = add_times(e, splat(rows[4 * length + n]), vector)
        f = add_times(f, splat(rows[5 * length + n]), vector)
    store(out, to, a)
    store(out, width + to, b)
    store(out, 2 * width + to, c)
    store(out, 3 * width + to, d)
    store(out, 4 * width + to, e)
    store(out, 5 * width + to, f)


_sums = _four if WIDE else _six


@njit(inline="always", **OPTIONS)
def _exponentials(numbers, start, count):
    """``count`` numbers from ``start`` on become their exponentials, less the largest of them;
    gives one over the sum of these."""
    tops = load(numbers, start)
    for s in range(start + LANES, start + count, LANES):
        tops = larger(tops, load(numbers, s))
    less, sums = splat(-largest(tops)), splat(np.float32(0))
    for s in range(start, start + count, LANES):
        vector = exps(plus(load(numbers, s), less))
        sums = plus(sums, vector)
        store(numbers, s, vector)
    return np.float32(1) / total(sums)


def _attend(q, k, v, out):
    """``out`` [T, H, D] of ``q`` [T, H, D] over ``k``, ``v`` [S, G, D], H a multiple of G and D of
    ``COLUMNS``: float32 or the bits of bfloat16, the numbers of a head in a row."""
    count, heads, dim = q.shape
    length, groups = k.shape[0], k.shape[1]
    width = (length + COLUMNS - 1) // COLUMNS * COLUMNS
    scale = np.float32(1) / np.sqrt(np.float32(dim))
    # By ``COLUMNS`` positions, and the numbers of each beside those of the others. The last ones,
    # that are none, get no share.
    keys = np.zeros(width * dim, np.float32)
    values = np.empty(length * dim, np.float32)
    asking, seen = np.empty(QUERIES * dim, np.float32), np.empty(QUERIES * dim, np.float32)
    scores, shares = np.empty(QUERIES * width, np.float32), np.empty(QUERIES, np.float32)
    for g in range(groups):
        for s in range(length):
            key, value = k[s, g], v[s, g]
            place = s // COLUMNS * COLUMNS * dim + s % COLUMNS
            for d in range(dim):
                keys[place + d * COLUMNS] = load_one(key, d)
            for d in range(0, dim, LANES):
                store(values, s * dim + d, load(value, d))
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            for t in range(0, count, QUERIES):
                for i in range(QUERIES):
                    query = q[min(t + i, count - 1), h]
                    for d in range(dim):
                        asking[i * dim + d] = load_one(query, d) * scale
                for at in range(0, width, COLUMNS):
                    _sums(asking, dim, dim, keys, at * dim, COLUMNS, scores, at, width)
                for i in range(QUERIES):
                    for s in range(i * width + length, (i + 1) * width):
                        scores[s] = -np.inf
                    shares[i] = _exponentials(scores, i * width, width)
                for d in range(0, dim, COLUMNS):
                    _sums(scores, width, length, values, d, dim, seen, d, dim)
                for i in range(min(QUERIES, count - t)):
                    share = splat(shares[i])
                    for d in range(0, dim, LANES):
                        store(out[t + i, h], d, times(share, load(seen, i * dim + d)))


@cache
def unmasked(numbers: str) -> Callable[..., None]:
    """``_attend`` of float32 or uint16, compiled."""
    every = f"{numbers}[:, :, :]"
    return compiled(f"void({every}, {every}, {every}, {every})", _attend, **OPTIONS)
