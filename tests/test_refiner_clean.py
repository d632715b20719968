"""What a refinement tore loose is dropped, what was drawn stays; a grainy mask takes no hour."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from kestrel.seg_refiner.clean import BAND, MIN_FRACTION, clean_mask, close_cracks

SIDE = 200
LEAST = int(MIN_FRACTION * SIDE * SIDE)
"""Pixels from which on an island or a hole of the test's masks is not small: 60."""


def block() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[50:150, 50:150] = 1
    return mask


def closed(mask: np.ndarray) -> np.ndarray:
    """As within a larger picture."""
    larger = cv2.morphologyEx(np.pad(mask, 3), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    return larger[3:-3, 3:-3]


def noise(side: int, seed: int, blur: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    soft = cv2.GaussianBlur(rng.random((side, side)).astype(np.float32), (0, 0), blur)
    return (soft > np.median(soft)).astype(np.uint8)


@pytest.mark.parametrize(("pixels", "stays"), [(1, False), (LEAST - 1, False), (LEAST, True)])
def test_an_island_stays_from_its_share_of_the_image_on(pixels, stays):
    mask = block()
    for i in range(pixels):
        mask[10 + i // 10, 10 + i % 10] = 1
    assert clean_mask(mask)[:30, :30].any() == stays


@pytest.mark.parametrize(("pixels", "stays"), [(1, False), (LEAST - 1, False), (LEAST, True)])
def test_a_hole_stays_from_its_share_of_the_image_on(pixels, stays):
    mask = block()
    for i in range(pixels):
        mask[80 + i // 10, 80 + i % 10] = 0
    assert (clean_mask(mask)[60:140, 60:140] == 0).any() == stays


def test_a_crack_is_no_island_and_is_closed():
    mask = block()
    mask[100, 50:150] = 0
    mask[50:150, 70] = 0
    assert np.array_equal(clean_mask(mask), block())


def test_lines_of_a_pixel_s_width_enclose_nothing_and_go():
    mask = block()
    mask[10, 10:60] = 1
    mask[10:40, 180] = 1
    assert np.array_equal(clean_mask(mask), block())


def test_a_dropped_island_does_not_come_back_as_its_hole():
    mask = block()
    mask[10:17, 10:17] = 1
    mask[13, 13] = 0
    assert np.array_equal(clean_mask(mask), block())
    # In the middle of what stays, too.
    ring = block()
    ring[70:130, 70:130] = 0
    mask = ring.copy()
    mask[97:104, 97:104] = 1
    mask[100, 100] = 0
    assert np.array_equal(clean_mask(mask), ring)


def test_when_all_islands_are_small_the_largest_stays():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:13, 10:13] = 1
    mask[40:44, 40:44] = 1
    cleaned = clean_mask(mask)
    assert cleaned.sum() == 16 and cleaned[40:44, 40:44].all()
    assert not clean_mask(np.zeros_like(mask)).any()


def test_small_parts_that_the_path_drew_stay():
    coarse = np.zeros((SIDE, SIDE), np.uint8)
    coarse[50:80, 50:80] = 1
    coarse[60:65, 60:65] = 0
    coarse[20:26, 20:26] = 1
    refined = coarse.copy()
    refined[100, 100] = 1
    cleaned = clean_mask(refined, coarse)
    assert np.array_equal(cleaned, coarse)
    assert cleaned.sum() != clean_mask(refined).sum()


@pytest.mark.parametrize(("pixels", "stays"), [(17, False), (18, True)])
def test_a_small_island_stays_from_a_third_of_the_one_that_was_drawn_on(pixels, stays):
    coarse = np.zeros((SIDE, SIDE), np.uint8)
    coarse[50:80, 50:80] = 1
    coarse[20:26, 20:29] = 1
    refined = coarse.copy()
    refined[20:26, 20:29] = 0
    for i in range(pixels):
        refined[20 + i // 6, 20 + i % 6] = 1
    assert clean_mask(refined, coarse)[:40].any() == stays


@pytest.mark.parametrize("seed", range(4))
def test_nothing_small_is_left_of_a_grainy_mask(seed):
    cleaned = clean_mask(noise(SIDE, seed, 1.5))
    for value, connectivity in ((1, 8), (0, 4)):
        # What closing itself opens or joins is not looked at again.
        parts = (cleaned == value).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(parts, connectivity=connectivity)
        assert stats[1:, cv2.CC_STAT_AREA].min() >= (LEAST if value else 1)


@pytest.mark.parametrize("window", [np.s_[:, :], np.s_[3:, 3:], np.s_[:-1, 1:]])
def test_large_parts_are_closed_as_in_the_whole_image(window):
    """Whatever the band that a row falls into, and at the rim of the image."""
    mask = np.zeros((2 * BAND + 50, 300), np.uint8)
    mask[window] = noise(2 * BAND + 50, 1, 4)[:, :300][window]
    small = np.zeros_like(mask)
    for value, connectivity in ((1, 8), (0, 4)):
        parts = (mask == value).astype(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(parts, connectivity=connectivity)
        small |= (stats[labels, cv2.CC_STAT_AREA] < MIN_FRACTION * mask.size).astype(np.uint8)
    cleaned = clean_mask(mask)
    far = cv2.dilate(small, np.ones((7, 7), np.uint8)) == 0
    assert far.mean() > 0.3
    assert np.array_equal(cleaned[far], closed(mask)[far])


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_bands_of_rows_are_closed_as_one(share):
    mask = (np.random.default_rng(7).random((3 * BAND + 1, 300)) < share).astype(np.uint8)
    expected = closed(mask)
    close_cracks(mask)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("gap", range(-30, 4))
def test_an_object_grows_at_the_rim_of_the_picture(gap, turns):
    """A disc that the rim cuts, touches or leaves free is what closing leaves of it elsewhere."""
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = ((x - 40 - gap) ** 2 + (y - 100) ** 2 <= 40**2).astype(np.uint8)
    assert np.array_equal(clean_mask(np.rot90(disc, turns).copy()), np.rot90(disc, turns))


def test_a_mask_is_not_changed_in_place():
    mask = noise(SIDE, 5, 2)
    before = mask.copy()
    clean_mask(mask, mask)
    assert np.array_equal(mask, before)


def test_hundreds_of_thousands_of_specks_take_seconds():
    mask = noise(1200, 6, 0.3)
    began = time.process_time()
    clean_mask(mask, mask)
    assert time.process_time() - began < 10


def test_many_specks_beside_many_drawn_pieces_take_no_longer():
    side, pieces = 1000, 9
    coarse = np.zeros((side, side), np.uint8)
    step = side // pieces
    for x in range(step // 2, side, step):
        for y in range(step // 2, side, step):
            cv2.circle(coarse, (x, y), step // 3, 1, -1)
    refined = coarse ^ (np.random.default_rng(0).random(coarse.shape) < 0.12).astype(np.uint8)
    # A speck that is large enough to be what became of a piece, so that pieces are looked at.
    cv2.circle(refined, (side // 2, side // 2), 24, 0, -1)
    cv2.circle(refined, (side // 2, side // 2), 21, 1, -1)
    began = time.process_time()
    clean_mask(refined, coarse)
    assert time.process_time() - began < 4
