"""From the size that a refiner works at to the mask's, along the outline only."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from kestrel.image import REDUCTIONS
from kestrel.seg_refiner.box import Size

SURE = 0.1
"""Where the working-size result is within this of 0 or 1 the full size is not looked at."""
TILE = 64
"""Side of the tiles that are sure or not, full-size pixels; twice that in a reduced picture."""
LEAST_SHORT_SIDE = 64
"""Pixels that the shorter side of a box keeps where its picture is reduced."""
MOST_OF_PICTURE = 0.6
"""Share of a picture up to which a box of it may be reduced."""

Planes = Sequence[np.ndarray]


def planes(picture: np.ndarray) -> Planes:
    """Three float32 planes, 0..1, of a uint8 [h, w, 3] picture."""
    scaled = np.multiply(picture, np.float32(1 / 255), dtype=np.float32)
    return [np.ascontiguousarray(scaled[..., k]) for k in range(3)]


def apply_coefficients(guide: Planes, fitted: Planes) -> np.ndarray:
    """``q = a . I + b`` (He, Sun, Tang, "Guided Image Filtering", eq. 19), float32 [h, w];
    ``fitted``: what ``guided.coefficients`` gives."""
    a0, a1, a2, offset = fitted
    soft = a0 * guide[0]
    soft += a1 * guide[1]
    soft += a2 * guide[2]
    soft += offset
    return soft


def reduction_for(box: Size, picture: Size, least_side: int) -> int:
    """The largest of ``REDUCTIONS`` that leaves the longer side of a box ``least_side`` pixels; 1
    where the box is most of the picture: what its outline moves by is then too much of it.

    Enough to work at is not enough: the last pass follows the picture's pixels, and its outline is
    less exact where they are larger. ``benchmarks/reduced.py`` measures by how much.
    """
    if box[0] * box[1] > MOST_OF_PICTURE * picture[0] * picture[1]:
        return 1
    most = min(max(box) / least_side, min(box) / LEAST_SHORT_SIDE)
    return next((reduction for reduction in REDUCTIONS if reduction <= most), 1)


def at_full_size(
    crop: np.ndarray, soft: np.ndarray, fitted: Planes, shape: tuple[int, int], reduction: int = 1
) -> np.ndarray:
    """Mask uint8 0/1 of ``shape``.

    ``crop``: uint8 [ceil(H / reduction), ceil(W / reduction), 3]; ``soft``, shares of the object,
    and ``fitted``, coefficients of the last guided pass: float32 [h, w] on the same box. That pass
    follows the crop's own pixels, and is interpolated between them where the crop is smaller than
    the mask; only tiles that the outline crosses are computed.
    """
    height, width = shape
    h, w = soft.shape
    stacked = cv2.merge(fitted)
    refined = np.empty(shape, np.uint8)
    down, right = h / height, w / width  # working pixels per full-size pixel
    side = TILE if reduction == 1 else 2 * TILE
    rim = int(reduction > 1)  # pixels of the crop that interpolation needs all round
    if rim:
        crop = cv2.copyMakeBorder(crop, rim, rim, rim, rim, cv2.BORDER_REPLICATE)
    for y0 in range(0, height, side):
        y1 = min(height, y0 + side)
        near_rows = slice(max(0, int(y0 * down) - 1), int(y1 * down) + 2)
        for x0 in range(0, width, side):
            x1 = min(width, x0 + side)
            full = np.s_[y0:y1, x0:x1]
            near = slice(max(0, int(x0 * right) - 1), int(x1 * right) + 2)
            low, high, _, _ = cv2.minMaxLoc(soft[near_rows, near])
            if high < SURE or low > 1 - SURE:
                refined[full] = low > 0.5
                continue
            top, left = y0 // reduction - rim, x0 // reduction - rim
            bottom, end = -(-y1 // reduction) + rim, -(-x1 // reduction) + rim
            # From pixel centres of the tile to those of the working size.
            to_small = np.array(
                [
                    [right * reduction, 0, (left + 0.5) * right * reduction - 0.5],
                    [0, down * reduction, (top + 0.5) * down * reduction - 0.5],
                ]
            )
            part = cv2.warpAffine(
                stacked,
                to_small,
                (end - left, bottom - top),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
            tile = crop[top + rim : bottom + rim, left + rim : end + rim]
            fine = apply_coefficients(planes(tile), [part[..., k] for k in range(4)])
            if reduction > 1:
                size = (fine.shape[1] * reduction, fine.shape[0] * reduction)
                fine = cv2.resize(fine, size, interpolation=cv2.INTER_LINEAR)
                fine = fine[reduction:, reduction:][: y1 - y0, : x1 - x0]
            np.greater(fine, 0.5, out=refined[full].view(np.bool_))
    return refined
