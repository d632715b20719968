"""Snap a mask to the picture's edges with the colour guided filter; no weights.

He, Sun, Tang, "Guided Image Filtering" (TPAMI 2013), eq. 18-20, with the coefficients found at a
bounded working size and applied to the full-size picture (He, Sun, "Fast Guided Filter", 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from kestrel.config import RefinerConfig
from kestrel.seg_refiner.box import grown_box, mask_box

GROW = 0.25
"""The box is grown by this fraction of its sides before it is cut out."""
WORKING_SIDE = 512
"""Longest side at which the filter's coefficients are found, pixels."""
PASS_SCALES = (1.0, 0.7, 0.5)
"""Radius of each pass as a fraction of the configured one: coarse to fine."""


class GuidedRefiner:
    """Callable ``(image uint8 [H, W, 3] RGB, mask uint8 [H, W] 0/1) -> mask uint8 [H, W] 0/1``."""

    def __init__(self, config: RefinerConfig) -> None:
        self.radius = config.guided_radius
        self.eps = config.guided_eps

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        refined = np.zeros_like(mask)
        box = mask_box(mask)
        if box is None:
            return refined
        height, width = mask.shape
        x0, y0, x1, y1 = grown_box(box, width, height, GROW)
        refined[y0:y1, x0:x1] = self._refine_crop(image[y0:y1, x0:x1], mask[y0:y1, x0:x1])
        return refined

    def _refine_crop(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        scale = min(1.0, WORKING_SIDE / max(height, width))
        small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
        guide = np.ascontiguousarray(image)
        soft = np.ascontiguousarray(mask, dtype=np.float32)
        if scale < 1:
            small_guide = cv2.resize(guide, small_size, interpolation=cv2.INTER_AREA)
            soft = cv2.resize(soft, small_size, interpolation=cv2.INTER_AREA)
        else:
            small_guide = guide
        channels = cv2.split(small_guide.astype(np.float32) * np.float32(1 / 255))
        size = math.sqrt(float(soft.sum()))  # side of the square of the object's area
        coefficients: tuple[np.ndarray, ...] = ()
        for pass_scale in PASS_SCALES:
            radius = max(1, round(self.radius * size * pass_scale))
            coefficients = _coefficients(channels, soft, radius, self.eps)
            soft = _apply(channels, coefficients)
        if scale == 1:
            return (soft > 0.5).astype(np.uint8)
        # The last pass once more at full size: that is where the outline follows real pixels.
        large = [
            cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)
            for plane in coefficients
        ]
        full = cv2.split(guide.astype(np.float32) * np.float32(1 / 255))
        return (_apply(full, large) > 0.5).astype(np.uint8)


def _apply(channels: Sequence[np.ndarray], coefficients: Sequence[np.ndarray]) -> np.ndarray:
    a0, a1, a2, b = coefficients
    return a0 * channels[0] + a1 * channels[1] + a2 * channels[2] + b


def _coefficients(
    channels: Sequence[np.ndarray], soft: np.ndarray, radius: int, eps: float
) -> tuple[np.ndarray, ...]:
    """Averaged ``a`` (three planes) and ``b`` of ``q = a . I + b``; all float32 [h, w]."""
    window = (2 * radius + 1, 2 * radius + 1)

    def mean(plane: np.ndarray) -> np.ndarray:
        return cv2.blur(plane, window, borderType=cv2.BORDER_REFLECT)

    r, g, b = channels
    mr, mg, mb, mp = mean(r), mean(g), mean(b), mean(soft)
    # Covariance of the guide in each window, with eps on the diagonal: symmetric 3x3.
    rr, gg, bb = (
        mean(r * r) - mr * mr + eps,
        mean(g * g) - mg * mg + eps,
        mean(b * b) - mb * mb + eps,
    )
    rg, rb, gb = mean(r * g) - mr * mg, mean(r * b) - mr * mb, mean(g * b) - mg * mb
    cr, cg, cb = mean(r * soft) - mr * mp, mean(g * soft) - mg * mp, mean(b * soft) - mb * mp
    # Inverse by the adjugate; the determinant is at least eps^3.
    irr, irg, irb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    igg, igb, ibb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
    det = rr * irr + rg * irg + rb * irb
    det = np.maximum(det, eps**3)
    ar = (irr * cr + irg * cg + irb * cb) / det
    ag = (irg * cr + igg * cg + igb * cb) / det
    ab = (irb * cr + igb * cg + ibb * cb) / det
    offset = mp - ar * mr - ag * mg - ab * mb
    return mean(ar), mean(ag), mean(ab), mean(offset)
