"""Bytes of traced paths against how well they give the mask back, by tracing option.

    python benchmarks/path_size.py --out path_size.json

Masks are outlines of ``benchmarks/refiner_cases.py`` refined by the guided filter on its pictures,
and smooth blobs; each option is changed alone from the defaults.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from refiner_cases import make_case, photo

from kestrel.config import RefinerConfig
from kestrel.image import decode
from kestrel.seg_refiner import bitmap_to_path
from kestrel.seg_refiner.box import mask_iou
from kestrel.seg_refiner.clean import clean_mask
from kestrel.seg_refiner.guided import GuidedRefiner
from kestrel.seg_refiner.raster import rasterize_relative
from kestrel.svg import parse_path

SIZES = ((640, 480), (1546, 1213))
OPTIONS: list[dict[str, Any]] = [
    {},
    *({"decimals": n} for n in (2, 3, 4, 5)),
    *({"opttolerance": t} for t in (0.0, 0.5, 1.0, 2.0)),
    *({"alphamax": a} for a in (0.0, 0.5, 1.3334)),
    *({"max_vertices": n} for n in (256, 128, 64, 32)),
]


def masks() -> Iterator[np.ndarray]:
    guided = GuidedRefiner(RefinerConfig())
    for size in SIZES:
        for vertices in (8, 32, 200):
            case = make_case(size, vertices, 0.17)
            coarse = rasterize_relative(case.path, case.bbox, *size)
            yield clean_mask(guided(decode(photo(case)), coarse), coarse)
        rng = np.random.default_rng(size[0])
        soft = cv2.resize(
            rng.random((6, 7)).astype(np.float32), size, interpolation=cv2.INTER_CUBIC
        )
        yield clean_mask((soft > 0.6).astype(np.uint8))


def measured(objects: list[np.ndarray], option: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for mask in objects:
        traced = bitmap_to_path(mask, **option)
        assert traced is not None
        again = rasterize_relative(*traced, mask.shape[1], mask.shape[0])
        segments = sum(name in "LCQ" for name, _ in parse_path(traced[0]).commands)
        rows.append((len(traced[0]), segments, mask_iou(mask, again)))
    size, vertices, iou = zip(*rows, strict=True)
    return {
        "option": option,
        "bytes": statistics.mean(size),
        "vertices": statistics.mean(vertices),
        "iou_mean": statistics.mean(iou),
        "iou_least": min(iou),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    objects = list(masks())
    rows = [measured(objects, option) for option in OPTIONS]
    print(f"{'option':>22}{'bytes':>9}{'vertices':>10}{'IoU':>9}{'least':>9}")
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row["option"].items()) or "defaults"
        print(
            f"{name:>22}{row['bytes']:9.0f}{row['vertices']:10.0f}"
            f"{row['iou_mean']:9.4f}{row['iou_least']:9.4f}"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
