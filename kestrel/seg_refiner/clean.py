"""Drop what a refinement tore loose: specks, pinholes, one-pixel cracks."""

from __future__ import annotations

import cv2
import numpy as np

from kestrel.seg_refiner.box import mask_box

MIN_FRACTION = 0.0015
"""Islands and holes under this fraction of the image are dropped (public refiner's 0.15 %)."""
KEPT_FRACTION = 0.01
"""A piece or hole that the model drew is kept when it is at least this fraction of the object."""


def clean_mask(mask: np.ndarray, coarse: np.ndarray | None = None) -> np.ndarray:
    """Mask uint8 [H, W], 0/1, without small islands and holes, then closed 3x3.

    ``coarse``, same shape: a small island or hole stays where it is what became of a piece or a
    hole of the coarse mask. When every island is small the largest stays.
    """
    cleaned = np.zeros_like(mask)
    box = mask_box(mask)
    if box is None:
        return cleaned
    x0, y0, x1, y1 = box
    window = np.s_[y0:y1, x0:x1]
    min_area = MIN_FRACTION * mask.size
    # A ring of background makes the outside one piece, so that a hole is any other.
    crop = _ringed(mask[window])
    reference = None if coarse is None else _ringed(coarse[window])
    object_area = int(coarse.sum()) if coarse is not None else 0
    smallest_kept = KEPT_FRACTION * object_area

    labels = _Pieces(crop, 8)
    keep = labels.areas >= min_area
    keep[0] = False
    if not keep.any():
        keep[1 + int(labels.areas[1:].argmax())] = True
    if reference is not None and not keep[1:].all():
        keep |= labels.heirs_of(_Pieces(reference, 8), smallest_kept)
    crop = labels.select(keep)

    holes = _Pieces(1 - crop, 4)
    keep = holes.areas >= min_area
    keep[0] = False
    keep[holes.labels[0, 0]] = True  # the outside
    if reference is not None and not keep[1:].all():
        keep |= holes.heirs_of(_Pieces(1 - reference, 4), smallest_kept)
    crop = 1 - holes.select(keep)

    # The foreground reaches the window's rim on every side, so closing needs no wider ring.
    closed = cv2.morphologyEx(crop, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    cleaned[window] = closed[1:-1, 1:-1]
    return cleaned


def _ringed(crop: np.ndarray) -> np.ndarray:
    return cv2.copyMakeBorder(np.ascontiguousarray(crop), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)


class _Pieces:
    """Connected pieces of a 0/1 mask; label 0 is what is not set."""

    def __init__(self, mask: np.ndarray, connectivity: int) -> None:
        self.mask = mask
        self.count, self.labels, stats, _ = cv2.connectedComponentsWithStats(
            mask, connectivity=connectivity
        )
        self.areas = stats[:, cv2.CC_STAT_AREA]

    def select(self, keep: np.ndarray) -> np.ndarray:
        """The mask of the pieces whose label is True in ``keep``: one table look-up per pixel."""
        if keep[1:].all():
            return self.mask
        return keep.view(np.uint8)[self.labels]

    def heirs_of(self, older: _Pieces, min_area: float) -> np.ndarray:
        """True for each piece that covers most of what is left of an older piece.

        Older pieces under ``min_area``, or of which less than a tenth is left, have no heir.
        """
        heirs = np.zeros(self.count, np.bool_)
        both = np.flatnonzero((self.labels > 0) & (older.labels > 0))
        pairs = older.labels.ravel()[both].astype(np.int64) * self.count + self.labels.ravel()[both]
        overlaps = np.bincount(pairs, minlength=older.count * self.count)
        overlaps = overlaps.reshape(older.count, self.count)
        for label in range(1, older.count):
            area = older.areas[label]
            heir = int(overlaps[label].argmax())
            if area >= max(1.0, min_area) and overlaps[label, heir] * 10 >= area:
                heirs[heir] = True
        return heirs
