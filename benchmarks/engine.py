"""What the engine makes of its model: batching, image reuse, decode against memory bandwidth.

    python benchmarks/engine.py --out engine.json --plot engine.png --reference CHECKOUT

CHECKOUT: a clone of github.com/vikhyat/moondream, run beside the engine (public_model.py).

Everything compared is run alternately in one process, so that the ratios hold on a machine whose
clock wanders. Masks are not part of it: no refiner runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from public_model import against_public, talkative
from safetensors.torch import save_file

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.api import SegmentRequest, SegmentSettings
from kestrel.config import SHIPPED_MODELS
from kestrel.engine import load_configured
from kestrel.image import decode
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.crops import overlap_crops
from kestrel.moondream.model import Moondream, load
from kestrel.skills.segment import Coord, Phase, SegmentDecode, Size, Token, build_prompt

NANO = SHIPPED_MODELS / "nano"
SAMPLES = NANO / "samples"
LEVELS = (1, 2, 4, 8, 16)
TOKENS = 48
"""Tokens that the random model is measured over."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


async def ask(
    engine: InferenceEngine, question: Question, settings: dict[str, int] | None = None
) -> float:
    """Milliseconds of one request."""
    began = time.perf_counter()
    await engine.segment(image=question.image, object=question.noun, settings=settings)
    return (time.perf_counter() - began) * 1e3


async def at_once(
    engine: InferenceEngine,
    asked: list[Question],
    clients: int,
    settings: dict[str, int] | None = None,
) -> dict[str, float]:
    """Requests per second and percentiles of latency with so many clients."""
    waiting = iter(asked)
    times: list[float] = []

    async def client() -> None:
        for question in waiting:
            times.append(await ask(engine, question, settings))

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


async def large_batching(folder: Path, rounds: int) -> dict[str, float]:
    """Requests per second of the random model, sixteen at once and one at a time, alternating."""
    runtime = RuntimeConfig(
        model_path=str(folder),
        refiner=None,
        torch_threads=1,
        max_batch_size=16,
        max_context=416,  # image, prompt and ``TOKENS``
        allow_empty_paths=True,
    )
    engine = await InferenceEngine.create(runtime)
    pool, settings = questions(), {"max_tokens": TOKENS}
    rates: dict[int, list[float]] = {1: [], 16: []}
    number = 0
    for _ in range(rounds):
        for level, count in ((1, 3), (16, 16)):
            asked = [varied(pool[n % len(pool)], number + n) for n in range(count)]
            number += count
            row = await at_once(engine, asked, level, settings)
            rates[level].append(row["requests_per_s"])
    await engine.shutdown()
    gain = [many / one for one, many in zip(rates[1], rates[16], strict=True)]
    return {
        "one_per_s": statistics.median(rates[1]),
        "sixteen_per_s": statistics.median(rates[16]),
        "sixteen_over_one": statistics.median(gain),
    }


@torch.inference_mode()
def bare_call(model: Moondream, question: Question) -> tuple[str, dict[str, float]]:
    """The path of a request by the model's own functions, one after the other, and milliseconds of
    their parts."""
    parts: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        parts[name], began = (now - began) * 1e3, now

    pixels = decode(question.image)
    lap("decode_image")
    crops, tiling = overlap_crops(pixels, model.config.vision)
    lap("crops")
    image = model.vision.embed(torch.from_numpy(crops).permute(0, 3, 1, 2), tiling)
    lap("vision")
    special, text = model.config.prompt, model.cached
    cache, slots = model.new_cache(1), torch.tensor([0])
    bos = model.embed_tokens(torch.tensor([special.bos_id]))
    cache.put(0, text.prefix(torch.cat([bos, image.to(bos.dtype)])))
    lap("prefix")
    request = SegmentRequest(question.noun, question.image, settings=SegmentSettings())
    prompt = build_prompt(request, model.config, model.tokenizer)
    start = prompt.length - len(prompt.tokens)
    embeds = model.embed_tokens(torch.tensor([prompt.tokens]))
    hidden = text.extend(embeds, torch.tensor([start]), cache, slots, prompt.length)[:, -1]
    lap("prompt")
    answer = SegmentDecode(special, model.tokenizer, 768)
    position = prompt.length
    while True:
        token: Token
        if answer.phase is Phase.SIZE:
            bins = model.size_logits(hidden)[0].argmax(-1)
            width, height = model.region.size_value(bins).tolist()
            token = Size(width, height)
            embeds = model.encode_size(torch.tensor([token]))
        else:
            token = int(model.logits(hidden).argmax()) if answer.phase is not Phase.CENTRE_Y else 0
            if answer.phase is Phase.CENTRE_Y or token == special.coord_id:
                token = Coord(float(model.region.coord_value(model.coord_logits(hidden).argmax())))
                embeds = model.encode_coord(torch.tensor([token.value]))
            else:
                embeds = model.embed_tokens(torch.tensor([token]))
        answer.push(token)
        if answer.phase is Phase.DONE:
            break
        at = torch.tensor([position])
        position += 1
        hidden = text.decode(embeds, at, cache, None, position, level=True)
    lap("answer")
    return answer.path, parts


def shipped_model() -> Moondream:
    """The shipped model as an engine would load it."""
    return load_configured(RuntimeConfig(device="cpu"))[0]


async def idle_overhead(rounds: int) -> dict[str, Any]:
    """Milliseconds that the engine adds to the bare call of its model, a picture each; the parts of
    that call."""
    engine = await InferenceEngine.create(RuntimeConfig(refiner=None, torch_threads=1))
    model = shipped_model()
    bare, served, parts = [], [], []
    pool = questions()
    for n in range(rounds * 12):
        question = varied(pool[n % len(pool)], 10**6 + n)
        began = time.perf_counter()
        path, laps = bare_call(model, question)
        bare.append((time.perf_counter() - began) * 1e3)
        parts.append(laps)
        began = time.perf_counter()
        result = await engine.segment(image=question.image, object=question.noun)
        served.append((time.perf_counter() - began) * 1e3)
        if result.output["segments"][0]["coarse_path"] != path:
            raise RuntimeError(f"the bare call gives {path[:60]}, the engine another path")
    await engine.shutdown()
    added = [ours - theirs for ours, theirs in zip(served, bare, strict=True)]
    return {
        "bare_ms": statistics.median(bare),
        "overhead_ms": statistics.median(added),
        "parts_ms": {name: statistics.median(p[name] for p in parts) for name in parts[0]},
    }


def large_config() -> MoondreamConfig:
    """Sizes of about 300 million parameters, pictures as the shipped model takes them."""
    shipped = MoondreamConfig.from_dict(json.loads((NANO / "config.json").read_text()))
    sizes = shipped.to_dict()
    sizes["text"] |= {"dim": 1024, "ff_dim": 4096, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16}
    sizes["vision"] |= {"proj_out_dim": 1024}
    sizes["region"] |= {"dim": 1024}
    return MoondreamConfig.from_dict(sizes)


def random_checkpoint(folder: Path) -> int:
    """Write a random model of about 300 million parameters; gives their number."""
    config = large_config()
    torch.manual_seed(0)
    model = talkative(Moondream(config))
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


def decode_rate(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Decode steps per second of one row, and the share of what reading the weights allows."""
    model = load(folder, torch.device("cpu"), dtype)
    # The vision tower and the embedding table are not read in a decode step.
    stepped = [*model.text.blocks.parameters(), *model.text.lm_head.parameters()]  # type: ignore[attr-defined]
    gigabytes = sum(p.numel() * p.element_size() for p in stepped) / 1e9
    bandwidth = read_bandwidth(round(gigabytes * 1e3))
    cache, slots = model.new_cache(1), torch.tensor([0])
    with torch.inference_mode():
        prompt = torch.randn(1, 90, model.config.text.dim).to(dtype)
        hidden = model.prefill(prompt, torch.tensor([90]), 82, cache, slots)
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


def machine() -> str:
    """Processor, its vectors as torch uses them, and cores of this machine."""
    cpus = Path("/proc/cpuinfo")
    names = {
        line.split(":")[1].strip()
        for line in (cpus.read_text().splitlines() if cpus.exists() else [])
        if line.startswith("model name")
    }
    name = ", ".join(names) or platform.machine()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({vectors}), {os.cpu_count()} cores, no GPU used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file (needs matplotlib)")
    parser.add_argument("--skip-large", action="store_true", help="without the 300 M model")
    parser.add_argument("--reference", type=Path, help="a checkout of the public implementation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"machine": machine(), "torch": torch.__version__}
    print(figures["machine"])
    figures |= asyncio.run(batching(args.rounds))
    print(f"{'clients':>8}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}")
    for level, row in figures["levels"].items():
        print(f"{level:8d}{row['requests_per_s']:12.1f}{row['p50_ms']:9.1f}{row['p99_ms']:9.1f}")
    print(f"16 at once over one at a time: {figures['sixteen_over_one']:.2f}x")
    ratio = figures["four_images_over_four_nouns_of_one"]
    print(f"four images over four nouns of one image: {ratio:.2f}x the time")
    figures["idle"] = idle = asyncio.run(idle_overhead(args.rounds))
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in idle["parts_ms"].items())
    print(f"a bare call takes {idle['bare_ms']:.1f} ms ({parts})")
    print(f"an idle engine adds {idle['overhead_ms']:.2f} ms")
    if not args.skip_large:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            figures["parameters"] = random_checkpoint(folder)
            print(f"{figures['parameters'] / 1e6:.0f} M random parameters:")
            figures["large"] = {key: decode_rate(folder, dtype) for key, dtype in DTYPES.items()}
            for key, large in figures["large"].items():
                print(
                    f"  {key}: {large['steps_per_s']:.1f} steps/s, {large['share_of_bound']:.0%} "
                    f"of what reading {large['weights_gb']:.2f} GB at "
                    f"{large['read_gb_per_s']:.1f} GB/s allows"
                )
            figures["large_batching"] = asyncio.run(large_batching(folder, min(args.rounds, 2)))
            print(f"  16 at once over one: {figures['large_batching']['sixteen_over_one']:.2f}x")
    if args.reference:
        compared = asyncio.run(against_public(args.reference, min(args.rounds, 3), 16))
        figures["public"] = compared
        print(
            f"public implementation, {compared['parameters'] / 1e6:.0f} M parameters, same tokens: "
            f"{compared['requests_per_s']['public']:.2f} requests/s; one at a time "
            f"{compared['one_over_public']:.2f}x, 16 at once {compared['at_once_over_public']:.2f}x"
        )
    if args.plot:
        plot(figures["levels"], args.plot)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
