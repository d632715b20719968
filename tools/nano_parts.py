"""Which part of an answer is wrong: the box, the shape in it, or what the picture was seen to be.

    python tools/nano_parts.py kestrel/models/nano --scenes 400

On new scenes of the training's kind, IoU with the true outline of: what is said; the true shape in
the said box; the said shape in the true box; each vertex as it is said after the true ones; and the
cells that the patches tell, where they name the noun (``--heads``, those of the checkpoint's
losses). Then, block by block of the decoder, the share of what each attention head looks at that is
near the vertex which is said next.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from effects import SIDE
from nano_checkpoint import read_checkpoint
from nano_eval import greedy, path_points
from nano_looks import BOX_STEPS, EDGES, POSITIONS, look_logs
from nano_questions import BatchMaker, SceneQuestions, path_ids
from nano_training import LEVELS, Batch, Losses
from nouns import CORE, CORE_STYLES
from outlines import polygon_mask
from safetensors.torch import load_file
from scene_store import CELLS, GRID, STARTS, Scenes, build_store
from torch import Tensor

from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.seg_refiner.box import mask_iou

GROUP = 50
"""Scenes that are answered together."""
PARTS = (
    "said",
    "true shape, said box",
    "said shape, true box",
    "after true vertices",
    "cells of its patches",
)
SIZES = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Limits of the groups of sizes, shares of the picture within the true outline."""


def drawn(shape: np.ndarray, box: Tensor) -> np.ndarray:
    """A polygon [n, 2] in 0..1 of a box (cx, cy, w, h) in 0..1 of the picture as a mask."""
    if len(shape) < 3:
        return np.zeros((SIDE, SIDE), bool)
    centre, size = box[:2].numpy(), box[2:].numpy()
    return polygon_mask(((shape - 0.5) * size + centre) * SIDE, SIDE, SIDE)


def cells_of(cells: Tensor, named: Tensor) -> np.ndarray:
    """Cells [576, 49] of the patches that name the noun (``named`` [576]) as a mask."""
    told = cells * named[:, None]
    told = told.view(GRID, GRID, CELLS, CELLS).permute(0, 2, 1, 3).reshape(1, 1, GRID * CELLS, -1)
    return F.interpolate(told, (SIDE, SIDE), mode="bilinear")[0, 0].numpy() > 0.5


def after_true_ones(
    losses: Losses,
    asker: SceneQuestions,
    image: Tensor,
    prompt: list[int],
    box: Tensor,
    shape: Tensor,
) -> np.ndarray:
    """The likeliest place of each vertex after the true box and the true vertices before it, in
    0..1 of the box: float [32, 2]. ``box`` [4] (cx, cy, w, h), ``shape`` [32, 2] in 0..1 of it."""
    model, levels = losses.model, losses.level_ids
    path = path_ids(shape, levels, asker.command_ids)[:-1]
    bos = torch.tensor([model.config.prompt.bos_id])
    asked = [
        model.embed_tokens(bos),
        image,
        model.embed_tokens(torch.tensor(prompt)),
        model.encode_coord(box[0:1]),
        model.encode_coord(box[1:2]),
        model.encode_size(box[None, 2:]),
        model.embed_tokens(path),
    ]
    start = sum(map(len, asked[:3])) - 1
    hidden = model.text(torch.cat(asked)[None], 1 + len(image))[0]
    said = model.text.logits(hidden[start + torch.tensor(POSITIONS[BOX_STEPS:])])[:, levels]
    return (said.argmax(-1) / (LEVELS - 1)).view(-1, 2).numpy()


def parts_of(losses: Losses, asker: SceneQuestions, store: Scenes) -> np.ndarray:
    """One row per unambiguous noun: its outline's share of the picture, and IoU of ``PARTS``."""
    model, rows = losses.model, []
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    for start in range(0, len(store), GROUP):
        found = store.take(torch.arange(start, min(start + GROUP, len(store))))
        image, early = losses.encode_image(found["images"].permute(0, 3, 1, 2).contiguous())
        cells = losses.cell_head(F.layer_norm(early, early.shape[-1:])).sigmoid()
        named = losses.noun_scores(image).softmax(-1)
        cases = [
            (scene, slot, noun)
            for scene, nouns in enumerate(found["nouns"].tolist())
            for slot, noun in enumerate(nouns)
            if noun >= 0 and nouns.count(noun) == 1
        ]
        embeddings = image[[scene for scene, _, _ in cases]]
        prompts = [asker.prompt(asker.nouns[noun]) for _, _, noun in cases]
        answers = greedy(model, embeddings, prompts)
        for (scene, slot, noun), prompt, (box, path) in zip(cases, prompts, answers, strict=True):
            true_box = found["boxes"][scene, slot]
            outline = found["outlines"][scene, slot, ::STARTS]
            true_shape = ((outline - true_box[:2]) / true_box[2:] + 0.5).numpy()
            truth = drawn(outline.numpy(), whole)
            masks = [truth & False] * 3
            if box is not None:
                said = path_points(model, whole.tolist(), path)
                said_box = torch.tensor(box)
                masks = [drawn(said, said_box), drawn(true_shape, said_box), drawn(said, true_box)]
            vertices = after_true_ones(
                losses, asker, image[scene], prompt, true_box, torch.from_numpy(true_shape)
            )
            masks.append(drawn(vertices, true_box))
            masks.append(cells_of(cells[scene], named[scene, :, noun] > 0.3))
            rows.append((truth.mean(), *(mask_iou(mask, truth) for mask in masks)))
    return np.array(rows, float)


def attention_near_vertices(losses: Losses, batch: Batch) -> Tensor:
    """Each block's and head's share of attention, [blocks, heads], that goes to patches near the
    vertex that is said next: those to which a look gives more than a tenth."""
    image, _ = losses.encode_image(batch.images)
    blocks, heads = len(losses.model.text.blocks), losses.model.config.text.n_heads
    attending = losses.decoded(image, batch, range(blocks)).attending
    asked = losses.starts(batch)
    vertices = batch.looks[asked[0], asked[1], EDGES:].repeat_interleave(2, 1)[:, None] > 0.1
    questions = batch.tokens.shape[1]
    shares = [
        look_logs(*attending[number], range(heads), asked, questions)[:, :, BOX_STEPS:].exp()
        for number in range(blocks)
    ]
    return torch.stack([(share * vertices).sum(-1).mean((0, 2)) for share in shares])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the weights")
    parser.add_argument("--heads", type=Path, default=Path("tools/nano_heads.safetensors"))
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=4242, help="of the scenes; no training's")
    args = parser.parse_args()
    model, tokenizer = read_checkpoint(args.checkpoint)
    model.tokenizer = SegmentTokenizer(tokenizer, model.config.prompt)
    asker = SceneQuestions(tokenizer, CORE)
    losses = Losses(model, asker.noun_ids, asker.level_ids)
    losses.set_heads(load_file(args.heads))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store = build_store(
            Path(folder), count=args.scenes, seed=args.seed, nouns=CORE, styles=CORE_STYLES
        )
        rows = parts_of(losses, asker, store)
        batches = BatchMaker(store, asker, scenes=GROUP, questions=3, boxes_only=False, seed=1)
        near = attention_near_vertices(losses, next(iter(batches)))
    groups = [("all", rows)]
    for low, high in itertools.pairwise(SIZES):
        within = (rows[:, 0] >= low) & (rows[:, 0] < high)
        groups.append((f"{100 * low:.0f} to {100 * high:.0f} %", rows[within]))
    print(f"{'of the picture':16}{'answers':>8}", *(f"{part:>22}" for part in PARTS))
    for name, group in groups:
        means = group[:, 1:].mean(0) if len(group) else [float("nan")] * len(PARTS)
        print(f"{name:16}{len(group):8d}", *(f"{mean:22.3f}" for mean in means))
    for number, heads in enumerate(near):
        print(
            f"block {number}, near the vertex: ",
            *(f"{100 * share:5.1f}%" for share in heads.tolist()),
        )


if __name__ == "__main__":
    main()
