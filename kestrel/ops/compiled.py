"""What a decode step does with each row between a layer's matrix products, compiled by Numba.

Called operator by operator it is two thirds of a step of a small model on a CPU. Here it is one
pass over the rows: tau, rotation, storing keys and values, attention, GELU. Each row is computed by
itself, so that its numbers do not depend on the rows beside it. ``kestrel.moondream.cached`` holds
the same in torch's operators, for other devices and types.

``kestrel.ops.rows`` says whether ``numba`` can be had.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

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


layer_rows = compiled(_SIGNATURE, _layer_rows, **_OPTIONS)
