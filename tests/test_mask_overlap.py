"""Overlap of masks, and of the bands inside their outlines."""

import numpy as np
import pytest

from kestrel.seg_refiner.box import boundary_iou, mask_iou


def square(low: int, high: int) -> np.ndarray:
    mask = np.zeros((80, 60), np.uint8)  # a diagonal of 100 px: bands of 2 px
    mask[low:high, low:high] = 1
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_bands_are_as_wide_as_two_hundredths_of_the_diagonal(dtype) -> None:
    inner, outer = square(11, 39).astype(dtype), square(10, 40).astype(dtype)
    assert mask_iou(inner, outer) == pytest.approx(28**2 / 30**2)
    # 26 px are within both bands' inner edges, 24 px within the smaller one's alone.
    common = 28**2 - 26**2
    union = (30**2 - 26**2) + (28**2 - 24**2) - common
    assert boundary_iou(inner, outer) == pytest.approx(common / union)


def test_bands_that_lie_apart_have_nothing_in_common() -> None:
    assert boundary_iou(square(10, 50), square(14, 46)) == 0
    assert boundary_iou(square(10, 50), square(10, 50)) == 1
