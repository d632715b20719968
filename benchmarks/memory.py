"""Host memory at its peak while a checkpoint is loaded, beside the checkpoint's size.

    python benchmarks/memory.py --out memory.json

Writes a checkpoint of about 4 GB in the shapes of Moondream 3 with fewer layers (bfloat16; as
safetensors in shards, then as one .pt), and loads it in a process of its own as the engine does.
Needs about 5 GB of disk and 6 GB of memory free.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kestrel.config import SHIPPED_MODELS
from kestrel.moondream.config import MOONDREAM_3, MoeConfig, MoondreamConfig
from kestrel.moondream.model import Moondream, load

ALLOWED = 1.2
"""Peak over the checkpoint's size that is still well."""
SHARD_BYTES = 1 << 30
FORMS = ("safetensors", "pt")


def synthetic(layers: int, dense: int) -> MoondreamConfig:
    """Moondream 3 with so many layers, the first ``dense`` of them without experts."""
    text = replace(MOONDREAM_3.text, n_layers=layers, moe=MoeConfig(start_layer=dense))
    return replace(MOONDREAM_3, text=text, name="synthetic")


def write(folder: Path, form: str, config: MoondreamConfig) -> int:
    """Write the checkpoint in one of ``FORMS``; gives its bytes."""
    with torch.device("meta"):
        shapes = {f"model.{n}": p.shape for n, p in Moondream(config).named_parameters()}
    if form == "pt":
        torch.save({name: filled(shape) for name, shape in shapes.items()}, folder / "model.pt")
    else:
        write_shards(folder, shapes)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tokenizer = SHIPPED_MODELS / "nano" / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return sum(2 * shape.numel() for shape in shapes.values())


def filled(shape: torch.Size) -> torch.Tensor:
    return torch.full(shape, 0.5, dtype=torch.bfloat16)


def write_shards(folder: Path, shapes: dict[str, torch.Size]) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    files: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: filled(shapes[name]) for name in names}, str(folder / file))
        files |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index)


def resident(key: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def load_here(folder: Path) -> dict[str, int]:
    """Load in this process; its bytes before, at the peak and after."""
    before = resident("VmRSS")
    model = load(folder, torch.device("cpu"), torch.bfloat16, max_context=1024)
    held = sum(p.nbytes for p in model.parameters())
    return {"before": before, "peak": resident("VmHWM"), "after": resident("VmRSS"), "model": held}


def measure(form: str, config: MoondreamConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), form, config)
        done = subprocess.run(
            [sys.executable, __file__, "--load", name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    seen = json.loads(done.stdout)
    return {"checkpoint": size, **seen, "peak_over_size": (seen["peak"] - seen["before"]) / size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="6 are about 4 GB")
    parser.add_argument("--dense", type=int, default=3, help="of them without experts")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load_here(args.load)))
        return 0
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    print(f"{'format':>12}{'checkpoint':>12}{'before':>9}{'peak':>9}{'after':>9}  peak over size")
    for form in FORMS:
        row = figures[form] = measure(form, synthetic(args.layers, args.dense))
        sizes = "".join(f"{row[key] / 1e9:8.2f}G" for key in ("before", "peak", "after"))
        checkpoint = f"{row['checkpoint'] / 1e9:11.2f}G"
        print(f"{form:>12}{checkpoint}{sizes}{row['peak_over_size']:16.3f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    over = [form for form in FORMS if figures[form]["peak_over_size"] > ALLOWED]
    if over:
        print(f"more than {ALLOWED} times the checkpoint: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
