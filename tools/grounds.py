"""What stands behind the objects of a scene: photographs, gradients, patterns, smooth noise."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from assets import backgrounds


@lru_cache(maxsize=1)
def photos() -> list[np.ndarray]:
    return backgrounds()


def _tint(rng: np.random.Generator) -> np.ndarray:
    """A random colour, float32 [3] in 0..1, greyish more often than vivid."""
    grey = rng.uniform(0.08, 0.98)
    return np.clip(grey + rng.normal(0, 1, 3) * rng.uniform(0.02, 0.3), 0, 1).astype(np.float32)


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of pixel centres in 0..1: float32 x [1, W] and y [H, 1]."""
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    return x[None, :], y[:, None]


def octaves(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Smooth noise of several scales, float32 [H, W] in 0..1."""
    total = np.zeros((height, width), np.float32)
    cells, strength, weight = int(rng.integers(2, 6)), 1.0, 0.0
    for _ in range(int(rng.integers(1, 5))):
        grid = rng.random((cells + 1, cells + 1), dtype=np.float32)
        total += strength * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weight += strength
        cells, strength = cells * 2, strength * rng.uniform(0.4, 0.8)
    return np.clip(total / weight, 0, 1)


def _mix(share: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3] between two colours."""
    return first + share[..., None] * (second - first)


def background(rng: np.random.Generator, width: int, height: int, photo: bool) -> np.ndarray:
    """float32 [H, W, 3] in 0..1; the same pattern at every size."""
    if photo:
        pictures = photos()
        source = pictures[rng.integers(len(pictures))]
        h, w = source.shape[:2]
        side = rng.uniform(0.3, 1.0) * min(h, w)
        cut_w, cut_h = side, side * rng.uniform(0.7, 1.0)
        left, top = rng.uniform(0, w - cut_w), rng.uniform(0, h - cut_h)
        cut = source[int(top) : int(top + cut_h), int(left) : int(left + cut_w)]
        if rng.random() < 0.5:
            cut = cut[:, ::-1]
        kind = cv2.INTER_AREA if cut.shape[1] > width else cv2.INTER_CUBIC
        canvas = cv2.resize(np.ascontiguousarray(cut), (width, height), interpolation=kind)
        canvas = canvas.astype(np.float32) / 255
        gain = np.exp(rng.normal(0, 0.15, 3) + rng.normal(0, 0.2)).astype(np.float32)
        return np.clip(canvas * gain, 0, 1)
    x, y = _grid(width, height)
    first, second = _tint(rng), _tint(rng)
    pick = rng.random()
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    share: np.ndarray
    if pick < 0.14:
        share = np.zeros((height, width), np.float32)
    elif pick < 0.32:
        share = along + 0.5
    elif pick < 0.4:
        cx, cy = rng.uniform(0, 1, 2)
        share = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    elif pick < 0.62:
        share = octaves(rng, width, height)
    elif pick < 0.7:
        period = rng.uniform(0.05, 0.4)
        share = (np.mod(along / period, 1) < rng.uniform(0.2, 0.8)).astype(np.float32)
    elif pick < 0.76:
        period = rng.uniform(0.08, 0.35)
        cells = np.floor(x / period) + np.floor(y / period)
        share = np.mod(cells, 2).astype(np.float32)
    elif pick < 0.9:
        # A horizon: ground and sky, each with a slope of its own.
        line = rng.uniform(0.3, 0.8) + 0.06 * np.sin(x * rng.uniform(2, 9) + rng.uniform(0, 6))
        share = (y > line).astype(np.float32) + 0.25 * (y - 0.5)
    else:
        share = np.clip((octaves(rng, width, height) - 0.5) * rng.uniform(4, 16) + 0.5, 0, 1)
    canvas = _mix(np.broadcast_to(share, (height, width)).astype(np.float32), first, second)
    if rng.random() < 0.35:
        for _ in range(int(rng.integers(1, 7))):
            _blob(canvas, rng)
    if rng.random() < 0.3:
        texture = octaves(rng, width, height) - 0.5
        canvas += np.float32(rng.uniform(0.05, 0.35)) * texture[..., None]
    return np.clip(canvas, 0, 1, out=canvas)


def _blob(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """An ellipse, rectangle or line of one colour, in place."""
    height, width = canvas.shape[:2]
    scale = min(width, height)
    colour = tuple(float(v) for v in _tint(rng))
    x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
    a, b = (int(v) for v in rng.uniform(0.03, 0.35, 2) * scale)
    pick = rng.random()
    if pick < 0.45:
        turn = float(rng.uniform(0, 180))
        cv2.ellipse(canvas, (x, y), (a, b), turn, 0, 360, colour, -1, cv2.LINE_AA)
    elif pick < 0.75:
        cv2.rectangle(canvas, (x - a, y - b), (x + a, y + b), colour, -1)
    else:
        end = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        thick = max(1, int(rng.uniform(0.008, 0.05) * scale))
        cv2.line(canvas, (x, y), end, colour, thick, cv2.LINE_AA)
