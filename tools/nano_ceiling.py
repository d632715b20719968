"""How near polygons of the training's kind come to what is seen: what a perfect model would say.

    python tools/nano_ceiling.py --scenes 150

IoU and boundary IoU with the true mask at the size of a request, of vertices at even steps along
the contour, as the model is taught, and on rays from the middle of the box; outlines are taken
at the training's 336 px. Then the nouns that what is taught follows worst.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import cv2
import numpy as np
from effects import SIDE
from eval_nano import SEED, scenes_of
from nouns import CORE, CORE_STYLES
from outlines import contour, outline, outline_along, polygon_mask
from scene_store import VERTICES
from scenes import SceneGenerator

from kestrel.seg_refiner.box import boundary_iou, mask_iou

COUNTS = (24, VERTICES, 40, 48)
KINDS = {"on rays": outline, "along the contour": outline_along}
TAUGHT = ("along the contour", VERTICES)
SHAPES = {"drawn and cut out": CORE_STYLES, "cut-outs": ["stamps"]}
WORST = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=150)
    args = parser.parse_args()
    for title, styles in SHAPES.items():
        generator = SceneGenerator("eval", SEED, styles=styles, nouns=CORE)
        found: dict[tuple[str, int], list[tuple[float, float]]] = {
            (kind, count): [] for kind in KINDS for count in COUNTS
        }
        by_noun: dict[str, list[float]] = defaultdict(list)
        for _, scene in scenes_of(generator, args.scenes, 1):
            for shown in scene.objects:
                height, width = shown.mask.shape
                grey = shown.mask.astype(np.uint8) * 255
                seen = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA) >= 128
                around = contour(seen)
                for (kind, count), figures in found.items():
                    points = KINDS[kind](around, count) * [width / SIDE, height / SIDE]
                    drawn = polygon_mask(points, height, width) if len(points) else shown.mask & 0
                    figures.append((mask_iou(drawn, shown.mask), boundary_iou(drawn, shown.mask)))
                by_noun[shown.noun].append(found[TAUGHT][-1][0])
        print(f"{title}, {len(found[TAUGHT])} objects: vertices, IoU, boundary IoU")
        for (kind, count), figures in found.items():
            iou, boundary = np.mean(figures, axis=0)
            print(f"  {kind:18} {count:4d} {iou:8.3f} {boundary:8.3f}")
        worst = sorted((float(np.mean(ious)), noun) for noun, ious in by_noun.items())[:WORST]
        print(" ", ", ".join(f"{noun} {iou:.2f}" for iou, noun in worst))


if __name__ == "__main__":
    main()
