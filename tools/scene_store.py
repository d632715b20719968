"""Scenes drawn once and read many times.

Drawing scenes takes a core. On a CPU a *store*, memory-mapped arrays in a folder, is drawn by all
cores before training, which then has them to itself. On an accelerator a *pool* in its memory grows
while training reads from it. Readers mirror scenes at random, so that a second pass does not see
the same pictures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from effects import SIDE
from outlines import contour, outline_along
from scenes import SceneGenerator
from torch import Tensor

GRID = 24
"""Patches per side."""
CELLS = 7
"""Cells per side of a patch, in which shapes are told."""
OBJECTS = 5
VERTICES = 32
STARTS = 4
"""Places within the first step along a contour from which there is a polygon round it."""
POINTS = 4
"""Points on each object, for spatial references."""
_CHUNK = 100

_SHAPES: dict[str, tuple[tuple[int, ...], type]] = {
    "images": ((SIDE, SIDE, 3), np.uint8),
    "nouns": ((OBJECTS,), np.int16),
    "shares": ((OBJECTS, GRID * GRID), np.uint8),
    "boxes": ((OBJECTS, 4), np.float32),
    "outlines": ((OBJECTS, STARTS * VERTICES, 2), np.float32),
    "points": ((OBJECTS, POINTS, 2), np.float32),
}


Job = tuple[int, tuple[str, ...], tuple[str, ...], int, int]
"""Seed, nouns, styles, first scene and the one after the last."""


class Scenes:
    """N scenes of up to 5 named objects; coordinates in 0..1 of the image.

    ``arrays`` holds tensors: ``images`` uint8 [N, 336, 336, 3]; ``nouns`` int16 [N, 5] index into
    ``names``, -1 for none; ``shares`` uint8 [N, 5, 576] part of each patch that shows the object,
    255 for all of it; ``boxes`` float32 [N, 5, 4] (cx, cy, w, h); ``outlines`` float32
    [N, 5, 128, 2] (x, y), each fourth of which is a vertex of the outline, and those between of
    outlines that begin a quarter, a half and three quarters of a step further on; ``points``
    float32 [N, 5, 4, 2] on the object. The first ``ready`` of them can be read.
    """

    def __init__(self, names: Sequence[str], arrays: dict[str, Tensor], ready: int) -> None:
        self.names, self.arrays, self.ready = list(names), arrays, ready

    def __len__(self) -> int:
        return self.ready

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """The scenes of these numbers, int64 [B]."""
        return {name: array[rows] for name, array in self.arrays.items()}


def open_store(folder: Path) -> Scenes:
    """Map a store into memory."""
    about = json.loads((folder / "store.json").read_text())
    # Mapped so that pages may be written, as torch asks for; what is written is not kept.
    mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in _SHAPES}
    arrays = {name: torch.from_numpy(array) for name, array in mapped.items()}
    return Scenes(about["names"], arrays, about["count"])


def build_store(
    folder: Path, *, count: int, seed: int, nouns: Sequence[str], styles: Sequence[str]
) -> Scenes:
    """Draw ``count`` training scenes with every core, unless the folder holds just these."""
    about = {"names": list(nouns), "styles": list(styles), "seed": seed, "count": count}
    about |= {"side": SIDE, "vertices": VERTICES, "starts": STARTS}
    told = folder / "store.json"
    if not (told.exists() and json.loads(told.read_text()) == about):
        folder.mkdir(parents=True, exist_ok=True)
        told.unlink(missing_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape))
            for name, (shape, dtype) in _SHAPES.items()
        }
        with multiprocessing.get_context("spawn").Pool(initializer=_beside) as pool:
            done = 0
            for start, part in pool.imap_unordered(_drawn, _jobs(count, seed, nouns, styles)):
                size = len(part["images"])
                for name, array in arrays.items():
                    array[start : start + size] = part[name]
                done += size
                if done % 10_000 == 0:
                    print(f"scenes drawn: {done} of {count}", flush=True)
        told.write_text(json.dumps(about))
    return open_store(folder)


def grow_pool(
    device: torch.device,
    *,
    count: int,
    first: int,
    workers: int,
    seed: int,
    nouns: Sequence[str],
    styles: Sequence[str],
) -> Scenes:
    """Room for ``count`` scenes in the device's memory, which processes fill; given when the
    ``first`` of them are there."""
    arrays = {
        name: torch.from_numpy(np.zeros(1, dtype)).to(device).new_zeros((count, *shape))
        for name, (shape, dtype) in _SHAPES.items()
    }
    pool = Scenes(nouns, arrays, 0)

    def fill() -> None:
        # On a stream of its own: training then does not wait for what is copied.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with (
            multiprocessing.get_context("spawn").Pool(workers, _beside) as processes,
            torch.cuda.stream(stream),
        ):
            for _, part in processes.imap_unordered(_drawn, _jobs(count, seed, nouns, styles)):
                size = len(part["images"])
                for name, array in arrays.items():
                    array[pool.ready : pool.ready + size].copy_(torch.from_numpy(part[name]))
                # What is ready is read: a stretch is, once all of it has been copied.
                if stream is not None:
                    stream.synchronize()
                pool.ready += size

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    while pool.ready < min(first, count):
        if not filler.is_alive():
            raise RuntimeError("no scenes could be drawn; the error is above")
        time.sleep(0.1)
    return pool


def _jobs(count: int, seed: int, nouns: Sequence[str], styles: Sequence[str]) -> Iterator[Job]:
    for start in range(0, count, _CHUNK):
        yield seed, tuple(nouns), tuple(styles), start, min(start + _CHUNK, count)


def _beside() -> None:
    """A process that draws has one thread, and gives way to the one that trains."""
    cv2.setNumThreads(1)
    os.nice(5)


def _drawn(job: Job) -> tuple[int, dict[str, np.ndarray]]:
    """One stretch of scenes. Scenes without a named object give way to others."""
    seed, nouns, styles, start, stop = job
    count = stop - start
    arrays = {n: np.zeros((count, *shape), dtype) for n, (shape, dtype) in _SHAPES.items()}
    arrays["nouns"][:] = -1
    # A stretch draws from numbers of its own, so the scenes do not depend on who drew what.
    generator = SceneGenerator("train", seed, styles=styles, nouns=nouns)
    index = {noun: number for number, noun in enumerate(nouns)}
    rng = np.random.default_rng((seed, start))
    number = start * 2
    for row in range(count):
        scene = generator.scene(number)
        number += 1
        while not scene.objects and number < stop * 2:
            scene = generator.scene(number)
            number += 1
        arrays["images"][row] = scene.image
        for slot, found in enumerate(scene.objects[:OBJECTS]):
            side = SIDE // GRID
            cells = found.mask.reshape(GRID, side, GRID, side).mean((1, 3))
            around = contour(found.mask)
            low, high = around.min(0) / SIDE, around.max(0) / SIDE
            rows, columns = np.nonzero(found.mask)
            pick = rng.integers(len(rows), size=POINTS)
            arrays["nouns"][row, slot] = index[found.noun]
            arrays["shares"][row, slot] = np.rint(cells.ravel() * 255)
            arrays["boxes"][row, slot] = [*((low + high) / 2), *(high - low)]
            arrays["outlines"][row, slot] = outline_along(around, VERTICES, STARTS) / SIDE
            arrays["points"][row, slot] = (np.stack([columns, rows], 1)[pick] + 0.5) / SIDE
    return start, arrays
