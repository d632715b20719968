"""Boxes of masks in whole pixels, ``(x0, y0, x1, y1)`` with exclusive ends; overlap of masks."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

PixelBox = tuple[int, int, int, int]
GROW = 0.25
"""Refinement looks at the box grown by this fraction of its sides."""


def mask_box(mask: np.ndarray) -> PixelBox | None:
    """Box of the set pixels of a 2-D mask (bool or uint8); None for an empty mask."""
    if not mask.size:
        return None
    # A reduction along rows is far faster than .any() for uint8 (no conversion to bool).
    rows = np.flatnonzero(mask.max(axis=1))
    if rows.size == 0:
        return None
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[y0:y1].max(axis=0))
    return int(columns[0]), y0, int(columns[-1]) + 1, y1


def grown_box(box: PixelBox, width: int, height: int, grow: float = GROW) -> PixelBox:
    """The box with ``grow`` of its sides (at least 2 pixels) added all round, cut at the image."""
    x0, y0, x1, y1 = box
    dx, dy = max(2, math.ceil((x1 - x0) * grow)), max(2, math.ceil((y1 - y0) * grow))
    return max(0, x0 - dx), max(0, y0 - dy), min(width, x1 + dx), min(height, y1 + dy)


def refined_in_box(
    image: np.ndarray,
    mask: np.ndarray,
    refine_crop: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """``refine_crop`` of image and mask within the mask's grown box; nothing is set outside.

    ``image`` uint8 [H, W, 3], ``mask`` uint8 [H, W] 0/1; ``refine_crop`` gives a mask, uint8 0/1 of
    the crop's size. Gives uint8 [H, W] 0/1.
    """
    refined = np.zeros_like(mask)
    box = mask_box(mask)
    if box is not None:
        height, width = mask.shape
        x0, y0, x1, y1 = grown_box(box, width, height)
        refined[y0:y1, x0:x1] = refine_crop(image[y0:y1, x0:x1], mask[y0:y1, x0:x1])
    return refined


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
