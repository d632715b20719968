"""Drop what a refinement tore loose: specks, pinholes, one-pixel cracks."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from kestrel.seg_refiner.box import mask_box

MIN_FRACTION = 0.0015
"""Islands and holes under this fraction of the image are dropped (public refiner's 0.15 %)."""
DRAWN_FRACTION = 0.01
"""A piece or hole of the coarse mask counts as meant from this fraction of the object's area."""
COVERED_FRACTION = 1 / 3
"""A small island or hole stays when it covers this much of a piece or hole that was meant."""


def clean_mask(mask: np.ndarray, coarse: np.ndarray | None = None) -> np.ndarray:
    """Mask uint8 [H, W], 0/1, without small islands and holes, then closed 3x3.

    ``coarse``, same shape: a small island (hole) stays where it is what became of a piece (hole)
    of the coarse mask. When every island is small the largest stays.
    """
    cleaned = np.zeros_like(mask)
    box = mask_box(mask)
    if box is None:
        return cleaned
    x0, y0, x1, y1 = box
    window = np.s_[y0:y1, x0:x1]
    # A ring of background, so that outlines and closing are not cut at the window's rim.
    crop = _ringed(mask[window])
    islands, holes = _outlines(crop)
    drawn_islands, drawn_holes = _drawn(coarse, window)
    min_area = MIN_FRACTION * mask.size

    small = [i for i, island in enumerate(islands) if island.area < min_area]
    largest = max(range(len(islands)), key=lambda i: islands[i].area)
    dropped = {
        i
        for i in small
        if not islands[i].covers_any(drawn_islands)
        and not (i == largest and len(small) == len(islands))
    }
    for i in dropped:
        islands[i].paint(crop, 0)
    for hole in holes:
        # A dropped island took its holes along: painting them would bring them back.
        if hole.area < min_area and hole.parent not in dropped and not hole.covers_any(drawn_holes):
            hole.paint(crop, 1)

    closed = cv2.morphologyEx(crop, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    cleaned[window] = closed[1:-1, 1:-1]
    return cleaned


def _ringed(crop: np.ndarray) -> np.ndarray:
    return cv2.copyMakeBorder(np.ascontiguousarray(crop), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)


class _Outline:
    """Filled outline of an 8-connected island, or of a 4-connected hole (its rim excluded)."""

    def __init__(self, contour: np.ndarray, parent: int | None) -> None:
        self.contour = contour
        self.parent = parent  # of a hole: index of its island
        self.box = cv2.boundingRect(contour)
        # Pick's theorem: pixels within an outline through pixel centres, with and without it.
        rim = len(contour) / 2
        self.area = cv2.contourArea(contour) + (rim + 1 if parent is None else 1 - rim)

    def paint(self, canvas: np.ndarray, value: int, offset: tuple[int, int] = (0, 0)) -> None:
        """Fill the outline; a hole's rim is part of the fill, and is set in a mask anyway."""
        cv2.drawContours(canvas, [self.contour], -1, value, cv2.FILLED, offset=offset)

    def covers_any(self, drawn: Iterable[_Outline]) -> bool:
        """Whether it covers ``COVERED_FRACTION`` or more of one of the drawn outlines."""
        return any(self._overlap(other) >= COVERED_FRACTION * other.area for other in drawn)

    def _overlap(self, other: _Outline) -> int:
        x, y, w, h = self.box
        ox, oy, ow, oh = other.box
        left, top = max(x, ox), max(y, oy)
        size = (min(y + h, oy + oh) - top, min(x + w, ox + ow) - left)
        if min(size) <= 0:
            return 0
        mine, theirs = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.paint(mine, 1, (-left, -top))
        other.paint(theirs, 1, (-left, -top))
        return cv2.countNonZero(mine & theirs)


def _outlines(crop: np.ndarray) -> tuple[list[_Outline], list[_Outline]]:
    """Islands, and holes with ``parent`` the index of their island."""
    contours, hierarchy = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    islands: list[_Outline] = []
    holes: list[tuple[np.ndarray, int]] = []
    index: dict[int, int] = {}
    for i, contour in enumerate(contours):
        parent = int(hierarchy[0, i, 3])
        if parent < 0:
            index[i] = len(islands)
            islands.append(_Outline(contour, None))
        else:
            holes.append((contour, parent))
    return islands, [_Outline(contour, index[parent]) for contour, parent in holes]


def _drawn(
    coarse: np.ndarray | None, window: tuple[slice, slice]
) -> tuple[list[_Outline], list[_Outline]]:
    """Pieces and holes of the coarse mask that were meant; none of a kind that has just one."""
    if coarse is None:
        return [], []
    crop = _ringed(coarse[window])
    islands, holes = _outlines(crop)
    least = DRAWN_FRACTION * cv2.countNonZero(crop)
    return (
        [island for island in islands if island.area >= least],
        [hole for hole in holes if hole.area >= least],
    )
