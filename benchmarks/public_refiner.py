"""The public engine's way with masks, re-enacted with the libraries and calls that it uses.

Every stage works on the whole image: resvg at twice the size through PNG and PIL, label images
cleaned with ``np.isin``, pypotrace, OpenCV's PNG encoder.
Its neural refinement, between rasterising and cleaning, is not part of this.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import cv2
import numpy as np
import potrace
from PIL import Image
from resvg import render, usvg

SCALE = 2
SMALL = 0.0015

TRACER = "pypotrace" if hasattr(potrace, "_potrace") else "potracer"
"""What the module named potrace is; only the first is the public way's."""

OPTIONS = usvg.Options.default()


def rasterize(path: str, bbox: dict[str, float], width: int, height: int) -> np.ndarray:
    """Mask uint8 [height, width], 0/1, of path data relative to a normalised box."""
    x0, y0 = bbox["x_min"], bbox["y_min"]
    sx, sy = bbox["x_max"] - x0, bbox["y_max"] - y0
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1" preserveAspectRatio="none" '
        f'width="{width * SCALE}" height="{height * SCALE}">'
        f'<path fill="white" d="{path}" transform="translate({x0},{y0}) scale({sx},{sy})"/></svg>'
    )
    tree = usvg.Tree.from_str(svg, OPTIONS)
    png = bytes(render(tree, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))
    alpha = np.array(Image.open(io.BytesIO(png)).getchannel("A"), np.float32)
    soft = alpha.reshape(height, SCALE, width, SCALE).mean(axis=(1, 3)) / 255.0
    return (soft > 0.5).astype(np.uint8)


def clean(mask: np.ndarray) -> np.ndarray:
    """Mask uint8 [H, W], 0/1, without holes and islands under 0.15 % of the image, closed 3x3."""
    least = max(1.0, SMALL * mask.size)
    for value in (0, 1):
        looked_at = (mask == value).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(looked_at, connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        small = [label + 1 for label, area in enumerate(areas) if area < least]
        if not small:
            continue
        if value == 0:
            inside = [0, *small]
        else:
            inside = [label for label in range(1, count) if label not in small]
            inside = inside or [int(areas.argmax()) + 1]
        mask = np.isin(labels, inside).astype(np.uint8)
    closed = cv2.morphologyEx(mask * 255, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    return (closed > 0).astype(np.uint8)


def trace(mask: np.ndarray) -> tuple[str, dict[str, float]] | None:
    """Path data in 0..1 of the mask's box with three decimals, and that box normalised."""
    ys, xs = np.where(mask > 0)
    if xs.size == 0:
        return None
    height, width = mask.shape
    x0, y0, x1, y1 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    bitmap = (mask > 0).astype(np.uint8)
    traced = potrace.Bitmap(bitmap).trace(turdsize=2, alphamax=1.0, opticurve=1, opttolerance=0.2)

    def place(point: tuple[float, float]) -> str:
        x, y = point
        return f"{(x - x0) / (x1 - x0):.3f},{(y - y0) / (y1 - y0):.3f}"

    def pieces() -> Iterator[str]:
        for curve in traced:
            yield f"M{place(curve.start_point)}"
            for segment in curve.segments:
                if segment.is_corner:
                    yield f"L{place(segment.c)}L{place(segment.end_point)}"
                else:
                    controls = (segment.c1, segment.c2, segment.end_point)
                    yield "C" + ",".join(map(place, controls))
            yield "z"

    path = "".join(pieces())
    box = {"x_min": x0 / width, "y_min": y0 / height, "x_max": x1 / width, "y_max": y1 / height}
    return (path, box) if path else None


def encode(mask: np.ndarray) -> str:
    """Base64 PNG, 0 or 255, of a mask uint8 [H, W], 0/1."""
    done, png = cv2.imencode(".png", mask * 255)
    assert done
    return base64.b64encode(png.tobytes()).decode("ascii")
