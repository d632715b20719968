"""Decode steps compiled by Numba: what a layer does with each row between its matrix products, and
the whole step of a small model, products included.

Called operator by operator the former is two thirds of a step of a small model on a CPU. Here it is
one pass over the rows: tau, rotation, storing keys and values, attention, GELU. Each row is
computed by itself, so that its numbers do not depend on the rows beside it.
``kestrel.moondream.cached`` holds the same in torch's operators, for other devices and types.

``kestrel.ops.rows`` says whether ``numba`` can be had.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kestrel.ops.jit import compiled
from kestrel.ops.lanes import (
    LANES,
    WIDE,
    add_times,
    fetch,
    floor,
    larger,
    largest,
    load,
    load_one,
    pairs,
    plus,
    power_of_two,
    ratio,
    smaller,
    splat,
    store,
    store_one,
    times,
    total,
)

# No liberties with arithmetic ("fastmath"): a process that compiles these functions and one that
# finds them compiled would take them differently, and a replica that is replaced would answer
# otherwise. What is fused and in which order sums are taken is written out.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}
_MATRIX, _INDEX = "float32[:, ::1]", "int64[::1]"
_ONE, _TWO = np.float32(1), np.float32(2)

STRETCH = 16
"""Positions whose keys, or values, all heads read before the next ones."""
PAIR = 2 * LANES
"""Numbers that sums take at once."""
AHEAD = 2
"""Stretches of positions that attention has fetched before it reads them."""
LINE = 32
"""Numbers that have a cache line at least, in bfloat16."""


@njit(inline="always", **OPTIONS)
def _exp(x):
    # 2 ** k times the series of e ** f, |f| <= ln(2) / 2; ln(2) in two parts of few bits.
    x = max(np.float32(-87), min(np.float32(88), x))
    k = np.floor(add_times(np.float32(0.5), x, np.float32(1.4426950408889634)))
    f = add_times(x, k, np.float32(-0.693359375))
    f = add_times(f, k, np.float32(2.1219444005469057e-4))
    series = add_times(np.float32(1 / 120), np.float32(1 / 720), f)
    series = add_times(np.float32(1 / 24), series, f)
    series = add_times(np.float32(1 / 6), series, f)
    series = add_times(np.float32(0.5), series, f)
    series = add_times(_ONE, series, f)
    series = add_times(_ONE, series, f)
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23))
    return series * power.view(np.float32)


@njit(inline="always", **OPTIONS)
def _gelu(x):
    # The tanh form; tanh(u) = 2 / (1 + exp(-2 u)) - 1.
    u = np.float32(0.7978845608028654) * add_times(x, np.float32(0.044715) * x * x, x)
    return x / (_ONE + _exp(-_TWO * u))


@njit(inline="always", **OPTIONS)
def exps(x):
    """``_exp`` of a vector, to the same bits."""
    x = larger(smaller(x, splat(np.float32(88))), splat(np.float32(-87)))
    k = floor(add_times(splat(np.float32(0.5)), x, splat(np.float32(1.4426950408889634))))
    f = add_times(x, k, splat(np.float32(-0.693359375)))
    f = add_times(f, k, splat(np.float32(2.1219444005469057e-4)))
    series = add_times(splat(np.float32(1 / 120)), splat(np.float32(1 / 720)), f)
    series = add_times(splat(np.float32(1 / 24)), series, f)
    series = add_times(splat(np.float32(1 / 6)), series, f)
    series = add_times(splat(np.float32(0.5)), series, f)
    series = add_times(splat(_ONE), series, f)
    series = add_times(splat(_ONE), series, f)
    return times(series, power_of_two(k))


@njit(inline="always", **OPTIONS)
def _gelus(numbers, start, out, to, count):
    """``_gelu`` of ``count`` numbers from ``start`` on, into ``out`` from ``to`` on."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        x = load(numbers, start + i)
        u = add_times(x, times(times(splat(np.float32(0.044715)), x), x), x)
        e = exps(times(splat(-_TWO), times(splat(np.float32(0.7978845608028654)), u)))
        store(out, to + i, ratio(x, plus(splat(_ONE), e)))
    for i in range(whole, count):
        store_one(out, to + i, _gelu(numbers[start + i]))


def _gelu_all(numbers):
    """GELU (tanh form) of an array [n], in place."""
    _gelus(numbers, 0, numbers, 0, numbers.shape[0])


@cache
def gelu_all() -> Callable[..., None]:
    """``_gelu_all`` of float32, compiled."""
    return compiled("void(float32[::1])", _gelu_all, **OPTIONS)


@njit(inline="always", **OPTIONS)
def _copy(numbers, out, count):
    """The first ``count`` numbers of an array [n], whichever of the two types each is of."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        store(out, i, load(numbers, i))
    for i in range(whole, count):
        store_one(out, i, load_one(numbers, i))


@njit(inline="always", **OPTIONS)
def _dot(a, i, b, j, count):
    """Sum of products of ``count`` numbers of two arrays [n], from ``i`` and ``j`` on."""
    whole = count - count % PAIR
    result = np.float32(0)
    if whole:
        # Two sums, as a processor has several under way.
        left, right = times(load(a, i), load(b, j)), times(load(a, i + LANES), load(b, j + LANES))
        for k in range(PAIR, whole, PAIR):
            left = add_times(left, load(a, i + k), load(b, j + k))
            right = add_times(right, load(a, i + k + LANES), load(b, j + k + LANES))
        result = total(left) + total(right)
    for k in range(whole, count):
        result += a[i + k] * b[j + k]
    return result


@njit(inline="always", **OPTIONS)
def _tau(row, weights, inner):
    logit = _dot(weights, 0, inner, 0, weights.shape[0])
    return _TWO / (_ONE + _exp(-_TWO * logit)) - _ONE + row


@njit(inline="always", **OPTIONS)
def _part(left, right, keys, place):
    """What sixteen pairs of dimensions add to a score, each in a lane."""
    return add_times(times(left, load(keys, place)), right, load(keys, place + LANES))


@njit(inline="always", **OPTIONS)
def _four_parts(left, right, keys, place, step):
    """Four positions' ``_part``, each in a quarter of the lanes."""
    a = _part(left, right, keys, place)
    b = _part(left, right, keys, place + step)
    c = _part(left, right, keys, place + 2 * step)
    d = _part(left, right, keys, place + 3 * step)
    return pairs(pairs(a, b), pairs(c, d))


@njit(inline="always", **OPTIONS)
def _fetch_stretch(numbers, start, stop):
    """Have ``numbers`` [n] fetched from ``start`` to ``stop``, line after line.

    Attention reads a head of sixteen positions, then the next head of them, which no processor
    foresees: where many rows' keys and values do not fit the caches, it waited for each.
    """
    for i in range(start, min(stop, numbers.shape[0]), LINE):
        fetch(numbers, i)


@njit(**OPTIONS)
def _scores(q, keys, heads, kv_heads, dim, scores):
    """``scores`` [heads, positions] of ``q`` [heads * dim] and ``keys`` [positions * kv_heads *
    dim], scaled."""
    step, group = kv_heads * dim, heads // kv_heads
    scale = _ONE / np.sqrt(np.float32(dim))
    count = scores.shape[1]
    rest = count - count % LANES
    paired = dim - dim % PAIR
    # A few positions at a time, as they lie.
    for start in range(0, count, LANES):
        stop = min(count, start + LANES)
        ahead = start + AHEAD * LANES
        _fetch_stretch(keys, ahead * step, (ahead + LANES) * step)
        for h in range(heads):
            line, at = scores[h], start * step + h // group * dim
            for s in range(start, stop):
                line[s] = 0
            for d in range(0, paired, PAIR):
                left, right = load(q, h * dim + d), load(q, h * dim + d + LANES)
                if start < rest:
                    a = _four_parts(left, right, keys, at + d, step)
                    b = _four_parts(left, right, keys, at + d + 4 * step, step)
                    c = _four_parts(left, right, keys, at + d + 8 * step, step)
                    e = _four_parts(left, right, keys, at + d + 12 * step, step)
                    sums = pairs(pairs(a, b), pairs(c, e))
                    store(line, start, add_times(load(line, start), splat(scale), sums))
                else:
                    for s in range(start, stop):
                        part = _part(left, right, keys, at + d + (s - start) * step)
                        line[s] += total(part) * scale
            for s in range(start, stop):
                for d in range(paired, dim):
                    key = load_one(keys, at + (s - start) * step + d)
                    line[s] += q[h * dim + d] * key * scale


@njit(inline="always", **OPTIONS)
def _sum_pair(line, start, stop, values, step, at, out, to):
    """``PAIR`` numbers of ``out`` += those of ``values``, from ``at`` on, at positions ``start`` to
    ``stop``, each by its number of ``line``."""
    # Eight sums, as a processor has several under way.
    a0, a1 = load(out, to), load(out, to + LANES)
    b0 = b1 = c0 = c1 = d0 = d1 = splat(np.float32(0))
    by_four = stop - (stop - start) % 4
    for s in range(start, by_four, 4):
        place = s * step + at
        share = splat(line[s])
        a0 = add_times(a0, share, load(values, place))
        a1 = add_times(a1, share, load(values, place + LANES))
        place += step
        share = splat(line[s + 1])
        b0 = add_times(b0, share, load(values, place))
        b1 = add_times(b1, share, load(values, place + LANES))
        place += step
        share = splat(line[s + 2])
        c0 = add_times(c0, share, load(values, place))
        c1 = add_times(c1, share, load(values, place + LANES))
        place += step
        share = splat(line[s + 3])
        d0 = add_times(d0, share, load(values, place))
        d1 = add_times(d1, share, load(values, place + LANES))
    for s in range(by_four, stop):
        share, place = splat(line[s]), s * step + at
        a0 = add_times(a0, share, load(values, place))
        a1 = add_times(a1, share, load(values, place + LANES))
    store(out, to, plus(plus(a0, b0), plus(c0, d0)))
    store(out, to + LANES, plus(plus(a1, b1), plus(c1, d1)))


@njit(inline="always", **OPTIONS)
def _sum_one(line, start, stop, values, step, at, out, to):
    """``_sum_pair`` of ``LANES`` numbers, to the same bits."""
    a = load(out, to)
    b = c = d = splat(np.float32(0))
    by_four = stop - (stop - start) % 4
    for s in range(start, by_four, 4):
        place = s * step + at
        a = add_times(a, splat(line[s]), load(values, place))
        b = add_times(b, splat(line[s + 1]), load(values, place + step))
        c = add_times(c, splat(line[s + 2]), load(values, place + 2 * step))
        d = add_times(d, splat(line[s + 3]), load(values, place + 3 * step))
    for s in range(by_four, stop):
        a = add_times(a, splat(line[s]), load(values, s * step + at))
    store(out, to, plus(plus(a, b), plus(c, d)))


@njit(**OPTIONS)
def _sums(shares, values, kv_heads, dim, out):
    """``out`` [heads * dim]: ``values`` [positions * kv_heads * dim] by ``shares`` [heads,
    positions]."""
    heads, count = shares.shape
    step, group = kv_heads * dim, heads // kv_heads
    paired = dim - dim % PAIR
    out[: heads * dim] = 0
    for start in range(0, count, STRETCH):
        stop = min(count, start + STRETCH)
        ahead = start + AHEAD * STRETCH
        _fetch_stretch(values, ahead * step, (ahead + STRETCH) * step)
        for h in range(heads):
            line, at = shares[h], h // group * dim
            if WIDE:
                for d in range(0, paired, PAIR):
                    _sum_pair(line, start, stop, values, step, at + d, out, h * dim + d)
            else:
                for d in range(0, paired, LANES):
                    _sum_one(line, start, stop, values, step, at + d, out, h * dim + d)
            for d in range(paired, dim):
                for s in range(start, stop):
                    out[h * dim + d] += line[s] * load_one(values, s * step + at + d)


@njit(**OPTIONS)
def _softmax(line):
    count = line.shape[0]
    whole = count - count % LANES
    top = line[count - 1]
    if whole:
        tops = load(line, 0)
        for s in range(LANES, whole, LANES):
            tops = larger(tops, load(line, s))
        top = max(top, largest(tops))
    for s in range(whole, count):
        top = max(top, line[s])
    everything = np.float32(0)
    if whole:
        less, sums = splat(-top), splat(np.float32(0))
        for s in range(0, whole, LANES):
            numbers = exps(plus(load(line, s), less))
            sums = plus(sums, numbers)
            store(line, s, numbers)
        everything = total(sums)
    for s in range(whole, count):
        line[s] = _exp(line[s] - top)
        everything += line[s]
    share = _ONE / everything
    for s in range(0, whole, LANES):
        store(line, s, times(load(line, s), splat(share)))
    for s in range(whole, count):
        line[s] *= share


@njit(**OPTIONS)
def _before_attention(
    joined, position, tau_weights, tau_rows, cos, sin, heads, kv_heads, dim, keys, values, gate, out
):
    """What a row of ``_layer_rows`` does before it looks at others: tau and rotation in ``joined``
    [packed + inner], its ``keys`` and ``values`` [kv_heads * dim], GELU into ``out`` [heads * dim +
    inner]. ``gate`` [packed] is scratch."""
    width, seen, half = gate.shape[0], heads * dim, cos.shape[1]
    _gelus(joined, width, out, seen, joined.shape[0] - width)
    if tau_weights.shape[0]:
        _gelus(joined, 0, gate, 0, width)
        for h in range(heads + kv_heads):
            factor = _tau(tau_rows[position, h], tau_weights[h], gate)
            start = (h if h < heads else h + kv_heads) * dim
            for d in range(dim):
                joined[start + d] *= factor
    for h in range(heads + kv_heads):
        for d in range(half):
            i = h * dim + d
            a, b = joined[i], joined[i + half]
            joined[i] = a * cos[position, d] - b * sin[position, d]
            joined[i + half] = a * sin[position, d] + b * cos[position, d]
    count = kv_heads * dim
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        store(keys, i, load(joined, seen + i))
        store(values, i, load(joined, seen + count + i))
    for i in range(whole, count):
        store_one(keys, i, joined[seen + i])
        store_one(values, i, joined[seen + count + i])


def _layer_rows(joined, tau_weights, tau_rows, cos, sin, kv, slots, positions, heads, out):
    """One layer's rows.

    ``joined`` [N, packed + inner] q, k, v and the MLP's inner values; q, k and v are
    overwritten. ``tau_weights`` [heads + kv_heads, packed] of q and v and ``tau_rows``
    [max_context, heads + kv_heads] by position, both without rows where there is no tau.
    ``cos``, ``sin`` [max_context, rotary_dim / 2]. ``kv`` [2, slots, max_context, kv_heads,
    head_dim], float32 or the bits of bfloat16, written at ``positions`` of ``slots``. ``out`` [N,
    heads * head_dim + inner] gets what attention saw and the inner values' GELU.
    """
    kv_heads, dim = kv.shape[3], kv.shape[4]
    gate = np.empty((heads + 2 * kv_heads) * dim, np.float32)
    scores = np.empty(heads * kv.shape[2], np.float32)
    for n in range(joined.shape[0]):
        slot, position = slots[n], positions[n]
        _before_attention(
            joined[n], position, tau_weights, tau_rows, cos, sin, heads, kv_heads, dim,
            kv[0, slot, position].ravel(), kv[1, slot, position].ravel(), gate, out[n],
        )  # fmt: skip
        count = position + 1
        keys, values = kv[0, slot, :count].ravel(), kv[1, slot, :count].ravel()
        line = scores[: heads * count].reshape(heads, count)
        _scores(joined[n], keys, heads, kv_heads, dim, line)
        for h in range(heads):
            _softmax(line[h])
        _sums(line, values, kv_heads, dim, out[n])


@cache
def layer_rows(kv: str) -> Callable[..., None]:
    """``_layer_rows`` of a cache that is float32 or uint16, compiled."""
    signature = (
        f"void({_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, {kv}[:, :, :, :, ::1], "
        f"{_INDEX}, {_INDEX}, int64, {_MATRIX})"
    )
    return compiled(signature, _layer_rows, **OPTIONS)


_rows_of_layer = njit(**OPTIONS)(_layer_rows)


def _prefix_rows(joined, tau_weights, tau_rows, cos, sin, kv, heads, q, out):
    """``_layer_rows`` of positions 0..N-1 as far as they do not look at each other.

    ``joined`` [N, packed + inner] as there, float32 or the bits of bfloat16, is only read; ``kv``
    [2, N, kv_heads, head_dim] and ``q`` [N, heads * head_dim] are written. Of ``out`` [N, heads *
    head_dim + inner] the inner values' GELU is written. ``q`` and ``out`` are as ``joined`` is.
    """
    kv_heads, dim = kv.shape[2], kv.shape[3]
    gate = np.empty((heads + 2 * kv_heads) * dim, np.float32)
    row = np.empty(joined.shape[1], np.float32)
    for n in range(joined.shape[0]):
        _copy(joined[n], row, joined.shape[1])
        _before_attention(
            row, n, tau_weights, tau_rows, cos, sin, heads, kv_heads, dim, kv[0, n].ravel(),
            kv[1, n].ravel(), gate, out[n],
        )  # fmt: skip
        _copy(row, q[n], heads * dim)


@cache
def prefix_rows(kind: str, kv: str) -> Callable[..., None]:
    """``_prefix_rows`` of products and a cache that are float32 or uint16, compiled."""
    products = f"{kind}[:, ::1]"
    signature = (
        f"void({products}, {_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, {kv}[:, :, :, ::1], "
        f"int64, {products}, {products})"
    )
    return compiled(signature, _prefix_rows, **OPTIONS)


# Products add in order of their inputs, whichever rows they take together, so that a row's numbers
# do not depend on the others.


@njit(inline="always", **OPTIONS)
def _add_one(x, weights, block, to, column):
    """Four blocks of a product for one row."""
    step = LANES * x.shape[0]
    a, b = load(to, column), load(to, column + LANES)
    c, d = load(to, column + 2 * LANES), load(to, column + 3 * LANES)
    for k in range(x.shape[0]):
        number, at = splat(x[k]), block + k * LANES
        a = add_times(a, number, load(weights, at))
        b = add_times(b, number, load(weights, at + step))
        c = add_times(c, number, load(weights, at + 2 * step))
        d = add_times(d, number, load(weights, at + 3 * step))
    store(to, column, a)
    store(to, column + LANES, b)
    store(to, column + 2 * LANES, c)
    store(to, column + 3 * LANES, d)


@njit(inline="always", **OPTIONS)
def _add_two(x0, x1, weights, block, to0, to1, column):
    """Two blocks of a product for two rows."""
    step, next_column = LANES * x0.shape[0], column + LANES
    a, b = load(to0, column), load(to0, next_column)
    c, d = load(to1, column), load(to1, next_column)
    for k in range(x0.shape[0]):
        at = block + k * LANES
        left, right = load(weights, at), load(weights, at + step)
        number = splat(x0[k])
        a, b = add_times(a, number, left), add_times(b, number, right)
        number = splat(x1[k])
        c, d = add_times(c, number, left), add_times(d, number, right)
    store(to0, column, a)
    store(to0, next_column, b)
    store(to1, column, c)
    store(to1, next_column, d)


@njit(inline="always", **OPTIONS)
def _add_four(x0, x1, x2, x3, weights, block, to0, to1, to2, to3, column):
    """Two blocks of a product for four rows."""
    step, next_column = LANES * x0.shape[0], column + LANES
    a, b = load(to0, column), load(to0, next_column)
    c, d = load(to1, column), load(to1, next_column)
    e, f = load(to2, column), load(to2, next_column)
    g, h = load(to3, column), load(to3, next_column)
    for k in range(x0.shape[0]):
        at = block + k * LANES
        left, right = load(weights, at), load(weights, at + step)
        number = splat(x0[k])
        a, b = add_times(a, number, left), add_times(b, number, right)
        number = splat(x1[k])
        c, d = add_times(c, number, left), add_times(d, number, right)
        number = splat(x2[k])
        e, f = add_times(e, number, left), add_times(f, number, right)
        number = splat(x3[k])
        g, h = add_times(g, number, left), add_times(h, number, right)
    store(to0, column, a)
    store(to0, next_column, b)
    store(to1, column, c)
    store(to1, next_column, d)
    store(to2, column, e)
    store(to2, next_column, f)
    store(to3, column, g)
    store(to3, next_column, h)


@njit(inline="always", **OPTIONS)
def _add_six(x0, x1, x2, x3, x4, x5, weights, block, to0, to1, to2, to3, to4, to5, column):
    """One block of a product for six rows."""
    a, b, c = load(to0, column), load(to1, column), load(to2, column)
    d, e, f = load(to3, column), load(to4, column), load(to5, column)
    for k in range(x0.shape[0]):
        vector = load(weights, block + k * LANES)
        a, b = add_times(a, splat(x0[k]), vector), add_times(b, splat(x1[k]), vector)
        c, d = add_times(c, splat(x2[k]), vector), add_times(d, splat(x3[k]), vector)
        e, f = add_times(e, splat(x4[k]), vector), add_times(f, splat(x5[k]), vector)
    store(to0, column, a)
    store(to1, column, b)
    store(to2, column, c)
    store(to3, column, d)
    store(to4, column, e)
    store(to5, column, f)


@njit(inline="always", **OPTIONS)
def _add_block(x, weights, block, to, column):
    """One block of a product for one row."""
    sums = load(to, column)
    for k in range(x.shape[0]):
        sums = add_times(sums, splat(x[k]), load(weights, block + k * LANES))
    store(to, column, sums)


@njit(**OPTIONS)
def _add_product(x, blocks, out):
    """``out`` [N, to] += ``x`` [N, from] @ weights that lie in ``blocks`` [to / LANES, from,
    LANES]."""
    weights, rows, count = blocks.ravel(), x.shape[0], blocks.shape[0]
    step = blocks.shape[1] * LANES
    if rows == 1:
        whole = count - count % 4
        for n in range(0, whole, 4):
            _add_one(x[0], weights, n * step, out[0], n * LANES)
    else:
        whole = count - count % 2
        for n in range(0, whole, 2):  # the weights of two blocks stay in the first cache
            at, column = n * step, n * LANES
            taken = rows - rows % (4 if WIDE else 6)
            if WIDE:
                for i in range(0, taken, 4):
                    _add_four(
                        x[i], x[i + 1], x[i + 2], x[i + 3], weights, at,
                        out[i], out[i + 1], out[i + 2], out[i + 3], column,
                    )  # fmt: skip
            else:
                for i in range(0, taken, 6):
                    for k in range(2):
                        _add_six(
                            x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], weights,
                            at + k * step, out[i], out[i + 1], out[i + 2], out[i + 3], out[i + 4],
                            out[i + 5], column + k * LANES,
                        )  # fmt: skip
            for i in range(taken, rows, 2):
                j = min(i + 1, rows - 1)  # the last row twice where it is alone
                _add_two(x[i], x[j], weights, at, out[i], out[j], column)
    for n in range(whole, count):
        for i in range(rows):
            _add_block(x[i], weights, n * step, out[i], n * LANES)


@njit(**OPTIONS)
def _layer_norm(x, scale_shift, out):
    """``dim`` is a multiple of ``LANES``."""
    dim = x.shape[1]
    for n in range(x.shape[0]):
        row = x[n]
        sums = load(row, 0)
        for i in range(LANES, dim, LANES):
            sums = plus(sums, load(row, i))
        mean = total(sums) / np.float32(dim)
        less, squares = splat(-mean), splat(np.float32(0))
        for i in range(0, dim, LANES):
            off = plus(load(row, i), less)
            squares = add_times(squares, off, off)
        factor = _ONE / np.sqrt(total(squares) / np.float32(dim) + np.float32(1e-5))
        for i in range(dim):
            out[n, i] = add_times(scale_shift[1, i], (row[i] - mean) * factor, scale_shift[0, i])


def _all_layers(
    x, norms, into, into_bias, out, out_bias, tau_weights, tau_rows, cos, sin, kv, slots, positions,
    heads,
):  # fmt: skip
    """Every layer of rows ``x`` [N, dim], which become hidden states in place.

    ``norms`` [layers, 2, dim]: scale and shift. ``into`` [layers, (packed + inner) / LANES, dim,
    LANES] and ``out`` [layers, dim / LANES, heads * head_dim + inner, LANES], float32 or the bits
    of bfloat16, with their biases [layers, ...]. The others as ``_layer_rows`` takes them, by
    layer.
    """
    rows, width = x.shape[0], out.shape[2]
    normed = np.empty_like(x)
    joined = np.empty((rows, into_bias.shape[1]), np.float32)
    seen = np.empty((rows, width), np.float32)
    for layer in range(into.shape[0]):
        _layer_norm(x, norms[layer], normed)
        for n in range(rows):
            joined[n] = into_bias[layer]
        _add_product(normed, into[layer], joined)
        _rows_of_layer(
            joined, tau_weights[layer], tau_rows[layer], cos, sin, kv[layer], slots, positions,
            heads, seen,
        )  # fmt: skip
        for n in range(rows):
            for i in range(x.shape[1]):
                x[n, i] += out_bias[layer, i]
        _add_product(seen, out[layer], x)


def _head(x, norm, weights, bias, out):
    """Logits ``out`` [N, vocabulary] of hidden states ``x`` [N, dim]; ``norm`` [2, dim],
    ``weights`` [vocabulary / LANES, dim, LANES]."""
    normed = np.empty_like(x)
    _layer_norm(x, norm, normed)
    for n in range(x.shape[0]):
        out[n] = bias
    _add_product(normed, weights, out)


_layers = njit(**OPTIONS)(_all_layers)
_logits = njit(**OPTIONS)(_head)


def _text_steps(
    tokens, steps, last, barred, table, norms, into, into_bias, out, out_bias, tau_weights,
    tau_rows, cos, sin, kv, slots, positions, heads, head_norm, head_weights, head_bias, chosen,
):  # fmt: skip
    """Feed ``tokens`` [N] and, up to ``steps`` times, what each row then finds likeliest.

    ``chosen`` [steps, N] gets the likeliest token after each step; no more steps follow one that
    gives ``last``. ``barred`` tokens are never chosen. ``table`` [vocabulary, dim]: embeddings;
    ``positions`` [N] of ``tokens``, which may not share slots. The others as ``_all_layers`` and
    ``_head`` take them. Gives the number of steps.
    """
    rows = tokens.shape[0]
    x = np.empty((rows, table.shape[1]), np.float32)
    logits = np.empty((rows, head_bias.shape[0]), np.float32)
    fed, at = tokens.copy(), positions.copy()
    for step in range(steps):
        for n in range(rows):
            x[n] = table[fed[n]]
        _layers(
            x, norms, into, into_bias, out, out_bias, tau_weights, tau_rows, cos, sin, kv, slots,
            at, heads,
        )  # fmt: skip
        _logits(x, head_norm, head_weights, head_bias, logits)
        over = False
        for n in range(rows):
            for token in barred:
                logits[n, token] = -np.inf
            fed[n] = chosen[step, n] = logits[n].argmax()
            at[n] += 1
            over = over or fed[n] == last
        if over:
            return step + 1
    return steps


@cache
def all_layers(weights: str, kv: str) -> Callable[..., None]:
    """``_all_layers`` of ``weights`` and a cache that are float32 or uint16, compiled."""
    by_layer = "float32[:, :, ::1]"
    signature = (
        f"void({_MATRIX}, {by_layer}, {weights}[:, :, :, ::1], {_MATRIX}, {weights}[:, :, :, ::1], "
        f"{_MATRIX}, {by_layer}, {by_layer}, {_MATRIX}, {_MATRIX}, "
        f"{kv}[:, :, :, :, :, ::1], {_INDEX}, {_INDEX}, int64)"
    )
    return compiled(signature, _all_layers, **OPTIONS)


@cache
def head(weights: str) -> Callable[..., None]:
    """``_head`` of ``weights`` that are float32 or uint16, compiled."""
    signature = f"void({_MATRIX}, {_MATRIX}, {weights}[:, :, ::1], float32[::1], {_MATRIX})"
    return compiled(signature, _head, **OPTIONS)


@cache
def text_steps(weights: str, kv: str) -> Callable[..., int]:
    """``_text_steps`` of ``weights`` and a cache that are float32 or uint16, compiled."""
    by_layer = "float32[:, :, ::1]"
    signature = (
        f"int64({_INDEX}, int64, int64, {_INDEX}, {_MATRIX}, {by_layer}, "
        f"{weights}[:, :, :, ::1], {_MATRIX}, {weights}[:, :, :, ::1], {_MATRIX}, {by_layer}, "
        f"{by_layer}, {_MATRIX}, {_MATRIX}, {kv}[:, :, :, :, :, ::1], {_INDEX}, {_INDEX}, "
        f"int64, {_MATRIX}, {by_layer.replace('float32', weights)}, float32[::1], int64[:, ::1])"
    )
    return compiled(signature, _text_steps, **OPTIONS)
