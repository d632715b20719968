"""Outlines and pictures that the refiner's benchmarks work on, drawn anew each time from seeds."""

from __future__ import annotations

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from kestrel.image import decode
from kestrel.seg_refiner.raster import rasterize_relative

Bbox = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One outline with a hole, as a model would give it, on an image of so many pixels."""

    width: int
    height: int
    vertices: int
    cover: float
    path: str
    bbox: Bbox


def outline(vertices: int, rng: np.random.Generator) -> np.ndarray:
    """Float [vertices, 2] in 0..1: a rounded square with uneven rim."""
    angle = (np.arange(vertices) + rng.uniform(0, 0.6, vertices)) * 2 * np.pi / vertices
    unit = np.stack([np.cos(angle), np.sin(angle)], 1)
    # A superellipse of exponent 8: it must fill its box to cover 60 % of an image.
    reach = np.sum(unit**8, axis=1) ** (-1 / 8)
    points = unit * (reach * (1 - 0.12 * rng.random(vertices)))[:, None]
    low, high = points.min(0), points.max(0)
    return (points - low) / (high - low)


def area(points: np.ndarray) -> float:
    """Shoelace formula; points in units of the box."""
    x, y = points.T
    return abs(float(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1)))) / 2


def make_case(size: tuple[int, int], vertices: int, cover: float) -> Case:
    rng = np.random.default_rng([*size, vertices, round(cover * 100)])
    rim = outline(vertices, rng)
    # A third as wide and the other way round, so that non-zero winding leaves it out.
    hole = (outline(max(4, vertices // 4), rng) - 0.5)[::-1] / 3 + 0.5
    side = (cover / (area(rim) - area(hole))) ** 0.5
    x0, y0 = (1 - side) * rng.uniform(0.1, 0.9, 2)
    path = "".join(
        "M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in points) + "Z" for points in (rim, hole)
    )
    bbox = {"x_min": x0, "y_min": y0, "x_max": x0 + side, "y_max": y0 + side}
    return Case(*size, vertices, cover, path, bbox)


def torn(coarse: np.ndarray, seed: int) -> np.ndarray:
    """The mask with specks and pinholes, as a refinement leaves them for the clean-up."""
    rng = np.random.default_rng(seed)
    height, width = coarse.shape
    mask = coarse.copy()
    for _ in range(24):
        x, y, r = rng.integers(width), rng.integers(height), 1 + width // 600
        mask[max(0, y - r) : y + r, max(0, x - r) : x + r] ^= 1
    return mask


def photo(case: Case) -> bytes:
    """A JPEG (quality 90) of a textured scene with the case's object in it."""
    rng = np.random.default_rng(case.vertices)
    size = (case.width, case.height)
    light = cv2.resize(
        rng.random((9, 11, 3)).astype(np.float32), size, interpolation=cv2.INTER_CUBIC
    )
    grain = cv2.GaussianBlur(rng.standard_normal((*size[::-1], 3)).astype(np.float32), (0, 0), 1.2)
    scene = np.clip(255 * (0.15 + 0.5 * light + 0.1 * grain), 0, 255).astype(np.uint8)
    inside = rasterize_relative(case.path, case.bbox, *size) > 0
    scene[inside] = np.minimum(scene[inside].astype(np.int16) + 70, 255)
    content = io.BytesIO()
    Image.fromarray(scene).save(content, "JPEG", quality=90)
    return content.getvalue()


def tiled_photo(case: Case) -> bytes:
    """A JPEG of pieces of one picture, for sizes that :func:`photo` would take minutes for."""
    piece = decode(photo(make_case((500, 500), case.vertices, case.cover)))
    scene = np.tile(piece, (case.height // 500, case.width // 500, 1))
    done, content = cv2.imencode(".jpg", scene)
    assert done
    return content.tobytes()
