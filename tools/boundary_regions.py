"""Regions of photographs between edges of their own: objects that were never pasted.

Pasted objects teach a network how pasting looks. A region of a graph-based segmentation
(Felzenszwalb and Huttenlocher, IJCV 2004) that differs from what is around it, or two such regions
side by side, has the edges that lenses and light make; it is no thing with a name, which the
refiner does not need it to be. Needs scikit-image.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from assets import CACHE

SCALES = (400,)
"""What the segmentation prefers: larger is larger."""
SMALLEST, LARGEST = 1200, 0.2
"""Area of a region: pixels, and share of its photograph."""
CONTRAST = 14.0
"""Least difference across the outline, grey levels, over most of its length."""
FRAYED = 90.0
"""Largest squared length of the outline per area; 12.6 for a disc, 16 for a square."""
RIM = 3
"""Distance from the outline at which both sides are compared, px."""
RULES = (SCALES, SMALLEST, LARGEST, CONTRAST, FRAYED, RIM)


@dataclass(frozen=True)
class Region:
    """A region of photograph ``photo``; ``mask`` uint8 [h, w] 0/1 at ``left``, ``top``."""

    photo: int
    left: int
    top: int
    mask: np.ndarray


def _stands_out(photo: np.ndarray, mask: np.ndarray) -> bool:
    """Whether colours differ across three quarters of the outline of ``mask`` [H, W]."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=len)[:, 0].astype(np.float32)
    if len(outline) < 40:
        return False
    step = np.roll(outline, -5, 0) - np.roll(outline, 5, 0)
    across = np.stack([step[:, 1], -step[:, 0]], 1) / (np.hypot(*step.T)[:, None] + 1e-3) * RIM
    sides = [
        cv2.remap(
            photo, outline + across * sign, None, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE
        )
        for sign in (-1, 1)
    ]
    apart = np.abs(sides[0].astype(float) - sides[1]).max(-1)
    return bool((apart > CONTRAST).mean() > 0.75)


def _fit(mask: np.ndarray) -> np.ndarray | None:
    """The mask without holes and specks, or None when it is not one solid piece off the border."""
    height, width = mask.shape
    if mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any():
        return None
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(outlines, key=cv2.contourArea)
    area = cv2.contourArea(largest)
    hull = cv2.contourArea(cv2.convexHull(largest))
    if not SMALLEST < area < LARGEST * height * width or area < 0.4 * hull:
        return None
    if cv2.arcLength(largest, True) ** 2 > FRAYED * area:
        return None
    filled = cv2.drawContours(np.zeros_like(mask), [largest], -1, 1, cv2.FILLED)
    return cv2.medianBlur(filled, 5)


def _of_photo(number: int, photo: np.ndarray) -> list[Region]:
    from skimage.segmentation import felzenszwalb

    found = []
    smooth = cv2.bilateralFilter(photo, 7, 30, 5)
    for scale in SCALES:
        labels = felzenszwalb(smooth, scale=scale, sigma=0.6, min_size=200)
        masks = [(labels == label).astype(np.uint8) for label in range(labels.max() + 1)]
        masks = [mask for mask in masks if mask.sum() > 400]
        pairs = []
        for mask in masks:
            around = labels[(cv2.dilate(mask, np.ones((3, 3), np.uint8)) > 0) & (mask == 0)]
            if len(around):
                neighbour = int(np.bincount(around).argmax())
                pairs.append(mask | (labels == neighbour).astype(np.uint8))
        for mask in masks + pairs:
            fit = _fit(mask)
            if fit is not None and _stands_out(photo, fit):
                x, y, w, h = cv2.boundingRect(fit)
                found.append(Region(number, x, y, fit[y : y + h, x : x + w].copy()))
    return found


def regions(photos: Sequence[np.ndarray]) -> list[Region]:
    """The regions of photographs uint8 [H, W, 3] RGB; found once, kept in the cache."""
    file = CACHE / f"regions-{len(photos)}-{zlib.crc32(repr(RULES).encode()):08x}.npz"
    if not file.exists():
        found = [region for n, photo in enumerate(photos) for region in _of_photo(n, photo)]
        places = np.array([(r.photo, r.left, r.top) for r in found])
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, places, *(r.mask for r in found))
        partial.replace(file)
    with np.load(file) as stored:
        places, *masks = (stored[name] for name in stored.files)
    return [Region(*map(int, p), m) for p, m in zip(places, masks, strict=True)]
