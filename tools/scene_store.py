"""Scenes made once and read many times: memory-mapped arrays in a folder.

Drawing scenes takes a core; a store is drawn by all cores before training, which then has them to
itself. Readers mirror scenes at random, so that a second pass does not see the same pictures.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from outlines import contour, outline
from scenes import SceneGenerator

SIDE = 126
GRID = 9
"""Patches per side."""
CELLS = 7
"""Cells per side of a patch, in which shapes are told."""
OBJECTS = 5
VERTICES = 24
POINTS = 4
"""Points on each object, for spatial references."""
_CHUNK = 500

_SHAPES: dict[str, tuple[tuple[int, ...], type]] = {
    "images": ((SIDE, SIDE, 3), np.uint8),
    "nouns": ((OBJECTS,), np.int16),
    "shares": ((OBJECTS, GRID * GRID), np.uint8),
    "boxes": ((OBJECTS, 4), np.float32),
    "outlines": ((OBJECTS, VERTICES, 2), np.float32),
    "points": ((OBJECTS, POINTS, 2), np.float32),
}


@dataclass
class SceneStore:
    """N scenes of up to 5 named objects; coordinates in 0..1 of the image.

    ``images`` uint8 [N, 126, 126, 3]; ``nouns`` int16 [N, 5] index into ``names``, -1 for none;
    ``shares`` uint8 [N, 5, 81] part of each patch that shows the object, 255 for all of it;
    ``boxes`` float32 [N, 5, 4] (cx, cy, w, h); ``outlines`` float32 [N, 5, 24, 2] (x, y);
    ``points`` float32 [N, 5, 4, 2] on the object.
    """

    names: list[str]
    images: np.ndarray
    nouns: np.ndarray
    shares: np.ndarray
    boxes: np.ndarray
    outlines: np.ndarray
    points: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def open_store(folder: Path) -> SceneStore:
    """Map a store into memory."""
    about = json.loads((folder / "store.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _SHAPES}
    return SceneStore(about["names"], **arrays)


def build_store(
    folder: Path, *, count: int, seed: int, nouns: Sequence[str], styles: Sequence[str]
) -> SceneStore:
    """Draw ``count`` training scenes with every core, unless the folder holds just these."""
    about = {"names": list(nouns), "styles": list(styles), "seed": seed, "count": count}
    told = folder / "store.json"
    if not (told.exists() and json.loads(told.read_text()) == about):
        folder.mkdir(parents=True, exist_ok=True)
        told.unlink(missing_ok=True)
        for name, (shape, dtype) in _SHAPES.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape))
        jobs = [
            (folder, seed, tuple(nouns), tuple(styles), start, min(start + _CHUNK, count))
            for start in range(0, count, _CHUNK)
        ]
        with multiprocessing.get_context("spawn").Pool() as pool:
            for done, _ in enumerate(pool.imap_unordered(_fill, jobs), 1):
                if done % 20 == 0:
                    print(f"scenes drawn: {done * _CHUNK} of {count}", flush=True)
        told.write_text(json.dumps(about))
    return open_store(folder)


def _fill(job: tuple[Path, int, tuple[str, ...], tuple[str, ...], int, int]) -> None:
    """Draw one stretch of a store. Scenes without a named object give way to others."""
    folder, seed, nouns, styles, start, stop = job
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _SHAPES}
    # A stretch draws from numbers of its own, so the store does not depend on who drew what.
    generator = SceneGenerator("train", seed, styles=styles, nouns=nouns)
    index = {noun: number for number, noun in enumerate(nouns)}
    rng = np.random.default_rng((seed, start))
    number = start * 2
    for row in range(start, stop):
        scene = generator.scene(number)
        number += 1
        while not scene.objects and number < stop * 2:
            scene = generator.scene(number)
            number += 1
        arrays["images"][row] = scene.image
        arrays["nouns"][row] = -1
        for slot, found in enumerate(scene.objects[:OBJECTS]):
            side = SIDE // GRID
            cells = found.mask.reshape(GRID, side, GRID, side).mean((1, 3))
            around = contour(found.mask)
            points = (outline(around, VERTICES) / SIDE).astype(np.float32)
            low, high = around.min(0) / SIDE, around.max(0) / SIDE
            rows, columns = np.nonzero(found.mask)
            pick = rng.integers(len(rows), size=POINTS)
            arrays["nouns"][row, slot] = index[found.noun]
            arrays["shares"][row, slot] = np.rint(cells.ravel() * 255)
            arrays["boxes"][row, slot] = [*((low + high) / 2), *(high - low)]
            arrays["outlines"][row, slot] = points
            arrays["points"][row, slot] = (np.stack([columns, rows], 1)[pick] + 0.5) / SIDE


def mirrored(store: SceneStore, row: int) -> tuple[np.ndarray, ...]:
    """Image, shares, boxes, outlines and points of a scene seen in a mirror (left to right)."""
    shares = store.shares[row].reshape(OBJECTS, GRID, GRID)[:, :, ::-1].reshape(OBJECTS, -1)
    boxes = store.boxes[row].copy()
    boxes[:, 0] = 1 - boxes[:, 0]
    # Clockwise stays clockwise, and the first vertex is still the one on the middle line.
    outlines = np.roll(store.outlines[row][:, ::-1], 1, axis=1) * [-1, 1] + [1, 0]
    points = store.points[row] * [-1, 1] + [1, 0]
    return store.images[row][:, ::-1], shares, boxes, outlines, points
