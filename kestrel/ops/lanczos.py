"""Lanczos resizing as Pillow does it, to the last bit, several times as fast.

Crops of large pictures are what a model replica's CPU spends most on before the accelerator has
anything to do. Pillow goes from pixel to pixel along a row; here a row's pixels become rows (a
transposed copy), so that the processor's vectors take many of them at once. The arithmetic is
Pillow's: weights in whole 2**-22ths, sums of 32 bits, 8 bits between the two passes; rows are
resized first, as Pillow did when the published models were made (since 13 it begins with the
columns of tall pictures, and their pixels come out a little different). Only a picture that would
be far too large in between, many rows of few pixels, is begun with its columns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from kestrel.ops.jit import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Weights = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]

log = logging.getLogger(__name__)

BITS = 22
"""Weights are multiples of 2 ** -BITS: a pixel takes 8 of 32 bits, sums over one and signs two."""
SUPPORT = 3
"""Zeros of the filter on each side, output pixels."""
BAND = 128
"""Rows that are transposed at once: they stay in the cache."""
STRETCH = 1024
"""Values that are summed up at once: their sums stay in the first cache."""
WIDENED = 2**23
"""Pixels at most that a tall picture has once its rows were made longer, at 3 bytes each."""
WEIGHTS = 2**18
"""Weights that are held at once, about, at 4 bytes each: one for each of millions of rows would
take several times the memory of a picture that is a pixel wide."""


def resized(
    image: NDArray[np.uint8],
    height: int,
    width: int,
    extent: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """``image`` uint8 [H, W, 3] as uint8 [height, width, 3], by Pillow's Lanczos filter.

    ``extent``: rows and columns that count, over H - 1 and W - 1, where a part of the last ones
    lies outside the picture. Pillow itself where Numba cannot be had.
    """
    rows, columns = image.shape[:2]
    tall, wide = extent or (rows, columns)
    passes = _passes()
    if passes is None:
        return resized_by_pillow(image, height, width, (tall, wide))
    steps = [(_across, wide, width, columns), (_down, tall, height, rows)]
    if _columns_first(image, height, width):
        steps.reverse()
    for step, length, out, size in steps:
        if out != size:
            image = step(image, length, out, *passes)
    return np.array(image) if (rows, columns) == (height, width) else image


def _columns_first(image: NDArray[np.uint8], height: int, width: int) -> bool:
    rows, columns = image.shape[:2]
    return columns < width and rows > height and rows * width > WIDENED


def _spans(extent: float, out: int) -> list[tuple[int, int]]:
    """Output pixels in runs, start and stop, whose weights are held at once: mostly one run."""
    some = max(1, int(WEIGHTS / (2 * SUPPORT * max(extent / out, 1.0))))
    return [(start, min(start + some, out)) for start in range(0, out, some)]


def _across(
    image: NDArray[np.uint8],
    extent: float,
    width: int,
    weights: Callable[..., Weights],
    weighted: Callable[..., None],
) -> NDArray[np.uint8]:
    """Rows resized, in bands of them; where they are so long that their weights are not held at
    once, there are few bands for which to make them again."""
    rows, columns = image.shape[:2]
    kept = lru_cache(maxsize=1)(partial(weights, columns, extent, width))
    resized = np.empty((rows, width, 3), np.uint8)
    for y in range(0, rows, BAND):
        band = np.asarray(cv2.transpose(image[y : y + BAND]), np.uint8)
        resized[y : y + BAND] = cv2.transpose(_summed(band, extent, width, kept, weighted))
    return resized


def _down(
    image: NDArray[np.uint8],
    extent: float,
    height: int,
    weights: Callable[..., Weights],
    weighted: Callable[..., None],
) -> NDArray[np.uint8]:
    """Columns resized."""
    of_lines = partial(weights, len(image), extent, height)
    return _summed(np.ascontiguousarray(image), extent, height, of_lines, weighted)


def _summed(
    lines: NDArray[np.uint8],
    extent: float,
    out: int,
    weights: Callable[[int, int], Weights],
    weighted: Callable[..., None],
) -> NDArray[np.uint8]:
    """Lines [N, n, 3] as [out, n, 3], each a weighted sum of some; ``weights`` of those from one
    number to another."""
    sums = np.empty((out, *lines.shape[1:]), np.uint8)
    for start, stop in _spans(extent, out):
        some = sums[start:stop].reshape(stop - start, -1)
        weighted(lines.reshape(len(lines), -1), *weights(start, stop), some)
    return sums


def resized_by_pillow(
    image: NDArray[np.uint8],
    height: int,
    width: int,
    extent: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """The same, and what ``resized`` is measured by; to the last bit where one run of weights is
    held."""
    rows, columns = image.shape[:2]
    tall, wide = extent or (rows, columns)
    steps = [(0, wide, width), (1, tall, height)]
    if _columns_first(image, height, width):
        steps.reverse()
    for axis, length, out in steps:
        image = _pass_by_pillow(image, axis, length, out)
    return image


def _pass_by_pillow(
    image: NDArray[np.uint8], axis: int, extent: float, out: int
) -> NDArray[np.uint8]:
    """Rows (axis 0) or columns (1) resized."""
    picture = Image.fromarray(image)
    width, height = picture.size
    parts = []
    for start, stop in _spans(extent, out):
        low, high = extent * start / out, extent if stop == out else extent * stop / out
        size = (stop - start, height) if axis == 0 else (width, stop - start)
        box = (low, 0, high, height) if axis == 0 else (0, low, width, high)
        parts.append(picture.resize(size, Image.Resampling.LANCZOS, box=box))
    return np.concatenate([np.asarray(part) for part in parts], axis=1 - axis)


@cache
def _passes() -> tuple[Callable[..., Any], Callable[..., None]] | None:
    """``_weights`` and ``_weighted``, compiled; None, with a warning, where they cannot be."""
    try:
        matrix, first = "uint8[:, ::1]", "int64[::1]"
        signature = f"void({matrix}, {first}, {first}, int32[:, ::1], {matrix})"
        weights = compiled("(int64, float64, int64, int64, int64)", _weights)
        weighted = compiled(signature, _weighted)
    except Exception as error:  # not installed, or not for this Python, NumPy or processor
        log.warning(
            "pictures are resized by Pillow, which is slower (%s: %s); pip install numba",
            type(error).__name__,
            error,
        )
        return None
    return weights, weighted


def _weights(size, extent, out, start, stop):
    """Of pixels ``start`` to ``stop`` of the ``out`` that a line of ``size`` becomes, of which
    ``extent`` counts: the first pixel that each takes, how many, and their weights int32
    [stop - start, most]."""
    scale = extent / out
    stretch = max(scale, 1.0)
    reach = SUPPORT * stretch
    first = np.empty(stop - start, np.int64)
    count = np.empty(stop - start, np.int64)
    weights = np.zeros((stop - start, 2 * math.ceil(reach) + 1), np.int32)
    line = np.empty(weights.shape[1])
    for i in range(stop - start):
        middle = (start + i + 0.5) * scale
        low = max(0, int(middle - reach + 0.5))
        first[i], count[i] = low, min(size, int(middle + reach + 0.5)) - low
        total = 0.0
        for k in range(count[i]):
            x = (k + low - middle + 0.5) * (1.0 / stretch)
            line[k] = 0.0
            if x == 0.0:
                line[k] = 1.0
            elif -SUPPORT <= x < SUPPORT:
                turn, slow = x * math.pi, x / SUPPORT * math.pi
                line[k] = math.sin(turn) / turn * (math.sin(slow) / slow)
            total += line[k]
        for k in range(count[i]):
            share = line[k] / total * (1 << BITS)
            weights[i, k] = int(share - 0.5) if share < 0 else int(share + 0.5)
    return first, count, weights


def _weighted(lines, first, count, weights, out):
    """Each line of ``out`` uint8 [n, width] from ``count`` of ``lines`` [m, width] by weights.

    Sums are kept to 32 bits at every step: Numba would widen them, and vectors hold half as many.
    """
    width = lines.shape[1]
    total = np.empty(STRETCH, np.int32)
    for start in range(0, width, STRETCH):
        size = min(STRETCH, width - start)
        for i in range(out.shape[0]):
            for j in range(size):
                total[j] = np.int32(1 << (BITS - 1))
            k = 0
            while k + 4 <= count[i]:
                w0, w1, w2, w3 = weights[i, k : k + 4]
                n = first[i] + k
                l0, l1 = lines[n, start : start + size], lines[n + 1, start : start + size]
                l2, l3 = lines[n + 2, start : start + size], lines[n + 3, start : start + size]
                for j in range(size):
                    total[j] = np.int32(
                        total[j]
                        + np.int32(np.int32(l0[j]) * w0)
                        + np.int32(np.int32(l1[j]) * w1)
                        + np.int32(np.int32(l2[j]) * w2)
                        + np.int32(np.int32(l3[j]) * w3)
                    )
                k += 4
            while k < count[i]:
                w0, l0 = weights[i, k], lines[first[i] + k, start : start + size]
                for j in range(size):
                    total[j] = np.int32(total[j] + np.int32(np.int32(l0[j]) * w0))
                k += 1
            line = out[i, start : start + size]
            for j in range(size):
                value = np.int32(total[j] >> np.int32(BITS))
                line[j] = np.uint8(max(np.int32(0), min(np.int32(255), value)))
