"""Train the shipped checkpoint from scratch on generated scenes.

    python tools/train_nano.py --minutes 95 --run runs/nano
    python tools/train_nano.py --device cuda --compile --scenes 512 --workers 14 --eval-scenes 0

On a CPU scenes are drawn into ``--store`` before training. On an accelerator ``--workers``
processes draw them into its memory while it trains.

Three phases share the time budget: the vision tower alone, on what each patch shows; then boxes;
then boxes and paths. Weights are float32, matrix products bfloat16 (``--float32`` turns that off,
for CPUs without AVX512-BF16 or AMX). The learning rate follows the share of the budget that is
spent, so that the schedule ends on time on any machine. Interrupted runs resume from
``RUN/state.pt``; ``RUN/log.csv`` holds the losses and evaluations, ``RUN/curves.png`` their plot,
``--ship`` the checkpoint of the best evaluation (averaged weights). ``--warm FOLDER`` goes on from
a shipped checkpoint with a schedule of its own, for instance after ``nouns.CORE`` has grown;
``--phases`` leaves out what it knows.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import nano_kernels
import nano_questions
import nano_training
import torch
import torch.nn.functional as F
from nano_checkpoint import build_tokenizer, nano_config, write_checkpoint
from nano_eval import evaluate
from nano_muon import optimisers
from nano_questions import BatchMaker, SceneQuestions
from nano_start import initialise, pass_through, picture_patches, resized_positions
from nano_training import Batch, Losses
from nouns import CORE, CORE_STYLES
from safetensors.torch import load_file, save_file
from scene_store import Scenes, build_store, grow_pool
from words import vocabulary_words

from kestrel.moondream import vision
from kestrel.moondream.model import Moondream
from kestrel.moondream.vision import VisionBlock

LOSSES = (
    "tokens",
    "coord",
    "size",
    "dense",
    "cells",
    "read_cells",
    "boxes",
    "answer",
    "outline",
    "place",
    "look",
    "vertex",
    "off",
    "marks",
    "offsets",
    "patch_places",
)
FIGURES = ("iou", "box_iou", "right", "absent")
FIELDS = ["minutes", "step", "phase", "scenes", "scenes_per_s", *LOSSES, "norm", *FIGURES]
REPORT_STEPS = 50
FIRST_SCENES = 50_000
"""Scenes in a pool before training begins: it would see the same few again and again."""
HEADS_ALONE = 100
"""Steps in which only the heads learn that are thrown away, after ``--warm`` without ``--heads``:
what they say while they know nothing would undo what the model knows."""
HEADS_PEAK = 4e-3
"""Learning rate of those steps."""
LONGEST_STEP_S = 20.0
"""A step on a CPU counts as no more: a process that was stopped for a while has not trained."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``until`` a share of the budget, ``questions`` per scene."""

    name: str
    until: float
    questions: int


QUESTIONS = {"vision": 0, "boxes": 5, "paths": 3}
"""Questions per scene in each kind of phase."""


def phases(text: str) -> list[Phase]:
    """``vision=0.15,paths=1``: each phase with the share of the budget at which it ends."""
    ends = [part.partition("=") for part in text.split(",")]
    try:
        return [Phase(name, float(until), QUESTIONS[name]) for name, _, until in ends]
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: phases are {', '.join(QUESTIONS)}, each with =SHARE"
        ) from error


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 1 % of the budget, level to half of it, then cosine to 2 % of the peak."""
    if progress < 0.01:
        return peak * max(progress / 0.01, 0.01)
    falling = min(1.0, max(0.0, 2 * progress - 1))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/nano"))
    parser.add_argument("--ship", type=Path, default=None, help="folder of the best checkpoint")
    parser.add_argument("--warm", type=Path, help="checkpoint folder to go on from")
    parser.add_argument(
        "--heads", type=Path, help="RUN/heads.safetensors of the run that gave the checkpoint"
    )
    parser.add_argument(
        "--phases",
        type=phases,
        default="vision=0.15,boxes=0.27,paths=1",
        help="what is trained, each until a share of the budget",
    )
    parser.add_argument("--store", type=Path, default=Path("runs/scenes"), help="drawn scenes")
    parser.add_argument("--store-scenes", type=int, default=120_000)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, help="processes that draw while a device trains")
    parser.add_argument("--minutes", type=float, default=95.0, help="training time budget")
    parser.add_argument("--scenes", type=int, default=24, help="scenes per step")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--adamw", action="store_true", help="AdamW for matrices too, no Muon")
    parser.add_argument("--eval-every", type=float, default=6.0, help="minutes to save after")
    parser.add_argument("--eval-scenes", type=int, default=120, help="0: weights are kept unjudged")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 matrix products")
    parser.add_argument("--compile", action="store_true", help="faster steps; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


class Run:
    """Model, optimiser, averaged weights and clock of one training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.store = self._scenes()
        self.tokenizer = build_tokenizer(vocabulary_words())
        self.model = Moondream(nano_config(self.tokenizer))
        self.questions = SceneQuestions(self.tokenizer, CORE)
        integer_ids = [self.tokenizer.token_to_id(str(v)) for v in range(961)]
        patch = self.model.config.vision.enc_patch_size
        pictures = self.store.arrays["images"][:500].cpu().numpy()
        initialise(self.model, integer_ids, picture_patches(pictures, patch))
        if args.warm is not None:
            self._begin_with(load_file(args.warm / "model.safetensors"))
        self.model.to(args.device)
        self.losses = Losses(self.model, self.questions.noun_ids, self.questions.level_ids)
        self.heads = self.losses.heads()
        self.heads_alone = HEADS_ALONE if args.warm is not None and args.heads is None else 0
        if args.heads is not None:
            self.losses.set_heads(load_file(args.heads))
        self.optimisers = optimisers(
            self.model, self.heads.values(), args.peak, adamw_alone=args.adamw
        )
        self.average = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.step, self.spent, self.best = 0, 0.0, 0.0
        self.state_file = args.run / "state.pt"
        if self.state_file.exists():
            self.resume()

    def _scenes(self) -> Scenes:
        args = self.args
        about = {"count": args.store_scenes, "seed": args.seed, "nouns": CORE}
        if args.device.type == "cpu":
            return build_store(args.store, styles=CORE_STYLES, **about)
        return grow_pool(
            args.device, first=FIRST_SCENES, workers=args.workers, styles=CORE_STYLES, **about
        )

    def _begin_with(self, known: dict[str, torch.Tensor]) -> None:
        """Weights of a checkpoint, which may be of smaller pictures and have fewer blocks."""
        model = self.model
        known["vision.pos_emb"] = resized_positions(
            known["vision.pos_emb"].float(), model.config.vision.grid
        )
        model.load_state_dict(known, strict=False)
        for tower in ("text", "vision"):
            blocks = enumerate(getattr(model, tower).blocks)
            pass_through(
                b for n, b in blocks if f"{tower}.blocks.{n}.attn.proj.weight" not in known
            )

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent."""
        return self.spent / (60 * self.args.minutes)

    @property
    def phase(self) -> Phase:
        planned = self.args.phases
        return next((phase for phase in planned if self.progress < phase.until), planned[-1])

    def batches(self, phase: Phase):
        """Endless batches of a phase; a resumed run draws other ones."""
        maker = BatchMaker(
            self.store,
            self.questions,
            scenes=self.args.scenes,
            questions=phase.questions,
            boxes_only=phase.name == "boxes",
            # Not what another run, from which this one may go on, has seen of the same store.
            seed=zlib.crc32(f"{self.args.run} {self.args.seed} {self.step}".encode()),
            device=self.args.device,
        )
        return iter(maker)

    def resume(self) -> None:
        saved = torch.load(self.state_file, weights_only=True, map_location=self.args.device)
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.average = saved["average"]
        self.losses.set_heads(saved["heads"])
        self.step, self.spent, self.best = saved["step"], saved["spent"], saved["best"]
        print(f"resumed at step {self.step}, {self.spent / 60:.1f} min spent", flush=True)

    def save(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "average": self.average,
                "heads": {name: head.detach() for name, head in self.heads.items()},
                "step": self.step,
                "spent": self.spent,
                "best": self.best,
            },
            partial,
        )
        partial.replace(self.state_file)

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        alone = self.step < self.heads_alone
        rate = learning_rate(self.progress, self.args.peak)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                alone_rate = HEADS_PEAK if group.get("heads") else 0.0
                group["lr"] = alone_rate if alone else rate
        asked = batch.tokens.numel() > 0
        kind = self.args.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=not self.args.float32):
            loss, parts = (self.losses if asked else self.losses.vision_only)(batch)
        loss.backward()
        parts["norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        names, live = zip(*self.model.named_parameters(), strict=True)
        torch._foreach_lerp_([self.average[n] for n in names], [p.detach() for p in live], 1 - keep)
        return parts

    def keep_unjudged(self) -> None:
        """Write the averaged weights and the last ones."""
        live = {k: v.detach() for k, v in self.model.named_parameters()}
        for folder, weights in (("averaged", self.average), ("last", live)):
            write_checkpoint(self.args.run / folder, self.model, weights, self.tokenizer)
        heads = {name: head.detach().contiguous() for name, head in self.heads.items()}
        save_file(heads, str(self.args.run / "heads.safetensors"))

    def evaluated(self, *, averaged: bool = True) -> dict[str, float]:
        """Figures of the averaged weights, or the last ones, on held-out scenes; ships them when
        they are the best."""
        live = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        judged = self.average if averaged else live
        self.model.load_state_dict(judged, strict=False)
        figures = evaluate(
            self.model, self.questions, self.args.eval_scenes, self.phase.name == "boxes"
        )
        self.model.load_state_dict(live, strict=False)
        if figures["iou"] > self.best:
            self.best = figures["iou"]
            for folder in filter(None, [self.args.run / "best", self.args.ship]):
                write_checkpoint(folder, self.model, judged, self.tokenizer)
        return figures


def plot(log: Path) -> None:
    """Draw losses and IoU against minutes beside the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for axis, names, marker in ((left, LOSSES, ""), (right, FIGURES, ".")):
        for name in names:
            points = [(float(r["minutes"]), float(r[name])) for r in rows if r[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, label=name)
        axis.set_xlabel("minutes")
        axis.legend()
    left.set_title("training losses")
    left.set_yscale("log")
    right.set_title("held-out scenes")
    figure.savefig(log.with_name("curves.png"), dpi=90)
    plt.close(figure)


def compile_blocks(*, fused: bool) -> bool:
    """Compile what steps are made of, with ``nano_kernels`` where they are wanted and can be had,
    which it says.

    One block at a time: all of a tower share what is compiled.
    """
    fused = fused and nano_kernels.fuse()
    if fused:
        vision.attend = nano_training.vision_attention
        F.gelu = nano_kernels.gelu  # which the model's own modules call
    nano_training.block_pass = torch.compile(nano_training.block_pass, dynamic=False)
    VisionBlock.forward = torch.compile(VisionBlock.forward, dynamic=False)
    nano_questions.covered_cells = torch.compile(nano_questions.covered_cells, dynamic=False)
    return fused


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    args.run.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if args.compile:
        compile_blocks(fused=args.device.type == "cpu")
    log = args.run / "log.csv"
    if not log.exists():
        log.write_text(",".join(FIELDS) + "\n")
    phase = run.phase
    batches = run.batches(phase)
    last_eval, parts_seen, since = run.spent, [], time.monotonic()
    while run.progress < 1:
        start = time.monotonic()
        if run.phase is not phase:
            run.save()
            phase, parts_seen = run.phase, []
            batches = run.batches(phase)
        parts_seen.append(run.train_step(next(batches)))
        spent = time.monotonic() - start
        run.spent += min(spent, LONGEST_STEP_S) if args.device.type == "cpu" else spent
        if run.step % REPORT_STEPS:
            continue
        row: dict[str, object] = {
            k: round(torch.stack([p[k] for p in parts_seen]).mean().item(), 4)
            for k in parts_seen[0]
        }
        row["minutes"] = round(run.spent / 60, 2)
        row["step"] = run.step
        row["phase"] = phase.name
        row["scenes"] = len(run.store)
        row["scenes_per_s"] = round(len(parts_seen) * args.scenes / (time.monotonic() - since), 1)
        if run.spent - last_eval > 60 * args.eval_every:
            if not args.eval_scenes:
                run.keep_unjudged()
            elif phase.questions:
                row.update({k: round(v, 4) for k, v in run.evaluated().items() if k in FIELDS})
            last_eval = run.spent
            run.save()
        with log.open("a") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
        if "iou" in row:
            plot(log)
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        parts_seen, since = [], time.monotonic()
    if not args.eval_scenes:
        run.keep_unjudged()
        run.save()
        return
    # After a short run the averages still hold much of its beginning.
    for averaged in (True, False):
        final = {k: round(v, 4) for k, v in run.evaluated(averaged=averaged).items()}
        print("averaged weights:" if averaged else "last weights:", final)
    run.save()
    print("best", round(run.best, 4))


if __name__ == "__main__":
    main()
