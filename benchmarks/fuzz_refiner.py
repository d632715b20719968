"""Whole refine calls on generated paths, boxes and images: a result or a ValueError, nothing else.

    python benchmarks/fuzz_refiner.py --cases 100000 --out fuzz.json

Cases run in child processes, so that one that crashes or hangs costs its batch and is named; each
is made from its number alone and can be run again with ``--first N --cases 1``. Prints outcomes,
the slowest cases and the most memory of a child; exits 1 for anything that is no result.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kestrel.config import RefinerConfig
from kestrel.seg_refiner import REASONS, SegmentRefiner
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.svg import parse_path

BATCH = 2000
"""Cases of one child process."""
BATCH_TIMEOUT_S = 1800
CASE_S = 10.0
"""CPU seconds that one case may take."""
SLOWEST = 5
REFINERS = ("boundary", "guided", "none")
SHARES = (0.4, 0.3, 0.3)
"""Which part of the cases asks for each; the first is the default of ``RefinerConfig``."""
LARGE = 0.02
"""Part of the arrays with sides that the refiner takes in several pieces: ``raster.TILE``,
``trace.HALVED_FROM``."""

Rng = np.random.Generator


@dataclass
class Case:
    """Arguments of one call; ``image`` is an array, encoded bytes, or something else altogether."""

    number: int
    image: Any
    path: Any
    bbox: Any
    masks: bool
    refiner: str


def make_case(number: int) -> Case:
    rng = np.random.default_rng(number)
    return Case(
        number,
        _image(rng),
        _path(rng),
        _bbox(rng),
        bool(rng.integers(2)),
        str(rng.choice(REFINERS, p=SHARES)),
    )


def _pick(rng: Rng, *makers: Callable[[Rng], Any]) -> Any:
    return makers[int(rng.integers(len(makers)))](rng)


# --- images ------------------------------------------------------------------------------------


def _size(rng: Rng) -> tuple[int, int]:
    long, short = int(2 ** rng.uniform(3, 9)), int(2 ** rng.uniform(0, 8))
    return (long, short) if rng.integers(2) else (short, long)


def _large(rng: Rng) -> tuple[int, int]:
    """Thin strips past every such side, and now and then a picture that is large both ways."""
    if rng.random() < 0.85:
        long, short = int(rng.integers(2000, 12000)), int(2 ** rng.uniform(0, 6))
    else:
        long, short = int(rng.integers(2000, 4500)), int(rng.integers(300, 2200))
    return (long, short) if rng.integers(2) else (short, long)


def _pixels(rng: Rng) -> np.ndarray:
    height, width = _large(rng) if rng.random() < LARGE else _size(rng)
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    if kind == 1:
        image[:: int(rng.integers(1, 5))] = rng.integers(0, 256, 3)
    if kind == 2:
        image[:, : width // 2] = rng.integers(0, 256, 3)
    return image


def _encoded(rng: Rng) -> bytes:
    content = io.BytesIO()
    form = str(rng.choice(["JPEG", "PNG", "WEBP"]))
    mode = str(rng.choice(["RGB", "L"]))
    Image.fromarray(_pixels(rng)).convert(mode).save(content, form)
    return content.getvalue()


def _broken(rng: Rng) -> bytes:
    content = bytearray(_encoded(rng))
    if rng.integers(2):
        return bytes(content[: int(rng.integers(len(content)))])
    for _ in range(int(rng.integers(1, 9))):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    return bytes(content)


def _no_image(rng: Rng) -> Any:
    return _pick(
        rng,
        lambda _: None,
        lambda _: np.zeros((0, 5, 3), np.uint8),
        lambda _: np.zeros((5, 5), np.uint8),
        lambda _: np.zeros((5, 5, 4), np.uint8),
        lambda _: np.zeros((5, 5, 3), np.float32),
        lambda _: "picture",
    )


def _image(rng: Rng) -> Any:
    share = rng.random()
    if share < 0.75:
        return _pixels(rng)
    if share < 0.9:
        return _encoded(rng)
    return _broken(rng) if share < 0.97 else _no_image(rng)


# --- paths -------------------------------------------------------------------------------------

_ARITY = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}
_STRANGE = ("1e6", "-1e6", "1e7", "1e-320", "1e400", "-0", ".5.5", "nan", "inf", "", "--1", "+.1")


def _number(rng: Rng) -> str:
    share = rng.random()
    if share < 0.8:
        return f"{rng.random():.3f}"
    if share < 0.97:
        return f"{rng.normal() * 10 ** rng.uniform(-3, 5):.4g}"
    return str(rng.choice(_STRANGE))


def _grammar(rng: Rng) -> str:
    pieces = [f"M{_number(rng)} {_number(rng)}"]
    for _ in range(int(2 ** rng.uniform(0, 6))):
        name = str(rng.choice(list(_ARITY)))
        numbers = [_number(rng) for _ in range(_ARITY[name])]
        if name == "A":
            numbers[3:5] = [str(rng.integers(2)), str(rng.integers(2))]
        pieces.append((name if rng.integers(2) else name.lower()) + " ".join(numbers))
    return "".join(pieces)


def _outline(rng: Rng) -> str:
    """What a model would give: a closed polygon, some vertices of it on one spot."""
    count = int(rng.integers(3, 60))
    angle = np.sort(rng.uniform(0, 2 * np.pi, count))
    radius = rng.uniform(0, 0.5, count)
    points = 0.5 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return "M" + "L".join(f"{x:.3f} {y:.3f}" for x, y in points) + "Z"


def _to_and_fro(rng: Rng) -> str:
    """Many strokes across: what takes a tracer and a rasteriser longest."""
    count = int(2 ** rng.uniform(1, 13))
    width = rng.uniform(0, 1)
    strokes = (f"{i % 2} {i / count + width * (i % 2) / count:.5f}" for i in range(count))
    return "M" + "L".join(strokes) + str(rng.choice(["", "Z"]))


def _combs(rng: Rng) -> str:
    """Teeth or islands of about a pixel."""
    count = int(rng.integers(2, 200))
    side = rng.uniform(0.2, 1.2) / count
    spots = rng.random((count, 2))
    return "".join(f"M{x:.4f} {y:.4f}h{side:.5f}v{side:.5f}h-{side:.5f}z" for x, y in spots)


def _mutated(rng: Rng) -> str:
    text = list(_pick(rng, _grammar, _outline))
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(text)))
        text[at] = str(
            rng.choice(["", "M", "Z", "e", "-", ".", ",", " ", "\0", "é", "a", "9" * 30])
        )
    return "".join(text)


def _path(rng: Rng) -> Any:
    if rng.random() < 0.02:
        return _pick(rng, lambda _: "", lambda _: "M", lambda _: None, lambda _: "M0 0" * 9000)
    return _pick(rng, _grammar, _outline, _outline, _outline, _to_and_fro, _combs, _mutated)


# --- boxes -------------------------------------------------------------------------------------

_KEYS = ("x_min", "y_min", "x_max", "y_max")


def _bbox(rng: Rng) -> Any:
    if rng.random() < 0.75:
        low, side = rng.uniform(0, 0.5, 2), rng.uniform(0, 0.5, 2)
        return dict(zip(_KEYS, map(float, (*low, *(low + side))), strict=True))
    return _pick(
        rng,
        lambda _: dict.fromkeys(_KEYS, 0.5),
        lambda r: dict(zip(_KEYS, map(float, r.normal(0.5, 1, 4)), strict=True)),
        lambda r: dict(zip(_KEYS, map(float, r.normal(0, 10.0 ** r.integers(12), 4)), strict=True)),
        lambda _: {"x_min": 0.9, "y_min": 0.9, "x_max": 0.1, "y_max": 0.1},
        lambda r: dict.fromkeys(_KEYS, 0.5) | {str(r.choice(_KEYS)): math.nan},
        lambda r: dict.fromkeys(_KEYS, 0.5) | {str(r.choice(_KEYS)): math.inf},
        lambda _: {"x_min": 0, "y_min": 0, "x_max": 1},
        lambda _: {"x_min": "0", "y_min": None, "x_max": 1, "y_max": 1},
        lambda _: None,
    )


# --- running -----------------------------------------------------------------------------------


def make_refiner() -> SegmentRefiner:
    """One with all of ``REFINERS``; nothing that they make of a mask is rejected."""
    default, *others = REFINERS
    return SegmentRefiner(
        RefinerConfig(refiner=default, selectable=tuple(others), min_agreement=0.0)
    )


def run(refiner: SegmentRefiner, case: Case) -> str:
    """The outcome: a reason, or ``ValueError``. Raises AssertionError for a result that is none,
    and whatever else the call raises."""
    encoded = isinstance(case.image, bytes)
    refine: Any = refiner.refine_encoded if encoded else refiner.refine_with_bitmaps
    try:
        result = refine(
            case.image, case.path, case.bbox, return_base64=case.masks, refiner=case.refiner
        )
    except ValueError:
        return "ValueError"
    size = case.image.shape[1::-1] if isinstance(case.image, np.ndarray) else None
    check(result, case.masks, size)
    return str(result.reason)


def check(result: SegmentRefineBitmapsResult, masks: bool, size: tuple[int, int] | None) -> None:
    """That a result keeps what ``SegmentRefineBitmapsResult`` promises; ``size``: the image's."""
    assert result.reason in REASONS, result.reason
    refined = result.reason == "refined"
    assert (result.refined_svg_path is not None) == refined
    assert (result.refined_bbox is not None) == refined
    if result.refined_svg_path is not None and result.refined_bbox is not None:
        values = [v for _, coords in parse_path(result.refined_svg_path).commands for v in coords]
        assert values and min(values) >= 0 and max(values) <= 1
        x0, y0, x1, y1 = (result.refined_bbox[key] for key in _KEYS)
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    assert (result.coarse_mask_base64 is not None) or not (masks and refined)
    for mask in (result.coarse_mask_base64, result.refined_mask_base64):
        assert masks or mask is None
        if mask is not None:
            png = Image.open(io.BytesIO(base64.b64decode(mask, validate=True)))
            assert png.mode == "L" and (size is None or png.size == size)


@dataclass
class Tally:
    """What some cases came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: list[tuple[float, int]] = field(default_factory=list)
    """CPU seconds and number."""

    def add(self, refiner: SegmentRefiner, number: int) -> None:
        case = make_case(number)
        began = time.process_time()
        try:
            self.outcomes[run(refiner, case)] += 1
        except Exception as error:
            self.failures.append(f"case {number}: {type(error).__name__}: {error}")
        spent = time.process_time() - began
        if spent > CASE_S:
            self.failures.append(f"case {number} takes {spent:.1f} s")
        self.slowest = sorted([*self.slowest, (spent, number)], reverse=True)[:SLOWEST]


def run_batch(first: int, count: int) -> None:
    """In a child process: the tally as JSON on stdout; each case's number on stderr beforehand."""
    import cv2

    cv2.setNumThreads(1)
    logging.disable(logging.CRITICAL)
    refiner = make_refiner()
    tally = Tally()
    for number in range(first, first + count):
        os.write(2, f"\r{number}".encode())
        tally.add(refiner, number)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([tally.outcomes, tally.failures, tally.slowest, peak]))


def run_child(first: int, count: int) -> tuple[Tally, float, str]:
    """A batch's tally, its peak memory in MiB and, where it died, why."""
    command = [sys.executable, __file__, "--batch", "--first", str(first), "--cases", str(count)]
    try:
        # As bytes: text would have its carriage returns made newlines.
        child = subprocess.run(command, capture_output=True, timeout=BATCH_TIMEOUT_S)
        died = "" if child.returncode == 0 else f"exit status {child.returncode}"
        stderr = child.stderr
    except subprocess.TimeoutExpired as error:
        died, stderr = f"still running after {BATCH_TIMEOUT_S} s", error.stderr or b""
    if died:
        said = stderr.decode(errors="replace")
        last = re.findall(r"\r(\d+)", said)
        return Tally(), 0.0, f"case {last[-1] if last else first}: {died}: {said[-300:]}"
    outcomes, failures, slowest, peak = json.loads(child.stdout)
    return Tally(Counter(outcomes), failures, [tuple(s) for s in slowest]), peak, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--batch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        run_batch(args.first, args.cases)
        return 0
    whole, peaks = Tally(), [0.0]
    for first in range(args.first, args.first + args.cases, BATCH):
        count = min(BATCH, args.first + args.cases - first)
        tally, peak, died = run_child(first, count)
        whole.outcomes += tally.outcomes
        whole.failures += tally.failures + [died] * bool(died)
        whole.slowest = sorted(whole.slowest + tally.slowest, reverse=True)[:SLOWEST]
        peaks.append(peak)
        print(f"\r{first + count - args.first} cases", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for outcome, count in whole.outcomes.most_common():
        print(f"{count:8d} {outcome}")
    for spent, number in whole.slowest:
        print(f"case {number}: {spent * 1e3:.0f} ms of CPU")
    print(f"{max(peaks):.0f} MB at most\n" + "\n".join(whole.failures))
    if args.out:
        report = {
            "cases": args.cases,
            "first": args.first,
            "outcomes": whole.outcomes,
            "slowest_s": whole.slowest,
            "peak_mb": max(peaks),
            "failures": whole.failures,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return int(bool(whole.failures))


if __name__ == "__main__":
    sys.exit(main())
