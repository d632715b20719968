"""How much Potrace has to do for a mask, told before it is asked: nothing can cancel it.

From each step of an outline it looks ahead, corner by corner, for as long as the outline stays
straight within half a pixel (``calc_lon`` and ``bestpolygon`` of its sections 2.2.1 and 2.2.3). A
straight edge of ``n`` steps and ``c`` corners takes about ``n · c / 2`` looks: a diagonal, with a
corner at every step, the square of its length.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

MOST_WORK = 1e8
"""Looks that all traces of a mask may take: 1.7 to 3 s of one core at 17 to 30 ns each."""

_OF_A_STEP = 60
"""Looks that each step of an outline counts by itself: one of specks takes 1.5 microseconds."""
_BLOCK = 32
"""Steps of the shortest edge that is looked at: what is shorter is within ``_OF_A_STEP``."""
_STRAIGHT = 1.0
"""Pixels that a straight edge may be off its chord."""
_UPRIGHT = 0.01
"""Corners that count for each step of an edge without any: it is not free."""


def work(mask: npt.NDArray[np.uint8], enough: float = 0.0) -> float:
    """About how many looks a trace takes; or a bound of them, which is found sooner, where that is
    within ``enough``.

    ``mask`` uint8 [H, W] of 0 and 1.
    """
    steps = _outline_steps(mask)
    alone = float(steps) * _OF_A_STEP
    bound = alone + float(steps) * max(mask.shape)
    if bound <= enough or alone > MOST_WORK:
        return bound
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return alone + _along_edges(np.concatenate(contours)[:, 0].astype(np.float32))


def _outline_steps(mask: npt.NDArray[np.uint8]) -> int:
    """Sides of pixels between what is set and what is not, those at the rim too."""
    within = cv2.countNonZero(cv2.absdiff(mask[1:], mask[:-1])) if len(mask) > 1 else 0
    if mask.shape[1] > 1:
        within += cv2.countNonZero(cv2.absdiff(mask[:, 1:], mask[:, :-1]))
    rim = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return within + sum(int(np.count_nonzero(side)) for side in rim)


def _along_edges(points: npt.NDArray[np.float32]) -> float:
    """Looks along the straight edges of outlines [n, 2], one pixel after the other: edges of a
    block of points, of two blocks, of four, ..., as long as they are straight."""
    blocks = points[: len(points) // _BLOCK * _BLOCK].reshape(-1, _BLOCK, 2)
    number = np.arange(len(blocks))
    looks = 0.0
    while len(blocks):
        from_start = blocks - blocks[:, :1]
        chord = from_start[:, -1]
        length = np.hypot(chord[:, 0], chord[:, 1])
        across = from_start[..., 0] * chord[:, None, 1] - from_start[..., 1] * chord[:, None, 0]
        straight = (np.abs(across).max(1) <= _STRAIGHT * length) & (length > 0)
        blocks, number = blocks[straight], number[straight]
        moves = np.abs(np.diff(blocks, axis=1))
        steps, corners = moves.sum((1, 2)), 2 * moves.min(2, initial=np.inf).sum(1)
        looks += float((steps * (corners + _UPRIGHT * steps)).sum()) / 2
        first = np.flatnonzero((number[:-1] % 2 == 0) & (np.diff(number) == 1))
        blocks = np.concatenate([blocks[first], blocks[first + 1]], axis=1)
        number = number[first] // 2
    return looks
