"""What tells right masks from coarse ones, for ``kestrel/seg_refiner/trust.py``.

    python tools/boundary_trust.py BSDS500/data

On photographs laid out as benchmarks/photographs.py takes them, split ``train``: pixels by
which the refiner would move true masks and their jittered outlines of 32 vertices, vertices of
either, and how many are left as they are. Needs scipy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

from kestrel.seg_refiner.boundary import BoundaryRefiner
from kestrel.seg_refiner.box import grown_box, mask_box
from kestrel.seg_refiner.trust import moved_by, trusted, vertices_of

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from photographs import cases

SHARES = (5, 25, 50, 75, 95)
"""Percentiles that are printed."""


def signs(image: np.ndarray, mask: np.ndarray, refiner: BoundaryRefiner) -> tuple[float, int, bool]:
    """Pixels, vertices and whether it is left, of a coarse mask [H, W] in its crop."""
    x0, y0, x1, y1 = grown_box(mask_box(mask), mask.shape[1], mask.shape[0])
    crop = np.ascontiguousarray(image[y0:y1, x0:x1])
    cut = np.ascontiguousarray(mask[y0:y1, x0:x1])
    view = refiner.look(crop, cut)
    left = trusted(cut, view.coverage, view.soft)
    return moved_by(view.coverage, view.soft), vertices_of(cut), left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    refiner = BoundaryRefiner()
    found: dict[str, list[tuple[float, int, bool]]] = {"true masks": [], "32 vertices": []}
    for case in cases(args.folder, "train", perfect=False):
        for kind, mask in zip(found, (case.truth, case.coarse), strict=True):
            found[kind].append(signs(case.image, mask, refiner))
    for kind, rows in found.items():
        moved, vertices, left = np.array(rows, float).T
        print(f"{kind}, percentiles {SHARES}: moved by", np.percentile(moved, SHARES).round(2))
        print(f"vertices {np.percentile(vertices, SHARES).round()}, left {left.mean():.1%}")


if __name__ == "__main__":
    main()
