"""Boxes of masks in whole pixels, ``(x0, y0, x1, y1)`` with exclusive ends; overlap of masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

from kestrel.image import PixelBox as PixelBox

Size = tuple[int, int]
"""Width and height, pixels."""
TILE = 64
"""Pixels of a side of the tiles in which masks are looked through."""
MOST_PARTS = 100
"""A mask of more is looked at as one: they are compared in pairs."""
GROW = 0.25
"""Refinement looks at the box grown by this fraction of its sides."""


def mask_box(mask: np.ndarray) -> PixelBox | None:
    """Box of the set pixels of a 2-D mask (bool or uint8); None for an empty mask."""
    return _box(mask, _tile_rows(mask))


def mask_parts(mask: np.ndarray) -> tuple[PixelBox | None, list[PixelBox]]:
    """:func:`mask_box`, and boxes of what lies apart in it.

    The boxes do not overlap and hold all set pixels; those of one 8-connected island, and of the
    holes in it, lie in one of them. They may be up to ``TILE`` pixels too large on each side.
    """
    rows = _tile_rows(mask)
    box = _box(mask, rows)
    if box is None:
        return None, []
    height, width = mask.shape
    tiles = np.maximum.reduceat(rows, np.arange(0, width, TILE), axis=1)
    _, _, stats, _ = cv2.connectedComponentsWithStats(tiles, connectivity=8)
    if len(stats) > MOST_PARTS:
        return box, [box]
    # A row per component: left, top, width, height, area; the first is what is not set.
    parts = [
        (left * TILE, top * TILE, min(width, (left + w) * TILE), min(height, (top + h) * TILE))
        for left, top, w, h, _ in stats[1:].tolist()
    ]
    return box, _disjoint(parts)


def _tile_rows(mask: np.ndarray) -> np.ndarray:
    """The largest value of each column within each ``TILE`` rows: uint8 or bool [tiles, W]."""
    height, width = mask.shape
    whole = height // TILE
    rows = np.zeros((-(-height // TILE), width), mask.dtype)
    # A reduction along rows is far faster than .any() for uint8 (no conversion to bool).
    mask[: whole * TILE].reshape(whole, TILE, width).max(axis=1, out=rows[:whole])
    if whole < len(rows):
        mask[whole * TILE :].max(axis=0, out=rows[whole])
    return rows


def _box(mask: np.ndarray, rows: np.ndarray) -> PixelBox | None:
    if not mask.size:
        return None
    columns = np.flatnonzero(rows.max(axis=0))
    if columns.size == 0:
        return None
    x0, x1 = int(columns[0]), int(columns[-1]) + 1
    used = np.flatnonzero(rows.max(axis=1))
    above, below = int(used[0]) * TILE, int(used[-1]) * TILE
    first = np.flatnonzero(mask[above : above + TILE, x0:x1].max(axis=1))
    last = np.flatnonzero(mask[below : below + TILE, x0:x1].max(axis=1))
    return x0, above + int(first[0]), x1, below + int(last[-1]) + 1


def _disjoint(boxes: list[PixelBox]) -> list[PixelBox]:
    """Boxes that overlap are joined until none do."""
    done: list[PixelBox] = []
    while boxes:
        box = boxes.pop()
        x0, y0, x1, y1 = box
        hits = [b for b in done if b[0] < x1 and x0 < b[2] and b[1] < y1 and y0 < b[3]]
        if not hits:
            done.append(box)
            continue
        done = [b for b in done if b not in hits]
        boxes.append(functools.reduce(joined_box, hits, box))
    return done


def grown_box(box: PixelBox, width: int, height: int, grow: float = GROW) -> PixelBox:
    """The box with ``grow`` of its sides (at least 2 pixels) added all round, cut at the image."""
    x0, y0, x1, y1 = box
    dx, dy = max(2, math.ceil((x1 - x0) * grow)), max(2, math.ceil((y1 - y0) * grow))
    return max(0, x0 - dx), max(0, y0 - dy), min(width, x1 + dx), min(height, y1 + dy)


def refined_in_box(
    image: np.ndarray,
    mask: np.ndarray,
    refine_crop: Callable[[np.ndarray, np.ndarray], np.ndarray],
    reduction: int = 1,
) -> np.ndarray:
    """``refine_crop`` of image and mask within the mask's grown box; nothing is set outside.

    ``image`` uint8 [H, W, 3], ``mask`` uint8 [H, W] 0/1; ``refine_crop`` gives a mask, uint8 0/1 of
    the crop's size. Gives uint8 [H, W] 0/1. The image may be smaller by ``reduction``, as
    ``kestrel.image.decode`` makes it; the box then holds whole pixels of it.
    """
    # Not zeros_like, which writes them: what is never touched takes no memory.
    refined = np.zeros(mask.shape, np.uint8)
    box = mask_box(mask)
    if box is not None:
        height, width = mask.shape
        box = x0, y0, x1, y1 = reduced_box(grown_box(box, width, height), reduction)
        crop = image[y0:y1, x0:x1]
        x0, y0, x1, y1 = (side * reduction for side in box)
        refined[y0:y1, x0:x1] = refine_crop(crop, mask[y0:y1, x0:x1])
    return refined


def reduced_box(box: PixelBox, reduction: int) -> PixelBox:
    """The pixels of a picture smaller by ``reduction`` that hold the box."""
    x0, y0, x1, y1 = box
    return x0 // reduction, y0 // reduction, -(-x1 // reduction), -(-y1 // reduction)


def joined_box(a: PixelBox, b: PixelBox) -> PixelBox:
    """The smallest box around both."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks (uint8 or bool, 0/1); 1 when both are empty."""
    # bool and uint8 share their bytes; counting bools is much faster.
    common = np.count_nonzero((a & b).view(np.bool_))
    union = np.count_nonzero(a.view(np.bool_)) + np.count_nonzero(b.view(np.bool_)) - common
    return common / union if union else 1.0


def boundary_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of the bands inside the outlines of two masks [H, W] (uint8 or bool, 0/1), 2 % of
    the picture's diagonal wide (Cheng et al., "Boundary IoU", CVPR 2021)."""
    width = max(1, round(0.02 * float(np.hypot(*a.shape))))

    def band(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask.view(np.uint8), 1)
        return (padded - cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width))[1:-1, 1:-1]

    return mask_iou(band(a), band(b))
