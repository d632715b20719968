"""Train the shipped checkpoint from scratch on generated scenes, on CPU.

    python tools/train_nano.py --minutes 100 --run runs/nano

The learning rate follows the share of the time budget that is spent, so that the schedule ends on
time on any machine. Interrupted runs resume from ``RUN/state.pt``; ``RUN/log.csv`` holds the
losses and evaluations, ``RUN/curves.png`` their plot, ``--ship`` the checkpoint of the best
evaluation (averaged weights).
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from nano_checkpoint import build_tokenizer, nano_config, write_checkpoint
from nano_data import SceneQuestions, question_batches
from nano_eval import evaluate
from nano_training import Losses, initialise
from nouns import vocabulary_words

from kestrel.moondream.model import Moondream

LOSSES = ("tokens", "coord", "size", "dense", "boxes", "answer")
FIGURES = ("iou", "box_iou", "right", "absent")
FIELDS = ["minutes", "step", "scenes_per_s", *LOSSES, "norm", *FIGURES]


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 1 % of the budget, then cosine to 2 % of the peak."""
    if progress < 0.01:
        return peak * max(progress / 0.01, 0.01)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/nano"))
    parser.add_argument("--ship", type=Path, default=None, help="folder of the best checkpoint")
    parser.add_argument("--minutes", type=float, default=100.0, help="training time budget")
    parser.add_argument(
        "--vision", type=float, default=0.25, help="share of the budget for the vision tower alone"
    )
    parser.add_argument("--scenes", type=int, default=24, help="scenes per step")
    parser.add_argument("--questions", type=int, default=4, help="questions per scene")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--eval-every", type=float, default=8.0, help="minutes")
    parser.add_argument("--eval-scenes", type=int, default=120)
    parser.add_argument("--workers", type=int, default=1, help="scene processes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


class Run:
    """Model, optimiser, averaged weights and clock of one training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.tokenizer = build_tokenizer(vocabulary_words())
        self.model = Moondream(nano_config(self.tokenizer))
        self.questions = SceneQuestions(self.tokenizer)
        integer_ids = [self.tokenizer.token_to_id(str(v)) for v in range(961)]
        initialise(self.model, integer_ids)
        self.losses = Losses(self.model, self.questions.noun_ids, integer_ids)
        tables = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": 0.02},
                {"params": vectors + self.losses.extra_parameters(), "weight_decay": 0.0},
            ],
            lr=args.peak,
            betas=(0.9, 0.98),
            foreach=True,
        )
        self.average = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.step, self.spent, self.best = 0, 0.0, 0.0
        self.state_file = args.run / "state.pt"
        if self.state_file.exists():
            self.resume()

    def resume(self) -> None:
        saved = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.average = saved["average"]
        with torch.no_grad():
            for mine, theirs in zip(self.losses.extra_parameters(), saved["extra"], strict=True):
                mine.copy_(theirs)
        self.step, self.spent, self.best = saved["step"], saved["spent"], saved["best"]
        print(f"resumed at step {self.step}, {self.spent / 60:.1f} min spent", flush=True)

    def save(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": self.average,
                "extra": [p.detach() for p in self.losses.extra_parameters()],
                "step": self.step,
                "spent": self.spent,
                "best": self.best,
            },
            partial,
        )
        partial.replace(self.state_file)

    def train_step(self, batch) -> dict[str, float]:
        progress = self.spent / (60 * self.args.minutes)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(progress, self.args.peak)
        loss, parts = (self.losses if batch.tokens.numel() else self.losses.vision_only)(batch)
        loss.backward()
        parts["norm"] = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        names, live = zip(*self.model.named_parameters(), strict=True)
        torch._foreach_lerp_([self.average[n] for n in names], [p.detach() for p in live], 1 - keep)
        return parts

    def evaluated(self) -> dict[str, float]:
        """Figures of the averaged weights on held-out scenes; ships them when they are the best."""
        live = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.model.load_state_dict(self.average, strict=False)
        figures = evaluate(self.model, self.questions, scenes=self.args.eval_scenes)
        self.model.load_state_dict(live, strict=False)
        if figures["iou"] > self.best:
            self.best = figures["iou"]
            for folder in filter(None, [self.args.run / "best", self.args.ship]):
                write_checkpoint(folder, self.model, self.average, self.tokenizer)
        return figures


def plot(log: Path) -> None:
    """Draw losses and IoU against minutes beside the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in LOSSES:
        points = [(float(r["minutes"]), float(r[name])) for r in rows if r[name]]
        left.plot(*zip(*points, strict=True), label=name)
    for name in FIGURES:
        points = [(float(r["minutes"]), float(r[name])) for r in rows if r[name]]
        if points:
            right.plot(*zip(*points, strict=True), marker=".", label=name)
    left.set_title("training losses")
    right.set_title("held-out scenes")
    for axis in (left, right):
        axis.set_xlabel("minutes")
        axis.legend()
    figure.savefig(log.with_name("curves.png"), dpi=90)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    log = args.run / "log.csv"
    if not log.exists():
        log.write_text(",".join(FIELDS) + "\n")

    def batches_of(questions: int):
        return question_batches(
            run.questions,
            scenes=args.scenes,
            questions=questions,
            seed=args.seed * 1_000_003 + run.step,
            workers=args.workers,
        )

    warming = run.spent < 60 * args.minutes * args.vision
    batches = batches_of(0 if warming else args.questions)
    last_eval, parts_seen, since = run.spent, [], time.monotonic()
    while run.spent < 60 * args.minutes:
        start = time.monotonic()
        if warming and run.spent >= 60 * args.minutes * args.vision:
            warming, batches, parts_seen = False, batches_of(args.questions), []
        parts_seen.append(run.train_step(next(batches)))
        run.spent += time.monotonic() - start
        if run.step % 50 == 0:
            now = time.monotonic()
            row: dict[str, object] = {
                k: round(float(np.mean([p[k] for p in parts_seen])), 4) for k in parts_seen[0]
            }
            row["minutes"] = round(run.spent / 60, 2)
            row["step"] = run.step
            row["scenes_per_s"] = round(len(parts_seen) * args.scenes / (now - since), 1)
            if not warming and run.spent - last_eval > 60 * args.eval_every:
                row.update({k: round(v, 4) for k, v in run.evaluated().items() if k in FIELDS})
                last_eval = run.spent
                run.save()
            with log.open("a") as file:
                csv.DictWriter(file, FIELDS).writerow(row)
            if "iou" in row:
                plot(log)
            if warming and run.step % 500 == 0:
                run.save()
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
            parts_seen, since = [], time.monotonic()
    final = run.evaluated()
    run.save()
    print("finished:", {k: round(v, 4) for k, v in final.items()}, "best", round(run.best, 4))


if __name__ == "__main__":
    main()
