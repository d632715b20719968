"""Drop what a refinement tore loose: specks, pinholes, one-pixel cracks."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import cv2
import numpy as np

from kestrel.seg_refiner.box import PixelBox, mask_parts

MIN_FRACTION = 0.0015
"""Islands and holes under this fraction of the image are dropped (public refiner's 0.15 %)."""
DRAWN_FRACTION = 0.01
"""A piece or hole of the coarse mask counts as meant from this fraction of the object's area."""
COVERED_FRACTION = 1 / 3
"""A small island or hole stays when it covers this much of a piece or hole that was meant."""


BAND = 128
"""Rows that are closed at once: what a band takes stays in the cache and is used again."""


def clean_mask(mask: np.ndarray, coarse: np.ndarray | None = None) -> np.ndarray:
    """Mask uint8 [H, W], 0/1, without small islands and holes, then closed 3x3.

    ``coarse``, same shape: a small island (hole) stays where it is what became of a piece (hole)
    of the coarse mask. When every island is small the largest stays.
    """
    # Not zeros_like, which writes them: what is never touched takes no memory.
    cleaned = np.zeros(mask.shape, np.uint8)
    box, parts = mask_parts(mask)
    if box is None:
        return cleaned
    islands, holes = _outlines(mask, parts)
    min_area = MIN_FRACTION * mask.size
    small = [island for island in islands if island.area < min_area]
    small_holes = [hole for hole in holes if hole.area < min_area]
    drawn_islands, drawn_holes = _drawn(coarse, box, small + small_holes)

    largest = max(islands, key=lambda island: island.area)
    kept = [island for island in islands if island.area >= min_area]
    dropped: list[_Outline] = []
    for island in small:
        stays = island is largest and len(small) == len(islands)
        (kept if stays or drawn_islands.one_is_covered_by(island) else dropped).append(island)
    # What stays lies in the boxes of these islands, and so does its closing. Nothing else of the
    # picture is written.
    boxes = np.array([cv2.boundingRect(island.contour) for island in kept])
    left, top = (int(v) for v in boxes[:, :2].min(0))
    right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(0)
    window, offset = np.s_[top:bottom, left:right], (-left, -top)
    crop = cleaned[window]
    crop[:] = mask[window]
    for island in dropped:
        island.paint(crop, 0, offset)
    for hole in small_holes:
        # A dropped island took its holes along: painting them would bring them back.
        if hole.rim_is_set(crop, offset) and not drawn_holes.one_is_covered_by(hole):
            hole.paint(crop, 1, offset)
    close_cracks(crop)
    return cleaned


def close_cracks(mask: np.ndarray) -> None:
    """Morphological closing 3x3 in place, of a mask around which nothing is set."""
    kernel = np.ones((3, 3), np.uint8)
    for top in range(0, len(mask), BAND):
        # A closed pixel looks two rows up and down. That those above are closed already changes
        # nothing: what lies between a mask and its closing has the same closing.
        first = max(0, top - 2)
        rows = mask[first : top + BAND + 2]
        # OpenCV alone takes what is beyond the rim for set when it erodes: what ends a pixel from
        # the rim would grow to it, and what touches it along it.
        rows = cv2.copyMakeBorder(rows, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        closed = cv2.morphologyEx(rows, cv2.MORPH_CLOSE, kernel)[1:-1, 1:-1]
        mask[top : top + BAND] = closed[top - first :][:BAND]


class _Outline:
    """Filled outline of an 8-connected island, or of a 4-connected hole (its rim excluded)."""

    __slots__ = ("area", "contour", "is_hole", "painted")

    def __init__(self, contour: np.ndarray) -> None:
        self.contour = contour
        # Holes are followed the other way round; islands of a pixel's width enclose nothing.
        within = cv2.contourArea(contour, oriented=True)
        self.is_hole = within > 0
        # Pick's theorem: pixels within an outline through pixel centres, with and without it.
        rim = len(contour) / 2
        self.painted = abs(within) + 1 + rim
        self.area = abs(within) + 1 - rim if self.is_hole else self.painted

    def rim_is_set(self, canvas: np.ndarray, offset: tuple[int, int]) -> bool:
        """Whether the pixels around a hole are (still) set; nothing is beyond the canvas."""
        x, y = self.contour[0, 0] + offset
        inside = 0 <= x < canvas.shape[1] and 0 <= y < canvas.shape[0]
        return inside and bool(canvas[y, x])

    def paint(self, canvas: np.ndarray, value: int, offset: tuple[int, int] = (0, 0)) -> None:
        """Fill the outline; a hole's rim is part of the fill, and is set in a mask anyway."""
        cv2.drawContours(canvas, [self.contour], -1, value, cv2.FILLED, offset=offset)

    def overlap(self, other: _Outline) -> int:
        """Pixels that both fill."""
        x, y, w, h = cv2.boundingRect(self.contour)
        ox, oy, ow, oh = cv2.boundingRect(other.contour)
        left, top = max(x, ox), max(y, oy)
        size = (min(y + h, oy + oh) - top, min(x + w, ox + ow) - left)
        if min(size) <= 0:
            return 0
        mine, theirs = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.paint(mine, 1, (-left, -top))
        other.paint(theirs, 1, (-left, -top))
        return cv2.countNonZero(mine & theirs)


class _Drawn:
    """Pieces, or holes, of the coarse mask that were meant.

    A grainy picture has hundreds of thousands of specks: most cover none by size or box alone.
    """

    def __init__(self, outlines: Iterable[_Outline] = ()) -> None:
        self._outlines = sorted(outlines, key=lambda outline: outline.area)
        self._enough = [COVERED_FRACTION * outline.area for outline in self._outlines]
        rects = [cv2.boundingRect(outline.contour) for outline in self._outlines]
        boxes = np.array(rects, np.int64).reshape(-1, 4)
        self._starts, self._ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]

    def one_is_covered_by(self, small: _Outline) -> bool:
        """Whether ``small`` covers ``COVERED_FRACTION`` or more of one of them."""
        count = bisect.bisect_right(self._enough, small.painted)
        if not count:
            return False
        x, y, w, h = cv2.boundingRect(small.contour)
        meets = (self._starts[:count] < (x + w, y + h)) & (self._ends[:count] > (x, y))
        return any(
            small.overlap(self._outlines[place]) >= self._enough[place]
            for place in np.flatnonzero(meets.all(axis=1)).tolist()
        )


def _outlines(mask: np.ndarray, parts: Iterable[PixelBox]) -> tuple[list[_Outline], list[_Outline]]:
    """Islands and holes of what the mask holds within the boxes that :func:`mask_parts` gives."""
    outlines: list[_Outline] = []
    for x0, y0, x1, y1 in parts:
        # A list, not a hierarchy: OpenCV's time for that grows with the square of the outlines, and
        # a grainy picture gives hundreds of thousands.
        contours, _ = cv2.findContours(
            mask[y0:y1, x0:x1], cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=(x0, y0)
        )
        outlines += map(_Outline, contours)
    return [o for o in outlines if not o.is_hole], [o for o in outlines if o.is_hole]


def _drawn(
    coarse: np.ndarray | None, box: PixelBox, small: list[_Outline]
) -> tuple[_Drawn, _Drawn]:
    """Pieces and holes of the coarse mask that were meant, if any of ``small`` may cover one.

    Of the coarse mask that part counts which is in the ``box`` of the refined one and its ring.
    """
    if coarse is None or not small:
        return _Drawn(), _Drawn()
    x0, y0, x1, y1 = box
    left, top = max(0, x0 - 2), max(0, y0 - 2)
    _, inner = mask_parts(coarse[top : y1 + 2, left : x1 + 2])
    parts = [(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in inner]
    set_pixels = sum(cv2.countNonZero(coarse[y0:y1, x0:x1]) for x0, y0, x1, y1 in parts)
    least = DRAWN_FRACTION * set_pixels
    if max(outline.painted for outline in small) < COVERED_FRACTION * least:
        return _Drawn(), _Drawn()
    islands, holes = _outlines(coarse, parts)
    return (
        _Drawn(island for island in islands if island.area >= least),
        _Drawn(hole for hole in holes if hole.area >= least),
    )
