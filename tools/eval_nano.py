"""Judge the shipped checkpoint on held-out scenes, through the engine that serves it.

    python tools/eval_nano.py --scenes 500 --out runs/eval

Prints a table, writes ``figures.json``, ``nouns.csv`` and ``sizes.csv`` (the table by noun and by
size), ``confusions.csv`` (what was outlined in place of what was asked for) and
``sheet.png`` (best, median and worst answers; truth in white, coarse in orange, refined in cyan).
Masks are those of ``return_base64``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import csv
import json
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from nouns import CORE, CORE_STYLES
from scenes import HELD_OUT_STYLE, Scene, SceneGenerator, SceneObject
from words import KINDS

from kestrel.config import RefinerConfig, RuntimeConfig
from kestrel.engine import InferenceEngine
from kestrel.seg_refiner.box import boundary_iou, mask_iou

SEED = 30_000
SIZES = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Limits of the groups of sizes, shares of the picture that an object covers."""
GROUP = 8
"""Answers in each row of the sheet."""
TILE = 200
"""Side of an answer in the sheet, px."""


@dataclass
class Answer:
    """One question and how well it was answered."""

    noun: str
    style: str
    share: float
    coarse: float
    refined: float
    boundary: float
    index: int
    masks: tuple[np.ndarray, np.ndarray, np.ndarray]
    instead: str | None
    """Noun of another object of the scene that the coarse mask fits by more than half."""


def decoded(segment: dict, key: str, like: np.ndarray) -> np.ndarray:
    """A mask of the answer as bool, all False where it is absent."""
    if key not in segment:
        return np.zeros(like.shape, bool)
    raw = np.frombuffer(base64.b64decode(segment[key]), np.uint8)
    return cv2.imdecode(raw, cv2.IMREAD_UNCHANGED) > 0


async def ask(engine: InferenceEngine, scene: Scene, found: SceneObject, index: int, refs=None):
    result = await engine.segment(
        image=scene.image, object=found.noun, return_base64=True, spatial_refs=refs
    )
    segment = result.output["segments"][0]
    coarse = decoded(segment, "coarse_mask_base64", found.mask)
    refined = decoded(segment, "refined_mask_base64", found.mask)
    if not refined.any():
        refined = coarse
    others = [o.noun for o in scene.objects if o is not found and mask_iou(coarse, o.mask) > 0.5]
    return Answer(
        found.noun,
        found.style,
        float(found.mask.mean()),
        mask_iou(coarse, found.mask),
        mask_iou(refined, found.mask),
        boundary_iou(coarse, found.mask),
        index,
        (found.mask, coarse, refined),
        others[0] if others else None,
    )


def size_of(rng: np.random.Generator, aspect: float) -> tuple[int, int]:
    """Width and height of a rendering with about 200,000 pixels."""
    area = float(rng.uniform(120_000, 300_000))
    return round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)


def scenes_of(generator: SceneGenerator, count: int, at_least: int):
    """Numbers and scenes, each of a size of its own, with at least so many named objects."""
    rng = np.random.default_rng(SEED)
    index = -1
    while count:
        index += 1
        described = generator.describe(index)
        size = size_of(rng, described.aspect)
        if sum(p.noun is not None for p in described.placements) < at_least:
            continue
        scene = generator.render(described, *size)
        if len(scene.objects) >= at_least:
            count -= 1
            yield index, scene


async def judge_scenes(
    engine: InferenceEngine,
    generator: SceneGenerator,
    count: int,
    per_scene: int = 2,
    at_least: int = 1,
) -> tuple[list[Answer], list[bool], list[Answer]]:
    """Answers to unambiguous questions, whether absent nouns gave nothing, answers by reference."""
    rng = np.random.default_rng(SEED)
    answers: list[Answer] = []
    silent: list[bool] = []
    referred: list[Answer] = []
    for index, scene in scenes_of(generator, count, at_least):
        nouns = [found.noun for found in scene.objects]
        clear = [found for found in scene.objects if nouns.count(found.noun) == 1]
        for found in clear[:per_scene]:
            answers.append(await ask(engine, scene, found, index))
        for found in scene.objects:
            if nouns.count(found.noun) > 1:
                rows, columns = np.nonzero(found.mask)
                height, width = found.mask.shape
                box = [
                    columns.min() / width,
                    rows.min() / height,
                    (columns.max() + 1) / width,
                    (rows.max() + 1) / height,
                ]
                referred.append(await ask(engine, scene, found, index, [[float(v) for v in box]]))
        kinds = {kind for noun in nouns for kind in KINDS.get(noun, ())}
        absent = sorted(set(generator.nouns) - set(nouns) - kinds)
        noun = absent[int(rng.integers(len(absent)))]
        result = await engine.segment(image=scene.image, object=noun)
        silent.append(result.output["segments"][0]["svg_path"] == "")
    return answers, silent, referred


def summary(answers: list[Answer]) -> dict[str, float]:
    coarse = np.array([a.coarse for a in answers])
    refined = np.array([a.refined for a in answers])
    return {
        "questions": len(answers),
        "coarse_iou": float(coarse.mean()),
        "coarse_boundary_iou": float(np.mean([a.boundary for a in answers])),
        "refined_iou": float(refined.mean()),
        "right_object": float((coarse > 0.5).mean()),
    }


def contact_sheet(answers: list[Answer], generator: SceneGenerator, file: Path) -> None:
    """Best, median and worst answers with their outlines, a row each."""
    ranked = sorted(answers, key=lambda a: -a.coarse)
    middle = max(0, len(ranked) // 2 - GROUP // 2)
    rows = []
    for group in (ranked[:GROUP], ranked[middle : middle + GROUP], ranked[-GROUP:]):
        tiles = []
        for answer in group:
            truth, coarse, refined = answer.masks
            height, width = truth.shape
            described = generator.describe(answer.index)
            picture = generator.render(described, width, height).image.copy()
            marks = [(truth, (255, 255, 255)), (coarse, (255, 140, 0)), (refined, (0, 220, 255))]
            for mask, colour in marks:
                lines, _ = cv2.findContours(
                    mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
                )
                cv2.drawContours(picture, lines, -1, colour, 2)
            tile = cv2.resize(picture, (TILE, TILE), interpolation=cv2.INTER_AREA)
            label = f"{answer.noun} {answer.coarse:.2f} {answer.refined:.2f}"
            cv2.putText(tile, label, (4, TILE - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 3)
            cv2.putText(tile, label, (4, TILE - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255,) * 3, 1)
            tiles.append(tile)
        tiles += [np.zeros((TILE, TILE, 3), np.uint8)] * (GROUP - len(tiles))
        rows.append(np.hstack(tiles))
    cv2.imwrite(str(file), np.vstack(rows)[..., ::-1])


def write_groups(answers: list[Answer], group_of: Callable[[Answer], str], file: Path) -> None:
    """A row of figures for each group of answers."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[group_of(answer)].append(answer)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow([file.stem, "questions", "coarse_iou", "refined_iou", "right_object"])
        for name, group in sorted(groups.items()):
            s = summary(group)
            writer.writerow(
                [name, len(group)]
                + [round(s[k], 3) for k in ("coarse_iou", "refined_iou", "right_object")]
            )


def size_group(answer: Answer) -> str:
    """The group of ``SIZES`` that the object belongs to, in words."""
    number = int(np.searchsorted(SIZES[1:-1], answer.share, side="right"))
    return f"{SIZES[number]:4.0%} to {SIZES[number + 1]:.0%}"


def write_confusions(answers: list[Answer], file: Path) -> None:
    """How often which noun was outlined where another was asked for; the most frequent first."""
    pairs = Counter((a.noun, a.instead) for a in answers if a.instead is not None)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["asked", "outlined", "times"])
        writer.writerows([*pair, times] for pair, times in pairs.most_common())


async def latency(engine: InferenceEngine, generator: SceneGenerator, count: int = 60) -> float:
    """Median milliseconds of one request, image to refined path, no masks."""
    times = []
    for index in range(count):
        scene = generator.render(generator.describe(index), 640, 480)
        if scene.objects:
            start = time.perf_counter()
            await engine.segment(image=scene.image, object=scene.objects[0].noun)
            times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[5:]))


def stay_on_one_core() -> None:
    """For the rest of the process: an engine gives a lone picture every core that is idle."""
    core = {min(os.sched_getaffinity(0))}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), core)


async def run(args: argparse.Namespace) -> dict:
    config = RuntimeConfig(
        model_path=str(args.model) if args.model else None,
        torch_threads=1,
        refiner=RefinerConfig(refiner=args.refiner),
        image_dtype=None if args.image_dtype == "float32" else args.image_dtype,
        kv_dtype=None if args.image_dtype == "float32" else "auto",
    )
    engine = await InferenceEngine.create(config)
    figures: dict = {
        "nouns": len(CORE),
        "scenes": args.scenes,
        "machine": platform.processor() or platform.machine(),
    }
    usual = SceneGenerator("eval", SEED, styles=CORE_STYLES, nouns=CORE, large_sprites=True)
    answers, silent, referred = await judge_scenes(engine, usual, args.scenes)
    figures["training styles"] = summary(answers)
    figures["absent_nothing"] = float(np.mean(silent))
    if referred:
        figures["referred"] = summary(referred)
    contact_sheet(answers, usual, args.out / "sheet.png")
    write_groups(answers, lambda a: a.noun, args.out / "nouns.csv")
    write_groups(answers, size_group, args.out / "sizes.csv")
    write_confusions(answers, args.out / "confusions.csv")
    few = max(40, args.scenes // 4)
    for name, styles, photos in (
        ("style never trained on", (HELD_OUT_STYLE,), 0.3),
        ("photographic cut-outs on photographs", ("stamps",), 1.0),
    ):
        other = SceneGenerator(
            "eval", SEED + 1, styles=styles, nouns=CORE, photos=photos, large_sprites=True
        )
        figures[name] = summary((await judge_scenes(engine, other, few))[0])
    crowded, _, _ = await judge_scenes(engine, usual, few, per_scene=5, at_least=3)
    figures["3 to 5 objects"] = summary(crowded)
    await engine.shutdown()
    stay_on_one_core()
    async with await InferenceEngine.create(config) as engine:
        figures["p50_ms"] = await latency(engine, usual)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="checkpoint; default: shipped")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--refiner", default=RefinerConfig().refiner, help="backend by name")
    parser.add_argument(
        "--image-dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="how images are encoded; float32: keys and values too",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures = asyncio.run(run(args))
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    columns = ("questions", "coarse_iou", "coarse_boundary_iou", "refined_iou", "right_object")
    print(f"{'scenes':40}" + "".join(f"{c:>21}" for c in columns))
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{name:40}" + "".join(f"{value[c]:21.3f}" for c in columns))
    print(f"absent noun, empty path: {figures['absent_nothing']:.3f}")
    print(f"one request, one core, p50: {figures['p50_ms']:.0f} ms")


if __name__ == "__main__":
    main()
