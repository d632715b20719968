"""Boxes of masks: of all that is set, and of what lies apart."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from kestrel.seg_refiner import box as box_module
from kestrel.seg_refiner.box import MOST_PARTS, TILE, mask_box, mask_parts
from kestrel.seg_refiner.clean import clean_mask


def blobs(rng: np.random.Generator) -> np.ndarray:
    """Discs and rings at random, some of a pixel, some over the rim."""
    height, width = rng.integers(1, 400, 2)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(0, 12))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        radius = int(rng.integers(0, 60)) if rng.random() < 0.4 else int(rng.integers(0, 5))
        cv2.circle(mask, centre, radius, 1, -1 if rng.random() < 0.7 else 1)
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_the_box_is_that_of_the_set_pixels(dtype):
    rng = np.random.default_rng(0)
    empty = 0
    for _ in range(200):
        mask = blobs(rng).astype(dtype)
        y, x = np.nonzero(mask)
        expected = (x.min(), y.min(), x.max() + 1, y.max() + 1) if x.size else None
        assert mask_box(mask) == expected
        empty += expected is None
    assert 0 < empty < 100
    assert mask_box(np.zeros((0, 5), dtype)) is None


def test_parts_hold_all_that_is_set_and_do_not_overlap():
    rng = np.random.default_rng(1)
    most = 0
    for _ in range(200):
        mask = blobs(rng)
        whole, parts = mask_parts(mask)
        assert whole == mask_box(mask)
        seen = np.zeros_like(mask)
        for x0, y0, x1, y1 in parts:
            assert 0 <= x0 < x1 <= mask.shape[1] and 0 <= y0 < y1 <= mask.shape[0]
            seen[y0:y1, x0:x1] += 1
        assert seen.max(initial=0) <= 1 and (seen >= mask).all()
        _, labels = cv2.connectedComponents(mask, connectivity=8)
        for x0, y0, x1, y1 in parts:
            inside = np.setdiff1d(labels[y0:y1, x0:x1], 0)
            outside = labels.copy()
            outside[y0:y1, x0:x1] = 0
            assert not np.isin(outside, inside).any()
        most = max(most, len(parts))
    assert most > 3


def test_very_many_parts_are_looked_at_as_one():
    mask = np.zeros((26 * TILE, 26 * TILE), np.uint8)
    mask[:: 2 * TILE, :: 2 * TILE] = 1
    whole, parts = mask_parts(mask)
    assert mask.sum() > MOST_PARTS and parts == [whole]


def test_cleaning_does_not_depend_on_how_a_mask_falls_into_parts(monkeypatch):
    rng = np.random.default_rng(2)
    masks = [(blobs(rng), int(rng.integers(3))) for _ in range(120)]

    def cleaned(tile: int) -> list[np.ndarray]:
        monkeypatch.setattr(box_module, "TILE", tile)
        return [
            clean_mask(mask, np.roll(mask, shift, axis=1) if shift else None)
            for mask, shift in masks
        ]

    for first, second in itertools.pairwise([cleaned(8), cleaned(64), cleaned(10_000)]):
        assert all(map(np.array_equal, first, second))
    assert any(not np.array_equal(mask, done) for (mask, _), done in zip(masks, first, strict=True))
