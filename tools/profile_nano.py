"""Where the time of a training step goes on a CPU.

    python tools/profile_nano.py
    python tools/profile_nano.py --plain      # with torch's operators alone, without nano_kernels

Steps from the shipped weights, compiled as training compiles them: seconds of each part,
scenes per second, and the operators that take longest.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from nano_checkpoint import read_checkpoint
from nano_muon import optimisers
from nano_questions import BatchMaker, SceneQuestions
from nano_training import Batch, Losses
from nouns import CORE, CORE_STYLES
from safetensors.torch import load_file
from scene_store import build_store
from torch.profiler import ProfilerActivity, profile
from train_nano import compile_blocks

PARTS = ("batch", "forwards", "backwards", "optimiser")
WARM_STEPS = 2
"""Steps that compile, and are not measured."""


class Step:
    """One training step after another; the seconds of each one's ``PARTS``."""

    def __init__(self, losses: Losses, batches: Iterator[Batch]) -> None:
        self.losses, self.batches = losses, batches
        self.optimisers = optimisers(losses.model, losses.heads().values(), 1e-4, adamw_alone=False)

    def __call__(self) -> list[float]:
        times = [time.perf_counter()]
        batch = next(self.batches)
        times.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = self.losses(batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.losses.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(times)]


def measured(step: Step, steps: int) -> list[float]:
    """Median seconds of each part."""
    for _ in range(WARM_STEPS):
        step()
    return torch.tensor([step() for _ in range(steps)]).median(0).values.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=40, help="per step")
    parser.add_argument("--steps", type=int, default=6, help="that are measured")
    parser.add_argument("--plain", action="store_true", help="torch's operators alone")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = read_checkpoint(Path("kestrel/models/nano"))
    model.train().requires_grad_()
    asker = SceneQuestions(tokenizer, CORE)
    losses = Losses(model, asker.noun_ids, asker.level_ids)
    losses.set_heads(load_file("tools/nano_heads.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder), count=200, seed=1, nouns=CORE, styles=CORE_STYLES)
        maker = BatchMaker(store, asker, scenes=args.scenes, questions=3, boxes_only=False, seed=1)
        step = Step(losses, iter(maker))
        print(f"{'':24}", *(f"{part:>10}" for part in PARTS), f"{'scenes/s':>10}")
        fused = compile_blocks(fused=not args.plain)
        seconds = measured(step, args.steps)
        name = "nano_kernels" if fused else "torch's operators"
        rate = args.scenes / sum(seconds)
        print(f"{name:24}", *(f"{part:10.2f}" for part in seconds), f"{rate:10.1f}")
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    main()
