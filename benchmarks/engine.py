"""What the engine makes of its model: batching, image reuse, decode against memory bandwidth.

    python benchmarks/engine.py --out engine.json --plot engine.png

Everything compared is run alternately in one process, so that the ratios hold on a machine whose
clock wanders. Masks are not part of it: no refiner runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.config import SHIPPED_MODELS
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.model import Moondream

NANO = SHIPPED_MODELS / "nano"
SAMPLES = NANO / "samples"
LEVELS = (1, 2, 4, 8, 16)
TOKENS = 48
"""Tokens that the random model is measured over."""


@dataclass(frozen=True)
class Question:
    """A sample picture and a noun that is in it."""

    image: bytes
    noun: str


def questions() -> list[Question]:
    entries = json.loads((SAMPLES / "samples.json").read_text())
    return [Question((SAMPLES / e["file"]).read_bytes(), e["noun"]) for e in entries]


def varied(question: Question, number: int) -> Question:
    """The same question about a picture of other bytes, so that no embedding is remembered."""
    # What follows the end marker of a JPEG is not read.
    return Question(question.image + number.to_bytes(4, "big"), question.noun)


async def ask(engine: InferenceEngine, question: Question) -> float:
    """Milliseconds of one request."""
    began = time.perf_counter()
    await engine.segment(image=question.image, object=question.noun)
    return (time.perf_counter() - began) * 1e3


async def at_once(engine: InferenceEngine, asked: list[Question], clients: int) -> dict[str, float]:
    """Requests per second and percentiles of latency with so many clients."""
    waiting = iter(asked)
    times: list[float] = []

    async def client() -> None:
        for question in waiting:
            times.append(await ask(engine, question))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    return {
        "requests_per_s": len(times) / seconds,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
    }


async def batching(rounds: int) -> dict[str, Any]:
    """Throughput by concurrency, every picture new; rounds alternate between the levels."""
    engine = await InferenceEngine.create(
        RuntimeConfig(refiner=None, torch_threads=1, max_batch_size=16)
    )
    pool = questions()
    seen: dict[int, list[dict[str, float]]] = {level: [] for level in LEVELS}
    number = 0
    for _ in range(rounds):
        for level in LEVELS:
            asked = [varied(pool[n % len(pool)], number + n) for n in range(max(16, 2 * level))]
            number += len(asked)
            seen[level].append(await at_once(engine, asked, level))
    levels = {
        level: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for level, runs in seen.items()
    }
    gain = [
        many["requests_per_s"] / one["requests_per_s"]
        for one, many in zip(seen[1], seen[LEVELS[-1]], strict=True)
    ]
    same: list[float] = []
    for n in range(rounds):
        several = [q for q in pool if q.image == pool[0].image][:3]
        fresh = [varied(several[i % len(several)], number + 8 * n + i) for i in range(4)]
        shared = [Question(fresh[0].image, q.noun) for q in fresh]
        began = time.perf_counter()
        await asyncio.gather(*(ask(engine, q) for q in shared))
        together = time.perf_counter() - began
        fresh = [varied(q, 7) for q in fresh]
        began = time.perf_counter()
        await asyncio.gather(*(ask(engine, q) for q in fresh))
        same.append((time.perf_counter() - began) / together)
    await engine.shutdown()
    return {
        "levels": levels,
        "sixteen_over_one": statistics.median(gain),
        "four_images_over_four_nouns_of_one": statistics.median(same),
    }


async def idle_overhead(rounds: int) -> dict[str, float]:
    """Milliseconds that a request waits beyond the time its prefill and decode took."""
    engine = await InferenceEngine.create(RuntimeConfig(refiner=None, torch_threads=1))
    beyond = []
    question = questions()[0]
    for _ in range(rounds * 8):
        began = time.perf_counter()
        result = await engine.segment(image=question.image, object=question.noun)
        spent = result.metrics.prefill_time_ms + result.metrics.decode_time_ms
        beyond.append((time.perf_counter() - began) * 1e3 - spent)
    await engine.shutdown()
    return {"overhead_ms": statistics.median(beyond)}


def random_checkpoint(folder: Path) -> int:
    """Write a random model of about 300 million parameters; gives their number."""
    shipped = MoondreamConfig.from_dict(json.loads((NANO / "config.json").read_text()))
    sizes = shipped.to_dict()
    sizes["text"] |= {"dim": 1024, "ff_dim": 4096, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16}
    sizes["vision"] |= {"proj_out_dim": 1024}
    sizes["region"] |= {"dim": 1024}
    config = MoondreamConfig.from_dict(sizes)
    torch.manual_seed(0)
    model = Moondream(config)
    save_file(dict(model.named_parameters()), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_bytes((NANO / "tokenizer.json").read_bytes())
    return sum(p.numel() for p in model.parameters())


def read_bandwidth(megabytes: int) -> float:
    """GB/s at which torch reads so much memory once."""
    data = torch.ones(megabytes * 2**20 // 4)
    data.sum()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return data.numel() * 4 / min(times) / 1e9


def decode_rate(folder: Path) -> dict[str, float]:
    """Decode steps per second of one row, and the share of what reading the weights allows."""
    from kestrel.moondream.model import load

    model = load(folder, torch.device("cpu"), torch.float32)
    # The vision tower and the embedding table are not read in a decode step.
    stepped = [*model.text.blocks.parameters(), *model.text.lm_head.parameters()]
    gigabytes = sum(p.numel() * 4 for p in stepped) / 1e9
    bandwidth = read_bandwidth(round(gigabytes * 1e3))
    cache, slots = model.new_cache(1), torch.tensor([0])
    with torch.inference_mode():
        hidden = model.prefill(
            torch.randn(1, 90, model.config.text.dim), torch.tensor([90]), 82, cache, slots
        )
        times = []
        for step in range(TOKENS):
            began = time.perf_counter()
            token = model.logits(hidden).argmax(-1)
            position = torch.tensor([90 + step])
            hidden = model.cached.decode(
                model.embed_tokens(token), position, cache, None, 91 + step, level=True
            )
            times.append(time.perf_counter() - began)
    per_step = statistics.median(times)
    return {
        "weights_gb": gigabytes,
        "read_gb_per_s": bandwidth,
        "steps_per_s": 1 / per_step,
        "share_of_bound": gigabytes / bandwidth / per_step,
    }


def plot(levels: dict[int, dict[str, float]], file: Path) -> None:
    """Throughput and latency against concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    clients = list(levels)
    left.plot(clients, [levels[c]["requests_per_s"] for c in clients], marker="o")
    left.set_ylabel("requests per second")
    for key in ("p50_ms", "p99_ms"):
        right.plot(clients, [levels[c][key] for c in clients], marker="o", label=key[:3])
    right.set_ylabel("milliseconds")
    right.legend()
    for axis in (left, right):
        axis.set_xlabel("clients")
        axis.set_ylim(0)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file (needs matplotlib)")
    parser.add_argument("--skip-large", action="store_true", help="without the 300 M model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    figures |= asyncio.run(batching(args.rounds))
    print(f"{'clients':>8}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}")
    for level, row in figures["levels"].items():
        print(f"{level:8d}{row['requests_per_s']:12.1f}{row['p50_ms']:9.1f}{row['p99_ms']:9.1f}")
    print(f"16 at once over one at a time: {figures['sixteen_over_one']:.2f}x")
    ratio = figures["four_images_over_four_nouns_of_one"]
    print(f"four images over four nouns of one image: {ratio:.2f}x the time")
    figures |= asyncio.run(idle_overhead(args.rounds))
    print(f"an idle engine adds {figures['overhead_ms']:.2f} ms to prefill and decode")
    if not args.skip_large:
        with tempfile.TemporaryDirectory() as folder:
            figures["parameters"] = random_checkpoint(Path(folder))
            figures["large"] = decode_rate(Path(folder))
        large = figures["large"]
        print(
            f"{figures['parameters'] / 1e6:.0f} M parameters: {large['steps_per_s']:.1f} steps/s, "
            f"{large['share_of_bound']:.0%} of what reading {large['weights_gb']:.2f} GB at "
            f"{large['read_gb_per_s']:.1f} GB/s allows"
        )
    if args.plot:
        plot(figures["levels"], args.plot)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
