"""Objects in photographs with outlines drawn by hand, then cut along edges.

Each outline in ``boundary_outlined.json`` is rough, in tenths of the photograph's width and height.
GrabCut (Rother et al., 2004) with a band around it finds where the object ends, and what came out
was looked at, one by one; objects for which it failed are not listed.

    python tools/boundary_outlined.py --sheet outlined.png
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from assets import CACHE
from boundary_photos import photographs, small_photographs

BAND = 0.1
"""Half width of the band in which GrabCut decides, fraction of the object's size."""
ROUNDS = 6
"""Iterations of GrabCut."""
AROUND = 0.4
"""What GrabCut sees around the outline's box, fraction of its longer side."""
OUTLINES = Path(__file__).with_suffix(".json")
"""Photographs (name, package, file, licence) and the vertices of each outline in them."""


def _outlines() -> Iterator[tuple[str, np.ndarray]]:
    """Subject and vertices float [n, 2], x and y in 0..1."""
    for photo in json.loads(OUTLINES.read_text("utf-8")):
        for vertices in photo["outlines"]:
            yield photo["name"], np.array([v.split(",") for v in vertices.split()], float) / 10


def _cut(photo: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Mask uint8 [H, W] 0/1 of the object within the vertices [n, 2], pixels."""
    rough = np.zeros(photo.shape[:2], np.uint8)
    cv2.fillPoly(rough, [np.round(vertices).astype(np.int32)], 1)
    reach = BAND * float(np.sqrt(rough.sum()))
    depth = cv2.distanceTransform(rough, cv2.DIST_L2, 5)
    labels = np.where(rough > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[depth > min(reach, 0.6 * float(depth.max()))] = cv2.GC_FGD
    labels[cv2.distanceTransform(1 - rough, cv2.DIST_L2, 5) > reach] = cv2.GC_BGD
    x, y, w, h = cv2.boundingRect(rough)
    more = round(AROUND * max(w, h))
    part = np.s_[max(0, y - more) : y + h + more, max(0, x - more) : x + w + more]
    seen = np.ascontiguousarray(labels[part])
    cv2.setRNGSeed(0)
    crop = np.ascontiguousarray(photo[part])
    models = np.empty(0), np.empty(0)
    cv2.grabCut(crop, seen, (0, 0, 0, 0), *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
    cut = np.zeros_like(rough)
    cut[part] = (seen == cv2.GC_FGD) | (seen == cv2.GC_PR_FGD)
    cut = cv2.medianBlur(cut, 5)
    _, numbers, stats, _ = cv2.connectedComponentsWithStats(cut)
    return (numbers == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)


@dataclass(frozen=True)
class Outlined:
    """``mask`` uint8 [h, w] 0/1 at ``left``, ``top`` of ``photo`` uint8 [H, W, 3] RGB."""

    photo: np.ndarray
    left: int
    top: int
    mask: np.ndarray


def outlined_objects() -> list[Outlined]:
    """Every object whose photograph there is; cut once, kept in the cache."""
    photos = photographs() | small_photographs()
    outlines = [(subject, points) for subject, points in _outlines() if subject in photos]
    drawn = [(subject, points.tolist()) for subject, points in outlines]
    rules = (drawn, BAND, ROUNDS, AROUND)
    file = CACHE / f"outlined-{zlib.crc32(repr(rules).encode()):08x}.npz"
    if not file.exists():
        masks = [_cut(photos[s], points * photos[s].shape[1::-1]) for s, points in outlines]
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, *masks)
        partial.replace(file)
    found = []
    with np.load(file) as stored:
        for (subject, _), name in zip(outlines, stored.files, strict=True):
            mask = stored[name]
            x, y, w, h = cv2.boundingRect(mask)
            found.append(Outlined(photos[subject], x, y, mask[y : y + h, x : x + w].copy()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sheet", type=Path, required=True)
    args = parser.parse_args()
    side, cells = 260, []
    for found in outlined_objects():
        marked = found.photo.copy()
        outlines, _ = cv2.findContours(found.mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        place = (found.left, found.top)
        cv2.drawContours(marked, outlines, -1, (255, 0, 0), 1, offset=place)
        h, w = found.mask.shape
        marked = marked[max(0, found.top - h // 4) :, max(0, found.left - w // 4) :]
        marked = marked[: h + h // 2, : w + w // 2]
        scale = side / max(marked.shape)
        cell = np.zeros((side, side, 3), np.uint8)
        marked = cv2.resize(marked, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        cell[: marked.shape[0], : marked.shape[1]] = marked
        cells.append(cell)
    cells += [np.zeros_like(cells[0])] * (-len(cells) % 8)
    rows = [np.hstack(cells[i : i + 8]) for i in range(0, len(cells), 8)]
    cv2.imwrite(str(args.sheet), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
