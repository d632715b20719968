"""Outlines of masks as closed polygons: along pixel edges, and with a few vertices, on even rays or
at even steps along the contour."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

_RAYS = 8
"""Rays that are looked along for each vertex of the polygon fitted to them."""
_NOTHING = 0.02
"""Radius where a ray from the middle of the box meets no object, half sides of the box."""
_STEPS = 16
"""Samples of the contour for each vertex at even steps along it."""
_SMOOTH = 5
"""Points of a contour, each half a pixel from the next, over which its length is smoothed: stairs
of pixels are longer than the edge that they stand for."""


@lru_cache(maxsize=8)
def _spline(vertices: int, samples: int) -> np.ndarray:
    """float64 [vertices, samples · vertices]: samples round a loop to a least-squares linear
    spline."""
    count = vertices * samples
    knots = np.arange(count) / samples
    low = np.floor(knots).astype(int)
    share = knots - low
    basis = np.zeros((count, vertices))
    basis[np.arange(count), low] = 1 - share
    basis[np.arange(count), (low + 1) % vertices] += share
    return np.linalg.pinv(basis)


def contour(mask: np.ndarray) -> np.ndarray:
    """float64 [n, 2] (x, y) px: outer contour of the largest piece along pixel edges, clockwise."""
    height, width = mask.shape
    # Every second element is a pixel edge or corner, set where a pixel that touches it is set.
    cracks = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    cracks[1::2, 1::2] = mask
    cracks = cv2.dilate(cracks, np.ones((3, 3), np.uint8))
    found, _ = cv2.findContours(cracks, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not found:
        return np.zeros((0, 2))
    points = max(found, key=cv2.contourArea)[:, 0].astype(np.float64) / 2
    x, y = points.T
    turn = np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))
    return points if turn > 0 else points[::-1]


def outline(points: np.ndarray, vertices: int = 24) -> np.ndarray:
    """Polygon that follows a ``contour`` [n, 2]: float64 [vertices, 2] (x, y) px.

    Coordinates are of pixel edges: a mask of one pixel at (0, 0) spans 0..1. The vertices lie on
    even rays from the middle of the piece's box, clockwise from straight up, in a frame where the
    box is a square: where the contour is farthest out along them. Only the distances are to be
    learnt, and each says by itself where the object ends: vertices at even steps along the contour
    follow it more closely (:func:`outline_along`) but slide along it with every detail. An empty
    contour gives [0, 2].
    """
    if not len(points):
        return points
    low, high = points.min(0), points.max(0)
    middle, half = (low + high) / 2, (high - low) / 2
    radii = _spline(vertices, _RAYS) @ _farthest((points - middle) / half, vertices * _RAYS)
    polygon = middle + half * radii.clip(_NOTHING)[:, None] * _directions(vertices)
    return np.clip(polygon, low, high)


def outline_along(points: np.ndarray, vertices: int = 32, starts: int = 1) -> np.ndarray:
    """Polygon that follows a ``contour`` [n, 2]: float64 [starts · vertices, 2] (x, y) px.

    Coordinates are of pixel edges: a mask of one pixel at (0, 0) spans 0..1. The vertices are at
    even steps along the contour, clockwise, in a frame where the piece's box is a square, from
    where the box's upright middle line first meets the piece; they are moved off it to where the
    polygon is nearest to all of the contour. An empty contour gives [0, 2].

    With more ``starts`` than one there is a polygon from each of as many places within the first
    step, and a vertex of each follows in turn: element ``starts · k + i`` is the k-th vertex of the
    polygon that begins ``i / starts`` of a step further on.
    """
    if not len(points):
        return points
    low, high = points.min(0), points.max(0)
    loop = _from_the_top((points - low) / (high - low))
    reached = _lengths(loop)
    step = reached[-1] / vertices
    closed = np.concatenate([loop, loop[:1]])
    polygons = np.empty((vertices, starts, 2))
    for start in range(starts):
        places = (np.arange(vertices * _STEPS) / _STEPS + start / starts) * step % reached[-1]
        samples = np.column_stack([np.interp(places, reached, closed[:, axis]) for axis in (0, 1)])
        polygons[:, start] = _spline(vertices, _STEPS) @ samples
    return low + (high - low) * polygons.reshape(-1, 2).clip(0, 1)


def _from_the_top(loop: np.ndarray) -> np.ndarray:
    """A loop [n, 2] in 0..1 of its box, begun where x = 0.5 first meets it from above."""
    start, end = loop, np.roll(loop, -1, axis=0)
    crossing = np.flatnonzero((start[:, 0] < 0.5) != (end[:, 0] < 0.5))
    share = (0.5 - start[crossing, 0]) / (end[crossing, 0] - start[crossing, 0])
    heights = start[crossing, 1] + share * (end[crossing, 1] - start[crossing, 1])
    first = heights.argmin()
    return np.concatenate([[[0.5, heights[first]]], np.roll(loop, -1 - crossing[first], axis=0)])


def _lengths(loop: np.ndarray) -> np.ndarray:
    """How long a loop [n, 2] is up to each of its points and back at the first: float64 [n + 1]."""
    half = _SMOOTH // 2
    around = np.pad(loop, ((half, half), (0, 0)), "wrap") if len(loop) > half else loop
    kernel = np.full(_SMOOTH, 1 / _SMOOTH)
    smooth = np.column_stack([np.convolve(axis, kernel, "valid") for axis in around.T])
    steps = np.hypot(*(np.roll(smooth, -1, axis=0) - smooth).T)
    return np.concatenate([[0], np.cumsum(steps)])


def _directions(count: int) -> np.ndarray:
    """Unit vectors float64 [count, 2] (x, y), y down, clockwise from straight up."""
    turn = np.arange(count) * (2 * np.pi / count)
    return np.column_stack([np.sin(turn), -np.cos(turn)])


def _farthest(loop: np.ndarray, count: int) -> np.ndarray:
    """How far out ``count`` rays from the origin meet a closed loop [n, 2]: float64 [count]."""
    start, end = loop, np.roll(loop, -1, axis=0)
    # An edge is seen from the origin between two angles, less than half a turn apart, and meets
    # the rays between them: mostly one or none.
    per_ray = 2 * np.pi / count
    first = np.arctan2(start[:, 0], -start[:, 1]) / per_ray
    turned = np.arctan2(end[:, 0], -end[:, 1]) / per_ray - first
    turned -= count * np.round(turned / count)
    low = np.ceil(np.minimum(first, first + turned) - 1e-9).astype(int)
    met = np.floor(np.maximum(first, first + turned) + 1e-9).astype(int) - low + 1
    edge = np.repeat(np.arange(len(loop)), met)
    ray = np.arange(len(edge)) - np.repeat(np.cumsum(met) - met, met) + low[edge]
    directions = _directions(count)[ray % count]
    way = (end - start)[edge]
    across = directions[:, 0] * way[:, 1] - directions[:, 1] * way[:, 0]
    # An edge that lies along a ray is met by it at its ends, where its neighbours are met too.
    crossed = np.abs(across) > 1e-9 * np.abs(way).max(1)
    along = start[edge, 0] * way[:, 1] - start[edge, 1] * way[:, 0]
    along = along[crossed] / across[crossed]
    radii = np.full(count, _NOTHING)
    np.maximum.at(radii, ray[crossed] % count, along)
    return radii


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [height, width]: pixels whose centre lies in the polygon (px, pixel edges)."""
    scale = 8
    big = np.zeros((height * scale, width * scale), np.uint8)
    cv2.fillPoly(big, [np.round(points * scale - 0.5).astype(np.int32)], 1)
    return cv2.resize(big * 255, (width, height), interpolation=cv2.INTER_AREA) >= 128
