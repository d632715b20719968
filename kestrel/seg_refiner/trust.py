"""Whether a coarse mask is right already: then the boundary refiner leaves it as it is.

What the refiner makes of a right mask lies nearer to it than what it makes of one that a model
spelled with a few vertices: it was trained on right masks too. Where the outline has more detail
than a few vertices could give, it may lie further off.
"""

from __future__ import annotations

import cv2
import numpy as np

MOVED, MOVED_IN_DETAIL = 0.8, 1.6
"""Working pixels by which the outline would move in the mean, up to which a mask is left: any mask,
one with detail. Jittered outlines of 32 vertices would move by 1.7 in the middle, none of them by
less than 0.8; masks that people drew by 0.5 in the middle: ``tools/boundary_trust.py``."""
VERTICES = 40
"""Vertices that an outline with detail takes."""
TOLERANCE = 0.004
"""Outlines are drawn to this fraction of the object's size when their vertices are counted."""
LEAST_TOLERANCE = 1.0
"""The least of it, pixels: finer is what drawing a line in pixels makes."""
NEAR = np.ones((3, 3), np.uint8)


def trusted(mask: np.ndarray, coverage: np.ndarray, soft: np.ndarray) -> bool:
    """Whether the coarse ``mask`` is likely right.

    ``mask`` uint8 [H, W] 0/1 at full size; ``coverage``, its own, and ``soft``, what the refiner
    makes of it, float32 [h, w], shares of the object at working size.
    """
    moved = moved_by(coverage, soft)
    if moved >= MOVED_IN_DETAIL:
        return False
    return moved < MOVED or vertices_of(mask) >= VERTICES


def vertices_of(mask: np.ndarray) -> int:
    """Number of vertices that the longest outline takes (Douglas and Peucker)."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(outlines, key=len)
    tolerance = max(LEAST_TOLERANCE, TOLERANCE * float(np.ptp(line[:, 0], axis=0).max()))
    return len(cv2.approxPolyDP(line, tolerance, True))


def moved_by(coverage: np.ndarray, soft: np.ndarray) -> float:
    """Mean distance between the two outlines, pixels: the area between them by the length."""
    coarse = (coverage > 0.5).astype(np.uint8)
    # One pixel on either side of the outline.
    rim = int(np.count_nonzero(cv2.dilate(coarse, NEAR) != cv2.erode(coarse, NEAR)))
    between = int(np.count_nonzero((soft > 0.5) != coarse.view(np.bool_)))
    return 2 * between / max(1, rim)
