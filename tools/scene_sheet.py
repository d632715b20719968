"""Generated scenes as one picture, to look at.

python tools/scene_sheet.py /tmp/sheet.png --split eval
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from outlines import contour, outline_along
from scenes import SceneGenerator


def _sheet(generator: SceneGenerator, first: int, columns: int, rows: int, zoom: int) -> np.ndarray:
    """Scenes with outlines, a white dot at the first vertex, and names; uint8 RGB."""
    tiles = []
    for index in range(first, first + columns * rows):
        scene = generator.scene(index)
        tile = cv2.resize(scene.image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
        for number, found in enumerate(scene.objects):
            hue = np.array([[[(number * 47) % 180, 255, 255]]], np.uint8)
            colour = tuple(int(v) for v in cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0])
            points = np.round(outline_along(contour(found.mask)) * zoom).astype(np.int32)
            cv2.polylines(tile, [points], True, colour, 1, cv2.LINE_AA)
            for point in points[1:]:
                cv2.circle(tile, point.tolist(), 2, colour, -1)
            cv2.circle(tile, points[0].tolist(), 4, (255, 255, 255), -1)
            corner = (int(points[:, 0].min()), int(points[:, 1].mean()))
            for width, ink in ((3, (0, 0, 0)), (1, (255, 255, 255))):
                text = f"{found.noun}/{found.style[:5]}"
                cv2.putText(tile, text, corner, cv2.FONT_HERSHEY_PLAIN, 0.9, ink, width)
        tiles.append(cv2.copyMakeBorder(tile, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(0, 0, 0)))
    return np.vstack([np.hstack(tiles[r * columns : (r + 1) * columns]) for r in range(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="PNG")
    parser.add_argument("--split", choices=["train", "eval"], default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--grid", type=int, nargs=2, default=(6, 4), metavar=("COLUMNS", "ROWS"))
    parser.add_argument("--zoom", type=int, default=2)
    args = parser.parse_args()
    generator = SceneGenerator(args.split, args.seed)
    columns, rows = args.grid
    sheet = _sheet(generator, args.first, columns, rows, args.zoom)
    cv2.imwrite(str(args.file), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
