"""What decoding a JPEG smaller saves a refinement, and by how much it moves the mask.

    python benchmarks/reduced.py --photographs FOLDER --out reduced.json

Every scene is refined twice from the same bytes: from all of its pixels, and as
``SegmentRefiner.refine_encoded`` does it. Scenes are generated; with a folder of photographs (a
megapixel and more, not enlarged, or there is no detail to lose) also pieces of one photograph
pasted over others. The model's outline is the true one with its vertices moved by 1.2 % of its
size. What differs is counted per pixel of the picture and per pixel of the object; beside it what
differs when the same pixels come from a JPEG of quality ``AGAIN``, and both masks' IoU with the
true one. Times are CPU
milliseconds of whole requests with both masks, medians of ``--rounds`` taken in turn. Exits 1 where
more of a picture differs than ``MOST_DIFFERING``.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from refiner_cases import Bbox, Case, make_case, photo

from kestrel.config import RefinerConfig
from kestrel.image import decode, probe
from kestrel.seg_refiner import SegmentRefineBitmapsResult, SegmentRefiner, boundary, guided
from kestrel.seg_refiner.box import grown_box, mask_box, mask_iou
from kestrel.seg_refiner.raster import rasterize_relative
from kestrel.svg import parse_path

SIZES = ((1546, 1213), (4032, 3024))
COVERS = (0.003, 0.03, 0.17, 0.6)
VERTICES = (8, 32, 200)
JITTER = 0.012
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp")
REFINERS = ("boundary", "guided", "none")
MOST_DIFFERING = 0.002
"""Pixels of a picture's mask that may differ, per pixel of the picture."""
QUALITY, AGAIN = 90, 85


@dataclass(frozen=True)
class Scene:
    """A JPEG, the object in it, and its outline as a model would give it."""

    name: str
    content: bytes
    truth: Case
    path: str
    bbox: Bbox


def jittered(case: Case, rng: np.random.Generator) -> tuple[str, Bbox]:
    """The case's outline with each vertex, and all together, moved at random."""
    low = np.array([case.bbox["x_min"], case.bbox["y_min"]])
    side = np.array([case.bbox["x_max"], case.bbox["y_max"]]) - low
    move = JITTER * rng.standard_normal(2)
    rings = [
        np.array([p.split() for p in ring.strip("MZ").split("L")], float)
        for ring in case.path.split("Z")[:-1]
    ]
    rings = [np.clip(low + (r + move + JITTER * rng.standard_normal(r.shape)) * side, 0, 1)
             for r in rings]  # fmt: skip
    first, last = np.vstack(rings).min(0), np.vstack(rings).max(0)
    path = "".join(
        "M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in (r - first) / (last - first)) + "Z"
        for r in rings
    )
    assert not parse_path(path).is_empty
    return path, dict(zip(("x_min", "y_min", "x_max", "y_max"), (*first, *last), strict=True))


def generated(sizes: list[tuple[int, int]]) -> Iterator[Scene]:
    for size in sizes:
        for vertices in VERTICES:
            for cover in COVERS:
                case = make_case(size, vertices, cover)
                rng = np.random.default_rng(vertices)
                name = f"generated {size[0]}x{size[1]} {vertices} {cover}"
                yield Scene(name, photo(case), case, *jittered(case, rng))


def filled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at its own resolution, mirrored until it fills a width and height."""
    while picture.shape[1] < size[0]:
        picture = np.hstack([picture, picture[:, ::-1]])
    while picture.shape[0] < size[1]:
        picture = np.vstack([picture, picture[::-1]])
    return picture[: size[1], : size[0]]


def pasted(folder: Path, sizes: list[tuple[int, int]]) -> Iterator[Scene]:
    """A piece of each photograph over the next one, at their own resolution."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTOGRAPHS)
    if len(files) < 2:
        sys.exit(f"{folder} holds fewer than two photographs")
    for size in sizes:
        for number, file in enumerate(files):
            rng = np.random.default_rng(number)
            cover = COVERS[number % len(COVERS)]
            case = make_case(size, VERTICES[number % len(VERTICES)], cover)
            front, ground = (
                filled(decode(f.read_bytes()), size) for f in (file, files[number - 1])
            )
            inside = rasterize_relative(case.path, case.bbox, *size).astype(np.float32)
            # As sharp as a lens makes it.
            share = cv2.GaussianBlur(inside, (0, 0), 0.8)[..., None]
            scene = np.round(share * front + (1 - share) * ground).astype(np.uint8)
            name = f"{file.stem} {size[0]}x{size[1]} {case.vertices} {cover}"
            yield Scene(name, jpeg(scene, QUALITY), case, *jittered(case, rng))


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, content = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    assert done
    return content.tobytes()


def mask_of(encoded: str | None) -> np.ndarray | None:
    if encoded is None:
        return None
    mask = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_GRAYSCALE)
    return np.asarray(mask) > 0


def compare(scene: Scene, name: str, refiner: SegmentRefiner, rounds: int) -> dict[str, Any]:
    content, given = scene.content, (scene.path, scene.bbox)

    def whole(content: bytes = content) -> SegmentRefineBitmapsResult:
        return refiner.refine_with_bitmaps(
            decode(content), *given, return_base64=True, refiner=name
        )

    def smaller() -> SegmentRefineBitmapsResult:
        return refiner.refine_encoded(content, *given, return_base64=True, refiner=name)

    ms: dict[str, list[float]] = {"whole": [], "smaller": []}
    for _ in range(rounds):
        for way, refine in (("whole", whole), ("smaller", smaller)):
            began = time.thread_time()
            refine()
            ms[way].append((time.thread_time() - began) * 1e3)
    results = whole(), smaller(), whole(jpeg(decode(content), AGAIN))
    coarse = mask_of(results[0].coarse_mask_base64)
    assert coarse is not None and len({r.coarse_mask_base64 for r in results}) == 1
    # One that is rejected leaves the coarse one.
    found = [mask_of(result.refined_mask_base64) for result in results]
    first, second, again = (coarse if mask is None else mask for mask in found)
    truth = rasterize_relative(scene.truth.path, scene.truth.bbox, *coarse.shape[::-1]) > 0
    area = max(1, int(np.count_nonzero(first)))

    def differing(mask: np.ndarray) -> int:
        return int(np.count_nonzero(first != mask))

    return {
        "scene": scene.name,
        "size": list(coarse.shape[::-1]),
        "cover": scene.truth.cover,
        "refiner": name,
        "reduction": _reduction(content, refiner, name, coarse),
        "reasons": [result.reason for result in results],
        "of_picture": differing(second) / coarse.size,
        "of_object": differing(second) / area,
        "again_of_object": differing(again) / area,
        "refined_of_object": differing(coarse) / area,
        "iou": [float(mask_iou(mask, truth)) for mask in (coarse, first, second)],
        "ms": {way: statistics.median(taken) for way, taken in ms.items()} if rounds else {},
    }


def _reduction(content: bytes, refiner: SegmentRefiner, name: str, coarse: np.ndarray) -> int:
    box = mask_box(coarse)
    assert box is not None
    x0, y0, x1, y1 = grown_box(box, coarse.shape[1], coarse.shape[0])
    backend: Any = refiner._backend(name)
    asked = backend.reduction((x1 - x0, y1 - y0), coarse.shape[::-1])
    return min(probe(content).reduction, asked)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind of scene, refiner and reduction."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kind = "generated" if row["scene"].startswith("generated") else "photographs"
        groups[kind, row["refiner"], row["reduction"]].append(row)
    lines = []
    for (kind, refiner, reduction), group in sorted(groups.items()):
        figures: dict[str, Any] = {"count": len(group)}
        for key in ("of_picture", "of_object", "again_of_object", "refined_of_object"):
            values = [row[key] for row in group]
            figures[key] = [float(np.quantile(values, q)) for q in (0.5, 0.95, 1)]
        figures["iou"] = np.mean([row["iou"] for row in group], axis=0).tolist()
        figures["other_reason"] = sum(row["reasons"][0] != row["reasons"][1] for row in group)
        figures["ms"] = {
            way: statistics.median(row["ms"][way] for row in group) for way in group[0]["ms"]
        }
        lines.append({"scenes": kind, "refiner": refiner, "reduction": reduction, **figures})
    return lines


def show(line: dict[str, Any]) -> None:
    def shares(key: str) -> str:
        return "".join(f"{value:8.3%}" for value in line[key])

    print(
        f"{line['scenes']:>11}{line['refiner']:>9} 1/{line['reduction']}{line['count']:4d}"
        f" |{shares('of_picture')} |{shares('of_object')} |{shares('again_of_object')} |"
        f"{line['refined_of_object'][0]:7.2%} |"
        + "".join(f"{value:8.4f}" for value in line["iou"])
        + f" |{line['other_reason']:3d} |"
        + "".join(f"{ms:7.1f}" for ms in line["ms"].values())
    )


def show_times(rows: list[dict[str, Any]]) -> None:
    """Milliseconds of generated scenes by size, cover and refiner, medians over outlines."""
    groups: dict[tuple[int, int, float, str], list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        if row["scene"].startswith("generated") and row["ms"]:
            groups[(*row["size"], row["cover"], row["refiner"])].append(row["ms"])
    for (width, height, cover, refiner), group in groups.items():
        medians = (statistics.median(ms[way] for ms in group) for way in group[0])
        times = "".join(f"{ms:7.1f}" for ms in medians)
        print(f"{width}x{height}{cover:7.1%} covered{refiner:>9}, ms whole, smaller:{times}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, help="folder of large pictures")
    parser.add_argument("--sizes", nargs="+", default=[f"{w}x{h}" for w, h in SIZES])
    parser.add_argument("--refiners", nargs="+", default=list(REFINERS), choices=REFINERS)
    parser.add_argument("--rounds", type=int, default=3, help="timed requests each; 0: none")
    parser.add_argument(
        "--least-side", type=int, help="pixels that a box keeps in a row: another rule"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    if args.least_side is not None:
        boundary.LEAST_SIDE = guided.LEAST_SIDE = args.least_side
    pairs = [tuple(map(int, size.split("x"))) for size in args.sizes]
    sizes = [(width, height) for width, height in pairs]
    refiner = SegmentRefiner(RefinerConfig(selectable=tuple(args.refiners)))
    rows = []
    scenes = [generated(sizes)] + ([pasted(args.photographs, sizes)] if args.photographs else [])
    for each in scenes:
        for scene in each:
            for name in args.refiners:
                rows.append(compare(scene, name, refiner, args.rounds))
                if rows[-1]["of_picture"] > MOST_DIFFERING:
                    print(json.dumps(rows[-1]), flush=True)
    lines = summary(rows)
    print(
        "scenes, refiner, sides, number | differing (median, 95 %, most) of the picture | of the "
        f"object | of the object with quality {AGAIN} | refiner's own | IoU coarse, whole, smaller "
        "| other outcome | ms whole, smaller"
    )
    for line in lines:
        show(line)
    show_times(rows)
    if args.out:
        args.out.write_text(
            json.dumps({"least_side": args.least_side, "rows": rows, "summary": lines})
        )
    return int(any(line["of_picture"][-1] > MOST_DIFFERING for line in lines))


if __name__ == "__main__":
    sys.exit(main())
