"""Objects in photographs of ``gcompris-qt-data`` with outlines drawn by hand, then cut along edges.

Each outline below is rough, in tenths of the photograph's width and height. GrabCut (Rother et al.,
2004) with a band around it finds where the object ends: the backgrounds are out of focus or of one
colour, and what came out was looked at, one by one; objects for which it failed are not listed.

    python tools/boundary_outlined.py --sheet outlined.png
"""

from __future__ import annotations

import argparse
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

OUTLINES = """\
erase/butterfly: 2.6,3.6 3.2,3.3 4.2,3.0 5.5,3.0 6.6,3.4 7.4,4.2 7.1,5.3 6.0,6.0 5.2,6.6 4.6,8.6
  3.8,9.3 2.8,8.9 2.5,7.5 2.6,5.5
erase/camels: 3.6,5.3 4.0,4.0 4.4,3.0 5.0,1.5 6.0,1.6 6.9,1.4 7.6,2.5 8.0,3.7 8.4,2.8 9.3,2.7
  9.4,3.6 8.8,4.0 8.3,5.8 7.6,6.6 7.6,8.4 7.2,8.6 6.2,8.5 6.4,6.6 5.2,6.3 4.8,6.2 4.7,8.2 4.2,8.1
  3.9,7.9 3.7,6.6
erase/caterpillar: 0.4,5.0 0.5,3.9 1.2,3.6 2.5,3.4 4.0,2.9 5.0,2.8 5.6,3.6 5.5,5.0 4.5,5.2 3.0,5.6
  1.5,5.9 0.7,5.8
erase/crab: 0.6,7.3 0.8,6.0 1.6,4.0 3.0,3.7 3.8,3.6 4.1,2.5 5.6,2.5 6.0,3.6 7.0,3.7 8.4,3.6
  9.4,5.5 9.3,6.7 8.7,5.2 8.4,7.8 7.8,7.2 7.3,5.7 6.6,5.4 6.7,8.1 6.2,8.0 6.2,5.6 5.9,7.6 4.2,7.6
  4.0,6.0 3.7,8.2 3.3,8.0 3.3,5.4 2.4,5.4 2.0,7.6 1.4,6.4 1.5,5.0 0.9,6.5
erase/flying_fox: 4.6,8.8 4.9,7.3 5.6,6.2 6.0,3.8 6.6,2.0 7.8,0.6 7.8,2.5 7.6,5.0 8.0,8.9 7.0,8.4
  6.2,8.7 5.4,8.3
erase/goat: 1.7,4.0 2.2,2.8 3.5,2.3 5.2,2.2 6.6,2.3 7.4,2.6 8.0,2.3 8.0,1.0 8.8,2.8 8.9,4.5
  8.2,5.4 7.4,5.6 7.0,7.4 7.0,9.0 6.4,9.0 6.1,7.6 4.6,7.4 3.8,9.0 3.3,9.0 3.1,7.6 2.4,8.8 1.8,8.8
  2.0,6.5
erase/gosling: 3.5,4.2 4.3,3.2 4.3,2.0 4.3,1.2 5.2,1.0 5.4,2.0 5.2,3.2 5.8,3.5 6.2,4.6 7.2,4.7
  7.1,5.8 6.2,5.8 5.6,6.8 5.0,7.2 5.0,9.0 4.6,8.6 4.7,7.0 4.2,6.3 4.2,5.0 3.6,4.8
erase/heron: 0.7,8.2 2.1,7.2 2.0,5.0 2.5,4.0 2.2,2.4 3.0,0.6 3.8,1.2 4.2,3.3 4.1,5.3 5.0,5.4
  6.4,5.9 5.2,6.3 4.8,7.0 4.0,7.2 3.0,7.3 1.6,8.2 0.6,8.6
erase/horse: 1.1,3.3 1.6,2.5 3.0,2.5 3.9,2.4 4.4,1.2 5.9,1.1 6.0,3.0 5.7,4.3 5.2,4.4 4.8,5.5
  4.7,9.3 3.9,9.3 4.0,6.2 2.6,5.9 2.7,9.2 2.2,9.2 2.1,6.6 1.7,8.0 1.8,9.6 1.2,9.6 1.1,6.0
erase/kingfisher: 2.8,6.8 3.0,4.6 3.4,3.0 3.8,1.4 4.8,1.1 5.3,1.9 6.3,2.6 5.2,2.5 5.4,4.0 5.2,5.6
  4.5,7.0 4.0,7.2 3.5,8.6 3.1,8.6
erase/northern_harrier: 0.6,0.9 1.4,1.3 3.2,3.3 3.9,5.0 4.4,4.9 4.9,3.0 5.8,1.4 6.5,0.8 6.5,2.6
  5.6,4.6 5.2,5.2 5.3,6.2 4.6,6.6 3.0,6.6 2.3,6.2 2.9,5.6 2.2,4.4 1.2,2.6
erase/nubian_ibex: 3.3,1.2 4.0,2.0 4.3,0.6 4.7,0.8 4.8,2.4 6.0,2.6 7.8,2.6 8.4,3.4 8.2,5.2 8.1,7.2
  8.2,9.5 7.6,9.4 7.5,7.0 7.2,5.8 6.4,6.0 6.7,9.2 6.1,9.2 5.7,6.2 5.6,9.3 5.1,9.3 5.3,6.2 4.8,4.6
  4.2,4.1 3.9,2.5
erase/penguin: 2.7,4.2 3.9,3.3 4.5,2.6 4.6,0.8 5.4,0.7 5.6,2.8 6.0,4.0 6.3,5.7 5.9,5.4 5.7,7.6
  5.4,8.6 5.5,9.5 5.0,9.5 4.8,8.8 4.2,9.0 3.8,8.8 3.7,6.8 4.0,4.6 3.5,4.3 2.7,4.4
erase/rhinoceros: 1.0,4.4 1.4,2.4 2.4,1.6 3.8,2.0 5.2,1.5 6.4,2.0 7.2,2.3 8.0,3.8 8.6,3.4 8.7,4.7
  8.1,5.4 7.0,5.0 6.2,6.0 5.8,7.8 5.6,9.2 4.2,9.1 4.2,7.2 2.8,7.0 2.8,8.8 2.5,9.5 1.4,9.5 1.5,7.0
  1.0,6.0
erase/spoonbills: 3.7,2.7 5.0,3.2 5.3,4.2 6.0,3.3 7.4,3.3 8.0,4.6 8.6,6.2 7.9,6.2 7.0,5.5 6.0,5.1
  5.2,5.0 4.9,3.9 3.8,3.0
explore_farm_animals/chicken: 0.4,4.0 0.8,2.0 1.5,2.0 1.9,3.5 2.1,5.4 1.8,7.4 1.2,7.7 0.6,7.4
  0.5,5.5
explore_farm_animals/chicken: 3.6,4.6 4.0,3.2 4.8,2.2 5.1,1.1 5.3,3.0 5.3,4.4 4.8,5.6 4.6,6.4
  4.2,7.4 3.9,6.8 3.8,5.6
explore_farm_animals/cow: 2.3,4.6 2.8,4.0 3.5,4.1 4.4,3.9 6.0,3.8 8.0,3.8 8.9,4.1 9.0,5.6 8.8,7.8
  8.9,9.2 8.4,9.2 8.3,7.4 7.9,7.0 6.8,7.0 5.2,6.8 5.2,8.8 4.7,8.9 4.6,7.0 3.8,6.5 3.3,5.9 2.5,6.0
explore_farm_animals/dog: 0.3,7.3 1.6,6.9 2.1,5.4 2.2,4.4 3.4,3.2 5.4,2.7 6.9,2.5 7.4,1.3 7.4,0.3
  8.0,0.6 8.7,0.5 8.7,1.9 8.3,2.8 8.2,4.2 7.8,5.8 7.2,6.3 7.4,9.6 6.4,9.6 6.6,6.4 4.6,6.0 3.6,5.9
  3.9,7.2 3.7,9.0 2.6,9.2 2.8,7.6 1.8,7.6 0.7,7.9
explore_farm_animals/horse: 5.7,4.4 6.0,3.6 6.6,3.6 7.6,3.8 8.4,4.4 8.6,6.0 8.6,8.4 8.2,8.3
  8.2,6.6 7.6,6.2 7.4,6.2 7.2,8.3 6.9,8.3 6.9,5.9 6.5,5.2 6.1,5.3
explore_farm_animals/owl: 5.4,4.2 5.6,2.4 6.2,2.1 7.2,2.3 7.5,3.8 7.9,5.4 7.6,7.4 7.9,8.6 7.0,9.4
  6.6,8.6 6.8,7.0 5.9,6.8 5.5,5.6
explore_farm_animals/pig: 1.7,5.6 2.0,4.2 2.9,3.9 3.6,3.0 4.6,2.4 5.4,2.4 5.9,3.4 5.8,4.2 6.0,6.3
  5.6,6.4 5.4,5.0 4.9,6.6 4.4,6.0 4.1,7.6 3.7,7.4 3.6,6.2 3.0,6.6 2.7,8.1 2.3,8.0 2.6,6.7 1.9,6.7
explore_farm_animals/sheep: 2.4,3.2 2.8,2.2 4.2,1.7 5.0,1.6 5.5,1.3 6.4,1.4 6.0,2.2 6.6,2.9
  7.0,4.2 7.0,5.2 6.4,6.4 6.3,8.7 5.8,8.6 5.5,9.0 5.0,8.8 5.1,7.0 3.9,6.8 3.7,9.0 3.3,8.8 3.2,7.4
  2.8,8.0 2.6,7.4 2.8,6.0 2.4,5.0
explore_world_animals/bison: 2.1,4.6 2.3,3.0 3.2,2.0 4.0,1.3 5.2,1.4 6.8,1.8 7.6,2.2 8.0,3.0
  7.8,5.0 7.6,7.2 7.0,6.8 6.6,5.4 5.0,5.8 5.3,6.9 4.2,7.0 3.0,7.2 2.6,6.4 2.4,5.6
explore_world_animals/dragon: 0.5,6.0 0.8,5.3 2.4,5.2 0.8,4.6 0.8,4.1 3.0,4.2 4.6,4.1 6.0,3.8
  6.6,3.4 7.6,3.3 8.4,4.0 9.0,4.3 8.2,4.8 7.4,4.7 6.6,5.4 5.6,6.2 6.8,7.8 6.9,8.6 6.2,8.6 4.8,6.6
  3.4,6.1 2.0,6.1
explore_world_animals/hedgehog: 2.0,5.6 2.2,3.8 3.0,2.4 4.4,1.9 6.0,2.3 7.2,3.8 7.9,4.9 8.4,5.6
  7.6,6.1 6.4,7.0 4.4,7.6 2.6,7.4
explore_world_animals/kangaroo: 3.0,7.0 3.1,5.2 3.8,3.6 3.7,1.8 4.2,1.0 4.2,0.2 5.0,1.2 5.5,2.6
  5.4,4.4 5.0,5.8 4.2,6.6 4.1,8.6 3.5,8.7 3.5,7.4
explore_world_animals/polar_bear: 2.5,6.9 2.9,6.0 3.4,4.2 4.6,3.4 6.2,3.5 7.4,4.2 8.2,4.8 8.0,5.6
  7.4,5.6 7.6,7.2 7.0,7.3 6.2,6.2 6.2,7.5 5.4,7.4 4.8,6.4 4.6,7.3 4.0,7.2 3.6,6.4 3.1,7.1
explore_world_animals/scarlet_macaw: 2.3,2.6 2.5,1.4 3.8,1.4 5.0,2.6 6.6,3.4 7.6,4.8 8.6,6.6
  9.3,8.4 7.6,8.9 6.0,8.4 4.8,8.5 4.0,6.6 3.8,4.6 3.2,5.0 2.8,3.6
explore_world_music/africa: 0.5,7.0 1.2,5.6 2.7,3.2 3.4,3.0 3.5,3.8 2.4,6.4 2.2,7.4 1.8,8.4
  1.0,8.0
explore_world_music/africa: 5.5,2.9 6.2,2.4 7.2,3.3 9.2,6.0 9.4,7.2 8.4,8.6 7.7,8.2 7.0,6.5
  6.0,4.2
categorization/fish12: 1.7,5.0 2.4,4.0 4.4,3.4 5.6,3.3 7.0,4.3 7.8,4.1 7.9,5.6 7.0,5.2 5.6,6.0
  4.0,6.4 2.8,6.2 2.0,5.6
categorization/fish13: 1.0,5.2 1.8,4.0 3.2,3.1 5.0,3.0 7.0,4.0 8.0,5.4 9.0,6.6 9.0,8.0 8.0,7.2
  6.0,7.6 4.0,7.4 2.0,6.4
categorization/fish15: 2.6,4.6 3.6,3.6 5.0,3.2 6.4,3.8 7.8,4.6 7.6,5.2 6.0,5.1 4.6,5.4 3.2,5.0
categorization/fish16: 1.0,4.4 1.8,3.4 3.4,2.8 5.0,3.0 6.8,3.8 8.0,4.6 9.4,3.8 9.2,5.4 8.0,5.2
  6.4,5.8 5.2,6.6 3.4,6.2 1.8,5.6 1.2,5.0
categorization/fish18: 0.7,4.4 2.0,3.2 3.4,2.2 4.0,1.0 5.6,1.6 6.4,3.0 7.4,4.2 8.6,3.4 9.4,4.2
  8.8,5.2 9.0,6.4 7.6,5.6 6.4,6.2 5.2,6.4 4.6,7.2 4.8,8.4 3.4,7.2 2.4,6.2 1.4,5.2
categorization/fish2: 1.7,4.8 2.4,4.0 4.0,3.4 6.0,3.4 8.0,4.0 8.9,3.4 8.6,4.8 7.0,5.0 5.0,5.2
  3.0,5.5 2.0,5.4
categorization/fish21: 3.3,4.4 4.4,3.8 5.4,3.4 6.8,3.5 8.0,4.2 8.5,4.8 7.8,5.4 6.4,6.0 5.0,6.1
  3.8,5.4 2.0,5.8 1.3,6.2 2.4,5.0 1.2,4.3
categorization/fish22: 0.9,5.0 2.0,4.0 3.4,3.3 5.0,3.0 6.8,3.4 8.2,3.8 9.4,3.0 9.4,4.4 8.4,4.8
  7.0,5.4 5.6,6.6 4.0,6.7 2.4,6.2 1.4,5.6
categorization/fish23: 2.7,4.2 3.6,3.9 5.0,4.0 6.4,4.5 7.7,4.2 7.6,5.2 6.6,5.2 5.0,5.6 3.6,5.2
  2.9,4.8
categorization/fish24: 2.1,3.6 3.2,3.4 4.6,4.2 6.2,5.2 8.1,5.2 8.0,6.2 6.6,6.0 5.0,5.9 3.6,5.2
  2.4,4.3
categorization/fish26: 1.9,5.7 2.8,5.1 4.4,4.9 6.4,5.0 8.5,4.4 8.2,5.2 8.4,6.2 7.4,5.6 6.0,6.0
  4.0,6.3 2.4,6.2
categorization/fish27: 2.1,3.4 3.0,3.1 4.4,3.6 6.0,4.6 7.6,5.2 8.8,5.2 8.8,6.0 7.6,5.8 5.6,5.7
  3.8,5.2 2.6,4.4
categorization/fish3: 0.7,4.6 1.6,4.6 2.4,4.0 4.0,3.2 6.0,3.2 7.4,3.9 8.6,5.6 7.8,5.8 6.4,6.0
  5.4,6.4 4.0,6.0 2.8,5.4 1.8,5.4 0.9,6.0
categorization/fish9: 2.0,2.6 2.6,1.9 3.6,1.7 4.2,1.0 5.2,1.2 5.6,2.0 6.6,2.0 6.7,3.0 6.0,3.4
  5.4,3.8 4.2,3.6 3.6,4.3 3.1,4.0 2.6,3.5
categorization/fish1: 2.5,4.0 2.0,0.6 4.0,0.3 6.4,1.6 8.2,3.2 8.6,4.4 8.0,5.2 6.6,7.2 5.0,8.2
  3.4,8.6 2.2,8.0 2.4,6.0 1.8,6.2 1.4,5.2 1.8,4.0
categorization/IndiaGate: 4.6,8.2 4.5,2.0 4.9,1.0 5.4,0.8 7.8,0.8 8.4,2.4 8.4,8.2 7.0,8.2 7.0,4.8
  6.2,4.4 6.0,8.2
categorization/kutubMinar: 6.0,9.4 6.2,4.0 6.3,0.4 6.7,0.2 7.0,4.0 7.3,9.2
categorization/operaHouse: 0.7,6.4 1.6,5.4 1.8,4.4 2.7,4.4 3.5,4.4 4.0,2.8 5.2,4.0 6.0,5.0 7.4,4.8
  8.0,6.0 9.6,6.0 9.4,7.2 8.0,7.6 1.2,7.8
categorization/solar7: 1.2,8.0 1.6,1.2 7.2,1.4 9.6,6.8 5.4,7.2
categorization/solar1: 1.1,4.2 1.4,2.2 2.6,0.8 4.0,0.4 5.6,1.2 6.6,2.8 6.7,4.8 6.0,6.2 4.6,7.2
  3.2,7.2 1.8,6.2
"""
"""Subject of a photograph and the vertices of an outline; lines that begin with spaces go on."""


def _outlines() -> Iterator[tuple[str, np.ndarray]]:
    """Subject and vertices float [n, 2], x and y in 0..1."""
    for line in OUTLINES.replace("\n  ", " ").splitlines():
        subject, _, vertices = line.partition(":")
        yield subject, np.array([v.split(",") for v in vertices.split()], float) / 10


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
    rules = (OUTLINES, BAND, ROUNDS, AROUND, len(outlines))
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
