"""What moves the weights in training: Muon for matrices, AdamW for everything else.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix
along its momentum with all singular values made alike, by five Newton-Schulz steps of degree five.
Here a step is scaled so that weights move as far as AdamW would move them (Liu and others, 2025,
arXiv:2502.16982). ``torch.optim.Muon`` is the same one matrix after the other, which for many
small ones on a CPU takes twice the time: a third of a training step. Here those of one shape are
moved at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

DECAY = 0.02
"""Of matrices and tables, in parts of the rate and step."""
STEPS = 5
FACTORS = (3.4445, -4.775, 2.0315)
"""Of the first, third and fifth power in a step."""


def optimisers(
    model: nn.Module, heads: Iterable[nn.Parameter], rate: float, *, adamw_alone: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW and, unless it is to be alone, Muon for the matrices of blocks and projection.

    A weight moves as far with either. The first group of the first holds the ``heads``, which are
    not part of the model, and is marked so.
    """
    named = dict(model.named_parameters())
    matrices = {} if adamw_alone else {n: p for n, p in named.items() if _maps_features(n, p)}
    others = [p for n, p in named.items() if n not in matrices]
    adamw = torch.optim.AdamW(
        [
            {"params": list(heads), "weight_decay": 0.0, "heads": True},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": DECAY},
        ],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    return [adamw, Muon(matrices.values(), rate, weight_decay=DECAY)] if matrices else [adamw]


def _maps_features(name: str, parameter: torch.Tensor) -> bool:
    """Whether it is a matrix from features to features, as Muon is made for: no table, whose rows
    are seldom asked for, no patch embedding, no small gate."""
    inner = ".blocks." in name or ".proj_mlp." in name
    return inner and parameter.dim() == 2 and min(parameter.shape) > 64


class Muon(torch.optim.Optimizer):
    """``parameters`` are matrices [n, m]; decay is decoupled, momentum Nesterov's."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move what has a gradient; ``closure`` is not taken."""
        if closure is not None:
            raise ValueError("closure: Muon takes none")
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                gradients = [m.grad for m in matrices if m.grad is not None]
                momenta = [self._momentum(m) for m in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                moves = orthogonal(torch.stack(list(ahead))).to(matrices[0].dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    matrices, list(moves), alpha=-0.2 * group["lr"] * max(shape) ** 0.5
                )

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        return state["momentum"]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, n, m] with their singular values made nearly 1 (0.7 to 1.2), in bfloat16."""
    first, third, fifth = FACTORS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    # No singular value is over 1 then.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        powers = torch.baddbmm(square, square, square, beta=third, alpha=fifth)
        x = torch.baddbmm(x, powers, x, beta=first)
    return x.mT if tall else x
