"""Whether a coarse mask is right already: then the boundary refiner leaves it as it is.

Two things tell a mask that follows the object from one that a model spelled with a few vertices:
its outline has more detail than those could give, and the network, which was trained on masks of
both kinds, would leave the outline where it is.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

DETAIL = 0.0025
"""Outlines are drawn to this fraction of the object's size when their vertices are counted."""
LEAST_DETAIL = 0.7
"""The least of it, pixels: finer is what drawing a line in pixels makes."""
FEWEST, MOST = 8, 80
"""Fewer and more vertices count as these."""
DETAIL_WEIGHT, AGREEMENT_WEIGHT, BIAS = 3.62, 24.79, -18.11
"""Logistic regression of true masks against jittered outlines of 32 vertices: of the logarithm of
the vertices, of the agreement; by ``tools/boundary_trust.py``."""
LEAST = 0.25
"""Log odds from which on a mask is left: where true masks of BSDS500's ``train`` stay within a
hundredth on average."""
NEAR = np.ones((3, 3), np.uint8)


def trusted(mask: np.ndarray, coverage: np.ndarray, learned: np.ndarray) -> bool:
    """Whether the coarse ``mask`` is likely right.

    ``mask`` uint8 [H, W] 0/1 at full size; ``coverage``, its own, and ``learned``, the network's
    share, float32 [h, w] in 0..1 at working size.
    """
    detail, agreement = log_vertices(mask), agreement_of(coverage, learned)
    return DETAIL_WEIGHT * detail + AGREEMENT_WEIGHT * agreement + BIAS > LEAST


def log_vertices(mask: np.ndarray) -> float:
    """Logarithm of the number of vertices that the longest outline takes (Douglas and Peucker)."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(outlines, key=len)
    detail = max(LEAST_DETAIL, DETAIL * float(np.ptp(line[:, 0], axis=0).max()))
    return math.log(min(MOST, max(FEWEST, len(cv2.approxPolyDP(line, detail, True)))))


def agreement_of(coverage: np.ndarray, learned: np.ndarray) -> float:
    """Share of the coarse outline that is within a working pixel of the network's, 0..1."""
    coarse = (coverage > 0.5).astype(np.uint8)
    outline = cv2.dilate(coarse, NEAR) != cv2.erode(coarse, NEAR)
    moved = cv2.dilate((learned > 0.5).astype(np.uint8) ^ coarse, NEAR) > 0
    length, away = int(np.count_nonzero(outline)), int(np.count_nonzero(outline & moved))
    return 1 - away / max(1, length)
