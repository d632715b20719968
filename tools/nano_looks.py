"""Where the decoder looks: at the edge of the box that it is about to say, then vertex by vertex.

Left to itself, the decoder fetches one outline as a whole and copies it: 1 % of what it attended to
was near the vertex that it was about to say. Told where to look, it finds each vertex anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scene_store import GRID, VERTICES
from torch import Tensor

EDGES = 4
"""Left, top, right, bottom: marks of an object before its vertices."""
MARKS = EDGES + VERTICES
LOOK_HEADS = {3: (2, 3), 4: (0, 1)}
"""Two attention heads of each of these text blocks are told where to look. The MLP of the block
after reads what they fetch."""
SPREAD = 0.6
"""Standard deviation of a look, patches: what it fetches on the average then lies at the mark."""
OFFSET_REACH = 1.0
"""How far from its middle, across and down, a patch tells where vertices are, patches."""

BOX_STEPS = 3
"""Steps of an answer before those of its vertices."""
_FIRST = (0, 1, 2, *(EDGES + k for k in range(VERTICES) for _ in "xy"))
"""Mark that the first head looks for at each step: the box's left for its x, its top for its y, its
right for its size; then each vertex, for its x and its y."""
_SECOND = (2, 3, 3, *_FIRST[BOX_STEPS:])
"""The same of the second head: right and bottom."""
POSITIONS = (0, 1, 2, 4, 5, *range(7, 7 + 2 * (VERTICES - 1)))
"""Positions of these steps after the one that asks: the first three give the box, the fourth M, the
seventh L, the others numbers."""


def _middles(device: torch.device) -> Tensor:
    """Middles of the patches, in patches (x, y): float32 [576, 2]."""
    steps = torch.arange(GRID, device=device) + 0.5
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def _near(distance: Tensor) -> Tensor:
    """Distances in patches -> 1 at none, falling as a Gaussian."""
    return (-0.5 * (distance / SPREAD).square()).exp()


def _edge_distances(boxes: Tensor, middles: Tensor) -> Tensor:
    """Boxes [..., 4] (cx, cy, w, h) in sides of the picture, middles [..., 2] in patches -> how far
    these are from its left, top, right and bottom, in patches [..., 4]."""
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    return torch.cat([middles, middles], -1) - GRID * torch.cat([low, high], -1)


def patch_marks(boxes: Tensor, outlines: Tensor) -> Tensor:
    """Each patch's object, boxes [B, 576, 4] and outlines [B, 576, 32, 2] in sides of the picture
    -> how near the patch is to that object's marks, 0..1: float32 [B, 576, 36]."""
    middles = _middles(boxes.device)
    vertices = (outlines * GRID - middles[:, None]).norm(dim=-1)
    return _near(torch.cat([_edge_distances(boxes, middles), vertices], -1))


def patch_offsets(outlines: Tensor) -> Tensor:
    """Each patch's outline [B, 576, 32, 2], in sides of the picture -> where its vertices are from
    the patch's middle, in patches; NaN of those that are not near it: float32 [B, 576, 32, 2]."""
    offsets = outlines * GRID - _middles(outlines.device)[:, None]
    near = (offsets.abs() < OFFSET_REACH).all(-1, keepdim=True)
    return offsets.where(near, torch.nan)


def patch_places(boxes: Tensor) -> Tensor:
    """Boxes [B, 576, 4] of each patch's object, in sides of the picture -> where the patch's middle
    is in that box, in its sides from its left and top: float32 [B, 576, 2]."""
    low, size = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:].clamp(min=1e-6)
    return ((_middles(boxes.device) / GRID - low) / size).clamp(-0.5, 1.5)


def looks(boxes: Tensor, outlines: Tensor, shares: Tensor) -> Tensor:
    """Where to look for the marks of objects: float32 [..., 36, 576], each of sum 1.

    Boxes [..., 4], outlines [..., 32, 2] and shares [..., 576], how much of each patch shows the
    object. An edge is looked for where the object touches it.
    """
    middles = _middles(boxes.device)
    edges = _near(_edge_distances(boxes[..., None, :], middles)).transpose(-1, -2)
    edges = edges * (shares[..., None, :] + 1e-3)
    vertices = _near((outlines[..., None, :] * GRID - middles).norm(dim=-1))
    wanted = torch.cat([edges, vertices], -2) + 1e-9
    return wanted / wanted.sum(-1, keepdim=True)


def look_logs(
    queries: Tensor, keys: Tensor, heads: Sequence[int], asked: tuple[Tensor, ...], questions: int
) -> Tensor:
    """What some heads of a block look at while an answer is said: logarithms of the shares of their
    attention, float32 [n, heads, steps, 576]. The first three steps are those of the box, the
    others, if Q positions are enough for a path, two of each vertex.

    ``queries`` (scaled) and ``keys`` [B, H, P + Q · S, D] over a prefix of BOS and 576 patches, for
    Q ``questions`` of S positions; ``asked`` are scene, question and position of each token that
    asks for an object that is there, int64 [n].
    """
    scene, question, start = asked
    p = GRID * GRID + 1
    qs, ks = (t[:, list(heads)].float() for t in (queries, keys))
    own_q, own_k = (t[:, :, p:].unflatten(2, (questions, -1)) for t in (qs, ks))
    length = own_q.shape[3]
    steps = len(POSITIONS) if length > POSITIONS[-1] else BOX_STEPS
    at = start[:, None] + torch.tensor(POSITIONS[:steps], device=start.device)
    # [n, steps, heads, D] -> [n, heads, steps, D]
    asking = own_q[scene[:, None], :, question[:, None], at].transpose(1, 2)
    to_prefix = asking @ ks[scene, :, :p].transpose(-1, -2)
    to_self = asking @ own_k[scene, :, question].transpose(-1, -2)
    later = torch.arange(length, device=start.device) > at[..., None]
    to_self = to_self.masked_fill(later[:, None], float("-inf"))
    return torch.cat([to_prefix, to_self], -1).log_softmax(-1)[..., 1:p]


def look_loss(
    queries: Tensor, keys: Tensor, heads: Sequence[int], asked: tuple[Tensor, ...], wanted: Tensor
) -> Tensor:
    """How far two heads look from where they should, in nats (the divergence from ``wanted``).

    ``wanted`` [B, Q, 36, 576] of :func:`looks`; the others as :func:`look_logs` takes them.
    """
    looked = look_logs(queries, keys, heads, asked, wanted.shape[1])
    scene, question, _ = asked
    steps = looked.shape[2]
    marks = torch.tensor([_FIRST[:steps], _SECOND[:steps]], device=wanted.device)
    target = wanted[scene, question][:, marks]
    return F.kl_div(looked, target, reduction="none").sum(-1).mean()
