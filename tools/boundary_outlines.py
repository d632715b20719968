"""Random outlines for things that have no cut-out: waves, polygons, bodies with limbs."""

from __future__ import annotations

import math

import cv2
import numpy as np


def random_outline(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """float32 [h, w], 0/1, as high and wide as the array."""
    kind = rng.random()
    if kind >= 0.55:
        return _body(rng, h, w)
    points = _waves(rng) if kind < 0.4 else _corners(rng)
    low, high = points.min(0), points.max(0)
    points = (points - low) / np.maximum(high - low, 1e-6) * (w - 1, h - 1)
    out = np.zeros((h, w), np.uint8)
    cv2.fillPoly(out, [np.round(points * 16).astype(np.int32)], 1, cv2.LINE_8, 4)
    return out.astype(np.float32)


def _waves(rng: np.random.Generator) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    radius = np.ones_like(angle)
    for wave in range(1, int(rng.integers(3, 12))):
        radius += rng.normal(0, 0.5 / wave**1.1) * np.cos(wave * angle + rng.uniform(0, 6.3))
    radius = np.clip(radius, 0.15, None)
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], 1)


def _corners(rng: np.random.Generator) -> np.ndarray:
    count = int(rng.integers(3, 9))
    angle = np.sort(rng.uniform(0, 2 * np.pi, count))
    return np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.5, 1, (count, 1))


def _body(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """An ellipse with limbs that bend and taper, some of which end in a lump."""
    canvas = np.zeros((256, 256), np.uint8)
    axes = (int(rng.uniform(25, 60)), int(rng.uniform(18, 45)))
    cv2.ellipse(canvas, (128, 128), axes, rng.uniform(0, 180), 0, 360, 1, -1)
    for _ in range(int(rng.integers(1, 7))):
        direction, step = rng.uniform(0, 6.3), rng.uniform(20, 55)
        x, y, thick = 128.0, 128.0, rng.uniform(6, 26)
        for _ in range(int(rng.integers(1, 4))):
            end = (x + math.cos(direction) * step, y + math.sin(direction) * step)
            ends = (int(x), int(y)), (int(end[0]), int(end[1]))
            cv2.line(canvas, *ends, 1, max(2, int(thick)))
            (x, y), thick = end, thick * 0.8
            direction += rng.normal(0, 0.6)
        if rng.random() < 0.5:
            radius = rng.uniform(8, 26)
            axes = (int(radius), int(radius * rng.uniform(0.6, 1)))
            cv2.ellipse(canvas, (int(x), int(y)), axes, 0, 0, 360, 1, -1)
    canvas = (cv2.GaussianBlur(canvas * 255, (0, 0), rng.uniform(1, 6)) > 127).astype(np.uint8)
    x0, y0, width, height = cv2.boundingRect(canvas)
    cut = canvas[y0 : y0 + height, x0 : x0 + width]
    return cv2.resize(cut, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32)
