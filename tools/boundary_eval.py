"""Refiners on generated pictures that nothing was trained on: photographs' cut-outs, drawn scenes.

    python tools/boundary_eval.py --count 60

Coarse masks as in benchmarks/photographs.py, then the true masks. Pasted objects are held-out
stamps and drawings; scenes are those of ``scenes.py``, split ``eval``, 384 px, drawn styles. The
table: IoU, share of objects that lose over a point, IoU that is left of a true mask.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from boundary_coarse import JITTER, coarse_polygon
from boundary_scenes import BoundaryScenes
from scenes import SceneGenerator

from kestrel.config import RefinerConfig
from kestrel.seg_refiner import BACKENDS
from kestrel.seg_refiner.box import mask_iou

DRAWN = ("noto", "fluent", "flat", "fxemoji", "emojione", "twemoji")
SCENE_SIDE = 384


def pasted(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    scenes = BoundaryScenes(99, held=True)
    for _ in range(count):
        sample = scenes.sample(288, 288)
        yield sample.image, sample.truth


def drawn(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    generator = SceneGenerator("eval", 99, styles=DRAWN, size=(SCENE_SIDE, SCENE_SIDE))
    for index in range(count):
        scene = generator.scene(index)
        for found in scene.objects:
            yield scene.image, np.ascontiguousarray(found.mask, np.uint8)
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="objects of each kind")
    parser.add_argument("--out", type=Path, help="JSON of the table")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    refiners = {name: BACKENDS[name](RefinerConfig()) for name in ("none", "guided", "boundary")}
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind, objects in (("pasted", pasted(args.count)), ("drawn", drawn(args.count))):
        rng = np.random.default_rng(1)
        rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in refiners}
        for image, truth in objects:
            coarse = coarse_polygon(truth, rng, 32, JITTER, JITTER)
            before = mask_iou(coarse, truth)
            for name, refine in refiners.items():
                after = mask_iou(refine(image, coarse), truth)
                kept = mask_iou(refine(image, truth), truth)
                rows[name].append((after, float(after < before - 0.01), kept))
        table[kind] = {}
        for name, figures in rows.items():
            iou, worse, kept = (round(float(v), 4) for v in np.mean(figures, axis=0))
            table[kind][name] = {"iou": iou, "worse_by_1pt": worse, "true_kept": kept}
            print(f"{kind:7} {name:9} IoU {iou:.4f}  worse {worse:.1%}  true mask {kept:.4f}")
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
