"""What one device makes of models of three sizes: steps against memory bandwidth, requests.

    python benchmarks/device.py --device cuda --out device.json

The shipped model, and two of random weights that are drawn on the device: about 300 million
parameters, and Moondream 3 at its published size with its experts. Decode steps are run by the
engine's own classes, operator by operator and as captured graphs, with torch's attention and with
FlashInfer's where that runs; then whole requests go through engines. The random models answer with
a box and a fixed number of tokens. Masks are not part of it: no refiner runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine import NANO, Question, large_config, machine, questions, varied
from public_model import talkative
from torch import nn

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.engine import EngineResult
from kestrel.moondream.config import MOONDREAM_3, MoondreamConfig
from kestrel.moondream.kv import PAGE
from kestrel.moondream.model import Moondream, load
from kestrel.moondream.moe import MixtureOfExperts
from kestrel.moondream.steps import DecodeSteps
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.ops import fast
from kestrel.ops.device import resolve_device, resolve_dtype

TOKENS = 64
"""Tokens of an answer of the random models."""
ANSWER_ROOM = 200
"""Positions for what follows the image."""


@dataclass(frozen=True)
class Case:
    """A model and how much of it is asked for."""

    name: str
    config: MoondreamConfig | None
    """None: the shipped checkpoint."""
    levels: tuple[int, ...]
    """Requests at once."""


def cases(most: int) -> list[Case]:
    context = MOONDREAM_3.text.prefix_attn + ANSWER_ROOM
    full = replace(MOONDREAM_3, text=replace(MOONDREAM_3.text, max_context=-(-context // 64) * 64))
    levels = tuple(n for n in (1, 16, 32) if n <= most)
    return [
        Case("9B", full, levels),
        Case("300M", large_config(), levels),
        Case("nano", None, levels),
    ]


# Models


def drawn(config: MoondreamConfig, device: torch.device, dtype: torch.dtype) -> Moondream:
    """A random model, each tensor drawn on the device, ready to serve."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Moondream(config)
    for module in list(model.modules()):
        for name, shape in [(n, p.shape) for n, p in module.named_parameters(recurse=False)]:
            weights = torch.zeros(shape, device=device, dtype=dtype)
            if len(shape) > 1:
                weights.normal_(std=shape[-1] ** -0.5)
            elif isinstance(module, nn.LayerNorm) and name == "weight":
                weights += 1
            setattr(module, name, nn.Parameter(weights, requires_grad=False))
    with torch.no_grad():
        model.text.wte.mul_(config.text.dim**0.5 / 20)  # of order 1 once it talks
    talkative(model)
    model.text.reset_tables()
    model.fuse()
    model.tokenizer = SegmentTokenizer.from_file(NANO / "tokenizer.json", config.prompt)
    return model.eval().requires_grad_(False)


def ready(case: Case, device: torch.device, dtype: torch.dtype) -> Moondream:
    return load(NANO, device, dtype) if case.config is None else drawn(case.config, device, dtype)


# The device


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device, seconds: float = 0.4) -> float:
    """Median time of a call, its work on the device included; 3 to 100 of them."""
    for _ in range(2):
        run()
    wait(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < 100 and time.perf_counter() < end):
        began = time.perf_counter()
        run()
        wait(device)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def bandwidth(device: torch.device) -> float:
    """GB/s of a large copy within the device's memory, bytes read and written."""
    count = 2**31 if device.type == "cuda" else 2**28
    source = torch.empty(count // 2, device=device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    return 2 * count / milliseconds(lambda: target.copy_(source), device) / 1e6


def allocated(device: torch.device) -> float:
    """GB that tensors hold on a GPU."""
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")


# Decode steps


def weights_read(model: Moondream, rows: int) -> float:
    """GB of weights that a step of so many rows must read: of experts those that are chosen, if
    every one is as likely."""
    every = [*model.text.blocks.parameters(), *model.text.lm_head.parameters()]  # type: ignore[attr-defined]
    read = float(sum(p.nbytes for p in every))
    moe = model.config.text.moe
    if moe is not None:
        missed = (1 - moe.experts_per_token / moe.num_experts) ** rows
        for block in model.text.blocks:
            if isinstance(block.mlp, MixtureOfExperts):
                read -= missed * (block.mlp.fc1.weight.nbytes + block.mlp.fc2.weight.nbytes)
    return read / 1e9


@torch.inference_mode()
def steps_of(
    model: Moondream, case: Case, gb_per_s: float, kernels: list[str]
) -> list[dict[str, Any]]:
    """Time per step by kernels and rows: called operator by operator, captured, the bound."""
    text, device, most = model.cached, model.device, case.levels[-1]
    c = model.config.text
    at = min(c.max_context - 1, c.prefix_attn + 40)
    found = []
    for name in kernels:
        pages = text.new_pages(most)
        began = time.perf_counter()
        steps = DecodeSteps(text, pages, flashinfer=name == "flashinfer")
        wait(device)
        seconds = time.perf_counter() - began
        for row in range(most):
            pages.reserve(row, at + 1)
        pages.kv.normal_()
        for rows in case.levels:
            x = torch.randn(rows, c.dim, device=device, dtype=model.dtype)
            filled = [at] * rows
            size = next(n for n in steps._sizes if n >= rows)
            span = next(n for n in steps._spans if n > at)
            called = steps._step(size, span)
            whole = milliseconds(partial(steps, x, filled), device)
            alone = milliseconds(steps._steps[size, span], device)
            cache_gb = rows * (at + 1) * pages.position_bytes / 1e9
            bound = (weights_read(model, rows) + cache_gb) / gb_per_s * 1e3
            found.append(
                {
                    "kernels": name,
                    "rows": rows,
                    "called_ms": milliseconds(called, device),
                    "captured_ms": alone,
                    "with_inputs_ms": whole,
                    "bound_ms": bound,
                    "share_of_bound": bound / whole,
                    "tokens_per_s": rows / whole * 1e3,
                    "all_captures_s": seconds,
                }
            )
            print(
                f"  {name:>10}{rows:5d} rows: called {found[-1]['called_ms']:8.2f} ms, captured "
                f"{alone:7.2f}, with inputs {whole:7.2f}, bound {bound:6.2f} "
                f"({bound / whole:4.0%}), {rows / whole * 1e3:8.0f} tokens/s",
                flush=True,
            )
        gc.collect()
    return found


@torch.inference_mode()
def prefill_of(model: Moondream) -> dict[str, float]:
    """Milliseconds of a crop in the vision tower, four at once, and of an image's prefix."""
    config, device = model.config, model.device
    side = config.vision.crop_size
    crops = torch.randint(0, 256, (4, 3, side, side), device=device, dtype=torch.uint8)
    image = torch.randn(config.text.prefix_attn, config.text.dim, device=device, dtype=model.dtype)
    return {
        "crop_ms": milliseconds(lambda: model.vision.features(crops[:1]), device),
        "four_crops_ms": milliseconds(lambda: model.vision.features(crops), device),
        "prefix_ms": milliseconds(lambda: model.cached.prefix(image), device),
    }


# Requests


async def ask(engine: InferenceEngine, question: Question, tokens: int) -> EngineResult:
    return await engine.segment(
        image=question.image, object=question.noun, settings={"max_tokens": tokens}
    )


async def requests_of(
    model: Moondream, case: Case, kernels: str, image_cache_bytes: int
) -> dict[str, Any]:
    """Whole requests through an engine, every picture new, but where nouns share one."""
    device = model.device
    runtime = RuntimeConfig(
        refiner=None,
        kernels=kernels if device.type == "cuda" else "auto",
        max_batch_size=case.levels[-1],
        max_context=min(4096, model.config.text.max_context),
        image_cache_bytes=image_cache_bytes,
        allow_empty_paths=True,
    )
    began = time.perf_counter()
    engine = InferenceEngine(runtime, model)
    await engine._check()
    found: dict[str, Any] = {"kernels": kernels, "start_s": time.perf_counter() - began}
    pool, number = questions(), 0
    tokens = TOKENS if case.config is not None else 200

    def fresh(count: int, among: list[Question] = pool) -> list[Question]:
        nonlocal number
        number += count
        return [varied(among[n % len(among)], n) for n in range(number - count, number)]

    for level in case.levels:
        asked = iter(fresh(6 if level == 1 else 2 * level))
        results: list[EngineResult] = []

        async def client(asked: Any = asked, results: list[EngineResult] = results) -> None:
            for question in asked:
                results.append(await ask(engine, question, tokens))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(level)))
        seconds = time.perf_counter() - began
        metrics = [result.metrics for result in results]
        row = found[f"{level} at once"] = {
            "requests_per_s": len(results) / seconds,
            "tokens_per_s": sum(m.output_tokens for m in metrics) / seconds,
            "ttft_ms": statistics.median(m.ttft_ms for m in metrics),
            "prefill_ms": statistics.median(m.prefill_time_ms for m in metrics),
            "ms_per_token": statistics.median(m.decode_time_ms / m.output_tokens for m in metrics),
        }
        print(
            f"  {kernels:>10}{level:5d} at once: {row['requests_per_s']:7.2f} requests/s, "
            f"{row['tokens_per_s']:7.0f} tokens/s, first token {row['ttft_ms']:7.1f} ms, "
            f"{row['ms_per_token']:6.2f} ms per token",
            flush=True,
        )
    times: dict[str, list[float]] = {"nouns": [], "images": []}
    # Of a picture that shows all of them: an answer about what is not there is short.
    most_shown = Counter(question.image for question in pool).most_common(1)[0][0]
    shown = [question for question in pool if question.image == most_shown][:4]
    for _ in range(2):
        images = fresh(4, shown)
        one = fresh(1, shown)[0].image
        nouns = [Question(one, q.noun) for q in images]
        for name, group in (("nouns", nouns), ("images", images)):
            began = time.perf_counter()
            await asyncio.gather(*(ask(engine, q, tokens) for q in group))
            times[name].append(time.perf_counter() - began)
    found["four_nouns_ms"], found["four_images_ms"] = (
        statistics.median(times[name]) * 1e3 for name in ("nouns", "images")
    )
    print(
        f"  {kernels:>10} four nouns of one image {found['four_nouns_ms']:.0f} ms, four images "
        f"{found['four_images_ms']:.0f} ms",
        flush=True,
    )
    found["allocated_gb"] = allocated(device)
    await engine.shutdown()
    return found


def measure(case: Case, device: torch.device, dtype: torch.dtype, gb_per_s: float) -> Any:
    began = time.perf_counter()
    model = ready(case, device, dtype)
    wait(device)
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "made_s": time.perf_counter() - began,
        "model_gb": allocated(device),
    }
    print(
        f"{case.name}: {figures['parameters'] / 1e9:.3f} G parameters, made in "
        f"{figures['made_s']:.1f} s, {figures['model_gb']:.2f} GB",
        flush=True,
    )
    kernels = ["torch"]
    c = model.config.text
    like = model.text.wte
    if fast.wanted("auto", like, (c.n_heads, c.n_kv_heads, c.head_dim), PAGE):
        kernels.insert(0, "flashinfer")
    figures["prefill"] = prefill_of(model)
    print("  " + ", ".join(f"{name} {ms:.1f}" for name, ms in figures["prefill"].items()))
    figures["steps"] = steps_of(model, case, gb_per_s, kernels)
    budget = 2**30 if case.name == "9B" else 256 * 2**20
    figures["requests"] = [asyncio.run(requests_of(model, case, name, budget)) for name in kernels]
    if device.type == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        print(f"  peak {figures['peak_gb']:.2f} GB", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16")
    names = [case.name for case in cases(1)]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--most", type=int, default=32, help="requests at once, at most")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else machine()
    gb_per_s = bandwidth(device)
    figures: dict[str, Any] = {
        "machine": name,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_per_s": gb_per_s,
        "tokens": TOKENS,
    }
    print(f"{name}, torch {torch.__version__}, {figures['dtype']}, copies at {gb_per_s:.0f} GB/s")
    for case in cases(args.most):
        if case.name not in args.models:
            continue
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        figures[case.name] = measure(case, device, dtype, gb_per_s)
        figures[case.name]["seconds"] = time.perf_counter() - began
        gc.collect()
        if args.out:
            args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
