"""Coarse masks of a true one, of the kinds that a refiner is given."""

from __future__ import annotations

import math

import cv2
import numpy as np

POLYGONS, ROUGH_POLYGONS, BLOBS, PERFECT = 0.6, 0.12, 0.08, 0.12
"""Shares of the kinds; the rest are fine polygons."""
JITTER = 0.012
"""Vertices of a path lie off by about this fraction of the object's size."""


def coarse_polygon(
    mask: np.ndarray, rng: np.random.Generator, vertices: int, jitter: float, shift: float
) -> np.ndarray:
    """Outline resampled at even steps, each point moved: what a model that spells paths gives."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(outlines, key=cv2.contourArea)[:, 0].astype(float)
    closed = np.r_[line, line[:1]]
    length = np.r_[0, np.cumsum(np.hypot(*np.diff(closed, axis=0).T))]
    start = rng.uniform(0, length[-1])
    at = (start + np.linspace(0, length[-1], vertices, endpoint=False)) % max(length[-1], 1e-6)
    points = np.stack([np.interp(at, length, closed[:, k]) for k in (0, 1)], 1)
    size = np.ptp(line, axis=0).max()
    points += rng.standard_normal(points.shape) * size * jitter
    points += rng.standard_normal(2) * size * shift
    out = np.zeros_like(mask)
    cv2.fillPoly(out, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return out


def coarsened(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A coarse mask of one of several kinds, uint8 [h, w] 0/1."""
    kind = rng.random()
    if kind < POLYGONS:
        strength = rng.uniform(0.7, 1.6) * JITTER
        return coarse_polygon(
            mask, rng, int(rng.integers(20, 41)), strength, strength * rng.uniform(0.5, 1)
        )
    if kind < POLYGONS + ROUGH_POLYGONS:
        vertices = round(math.exp(rng.uniform(math.log(8), math.log(200))))
        return coarse_polygon(
            mask, rng, vertices, rng.uniform(0, 0.02) * min(1, 40 / vertices), rng.uniform(0, 0.02)
        )
    size = math.sqrt(float(mask.sum()))
    if kind < POLYGONS + ROUGH_POLYGONS + BLOBS:
        # Level sets of the distance plus smooth noise: blobs, mostly too large or too small.
        far = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
        far -= cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3)
        cells = int(rng.integers(3, 14))
        noise = cv2.resize(
            rng.standard_normal((cells, cells)).astype(np.float32),
            mask.shape[::-1],
            interpolation=cv2.INTER_CUBIC,
        )
        far += size * (rng.uniform(0, 0.07) * noise + rng.normal(0, 0.02))
        out = (far > 0).astype(np.uint8)
        if rng.random() < 0.3:
            out = cv2.medianBlur(out, 2 * int(rng.integers(1, 6)) + 1)
        return out
    if kind < POLYGONS + ROUGH_POLYGONS + BLOBS + PERFECT:
        return mask.copy()
    return coarse_polygon(mask, rng, int(rng.integers(60, 200)), rng.uniform(0, 0.003), 0.0)
