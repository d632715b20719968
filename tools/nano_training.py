"""Training of the shipped model: batches of scenes with several questions each, and the losses.

One scene is encoded once; its questions share the image prefix. Queries of a question see the
prefix and, causally, the question's own tokens, exactly as a request does when it is served.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from nano_kernels import attention
from nano_looks import BOX_STEPS, EDGES, LOOK_HEADS, MARKS, POSITIONS, look_loss
from scene_store import CELLS, VERTICES
from torch import Tensor, nn

from kestrel.moondream.model import Moondream
from kestrel.moondream.text import Block

QUANTUM = 8
"""Path integers are trained on multiples of this."""
LEVELS = 960 // QUANTUM + 1
"""Path integers that are trained, over the grid of 960."""
SIGMA = 2.0
"""How far a level that is wanted spreads over its neighbours (standard deviation), levels. Where it
spreads as far as the model errs, being nearer is hardly worth anything."""
CLOSE = 0.02
"""Errors of the next vertex, and of where a patch lies in its box, up to which they count by their
square, sides of the box."""
IGNORE = -100
SHAPE_BLOCK = 2
"""Vision block after which a patch tells which of its cells the object covers. The blocks after it
put what the patches tell together to an outline."""
OUTLINE_BLOCK = 3
"""Text block that reads the regressed outline where the path starts. Attention and MLP of a block
read the same: the attention of this block or a later one fetches the outline for a vertex, and the
MLP of a block after that picks what belongs to it."""

VERTEX_BLOCK = 5
"""Text block that reads the vertex that comes next: those of ``LOOK_HEADS`` before it found it."""

_ROWS = {
    "answer_outline_head": (0, 2),
    "mark_head": (EDGES, 1),
    "offset_head": (0, 2),
}
"""Heads that tell where all vertices are: rows before theirs, and rows of each vertex."""


@dataclass
class Batch:
    """Tensors of B scenes with Q questions of S positions each.

    ``images`` uint8 [B, 3, 336, 336]; ``tokens`` int64 [B, Q, S] (ids fed in); ``kind`` uint8
    [B, Q, S]: 0 token, 1 coordinate, 2 size; ``value`` float [B, Q, S, 2]; ``target`` int64
    [B, Q, S] next id or IGNORE; ``target_value`` float [B, Q, S, 2] for coord and size targets;
    ``looks`` float [B, Q, 36, 576] where to look for the edges and vertices of what is asked for;
    ``patches`` float [B, 576, nouns + 1] share of each patch that shows each noun, background last;
    ``boxes`` float [B, 576, 4] box (cx, cy, w, h) of the object that the patch shows, in sides of
    the picture, NaN where it shows none; ``cells`` float [B, 576, 49] share of each of the patch's
    7 x 7 cells within the outline of the object that covers most of it, NaN without one; ``marks``
    float [B, 576, 36] how near the patch is to the edges and vertices of that object; ``offsets``
    float [B, 576, 32, 2] where those vertices are from the patch's middle, in patches, NaN where
    they are not near; ``places`` float [B, 576, 2] where the patch lies in that object's box, in
    its sides.
    """

    images: Tensor
    tokens: Tensor
    kind: Tensor
    value: Tensor
    target: Tensor
    target_value: Tensor
    looks: Tensor
    patches: Tensor
    boxes: Tensor
    cells: Tensor
    marks: Tensor
    offsets: Tensor
    places: Tensor


@dataclass
class Decoded:
    """What the decoder makes of questions.

    ``hidden`` [B, Q, S, dim] after the last block; by the block's number ``read`` [B, Q, S, dim],
    what ``OUTLINE_BLOCK`` and ``VERTEX_BLOCK`` read, and ``attending``, queries and keys
    [B, H, P + Q · S, D].
    """

    hidden: Tensor
    read: dict[int, Tensor]
    attending: dict[int, tuple[Tensor, Tensor]]


def decoder_pass(
    model: Moondream, prefix: Tensor, asked: Tensor, told: Collection[int] = LOOK_HEADS
) -> Decoded:
    """``prefix`` [B, P, dim] BOS and image, ``asked`` [B, Q, S, dim]; ``told`` are the blocks of
    which queries and keys are given."""
    text = model.text
    p = prefix.shape[1]
    _, q, s, _ = asked.shape
    x = torch.cat([prefix, asked.flatten(1, 2)], dim=1)
    positions = torch.cat(
        [torch.arange(p, device=x.device), torch.arange(p, p + s, device=x.device).repeat(q)],
    )
    table, logs = text.rotary[positions], text.log_positions[positions]
    read, attending = {}, {}
    for number, block in enumerate(text.blocks):
        if number in (OUTLINE_BLOCK, VERTEX_BLOCK):
            read[number] = x[:, p:].unflatten(1, (q, s))
        x, *queries_keys = block_pass(block, x, table, logs, p, q, number in told)
        if queries_keys:
            attending[number] = (queries_keys[0], queries_keys[1])
    return Decoded(x[:, p:].unflatten(1, (q, s)), read, attending)


def block_pass(
    block: Block, x: Tensor, table: Tensor, logs: Tensor, p: int, q: int, told: bool = False
) -> tuple[Tensor, ...]:
    """One block over a prefix of ``p`` positions and ``q`` questions, [B, P + Q · S, dim]; if
    ``told``, its scaled queries and its keys too, [B, H, P + Q · S, D]."""
    normed = block.ln(x)
    qs, ks, vs = block.attn.project(normed, table, logs)
    qs = qs * (1.0 / math.sqrt(qs.shape[-1]))
    heard = attention(qs, ks, vs, p, q)
    x = x + block.attn.proj(heard.flatten(2)) + block.mlp(normed)
    return (x, qs, ks) if told else (x,)


def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the vision tower by that of training, [B, H, N, D] each."""
    return attention(q * (1.0 / math.sqrt(q.shape[-1])), k, v, q.shape[2], 0).transpose(1, 2)


def soft_bins(centre: Tensor, bins: int, sigma: float) -> Tensor:
    """Gaussian over ``bins`` around ``centre`` [...], normalised: [..., bins]."""
    grid = torch.arange(bins, dtype=torch.float32, device=centre.device)
    return F.softmax(-0.5 * ((grid - centre[..., None]) / sigma) ** 2, dim=-1)


class TokenLoss(torch.autograd.Function):
    """Mean cross-entropy of logits [n, vocab] and what is wanted: ``target`` int64 [n] or, where
    ``levels`` [n] is one and not -1, its row of ``spread`` [levels, levels] over ``level_ids``.

    Written out, as torch's own passes over n times the vocabulary were a tenth of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, level_ids: Tensor, levels: Tensor, spread: Tensor
    ) -> Tensor:
        logits = logits.float()
        shares = logits.softmax(-1)
        most, where = logits.max(-1, keepdim=True)
        total = (most - shares.gather(1, where).log())[:, 0]
        near = (logits[:, level_ids] * spread[levels.clamp(min=0)]).sum(-1)
        itself = logits.gather(1, target[:, None])[:, 0]
        ctx.shares = shares
        ctx.save_for_backward(target, level_ids, levels, spread)
        return (total - near.where(levels >= 0, itself)).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, level_ids, levels, spread = ctx.saved_tensors
        made, ctx.shares = ctx.shares, None
        numbers = (levels >= 0)[:, None]
        made.index_add_(1, level_ids, -spread[levels.clamp(min=0)] * numbers)
        made.scatter_add_(1, target[:, None], numbers.to(made.dtype) - 1)
        return made.mul_(grad / len(target)), None, None, None, None


class Losses:
    """The training losses of a batch; every weight is a plain attribute."""

    def __init__(self, model: Moondream, noun_ids: list[int], level_ids: list[int]) -> None:
        self.model = model
        device = model.device
        self.noun_ids = torch.tensor(noun_ids, device=device)
        self.level_ids = torch.tensor(level_ids, device=device)
        self.level_of = self.level_ids.new_full((model.config.text.vocab_size,), -1)
        self.level_of[self.level_ids] = torch.arange(LEVELS, device=device)
        # Row n: what is wanted where level n is. Numbers spread over their neighbours: where the
        # model is not sure, the likeliest is near the middle of the likely ones.
        self.spread = soft_bins(torch.arange(LEVELS, device=device), LEVELS, SIGMA)
        self.dense_weight = 1.0
        self.cell_weight = 0.5
        self.read_cell_weight = 2.0
        self.box_weight = 2.0
        self.outline_weight = 2.0
        self.place_weight = 0.1
        self.mark_weight = 2.0
        self.offset_weight = 1.0
        self.vertex_weight = 2.0
        self.look_weight = 0.3
        self.region_weight = 0.5
        dim = model.config.text.dim
        self.background = nn.Parameter((torch.randn(dim) * 0.02).to(device))
        self.scale = nn.Parameter(torch.tensor(10.0, device=device))
        self.box_head = nn.Linear(dim, 4).to(device)
        self.answer_head = nn.Linear(dim, 4).to(device)
        self.offset_head = nn.Linear(dim, 2 * VERTICES).to(device)
        self.answer_outline_head = nn.Linear(dim, 2 * VERTICES).to(device)
        self.place_head = nn.Linear(dim, 2 * VERTICES).to(device)
        vision = model.config.vision
        self.cell_head = nn.Linear(vision.enc_dim, CELLS * CELLS).to(device)
        self.read_cell_head = nn.Linear(dim, CELLS * CELLS).to(device)
        self.mark_head = nn.Linear(dim, MARKS).to(device)
        self.patch_place_head = nn.Linear(dim, 2).to(device)
        self.vertex_head = nn.Linear(dim, 2).to(device)

    def heads(self) -> dict[str, nn.Parameter]:
        """Parameters of the auxiliary losses by name, not part of the model."""
        layers = {name: part for name, part in vars(self).items() if isinstance(part, nn.Linear)}
        return {"background": self.background, "scale": self.scale} | {
            f"{name}.{which}": parameter
            for name, layer in layers.items()
            for which, parameter in layer.named_parameters()
        }

    def set_heads(self, known: dict[str, Tensor]) -> None:
        """Take these parameters, which may be of outlines with more or fewer vertices; one that is
        not known, or does not fit, is 0, so that it says nothing yet."""
        with torch.no_grad():
            for name, head in self.heads().items():
                found = _for_vertices(name, known[name]) if name in known else None
                fits = found is not None and found.shape == head.shape
                head.copy_(found) if fits else head.zero_()

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [B, 3, 336, 336] -> what the decoder reads, [B, 576, dim], and what
        ``SHAPE_BLOCK`` gives, [B, 576, enc_dim]."""
        features, early = self.model.vision.features_with_early(images, SHAPE_BLOCK)
        return self.model.vision.project(features, features), early

    def vision_only(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The dense losses alone: what the vision tower learns from before anything is asked."""
        image, early = self.encode_image(batch.images)
        return self.dense_losses(image, early, batch)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts, each a number."""
        model, config = self.model, self.model.config
        image, early = self.encode_image(batch.images)
        decoded = self.decoded(image, batch)
        hidden = decoded.hidden
        wanted = batch.target != IGNORE
        picked, target = hidden[wanted], batch.target[wanted]
        values = batch.target_value[wanted]
        logits = model.logits(picked)
        coord_rows = target == config.prompt.coord_id
        size_rows = target == config.prompt.size_id
        coord_logits = model.coord_logits(picked[coord_rows]).float()
        size_logits = model.size_logits(picked[size_rows]).float()
        tokens = TokenLoss.apply(logits, target, self.level_ids, self.level_of[target], self.spread)
        coord = _soft_cross_entropy(
            coord_logits, soft_bins(values[coord_rows][:, 0] * 1024, 1024, 10.0)
        )
        size_bins = model.region.size_bin(values[size_rows])
        size = _soft_cross_entropy(size_logits, soft_bins(size_bins, 1024, 6.0))
        dense, dense_parts = self.dense_losses(image, early, batch)
        starts = self.starts(batch)
        answer = self._answer_loss(hidden, batch, starts)
        outline, place, vertex = self._outline_losses(decoded.read, batch, starts)
        looked = [
            look_loss(*decoded.attending[block], heads, starts, batch.looks)
            for block, heads in LOOK_HEADS.items()
        ]
        look = torch.stack(looked).mean()
        total = tokens + self.region_weight * (coord + size) + dense
        total = total + self.box_weight * answer + self.outline_weight * outline
        total = total + self.place_weight * place + self.look_weight * look
        total = total + self.vertex_weight * vertex
        parts = {
            "tokens": tokens,
            "coord": coord,
            "size": size,
            "answer": answer,
            "outline": outline,
            "place": place,
            "look": look,
            "vertex": vertex,
            "off": self._off(logits.detach(), target),
        }
        return total, dense_parts | {name: part.detach() for name, part in parts.items()}

    def _off(self, logits: Tensor, target: Tensor) -> Tensor:
        """How far the likeliest numbers of a path are from those wanted, levels."""
        levels = self.level_of[target]
        said = logits[:, self.level_ids].argmax(-1)
        return (said - levels)[levels >= 0].abs().float().mean()

    def decoded(self, image: Tensor, batch: Batch, told: Collection[int] = LOOK_HEADS) -> Decoded:
        """What the decoder makes of a batch whose pictures are encoded, [B, 576, dim]."""
        model, config = self.model, self.model.config
        bos = model.text.wte[config.prompt.bos_id].expand(len(image), 1, -1)
        prefix = torch.cat([bos, image], dim=1)
        asked = F.embedding(batch.tokens, model.text.wte)
        is_coord, is_size = batch.kind == 1, batch.kind == 2
        # Rounded to bfloat16, the angles of the fastest waves would be off by half a radian.
        with torch.autocast(asked.device.type, enabled=False):
            coords = model.encode_coord(batch.value[is_coord][:, 0])
            sizes = model.encode_size(batch.value[is_size])
        asked = asked.clone()
        asked[is_coord] = coords.to(asked.dtype)
        asked[is_size] = sizes.to(asked.dtype)
        return decoder_pass(model, prefix, asked, told)

    def starts(self, batch: Batch) -> tuple[Tensor, ...]:
        """Scene, question and position of each token that asks for what is there: int64 [n]."""
        is_coord = batch.target == self.model.config.prompt.coord_id
        return (is_coord & ~F.pad(is_coord, (1, 0))[..., :-1]).nonzero(as_tuple=True)

    def _answer_loss(self, hidden: Tensor, batch: Batch, starts: tuple[Tensor, ...]) -> Tensor:
        """The whole box, regressed at the noun and where the answer starts.

        The noun meets the patches in one step of attention, the answer's start needs two: help at
        both places finds the object long before the bins of the coordinates do.
        """
        b, q, s = starts
        value = batch.target_value
        box = torch.cat([value[b, q, s, :1], value[b, q, s + 1, :1], value[b, q, s + 2]], dim=-1)
        heard = torch.cat([hidden[b, q, s - 1], hidden[b, q, s]])
        guess = self.answer_head(heard).float()
        return F.smooth_l1_loss(guess, torch.cat([box, box]), beta=0.05)

    def _outline_losses(
        self, read: dict[int, Tensor], batch: Batch, starts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The whole outline, regressed where the box has been read and the path starts; and, at
        each number of the path, which of them comes next, as classes, and the vertex it is of.

        ``OUTLINE_BLOCK`` is to read the first two: the blocks from there on fetch the vertices, one
        after the other as the path is written, and know which one it is. ``VERTEX_BLOCK`` is to
        read the vertex.
        """
        hidden = read[OUTLINE_BLOCK]
        b, q, asks = starts
        if not len(b) or batch.tokens.shape[-1] <= POSITIONS[-1]:  # boxes alone
            return (hidden.sum() * 0,) * 3
        places = asks[:, None] + torch.tensor(POSITIONS[BOX_STEPS:], device=asks.device)
        levels = self.level_of[batch.target[b[:, None], q[:, None], places]]
        heard = hidden[b, q, asks + BOX_STEPS]
        guess = self.answer_outline_head(F.layer_norm(heard, heard.shape[-1:])).float()
        wanted = levels * (QUANTUM / 960)
        at_numbers = hidden[b[:, None], q[:, None], places]
        number = self.place_head(F.layer_norm(at_numbers, heard.shape[-1:])).float()
        found = read[VERTEX_BLOCK][b[:, None], q[:, None], places]
        vertex = self.vertex_head(F.layer_norm(found, heard.shape[-1:])).float()
        pairs = wanted.unflatten(1, (VERTICES, 2)).repeat_interleave(2, 1)
        order = torch.arange(2 * VERTICES, device=asks.device).expand(len(b), -1)
        return (
            F.smooth_l1_loss(guess, wanted, beta=0.05),
            F.cross_entropy(number.flatten(0, 1), order.flatten()),
            F.smooth_l1_loss(vertex, pairs, beta=CLOSE),
        )

    def noun_scores(self, image: Tensor) -> Tensor:
        """Pictures [B, 576, dim] -> logits of the noun that each patch shows, [B, 576, nouns + 1],
        background last."""
        nouns = self.model.text.wte[self.noun_ids]
        classes = F.normalize(torch.cat([nouns, self.background[None]]), dim=-1)
        return F.normalize(image, dim=-1) @ classes.T * self.scale.clamp(1.0, 40.0)

    def dense_losses(
        self, image: Tensor, early: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each patch: cosine to the noun it shows, over all nouns and background; its object's box;
        which of its cells that object covers; and where it is of that object's marks and box.

        ``image`` float32 [B, patches, dim], the very vectors that the decoder reads; ``early``
        [B, patches, enc_dim], what ``SHAPE_BLOCK`` gives. The weighted sum, and its parts.
        """
        shown = ~batch.boxes[..., 0].isnan()
        # Cosines are scaled up tenfold and more: rounded to bfloat16 they would be steps.
        with torch.autocast(image.device.type, enabled=False):
            image = image.float()
            partly = ~batch.cells[..., 0].isnan()
            looked = F.layer_norm(early[partly].float(), early.shape[-1:])
            cells = F.binary_cross_entropy_with_logits(self.cell_head(looked), batch.cells[partly])
            scores = self.noun_scores(image)
            guess = self.box_head(image[shown])
            boxes = F.smooth_l1_loss(guess, batch.boxes[shown], beta=0.05)
            touching = F.layer_norm(image[partly], image.shape[-1:])
            marks = F.binary_cross_entropy_with_logits(
                self.mark_head(touching), batch.marks[partly]
            )
            wanted = batch.offsets[partly].flatten(1)
            near = ~wanted.isnan()
            guess = self.offset_head(touching)[near]
            offsets = F.smooth_l1_loss(guess, wanted[near], beta=0.05)
            read_cells = F.binary_cross_entropy_with_logits(
                self.read_cell_head(touching), batch.cells[partly]
            )
            guess = self.patch_place_head(touching)
            patch_places = F.smooth_l1_loss(guess, batch.places[partly], beta=CLOSE)
            surprise = -(batch.patches * scores.log_softmax(-1)).sum(-1)
            # Most patches show background, which is soon learned: objects count four times.
            weight = 1 - 0.75 * batch.patches[..., -1]
            dense = (weight * surprise).sum() / weight.sum()
        total = self.dense_weight * dense + self.cell_weight * cells
        total = total + self.read_cell_weight * read_cells
        total = total + self.box_weight * (boxes + patch_places)
        total = total + self.mark_weight * marks + self.offset_weight * offsets
        parts = {"dense": dense, "cells": cells, "boxes": boxes, "read_cells": read_cells}
        parts |= {"marks": marks, "offsets": offsets, "patch_places": patch_places}
        return total, {name: part.detach() for name, part in parts.items()}


def _for_vertices(name: str, head: Tensor) -> Tensor:
    """A head's rows for ``VERTICES`` at even steps round an outline, whatever number it was of."""
    edges, numbers = _ROWS.get(name.partition(".")[0], (0, 0))
    if not numbers or len(head) == edges + numbers * VERTICES:
        return head
    loop = head[edges:].unflatten(0, (-1, numbers))
    steps = torch.arange(VERTICES, device=head.device) * (len(loop) / VERTICES)
    low = steps.long()
    share = (steps - low).view(-1, *[1] * (loop.dim() - 1))
    between = loop[low].lerp(loop[(low + 1) % len(loop)], share)
    return torch.cat([head[:edges], between.flatten(0, 1)])


def _soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    if logits.numel() == 0:
        return logits.sum()
    return -(target * logits.log_softmax(-1)).sum(-1).mean()
