"""Where an object ends, by several rules that err in different places; no weights.

Each cue is a share of the object, float32 [h, w] in 0..1, from a picture and the coverage of a
coarse mask at working size. Their mean beats each of them; the boundary network corrects it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from kestrel.config import RefinerConfig
from kestrel.seg_refiner.enlarge import apply_coefficients, planes
from kestrel.seg_refiner.guided import GuidedRefiner, Windows

LEVELS = 16
"""Levels of each channel that the colour histograms tell apart."""
DOUBT = 1e-4
"""Added to the frequencies of a colour, so that one that is rare in both decides nothing."""
COARSE_BASIN = 0.05
"""Half width of the band that is flooded around the coarse outline, fraction of the size."""
GUIDED_BASIN = 0.04
"""The same around the guided filter's outline."""
WIDE, NARROW = 0.06, 0.042
"""Radii at which coarse mask and colours together are filtered, one after the other, fractions of
the size; the wide one is also that of the neighbourhood in the mean field."""
DISTANCE_WEIGHT = 3.0
COLOUR_WEIGHT = 1.5
AROUND_WEIGHT = 3.0
"""Logits in the mean field: of the full distance, of a sure colour, of sure neighbours."""
FILTER_EPS = 1e-4
"""Regularisation of those filters, squared intensity with channels in 0..1."""

BASINS = np.array([0.5, 0, 1, 0], np.float32)
"""Share of the object where the watershed has its line (-1), nothing (0), the object, the rest."""

HELD_SLOPE = 16.0
"""Logit of the coarse mask itself per quarter of the object's size."""

THIN = 0.6
"""Least size of an object, fraction of its longer side: outlines of thin objects are as far off as
those of others as long."""

MEAN_WEIGHTS = {
    "guided": 0.18,
    "colour": 0.10,
    "flooded": 0.07,
    "flooded_guided": 0.11,
    "guided_colour": 0.14,
    "smoothed": 0.10,
    "held": 0.30,
}
"""Weights of the cues in their mean, which hardly depends on them; ``held`` keeps it from harm."""


class Cues:
    """Callable ``(image uint8 [h, w, 3] RGB, coverage float32 [h, w] in 0..1) -> cues by name``."""

    def __init__(self) -> None:
        # As in training, whatever is configured for the guided filter by itself.
        self.guided = GuidedRefiner(RefinerConfig(), halve=True)

    def __call__(self, image: np.ndarray, coverage: np.ndarray) -> dict[str, np.ndarray]:
        """Keys: those of ``MEAN_WEIGHTS`` and ``mean``; ``coarse_colour``, the colours by the
        coarse mask; ``distance``, -1..1, to the coarse outline in quarters of the object's size.
        """
        guide, bins, size = planes(image), _bins(image), _size(coverage)
        smooth = cv2.GaussianBlur(image, (0, 0), 1.0)
        depths = _depths(coverage)
        guided = np.clip(self.guided.passes(guide, coverage)[0], 0, 1)
        cues = {
            "guided": guided,
            "coarse_colour": colour_share(bins, coverage),
            "distance": np.clip(np.subtract(*depths) * np.float32(4 / size), -1, 1),
        }
        colour = colour_share(bins, guided)
        blend = (coverage + colour) * np.float32(0.5)
        wide = Windows(guide, _radius(WIDE * size), FILTER_EPS, halve=True)
        narrow = Windows(guide, _radius(NARROW * size), FILTER_EPS, halve=True)
        for windows in (wide, narrow):
            blend = apply_coefficients(guide, windows.fit(blend))
        cues |= {
            "colour": colour,
            "flooded": flooded(smooth, depths, COARSE_BASIN * size),
            "flooded_guided": flooded(smooth, _depths(guided), GUIDED_BASIN * size),
            "guided_colour": np.clip(blend, 0, 1),
            "smoothed": _smoothed_colours(guide, cues, colour, wide),
            # Where nothing else is sure the coarse outline stays.
            "held": 1 / (1 + np.exp(-np.float32(HELD_SLOPE) * cues["distance"])),
        }
        mean = np.zeros_like(coverage)
        for name, weight in MEAN_WEIGHTS.items():
            mean += np.float32(weight) * cues[name]
        return {**cues, "mean": mean}


def _size(coverage: np.ndarray) -> float:
    """Side of the square of the object's area, or more where the object is thin; pixels."""
    _, _, width, height = cv2.boundingRect((coverage > 0.5).astype(np.uint8))
    return max(1.0, math.sqrt(float(coverage.sum())), THIN * max(width, height))


def _depths(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels to the outline of what is covered by more than half: inside, and outside; float32."""
    inside = (share > 0.5).astype(np.uint8)
    within = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    return within, cv2.distanceTransform(1 - inside, cv2.DIST_L2, 3)


def _bins(image: np.ndarray) -> np.ndarray:
    """Number of each pixel's colour, int32 [h, w] in 0..LEVELS ** 3."""
    levels = (image // (256 // LEVELS)).astype(np.int32)
    return (levels[..., 0] * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]


def colour_share(bins: np.ndarray, share: np.ndarray) -> np.ndarray:
    """How much more frequent a pixel's colour is inside than outside, 0..1; 0.5 when equal.

    ``share``: float32 [h, w], how much of a pixel is inside.
    """
    flat = bins.ravel()
    counted = np.bincount(flat, share.ravel(), LEVELS**3)
    inside = _frequencies(counted)
    outside = _frequencies(np.bincount(flat, minlength=LEVELS**3) - counted)
    frequent = (inside + 0.5 * DOUBT) / (inside + outside + DOUBT)
    return frequent.astype(np.float32)[bins]


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Histogram [LEVELS ** 3] with a sum of 1, each bin shared with its neighbours.

    1/4, 1/2, 1/4 along each axis.
    """
    cube = counts.reshape(LEVELS, LEVELS, LEVELS)
    for _ in range(3):
        padded = np.concatenate((cube[:1], cube, cube[-1:]))
        cube = 0.5 * cube + 0.25 * (padded[:-2] + padded[2:])
        cube = cube.transpose(1, 2, 0)
    return cube.ravel() / max(1.0, float(cube.sum()))


def flooded(smooth: np.ndarray, depths: tuple[np.ndarray, np.ndarray], reach: float) -> np.ndarray:
    """Watershed between what is more than ``reach`` pixels inside and outside of an outline.

    ``smooth``: the picture, uint8 [h, w, 3], blurred; ``depths``: distances to the outline.
    """
    inside, outside = depths
    markers = np.zeros(inside.shape, np.int32)
    markers[outside > reach] = 2
    # Thin objects keep a core.
    markers[inside > min(reach, 0.6 * float(inside.max()))] = 1
    cv2.watershed(smooth, markers)
    return cv2.GaussianBlur(BASINS[markers + 1], (0, 0), 1.0)


def _radius(pixels: float) -> int:
    return max(1, round(pixels))


def _smoothed_colours(
    guide: Sequence[np.ndarray], cues: dict[str, np.ndarray], colour: np.ndarray, windows: Windows
) -> np.ndarray:
    """Mean field of distance and colour, with the guided filter between neighbours.

    Three updates as of Krähenbühl and Koltun's dense random field (NIPS 2011), another filter.
    """
    own = np.float32(DISTANCE_WEIGHT) * cues["distance"]
    own += np.float32(COLOUR_WEIGHT) * (2 * colour - 1)
    share = cues["guided"]
    for _ in range(3):
        around = np.clip(apply_coefficients(guide, windows.fit(share)), 0, 1)
        share = 1 / (1 + np.exp(-(own + np.float32(AROUND_WEIGHT) * (2 * around - 1))))
    return share
