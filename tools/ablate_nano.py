"""What each choice of the training is worth: the vision phase, shortened, without one at a time.

    python tools/ablate_nano.py --minutes 2 --out runs/ablation.json

Every variant trains for the same time on the same scenes; the figures are those of 400 scenes kept
aside. Also measured: the rates of the matmuls that training is made of, by number format.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from nano_checkpoint import build_tokenizer, nano_config
from nano_muon import optimisers
from nano_questions import BatchMaker, SceneQuestions
from nano_start import initialise, picture_patches
from nano_training import Batch, Losses
from nouns import CORE, CORE_STYLES
from scene_store import Scenes, build_store
from words import vocabulary_words

from kestrel.moondream.model import Moondream

VARIANTS = (
    "as trained",
    "AdamW alone",
    "random patch embedding",
    "random positions",
    "random attention",
    "bfloat16 matmuls",
    "peak 3e-3",
)
HELD_BACK = 400


def matmul_rates() -> dict[str, float]:
    """GFLOP/s of [1944, 192] x [192, 768], the largest product of a step, by number format."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1944, 192).to(dtype), torch.randn(192, 768).to(dtype)
        for _ in range(5):
            a @ b
        began, count = time.perf_counter(), 100
        for _ in range(count):
            a @ b
        flop = 2 * a.shape[0] * a.shape[1] * b.shape[1] * count
        rates[str(dtype).removeprefix("torch.")] = flop / (time.perf_counter() - began) / 1e9
    return rates


def judge(model: Moondream, losses: Losses, batch: Batch) -> dict[str, float]:
    """Dense loss, and the share of patches mostly within an object that name it."""
    with torch.no_grad():
        image, early = losses.encode_image(batch.images)
        _, parts = losses.dense_losses(image, early, batch)
        nouns = torch.cat([model.text.wte[losses.noun_ids], losses.background[None]])
        named = (F.normalize(image, dim=-1) @ F.normalize(nouns, dim=-1).T).argmax(-1)
        most, truth = batch.patches.max(-1)
        inside = (truth < len(losses.noun_ids)) & (most > 0.6)
    right = float((named == truth)[inside].float().mean())
    return {
        "dense": parts["dense"].item(),
        "boxes": parts["boxes"].item(),
        "patches_named": right,
    }


def train(variant: str, store: Scenes, minutes: float) -> dict[str, float]:
    """Figures of one variant after so many minutes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary_words())
    model = Moondream(nano_config(tokenizer))
    asker = SceneQuestions(tokenizer, CORE)
    integer_ids = [tokenizer.token_to_id(str(v)) for v in range(961)]
    patch = model.config.vision.enc_patch_size
    initialise(model, integer_ids, picture_patches(store.arrays["images"][:500].numpy(), patch))
    if variant == "random patch embedding":
        torch.nn.init.normal_(model.vision.patch_emb.weight, std=0.04)
        torch.nn.init.zeros_(model.vision.patch_emb.bias)
    elif variant == "random positions":
        torch.nn.init.normal_(model.vision.pos_emb, std=0.04)
    elif variant == "random attention":
        for block in model.vision.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.04)
    peak = 3e-3 if variant == "peak 3e-3" else 1.5e-3
    losses = Losses(model, asker.noun_ids, asker.level_ids)
    parameters = [*model.parameters(), *losses.heads().values()]
    moving = optimisers(model, losses.heads().values(), peak, adamw_alone=variant == "AdamW alone")
    options = {"questions": 0, "boxes_only": False, "seed": 1}
    held_back = BatchMaker(store, asker, scenes=HELD_BACK, **options).batch(
        torch.arange(len(store) - HELD_BACK, len(store))
    )
    batches = BatchMaker(store, asker, scenes=24, rows=len(store) - HELD_BACK, **options)
    began, scenes = time.monotonic(), 0
    for batch in batches:
        progress = (time.monotonic() - began) / (60 * minutes)
        if progress >= 1:
            break
        rate = peak * min(1.0, progress / 0.03 + 0.02) * math.cos(progress * math.pi / 2)
        for group in (group for optimiser in moving for group in optimiser.param_groups):
            group["lr"] = rate
        half = torch.autocast("cpu", torch.bfloat16)
        with half if variant == "bfloat16 matmuls" else contextlib.nullcontext():
            loss, _ = losses.vision_only(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in moving:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        scenes += len(batch.images)
    return {"scenes": scenes, **judge(model, losses, held_back)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="for each variant")
    parser.add_argument("--store", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--store-scenes", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=1, help="of the store")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.json"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    rates = matmul_rates()
    print("matmul GFLOP/s:", {name: round(rate) for name, rate in rates.items()}, flush=True)
    store = build_store(
        args.store, count=args.store_scenes, seed=args.seed, nouns=CORE, styles=CORE_STYLES
    )
    table = {}
    print(f"{'variant':26}{'scenes':>9}{'dense':>9}{'boxes':>9}{'patches named':>15}")
    for variant in VARIANTS:
        figures = table[variant] = train(variant, store, args.minutes)
        print(
            f"{variant:26}{figures['scenes']:9d}{figures['dense']:9.3f}{figures['boxes']:9.4f}"
            f"{figures['patches_named']:15.3f}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    told = {"minutes": args.minutes, "matmul_gflops": rates, "variants": table}
    args.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
