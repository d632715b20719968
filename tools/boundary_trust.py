"""Fit when the boundary refiner leaves a coarse mask as it is (``kestrel/seg_refiner/trust.py``).

    python tools/boundary_trust.py BSDS500/data

On photographs laid out as benchmarks/photographs.py takes them, split ``train``: true masks against
their jittered outlines of 32 vertices. Prints the weights, and what they keep of either on every
other photograph, by which they were not fitted. Needs scipy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

from kestrel.seg_refiner.boundary import _at_working_size, load_network, network_planes
from kestrel.seg_refiner.box import grown_box, mask_box
from kestrel.seg_refiner.cues import Cues
from kestrel.seg_refiner.trust import LEAST, agreement_of, log_vertices

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from photographs import cases

STEPS, RATE = 800, 1.0


def signs(image: np.ndarray, mask: np.ndarray, cues: Cues) -> tuple[float, float]:
    """Detail and agreement of a coarse mask [H, W] in the crop that the refiner looks at."""
    x0, y0, x1, y1 = grown_box(mask_box(mask), mask.shape[1], mask.shape[0])
    crop = np.ascontiguousarray(image[y0:y1, x0:x1])
    cut = np.ascontiguousarray(mask[y0:y1, x0:x1])
    small, coverage = _at_working_size(crop, cut)
    (learned,) = load_network()(network_planes(small, coverage, cues(small, coverage))[None])
    return log_vertices(cut), agreement_of(coverage, learned)


def fitted(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [k] and bias of a logistic regression of ``true`` [n] by ``found`` [n, k]."""
    middle, spread = found.mean(0), found.std(0)
    inputs = np.c_[(found - middle) / spread, np.ones(len(found))]
    weights = np.zeros(inputs.shape[1])
    for _ in range(STEPS):
        weights -= RATE * inputs.T @ (1 / (1 + np.exp(-inputs @ weights)) - true) / len(true)
    scaled = weights[:-1] / spread
    return scaled, float(weights[-1] - scaled @ middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    cues = Cues()
    rows = [
        (*signs(case.image, mask, cues), mask is case.truth)
        for case in cases(args.folder, "train", perfect=False)
        for mask in (case.truth, case.coarse)
    ]
    table = np.array(rows, float)
    halves = {name: table[np.arange(len(table)) // 2 % 2 == k] for k, name in enumerate("AB")}
    for name, half in halves.items():
        weights, bias = fitted(half[:, :2], half[:, 2])
        other = halves["B" if name == "A" else "A"]
        kept = other[:, :2] @ weights + bias > LEAST
        true = other[:, 2] > 0.5
        print(
            f"fitted on {name}: weights {weights.round(3)}, bias {bias:.3f}; keeps "
            f"{kept[true].mean():.1%} of the other half's true masks, {kept[~true].mean():.1%} of "
            "their outlines of 32 vertices"
        )
    weights, bias = fitted(table[:, :2], table[:, 2])
    print(f"fitted on all: weights {weights.round(3)}, bias {bias:.3f}")


if __name__ == "__main__":
    main()
