"""The CPU half against the public engine's way: stage by stage, whole requests, a fresh process.

    apt-get install libagg-dev libpotrace-dev g++ pkg-config
    pip install --no-deps --target /tmp/pypotrace pypotrace
    python benchmarks/refiner.py --pypotrace /tmp/pypotrace --out refiner.json

The public way traces with ``pypotrace``, which has to be built. It goes into a folder of its own:
installed, it would hide ``potracer``, which is no fair baseline (a hundred times slower).

Both run in one process on one thread, case by case in turn. Times are CPU time of that thread, so
that what else the machine does is not counted; each figure is a median. Every case is checked:
coarse masks against resvg's, traced paths against the public tracer's, and the paths of both
against the mask that they trace. Exits 1 when a check fails or a figure is missed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from refiner_cases import Bbox, Case, make_case, photo, tiled_photo, torn

from kestrel.config import RefinerConfig
from kestrel.seg_refiner import SegmentRefiner, bitmap_to_path
from kestrel.seg_refiner.box import mask_iou
from kestrel.seg_refiner.clean import clean_mask
from kestrel.seg_refiner.png import _encode_mask_png_base64
from kestrel.seg_refiner.raster import rasterize_relative
from kestrel.seg_refiner.tracers import load_tracer

SIZES = ((640, 480), (1546, 1213), (4032, 3024))
VERTICES = (8, 32, 200)
COVERS = (0.01, 0.17, 0.6)
STAGES = ("rasterise", "clean", "trace", "encode", "whole")
WANTED_RATIO = {(1546, 1213): 50, (4032, 3024): 100}
"""How many times faster than the public way the whole is to be, by size: median over its cases."""
WANTED_MS = {"boundary": 60, "guided": 60, "none": 25}
"""Milliseconds that a request with both masks may take at 1546x1213, by refiner."""
MASKS_COST_MS = 4
FIRST_RESULT_S = 1.0
RESIDENT_MB = {"boundary": 400, "guided": 200}
LARGEST = (10_000, 10_000)
"""The largest image that the default limits let in."""
LARGEST_MB = 2000
MAX_DISAGREEMENT = 0.001
"""Pixels of the coarse mask that may differ from resvg's, per pixel of the object."""
MIN_TRACE_IOU = 0.995

# --- the two pipelines, by the same four stages ------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """Functions of the stages; masks are uint8 [H, W], 0/1."""

    rasterise: Callable[[str, Bbox, int, int], np.ndarray]
    clean: Callable[[np.ndarray, np.ndarray], np.ndarray]
    trace: Callable[[np.ndarray], tuple[str, Bbox] | None]
    encode: Callable[[np.ndarray], str]


@dataclass
class Run:
    """Outputs of one pass and its milliseconds by stage."""

    coarse: np.ndarray
    clean: np.ndarray
    traced: tuple[str, Bbox] | None
    ms: dict[str, float]


def run(pipeline: Pipeline, case: Case) -> Run:
    ms: dict[str, float] = {}

    def timed(stage: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.thread_time()
        made = function(*args)
        ms[stage] = ms.get(stage, 0.0) + (time.thread_time() - began) * 1e3
        return made

    size = (case.width, case.height)
    coarse = timed("rasterise", pipeline.rasterise, case.path, case.bbox, *size)
    refined = torn(coarse, case.vertices)
    cleaned = timed("clean", pipeline.clean, refined, coarse)
    traced = timed("trace", pipeline.trace, cleaned)
    for mask in (coarse, cleaned):
        timed("encode", pipeline.encode, mask)
    ms["whole"] = sum(ms.values())
    return Run(coarse, cleaned, traced, ms)


OURS = Pipeline(rasterize_relative, clean_mask, bitmap_to_path, _encode_mask_png_base64)


def public_pipeline() -> Pipeline:
    import public_refiner as public

    return Pipeline(
        public.rasterize, lambda mask, _coarse: public.clean(mask), public.trace, public.encode
    )


def compare(case: Case, public: Pipeline, rounds: int) -> dict[str, Any]:
    """Median milliseconds and ratios of both, and how far their outputs agree."""
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(run(public, case))
        ours += [run(OURS, case) for _ in range(5)]
    row: dict[str, Any] = {
        "size": [case.width, case.height],
        "vertices": case.vertices,
        "cover": case.cover,
        "public_ms": {s: statistics.median(r.ms[s] for r in theirs) for s in STAGES},
        "ours_ms": {s: statistics.median(r.ms[s] for r in ours) for s in STAGES},
    }
    row["ratio"] = {s: row["public_ms"][s] / row["ours_ms"][s] for s in STAGES}
    return row | agreement(case, public, theirs[0], ours[0])


def agreement(case: Case, public: Pipeline, theirs: Run, ours: Run) -> dict[str, Any]:
    differing = int(np.count_nonzero(theirs.coarse != ours.coarse))
    # Both trace the same mask: ours keeps small holes that the path drew, the public way does not.
    reference = public.trace(ours.clean)
    assert reference is not None and ours.traced is not None
    again = [rasterize_relative(*t, case.width, case.height) for t in (reference, ours.traced)]
    return {
        "coarse_pixels": int(np.count_nonzero(theirs.coarse)),
        "coarse_differing": differing,
        "coarse_disagreement": differing / np.count_nonzero(theirs.coarse),
        "trace_iou": mask_iou(*again),
        "public_iou_with_mask": mask_iou(again[0], ours.clean),
        "ours_iou_with_mask": mask_iou(again[1], ours.clean),
        "path_bytes": {"public": len(reference[0]), "ours": len(ours.traced[0])},
    }


# --- whole requests ----------------------------------------------------------------------------


def requests(size: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """JPEG bytes in; path, and masks when asked for, out: both refiners in turn."""
    case = make_case(size, 32, 0.17)
    image = photo(case)
    refiners = {name: SegmentRefiner(RefinerConfig(refiner=name)) for name in WANTED_MS}
    times: dict[tuple[str, bool], list[float]] = {
        (name, masks): [] for name in refiners for masks in (False, True)
    }
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in refiners}
    for _ in range(rounds):
        for (name, masks), seen in times.items():
            began = time.thread_time()
            result = refiners[name].refine_encoded(image, case.path, case.bbox, return_base64=masks)
            seen.append((time.thread_time() - began) * 1e3)
            assert result.reason == "refined", result.reason
            if masks:
                stages[name].append(result.timings_ms)
    return [
        {
            "size": list(size),
            "refiner": name,
            "jpeg_bytes": len(image),
            "path_ms": statistics.median(times[name, False]),
            "path_and_masks_ms": statistics.median(times[name, True]),
            # In pairs: what a slow moment adds, it adds to both.
            "masks_cost_ms": statistics.median(
                b - a for a, b in zip(times[name, False], times[name, True], strict=True)
            ),
            "stages_wall_ms": {
                s: statistics.median(t[s] for t in stages[name]) for s in stages[name][0]
            },
        }
        for name in refiners
    ]


# --- a fresh process ---------------------------------------------------------------------------

FRESH = """
import json, sys, time
name, image, path, bbox = json.load(open(sys.argv[1]))
import base64
began = time.perf_counter(), time.process_time()
import cv2
cv2.setNumThreads(1)
from kestrel.config import RefinerConfig
from kestrel.seg_refiner import SegmentRefiner
refiner = SegmentRefiner(RefinerConfig(refiner=name, selectable=()))
result = refiner.refine_encoded(base64.b64decode(image), path, bbox, return_base64=True)
done = time.perf_counter(), time.process_time()
assert result.reason == "refined", result.reason
assert "torch" not in sys.modules
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "first_result_s": done[0] - began[0],
    "first_result_cpu_s": done[1] - began[1],
    "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
    "peak_mb": int(status["VmHWM"].split()[0]) / 1024,
}))
"""


def fresh_process(
    refiner: str,
    size: tuple[int, int],
    rounds: int,
    cover: float = 0.17,
    picture: Callable[[Case], bytes] = photo,
) -> dict[str, Any]:
    """Seconds from import to the first result, and MiB, of a process that only refines."""
    case = make_case(size, 32, cover)
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "request.json")
        image = base64.b64encode(picture(case)).decode()
        asked.write_text(json.dumps([refiner, image, case.path, case.bbox]))
        for _ in range(rounds):
            said = subprocess.run(
                [sys.executable, "-c", FRESH, str(asked)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            runs.append(json.loads(said))
    return {"size": list(size)} | {
        key: statistics.median(run[key] for run in runs) for key in runs[0]
    }


# --- report ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else "unknown", "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("numpy", "opencv-python-headless", "pillow", "resvg", "skia-python", "pypotrace"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def show_head() -> None:
    stages = "".join(f"{stage:>24}" for stage in STAGES)
    cells = f"{'public':>9}{'ours':>8}{'ratio':>7}" * len(STAGES)
    agreement = f"{'coarse':>9}{'traces':>8}{'public':>8}{'ours':>8}"
    print(f"CPU ms\n{'':21}{stages}{'differ':>9}{'IoU':>8}{'IoU with mask':>16}")
    print(f"{'size':>10}{'vert':>5}{'cover':>6}{cells}{agreement}", flush=True)


def show_case(row: dict[str, Any]) -> None:
    where = f"{row['size'][0]}x{row['size'][1]}"
    cells = "".join(
        f"{row['public_ms'][s]:9.1f}{row['ours_ms'][s]:8.2f}{row['ratio'][s]:6.0f}x" for s in STAGES
    )
    print(
        f"{where:>10}{row['vertices']:5d}{row['cover']:6.0%}{cells}"
        f"{row['coarse_disagreement']:9.3%}{row['trace_iou']:8.4f}"
        f"{row['public_iou_with_mask']:8.4f}{row['ours_iou_with_mask']:8.4f}",
        flush=True,
    )


def show_request(row: dict[str, Any]) -> None:
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_wall_ms"].items())
    print(
        f"{row['size'][0]}x{row['size'][1]} {row['refiner']:>7}: {row['path_ms']:.1f} ms, with "
        f"masks {row['path_and_masks_ms']:.1f} ({row['masks_cost_ms']:+.1f}); wall: {stages}",
        flush=True,
    )


def whole_ratios(cases: list[dict[str, Any]], size: tuple[int, int]) -> list[float]:
    return [row["ratio"]["whole"] for row in cases if tuple(row["size"]) == size]


def wrong_outputs(cases: list[dict[str, Any]]) -> Iterator[str]:
    for row in cases:
        name = f"{row['size']}, {row['vertices']} vertices, {row['cover']:.0%}"
        if row["coarse_disagreement"] > MAX_DISAGREEMENT:
            yield f"{name}: {row['coarse_differing']} pixels of the coarse mask differ"
        # Potrace rounds the corners of small objects; ours keeps them where that costs too much,
        # and may then differ by being nearer to the mask.
        nearer = row["ours_iou_with_mask"] > row["public_iou_with_mask"] > MIN_TRACE_IOU - 0.03
        if row["trace_iou"] < MIN_TRACE_IOU and not nearer:
            yield f"{name}: IoU of the traces is {row['trace_iou']:.4f}"


def missed_figures(report: dict[str, Any]) -> Iterator[str]:
    for size, wanted in WANTED_RATIO.items():
        ratios = whole_ratios(report["cases"], size)
        if ratios and statistics.median(ratios) < wanted:
            yield f"{size}: {statistics.median(ratios):.0f}x, not {wanted}x"
    for row in report["requests"]:
        if row["size"] != [1546, 1213]:
            continue
        if row["path_and_masks_ms"] > WANTED_MS[row["refiner"]]:
            yield f"a request ({row['refiner']}) takes {row['path_and_masks_ms']:.0f} ms"
        if row["masks_cost_ms"] > MASKS_COST_MS:
            yield f"masks ({row['refiner']}) cost {row['masks_cost_ms']:.1f} ms"
    for name, fresh in report["fresh_process"].items():
        if fresh["first_result_cpu_s"] > FIRST_RESULT_S:
            yield f"the first result ({name}) takes {fresh['first_result_cpu_s']:.2f} s"
        if fresh["resident_mb"] > RESIDENT_MB[name]:
            yield f"a refiner process ({name}) holds {fresh['resident_mb']:.0f} MB"
    if report["largest"]["peak_mb"] > LARGEST_MB:
        yield f"an image of {LARGEST} takes {report['largest']['peak_mb']:.0f} MB"


def measured(sizes: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    public = public_pipeline()
    cases = []
    show_head()
    for size in sizes:
        for vertices in VERTICES:
            for cover in COVERS:
                cases.append(compare(make_case(size, vertices, cover), public, rounds))
                show_case(cases[-1])
    for size in sizes:
        ratios = whole_ratios(cases, size)
        print(f"{size[0]}x{size[1]}: {min(ratios):.0f}x to {max(ratios):.0f}x, ", end="")
        print(f"median {statistics.median(ratios):.0f}x")
    asked = [row for size in sizes for row in requests(size, 5 * rounds)]
    for row in asked:
        show_request(row)
    fresh = {name: fresh_process(name, (1546, 1213), rounds) for name in RESIDENT_MB}
    largest = fresh_process("boundary", LARGEST, 1, 0.6, tiled_photo)
    for name, one in fresh.items():
        print(
            f"fresh process ({name}): first result after {one['first_result_s']:.2f} s "
            f"({one['first_result_cpu_s']:.2f} s CPU), {one['resident_mb']:.0f} MB resident, "
            f"{one['peak_mb']:.0f} MB at most"
        )
    print(
        f"{LARGEST[0]}x{LARGEST[1]}: {largest['first_result_cpu_s']:.1f} s CPU, "
        f"{largest['peak_mb']:.0f} MB at most"
    )
    return {
        "machine": machine(),
        "versions": versions(),
        "cases": cases,
        "requests": asked,
        "fresh_process": fresh,
        "largest": largest,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="passes of each case")
    parser.add_argument("--sizes", nargs="+", default=[f"{w}x{h}" for w, h in SIZES])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--pypotrace", help="folder that pypotrace was installed into")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    load_tracer()
    # After ours is loaded: both packages install a module named potrace.
    if args.pypotrace:
        sys.path.insert(0, args.pypotrace)
    from public_refiner import TRACER

    if TRACER != "pypotrace":
        parser.error("the public way needs pypotrace: build it as the head of this file says")
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    report = measured([(width, height) for width, height in sizes], args.rounds)
    report["failures"] = [*wrong_outputs(report["cases"]), *missed_figures(report)]
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(report["failures"]))
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
