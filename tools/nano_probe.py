"""What each block of the vision tower, and what the decoder reads of it, knows of shapes.

    python tools/nano_probe.py kestrel/models/nano

A linear map is fitted, on new scenes of the training's kind, from what a block gives for a patch to
which of its 7 x 7 cells its object covers. The share of cells that it gets wrong on other patches,
of those that an object's edge goes through, says whether blocks add to what is known, and whether
the projection hands it on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from nano_checkpoint import read_checkpoint
from nano_questions import BatchMaker, SceneQuestions
from nouns import CORE, CORE_STYLES
from scene_store import build_store
from torch import Tensor

from kestrel.moondream.vision import VisionEncoder

GROUP = 50
"""Scenes that are encoded together."""
FITTED = 0.8
"""Share of the patches that the map is fitted to; it is judged on the others."""
RIDGE = 10.0
EDGE = 0.02
"""An edge goes through a patch of which the object covers at least this share, and leaves it."""


def stages(vision: VisionEncoder, images: Tensor) -> dict[str, Tensor]:
    """What the embedding, each block and the projection give, [B, 576, dim] each."""
    x = vision._patches(images)
    found = {"embedding": x}
    for number, block in enumerate(vision.blocks):
        x = found[f"block {number}"] = block(x)
    features = vision.post_ln(x)
    return found | {"read by the decoder": vision.project(features, features)}


def wrong_cells(known: Tensor, cells: Tensor) -> float:
    """Share of the cells [n, 49] of edges that a linear map of ``known`` [n, dim] gets wrong."""
    known = F.layer_norm(known, known.shape[-1:])
    known = torch.cat([known, torch.ones(len(known), 1)], -1).double()
    fitted = int(len(known) * FITTED)
    inputs, wanted = known[:fitted], cells[:fitted].double()
    ridge = RIDGE * torch.eye(inputs.shape[1], dtype=torch.double)
    guess = known[fitted:] @ torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted)
    judged = cells[fitted:]
    share = judged.mean(-1)
    edge = (share > EDGE) & (share < 1 - EDGE)
    return float(((guess > 0.5) != (judged > 0.5))[edge].double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the weights")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=4243, help="of the scenes; no training's")
    args = parser.parse_args()
    model, tokenizer = read_checkpoint(args.checkpoint)
    asker = SceneQuestions(tokenizer, CORE)
    known: dict[str, list[Tensor]] = {}
    cells = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store = build_store(
            Path(folder), count=args.scenes, seed=args.seed, nouns=CORE, styles=CORE_STYLES
        )
        maker = BatchMaker(store, asker, scenes=GROUP, questions=0, boxes_only=False, seed=1)
        for rows in torch.arange(args.scenes).split(GROUP):
            batch = maker.batch(rows)
            shown = ~batch.cells[..., 0].isnan()
            cells.append(batch.cells[shown])
            for name, given in stages(model.vision, batch.images).items():
                known.setdefault(name, []).append(given[shown])
        print(f"cells of edges that are told wrong, {len(torch.cat(cells))} patches")
        for name, parts in known.items():
            print(f"{name:22}{100 * wrong_cells(torch.cat(parts), torch.cat(cells)):6.1f}%")


if __name__ == "__main__":
    main()
