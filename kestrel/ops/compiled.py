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
from numba import njit, types
from numba.extending import overload

from kestrel.ops.jit import compiled

# Sums may be taken in the order that vectors want; nothing is assumed about NaN and infinity.
_OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
    "error_model": "numpy",
    "nogil": True,
}
_MATRIX, _INDEX = "float32[:, ::1]", "int64[::1]"
_SIGNATURE = (
    f"void({_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, {_MATRIX}, float32[:, :, :, :, ::1], "
    f"{_INDEX}, {_INDEX}, int64, {_MATRIX})"
)
_ONE, _TWO = np.float32(1), np.float32(2)


@njit(inline="always", **_OPTIONS)
def _exp(x):
    # 2 ** k times the series of e ** f, |f| <= ln(2) / 2; ln(2) in two parts of few bits.
    x = max(np.float32(-87), min(np.float32(88), x))
    k = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    f = x - k * np.float32(0.693359375) + k * np.float32(2.1219444005469057e-4)
    series = np.float32(1 / 720)
    series = series * f + np.float32(1 / 120)
    series = series * f + np.float32(1 / 24)
    series = series * f + np.float32(1 / 6)
    series = series * f + np.float32(0.5)
    series = series * f + _ONE
    series = series * f + _ONE
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23))
    return series * power.view(np.float32)


@njit(inline="always", **_OPTIONS)
def _gelu(x):
    # The tanh form; tanh(u) = 2 / (1 + exp(-2 u)) - 1.
    u = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
    return x / (_ONE + _exp(-_TWO * u))


@njit(inline="always", **_OPTIONS)
def _tau(row, weights, inner):
    total = np.float32(0)
    for i in range(weights.shape[0]):
        total += weights[i] * inner[i]
    return _TWO / (_ONE + _exp(-_TWO * total)) - _ONE + row


def _layer_rows(joined, tau_weights, tau_rows, cos, sin, kv, slots, positions, heads, out):
    """One layer's rows.

    ``joined`` [N, packed + inner] q, k, v and the MLP's inner values; q, k and v are
    overwritten. ``tau_weights`` [heads + kv_heads, packed] of q and v and ``tau_rows``
    [max_context, heads + kv_heads] by position, both without rows where there is no tau.
    ``cos``, ``sin`` [max_context, rotary_dim / 2]. ``kv`` [2, slots, max_context, kv_heads,
    head_dim], written at ``positions`` of ``slots``. ``out`` [N, heads * head_dim + inner]
    gets what attention saw and the inner values' GELU.
    """
    kv_heads, dim, half = kv.shape[3], kv.shape[4], cos.shape[1]
    width, seen = (heads + 2 * kv_heads) * dim, heads * dim
    inner = joined.shape[1] - width
    gate = np.empty(width, np.float32)
    scores = np.empty((heads, kv.shape[2]), np.float32)
    scale = _ONE / np.sqrt(np.float32(dim))
    for n in range(joined.shape[0]):
        slot, position = slots[n], positions[n]
        for i in range(inner):
            out[n, seen + i] = _gelu(joined[n, width + i])
        if tau_weights.shape[0]:
            for i in range(width):
                gate[i] = _gelu(joined[n, i])
            for h in range(heads + kv_heads):
                factor = _tau(tau_rows[position, h], tau_weights[h], gate)
                start = (h if h < heads else h + kv_heads) * dim
                for d in range(dim):
                    joined[n, start + d] *= factor
        for h in range(heads + kv_heads):
            for d in range(half):
                i = h * dim + d
                a, b = joined[n, i], joined[n, i + half]
                joined[n, i] = a * cos[position, d] - b * sin[position, d]
                joined[n, i + half] = a * sin[position, d] + b * cos[position, d]
        for h in range(kv_heads):
            for d in range(dim):
                kv[0, slot, position, h, d] = joined[n, seen + h * dim + d]
                kv[1, slot, position, h, d] = joined[n, seen + (kv_heads + h) * dim + d]
        group = heads // kv_heads
        keys, values = kv[0, slot], kv[1, slot]
        # Position by position, as they lie: the processor then fetches ahead.
        for s in range(position + 1):
            for h in range(heads):
                total = np.float32(0)
                for d in range(dim):
                    total += joined[n, h * dim + d] * keys[s, h // group, d]
                scores[h, s] = total * scale
        for h in range(heads):
            top = scores[h, 0]
            for s in range(1, position + 1):
                top = max(top, scores[h, s])
            total = np.float32(0)
            for s in range(position + 1):
                scores[h, s] = _exp(scores[h, s] - top)
                total += scores[h, s]
            for s in range(position + 1):
                scores[h, s] /= total
        for i in range(seen):
            out[n, i] = 0
        for s in range(position + 1):
            for h in range(heads):
                share = scores[h, s]
                for d in range(dim):
                    out[n, h * dim + d] += share * values[s, h // group, d]


@cache
def layer_rows() -> Callable[..., None]:
    """``_layer_rows``, compiled."""
    return compiled(_SIGNATURE, _layer_rows, **_OPTIONS)


_rows_of_layer = njit(**_OPTIONS)(_layer_rows)

# Products add in order of their inputs, whichever rows they take together, so that a row's numbers
# do not depend on the others: no reordering here.
_IN_ORDER: dict[str, Any] = _OPTIONS | {"fastmath": {"contract", "nsz"}}


def _number(weight):
    """A weight as float32: itself, or of a bfloat16's bits."""
    raise NotImplementedError


@overload(_number, inline="always")
def _number_of(weight):
    if weight == types.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: weight


@njit(inline="always", **_IN_ORDER)
def _add_one(x, weights, out, n):
    row, to = x[n], out[n]
    for k in range(0, weights.shape[0], 8):
        a0, a1, a2, a3 = row[k], row[k + 1], row[k + 2], row[k + 3]
        a4, a5, a6, a7 = row[k + 4], row[k + 5], row[k + 6], row[k + 7]
        for j in range(weights.shape[1]):
            total = to[j]
            total += a0 * _number(weights[k, j])
            total += a1 * _number(weights[k + 1, j])
            total += a2 * _number(weights[k + 2, j])
            total += a3 * _number(weights[k + 3, j])
            total += a4 * _number(weights[k + 4, j])
            total += a5 * _number(weights[k + 5, j])
            total += a6 * _number(weights[k + 6, j])
            total += a7 * _number(weights[k + 7, j])
            to[j] = total


@njit(inline="always", **_IN_ORDER)
def _add_two(x, weights, out, n):
    row0, row1, to0, to1 = x[n], x[n + 1], out[n], out[n + 1]
    for k in range(0, weights.shape[0], 4):
        a0, a1, a2, a3 = row0[k], row0[k + 1], row0[k + 2], row0[k + 3]
        b0, b1, b2, b3 = row1[k], row1[k + 1], row1[k + 2], row1[k + 3]
        for j in range(weights.shape[1]):
            w0, w1 = _number(weights[k, j]), _number(weights[k + 1, j])
            w2, w3 = _number(weights[k + 2, j]), _number(weights[k + 3, j])
            a, b = to0[j], to1[j]
            a += a0 * w0
            b += b0 * w0
            a += a1 * w1
            b += b1 * w1
            a += a2 * w2
            b += b2 * w2
            a += a3 * w3
            b += b3 * w3
            to0[j], to1[j] = a, b


@njit(inline="always", **_IN_ORDER)
def _add_four(x, weights, out, n):
    row0, row1, row2, row3 = x[n], x[n + 1], x[n + 2], x[n + 3]
    to0, to1, to2, to3 = out[n], out[n + 1], out[n + 2], out[n + 3]
    for k in range(0, weights.shape[0], 4):
        a0, a1, a2, a3 = row0[k], row0[k + 1], row0[k + 2], row0[k + 3]
        b0, b1, b2, b3 = row1[k], row1[k + 1], row1[k + 2], row1[k + 3]
        c0, c1, c2, c3 = row2[k], row2[k + 1], row2[k + 2], row2[k + 3]
        d0, d1, d2, d3 = row3[k], row3[k + 1], row3[k + 2], row3[k + 3]
        for j in range(weights.shape[1]):
            w0, w1 = _number(weights[k, j]), _number(weights[k + 1, j])
            w2, w3 = _number(weights[k + 2, j]), _number(weights[k + 3, j])
            a, b, c, d = to0[j], to1[j], to2[j], to3[j]
            a += a0 * w0
            b += b0 * w0
            c += c0 * w0
            d += d0 * w0
            a += a1 * w1
            b += b1 * w1
            c += c1 * w1
            d += d1 * w1
            a += a2 * w2
            b += b2 * w2
            c += c2 * w2
            d += d2 * w2
            a += a3 * w3
            b += b3 * w3
            c += c3 * w3
            d += d3 * w3
            to0[j], to1[j], to2[j], to3[j] = a, b, c, d


@njit(**_IN_ORDER)
def _add_product(x, weights, out):
    """``out`` [N, to] += ``x`` [N, from] @ ``weights`` [from, to]; ``from`` a multiple of 8."""
    rows = x.shape[0]
    whole = rows - rows % 4
    for n in range(0, whole, 4):
        _add_four(x, weights, out, n)
    if rows - whole >= 2:
        _add_two(x, weights, out, whole)
    if rows % 2:
        _add_one(x, weights, out, rows - 1)


@njit(**_OPTIONS)
def _layer_norm(x, scale_shift, out):
    dim = x.shape[1]
    for n in range(x.shape[0]):
        mean = np.float32(0)
        for i in range(dim):
            mean += x[n, i]
        mean /= np.float32(dim)
        spread = np.float32(0)
        for i in range(dim):
            off = x[n, i] - mean
            spread += off * off
        factor = _ONE / np.sqrt(spread / np.float32(dim) + np.float32(1e-5))
        for i in range(dim):
            out[n, i] = (x[n, i] - mean) * factor * scale_shift[0, i] + scale_shift[1, i]


def _all_layers(
    x, norms, into, into_bias, out, out_bias, tau_weights, tau_rows, cos, sin, kv, slots, positions,
    heads,
):  # fmt: skip
    """Every layer of rows ``x`` [N, dim], which become hidden states in place.

    ``norms`` [layers, 2, dim]: scale and shift. ``into`` [layers, dim, packed + inner] and ``out``
    [layers, heads * head_dim + inner, dim], float32 or the bits of bfloat16, with their biases
    [layers, ...]. The others as ``_layer_rows`` takes them, by layer.
    """
    rows, width = x.shape[0], out.shape[1]
    normed = np.empty_like(x)
    joined = np.empty((rows, into.shape[2]), np.float32)
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
    ``weights`` [dim, vocabulary]."""
    normed = np.empty_like(x)
    _layer_norm(x, norm, normed)
    for n in range(x.shape[0]):
        out[n] = bias
    _add_product(normed, weights, out)


@cache
def all_layers(weights: str) -> Callable[..., None]:
    """``_all_layers`` of ``weights`` that are float32 or uint16, compiled."""
    by_layer = "float32[:, :, ::1]"
    signature = (
        f"void({_MATRIX}, {by_layer}, {weights}[:, :, ::1], {_MATRIX}, {weights}[:, :, ::1], "
        f"{_MATRIX}, {by_layer}, {by_layer}, {_MATRIX}, {_MATRIX}, "
        f"float32[:, :, :, :, :, ::1], {_INDEX}, {_INDEX}, int64)"
    )
    return compiled(signature, _all_layers, **_OPTIONS)


@cache
def head(weights: str) -> Callable[..., None]:
    """``_head`` of ``weights`` that are float32 or uint16, compiled."""
    signature = f"void({_MATRIX}, {_MATRIX}, {weights}[:, ::1], float32[::1], {_MATRIX})"
    return compiled(signature, _head, **_OPTIONS)
