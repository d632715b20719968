"""Whether a coarse mask is right already: then the boundary refiner leaves it as it is.

The network, which was trained on right masks too, moves their outlines less than those that a model
spelled with a few vertices. Where it leaves a good part of an outline it decides alone; where it
leaves less, the outline must have more detail than a few vertices could give.
"""

from __future__ import annotations

import cv2
import numpy as np

AGREES, AGREES_IN_DETAIL = 0.3, 0.15
"""Share of the coarse outline within a working pixel of the network's, from which on a mask is
left: any mask, one with detail. Jittered outlines of 32 vertices come to 0.1 in the middle, one in
twenty to 0.18; masks that people drew to 0.3, exact ones to more: ``tools/boundary_trust.py``."""
VERTICES = 40
"""Vertices that an outline with detail takes."""
TOLERANCE = 0.004
"""Outlines are drawn to this fraction of the object's size when their vertices are counted."""
LEAST_TOLERANCE = 1.0
"""The least of it, pixels: finer is what drawing a line in pixels makes."""
NEAR = np.ones((3, 3), np.uint8)


def trusted(mask: np.ndarray, coverage: np.ndarray, learned: np.ndarray) -> bool:
    """Whether the coarse ``mask`` is likely right.

    ``mask`` uint8 [H, W] 0/1 at full size; ``coverage``, its own, and ``learned``, the network's
    share, float32 [h, w] in 0..1 at working size.
    """
    agreement = agreement_of(coverage, learned)
    if agreement < AGREES_IN_DETAIL:
        return False
    return agreement >= AGREES or vertices_of(mask) >= VERTICES


def vertices_of(mask: np.ndarray) -> int:
    """Number of vertices that the longest outline takes (Douglas and Peucker)."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(outlines, key=len)
    tolerance = max(LEAST_TOLERANCE, TOLERANCE * float(np.ptp(line[:, 0], axis=0).max()))
    return len(cv2.approxPolyDP(line, tolerance, True))


def agreement_of(coverage: np.ndarray, learned: np.ndarray) -> float:
    """Share of the coarse outline that is within a working pixel of the network's, 0..1."""
    coarse = (coverage > 0.5).astype(np.uint8)
    outline = cv2.dilate(coarse, NEAR) != cv2.erode(coarse, NEAR)
    moved = cv2.dilate((learned > 0.5).astype(np.uint8) ^ coarse, NEAR) > 0
    length, away = int(np.count_nonzero(outline)), int(np.count_nonzero(outline & moved))
    return 1 - away / max(1, length)
