"""Refiners on photographs with outlines drawn by people: one table, and pictures of both ends.

    python benchmarks/photographs.py BSDS500/data --split val --out photographs.json \\
        --pictures photographs.png

The folder is laid out like BSDS500's: ``images/<split>/*.jpg`` and ``groundTruth/<split>/*.mat``.
An object is a region of the annotator of middling detail that covers 2 to 40 % of the photograph,
lies off its border and is of one piece; the coarse mask is its outline resampled to 32 vertices
and jittered by 1.2 % of its size, as a model that spells paths would give it. Boundary IoU:
Cheng et al., "Boundary IoU", CVPR 2021, bands of 2 % of the diagonal. Beside the refiners that
ship: GrabCut as it comes and held to a band, closed-form matting in the band. Everything runs on
one thread; the CPU time tells more than the wall clock on a busy machine. Needs scipy.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from kestrel.config import RefinerConfig
from kestrel.seg_refiner import BACKENDS
from kestrel.seg_refiner.box import boundary_iou, grown_box, mask_box, mask_iou

VERTICES, JITTER = 32, 0.012
BAND = 0.06
"""Half width of the band in which GrabCut and matting decide, fraction of the object's size."""
MATTING_SIDE = 160
"""Longest side at which the matting system is solved, px."""
CELL = 240
"""Side of a picture in the sheet, px."""

Refine = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Case:
    name: str
    image: np.ndarray
    truth: np.ndarray
    coarse: np.ndarray


@dataclass
class Scores:
    iou: list[float] = field(default_factory=list)
    boundary_iou: list[float] = field(default_factory=list)
    gain: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, case: Case, refined: np.ndarray, wall: float, cpu: float) -> None:
        self.iou.append(mask_iou(refined, case.truth))
        self.boundary_iou.append(boundary_iou(refined, case.truth))
        self.gain.append(self.iou[-1] - mask_iou(case.coarse, case.truth))
        self.wall.append(wall)
        self.cpu.append(cpu)

    def row(self) -> dict[str, float]:
        gain = np.array(self.gain)
        figures = {
            "iou": np.mean(self.iou),
            "boundary_iou": np.mean(self.boundary_iou),
            "worse_by_1pt": np.mean(gain < -0.01),
            "better_by_1pt": np.mean(gain > 0.01),
            "median_ms": np.median(self.wall) * 1e3,
            "median_cpu_ms": np.median(self.cpu) * 1e3,
        }
        return {name: round(float(value), 4) for name, value in figures.items()}


def cases(folder: Path, split: str, perfect: bool) -> Iterator[Case]:
    """One object of each photograph that has one; the same for every run."""
    from scipy.io import loadmat

    picks, noise = np.random.default_rng(0), np.random.default_rng(1)
    for file in sorted((folder / "images" / split).glob("*.jpg")):
        annotated = loadmat(folder / "groundTruth" / split / f"{file.stem}.mat")["groundTruth"][0]
        drawn = sorted((a["Segmentation"][0, 0] for a in annotated), key=lambda s: s.max())
        regions = drawn[len(drawn) // 2]
        found = [
            mask
            for number in range(1, int(regions.max()) + 1)
            if _is_object(mask := (regions == number).astype(np.uint8, order="C"))
        ]
        if not found:
            continue
        truth = found[0] if len(found) == 1 else found[int(picks.integers(len(found)))]
        read = cv2.imread(str(file))
        assert read is not None, f"{file} is no picture"
        image = cv2.cvtColor(read, cv2.COLOR_BGR2RGB)
        yield Case(file.stem, image, truth, truth.copy() if perfect else coarsened(truth, noise))


def _is_object(mask: np.ndarray) -> bool:
    rim = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    if rim or not 0.02 < mask.mean() < 0.4:
        return False
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    return bool(stats[1:, cv2.CC_STAT_AREA].max() >= 0.9 * mask.sum())


def coarsened(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vertices at even steps of the longest outline, each and all together moved at random."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(outlines, key=cv2.contourArea)[:, 0].astype(float) + 0.5
    closed = np.r_[line, line[:1]]
    length = np.r_[0, np.cumsum(np.hypot(*np.diff(closed, axis=0).T))]
    at = np.linspace(0, length[-1], VERTICES, endpoint=False)
    points = np.stack([np.interp(at, length, closed[:, axis]) for axis in (0, 1)], 1)
    spread = np.ptp(line, axis=0).max() * JITTER
    points += spread * rng.standard_normal(points.shape) + spread * rng.standard_normal(2)
    vertices = np.round((points - 0.5) * 16).astype(np.int32)
    return cv2.fillPoly(np.zeros_like(mask), [vertices], 1, shift=4)


def _trimap(coarse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks of what is sure to be inside and outside."""
    reach = BAND * float(np.sqrt(coarse.sum()))
    depth = cv2.distanceTransform(coarse, cv2.DIST_L2, 5)
    inside = depth > min(reach, 0.6 * float(depth.max()))
    return inside, cv2.distanceTransform(1 - coarse, cv2.DIST_L2, 5) > reach


def _grown(mask: np.ndarray, *by: float) -> tuple[int, int, int, int]:
    """The box that a refiner looks at for a mask uint8 [H, W] that is not empty."""
    box = mask_box(mask)
    assert box is not None
    return grown_box(box, mask.shape[1], mask.shape[0], *by)


def grabcut(image: np.ndarray, coarse: np.ndarray, held: bool) -> np.ndarray:
    """Rother et al. 2004 as OpenCV has it; ``held`` to the band around the coarse outline."""
    x0, y0, x1, y1 = _grown(coarse)
    crop, mask = np.ascontiguousarray(image[y0:y1, x0:x1]), coarse[y0:y1, x0:x1]
    labels = np.where(mask > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    if held:
        inside, outside = _trimap(np.ascontiguousarray(mask))
        labels[inside], labels[outside] = cv2.GC_FGD, cv2.GC_BGD
    refined = coarse.copy()
    try:
        cv2.grabCut(crop, labels, (0, 0, 0, 0), np.empty(0), np.empty(0), 3, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # no pixel left for one of its colour models
        return refined
    refined[y0:y1, x0:x1] = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return refined


def matting(image: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Closed-form matting in the band (Levin, Lischinski, Weiss, TPAMI 2008), cut at a half."""
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import spsolve

    x0, y0, x1, y1 = _grown(coarse)
    crop, mask = image[y0:y1, x0:x1], coarse[y0:y1, x0:x1]
    scale = min(1.0, MATTING_SIDE / max(mask.shape))
    size = (max(3, round(mask.shape[1] * scale)), max(3, round(mask.shape[0] * scale)))
    small = cv2.resize(np.ascontiguousarray(crop), size, interpolation=cv2.INTER_AREA) / 255.0
    small_mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.5
    inside, outside = _trimap(small_mask.astype(np.uint8))
    height, width = small_mask.shape
    index = np.arange(height * width).reshape(height, width)
    windows = np.lib.stride_tricks.sliding_window_view(index, (3, 3)).reshape(-1, 9)
    unknown = ~(inside | outside).ravel()
    windows = windows[unknown[windows].any(1)]
    colours = small.reshape(-1, 3)[windows]
    centred = colours - colours.mean(1, keepdims=True)
    covariance = np.einsum("nik,nil->nkl", centred, centred) / 9 + 1e-5 / 9 * np.eye(3)
    affinity = np.einsum("nik,nkl,njl->nij", centred, np.linalg.inv(covariance), centred)
    values = np.eye(9) - (1 + affinity) / 9
    rows, columns = np.repeat(windows, 9, 1).ravel(), np.tile(windows, 9).ravel()
    laplacian = coo_matrix((values.ravel(), (rows, columns)), shape=(index.size,) * 2).tocsr()
    sure = 100.0 * ~unknown
    alpha = spsolve((laplacian + diags(sure + 1e-9)).tocsc(), sure * inside.ravel())
    alpha = alpha.reshape(height, width).astype(np.float32)
    refined = coarse.copy()
    fine = cv2.resize(alpha, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
    refined[y0:y1, x0:x1] = fine > 0.5
    return refined


def refiners() -> dict[str, Refine]:
    config = RefinerConfig()
    return {
        "none": BACKENDS["none"](config),
        "grabcut": functools.partial(grabcut, held=False),
        "grabcut, held": functools.partial(grabcut, held=True),
        "matting": matting,
        "guided": BACKENDS["guided"](config),
        "boundary": BACKENDS["boundary"](config),
    }


def drawn(case: Case, refined: np.ndarray, note: str) -> np.ndarray:
    """The crop, with coarse (yellow) and true (green) outline, and with ours (red) and true."""
    x0, y0, x1, y1 = _grown(case.truth | case.coarse, 0.15)
    scale = CELL / max(x1 - x0, y1 - y0)
    cells = []
    for outlines in ((), ((case.coarse, (255, 220, 0)),), ((refined, (255, 0, 0)),)):
        cell = np.zeros((CELL, CELL, 3), np.uint8)
        crop = np.ascontiguousarray(case.image[y0:y1, x0:x1])
        crop = cv2.resize(crop, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for mask, colour in (*outlines, *(((case.truth, (0, 255, 0)),) if outlines else ())):
            large = cv2.resize(
                np.ascontiguousarray(mask[y0:y1, x0:x1]),
                crop.shape[1::-1],
                interpolation=cv2.INTER_NEAREST,
            )
            lines, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(crop, lines, -1, colour, 1)
        cell[: crop.shape[0], : crop.shape[1]] = crop[:CELL, :CELL]
        cells.append(cell)
    row = np.hstack(cells)
    cv2.putText(row, note, (4, CELL - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1)
    return row


def sheet(rows: list[tuple[float, np.ndarray]], file: Path, each: int = 9) -> None:
    """The largest losses, then the largest wins."""
    rows = sorted(rows, key=lambda row: row[0])
    cells = [cell for _, cell in rows[:each] + rows[-each:][::-1]]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % 3)
    lines = [np.hstack(cells[i : i + 3]) for i in range(0, len(cells), 3)]
    cv2.imwrite(str(file), cv2.cvtColor(np.vstack(lines), cv2.COLOR_RGB2BGR))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--perfect", action="store_true", help="the true mask as the coarse one")
    parser.add_argument("--only", nargs="+", help="refiners to run; all by default")
    parser.add_argument("--limit", type=int, help="so many objects")
    parser.add_argument("--out", type=Path, help="JSON of the table")
    parser.add_argument("--pictures", type=Path, help="PNG of the last refiner's wins and losses")
    args = parser.parse_args()
    if find_spec("scipy") is None:
        parser.error("scipy is missing: pip install scipy")
    cv2.setNumThreads(1)
    every = refiners()
    if unknown := [name for name in args.only or () if name not in every]:
        parser.error(f"no refiner {unknown[0]!r} (choose from {', '.join(map(repr, every))})")
    chosen = {n: r for n, r in every.items() if not args.only or n in args.only}
    scores = {name: Scores() for name in chosen}
    pictures: list[tuple[float, np.ndarray]] = []
    for number, case in enumerate(cases(args.folder, args.split, args.perfect)):
        if args.limit is not None and number >= args.limit:
            break
        for name, refine in chosen.items():
            coarse = case.coarse.copy()
            wall, cpu = time.perf_counter(), time.process_time()
            refined = refine(case.image, coarse)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            scores[name].add(case, refined, wall, cpu)
        gain = scores[name].gain[-1]
        if args.pictures:
            note = (
                f"{case.name} IoU {scores[name].iou[-1] - gain:.3f} to {scores[name].iou[-1]:.3f}"
            )
            pictures.append((gain, drawn(case, refined, note)))
    table = {name: score.row() for name, score in scores.items()}
    if not pictures and not any(score.iou for score in scores.values()):
        print(f"no object in {args.folder}", file=sys.stderr)
        return 1
    print(f"{'':14} {'IoU':>7} {'boundary':>9} {'worse':>7} {'better':>7} {'ms':>7} {'CPU ms':>7}")
    for name, row in table.items():
        print(
            f"{name:14} {row['iou']:7.4f} {row['boundary_iou']:9.4f} {row['worse_by_1pt']:7.1%} "
            f"{row['better_by_1pt']:7.1%} {row['median_ms']:7.1f} "
            f"{row['median_cpu_ms']:7.1f}"
        )
    if args.pictures:
        sheet(pictures, args.pictures)
    if args.out:
        objects = len(next(iter(scores.values())).iou)
        ran = {"split": args.split, "objects": objects, "machine": platform.machine()}
        args.out.write_text(json.dumps({**ran, "refiners": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
