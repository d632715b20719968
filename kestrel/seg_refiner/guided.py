"""Snap a mask to the picture's edges with the colour guided filter; no weights.

He, Sun, Tang, "Guided Image Filtering" (TPAMI 2013), eq. 18-20, with the coefficients found at a
bounded working size and applied to the full-size picture (He, Sun, "Fast Guided Filter", 2015).
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np

from kestrel.config import RefinerConfig
from kestrel.seg_refiner.box import Size, refined_in_box
from kestrel.seg_refiner.enlarge import (
    SURE,
    Planes,
    apply_coefficients,
    at_full_size,
    planes,
    reduction_for,
)

WORKING_SIDE = 192
"""Longest side at which the filter's coefficients are found, pixels."""
LEAST_SIDE = 2000
"""Pixels that the longer side of a box keeps where the picture is decoded smaller: with 1024 up to
0.9 % of an object changed, with 2000 up to 0.4 %."""
HALVED_FROM = 6
"""Radius of the smallest windows that may look at half the resolution, pixels."""
PASS_SCALES = (1.0, 0.7, 0.5)
"""Radius of each pass as a fraction of the configured one: coarse to fine."""
TILE = 16
"""Side of the tiles that are sure or not, working pixels."""


class GuidedRefiner:
    """Callable ``(image uint8 [H, W, 3] RGB, mask uint8 [H, W] 0/1) -> mask uint8 [H, W] 0/1``."""

    def __init__(self, config: RefinerConfig, *, halve: bool = False) -> None:
        """``halve``: large windows look at half the resolution (:class:`Windows`)."""
        self.radius = config.guided_radius
        self.eps = config.guided_eps
        self.halve = halve

    def __call__(self, image: np.ndarray, mask: np.ndarray, reduction: int = 1) -> np.ndarray:
        refine_crop = functools.partial(self._refine_crop, reduction=reduction)
        return refined_in_box(image, mask, refine_crop, reduction)

    def reduction(self, box: Size, picture: Size) -> int:
        """See :class:`kestrel.seg_refiner.backends.Reduced`."""
        return reduction_for(box, picture, LEAST_SIDE)

    def _refine_crop(self, image: np.ndarray, mask: np.ndarray, reduction: int) -> np.ndarray:
        height, width = mask.shape
        # A whole factor, so that tiles of both sizes line up and averaging takes its fast path.
        factor = math.ceil(max(height, width) / WORKING_SIDE)
        below, right = -height % factor, -width % factor
        # Rounded up to whole factors, a strip may become many times as large: it stays as it is.
        if reduction > 1 or below > height or right > width:
            return self._refine_reduced(np.ascontiguousarray(image), mask, reduction)
        if factor == 1:
            soft, _ = self.passes(planes(image), mask.astype(np.float32))
            return (soft > 0.5).astype(np.uint8)
        image = _padded(image, below, right)
        small_size = (image.shape[1] // factor, image.shape[0] // factor)
        small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
        coverage = cv2.resize(
            _padded(mask * np.uint8(255), below, right), small_size, interpolation=cv2.INTER_AREA
        )
        soft, fitted = self.passes(planes(small), coverage.astype(np.float32) * np.float32(1 / 255))
        return _at_full_size(image, soft, fitted, factor)[:height, :width]

    def _refine_reduced(self, crop: np.ndarray, mask: np.ndarray, reduction: int) -> np.ndarray:
        height, width = mask.shape
        factor = math.ceil(max(height, width) / WORKING_SIDE)
        size = (math.ceil(width / factor), math.ceil(height / factor))
        small = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
        coverage = cv2.resize(mask * np.uint8(255), size, interpolation=cv2.INTER_AREA)
        soft, fitted = self.passes(planes(small), coverage.astype(np.float32) * np.float32(1 / 255))
        return at_full_size(crop, soft, fitted, mask.shape, reduction)

    def passes(self, guide: Planes, soft: np.ndarray) -> tuple[np.ndarray, Planes]:
        """Soft mask after the last pass and that pass's coefficients, all float32 [h, w]."""
        size = math.sqrt(float(soft.sum()))  # side of the square of the object's area
        fitted: Planes = ()
        for scale in PASS_SCALES:
            radius = max(1, round(self.radius * size * scale))
            fitted = Windows(guide, radius, self.eps, halve=self.halve).fit(soft)
            soft = apply_coefficients(guide, fitted)
        return soft, fitted


def _padded(picture: np.ndarray, below: int, right: int) -> np.ndarray:
    return cv2.copyMakeBorder(
        np.ascontiguousarray(picture), 0, below, 0, right, cv2.BORDER_REPLICATE
    )


def coefficients(guide: Planes, soft: np.ndarray, radius: int, eps: float) -> Planes:
    """Window means of ``a`` (three planes) and ``b`` (eq. 18 to 20), float32 [h, w]."""
    return Windows(guide, radius, eps).fit(soft)


class Windows:
    """What the windows of one size see of a guide; made once for several masks."""

    def __init__(self, guide: Planes, radius: int, eps: float, *, halve: bool = False) -> None:
        """``halve``: windows from a radius of ``HALVED_FROM`` on look at half the resolution, whose
        coefficients are then interpolated: a third of the time ("Fast Guided Filter")."""
        self._full = guide[0].shape[::-1]
        self._halved = halve and radius >= HALVED_FROM
        if self._halved:
            guide, radius = [_half(plane) for plane in guide], round(radius / 2)
        self._guide, self._size = guide, (2 * radius + 1, 2 * radius + 1)
        r, g, b = guide
        mean = self._mean
        mr, mg, mb = self._means = mean(r), mean(g), mean(b)
        # Covariance of the guide in each window, symmetric 3x3, eps on its diagonal.
        rr = mean(r * r) - mr * mr + eps
        gg = mean(g * g) - mg * mg + eps
        bb = mean(b * b) - mb * mb + eps
        rg = mean(r * g) - mr * mg
        rb = mean(r * b) - mr * mb
        gb = mean(g * b) - mg * mb
        # Its adjugate.
        irr, irg, irb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
        igg, igb, ibb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
        self._inverse = (irr, irg, irb, igg, igb, ibb)
        # A covariance has no negative eigenvalue, so det >= eps^3; the bound guards against
        # float32 cancellation.
        self._scale = 1 / np.maximum(rr * irr + rg * irg + rb * irb, np.float32(eps**3))

    def _mean(self, plane: np.ndarray) -> np.ndarray:
        return cv2.blur(plane, self._size, borderType=cv2.BORDER_REFLECT)

    def fit(self, soft: np.ndarray) -> Planes:
        """:func:`coefficients` of a soft mask float32 [h, w]."""
        soft = _half(soft) if self._halved else soft
        (r, g, b), (mr, mg, mb), mean = self._guide, self._means, self._mean
        irr, irg, irb, igg, igb, ibb = self._inverse
        mp = mean(soft)
        # Covariance of the guide and the mask.
        pr = mean(r * soft) - mr * mp
        pg = mean(g * soft) - mg * mp
        pb = mean(b * soft) - mb * mp
        ar = (irr * pr + irg * pg + irb * pb) * self._scale
        ag = (irg * pr + igg * pg + igb * pb) * self._scale
        ab = (irb * pr + igb * pg + ibb * pb) * self._scale
        fitted = mean(ar), mean(ag), mean(ab), mean(mp - ar * mr - ag * mg - ab * mb)
        return [cv2.resize(plane, self._full) for plane in fitted] if self._halved else fitted


def _half(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape
    size = ((width + 1) // 2, (height + 1) // 2)
    return cv2.resize(plane, size, interpolation=cv2.INTER_AREA)


def _at_full_size(image: np.ndarray, soft: np.ndarray, fitted: Planes, factor: int) -> np.ndarray:
    """The last pass at full size, where the outline follows real pixels.

    ``image``: uint8 [h * factor, w * factor, 3]; ``soft`` and ``fitted``: [h, w]. Only
    tiles that the outline crosses are computed. Gives uint8 0/1 of the image's size.
    """
    height, width = soft.shape
    refined = np.empty(image.shape[:2], np.uint8)
    # One more pixel all round, for interpolation across the tile's rim.
    stacked = cv2.copyMakeBorder(cv2.merge(fitted), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    for y0 in range(0, height, TILE):
        y1 = min(height, y0 + TILE)
        for x0 in range(0, width, TILE):
            x1 = min(width, x0 + TILE)
            full = np.s_[y0 * factor : y1 * factor, x0 * factor : x1 * factor]
            near = soft[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1]
            low, high, _, _ = cv2.minMaxLoc(near)
            if high < SURE or low > 1 - SURE:
                refined[full] = low > 0.5
                continue
            part = stacked[y0 : y1 + 2, x0 : x1 + 2]
            size = (part.shape[1] * factor, part.shape[0] * factor)
            part = cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
            part = part[factor:-factor, factor:-factor]
            fine = apply_coefficients(planes(image[full]), [part[..., k] for k in range(4)])
            np.greater(fine, 0.5, out=refined[full].view(np.bool_))
    return refined
