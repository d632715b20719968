"""Which experts a token goes to, and with what weight: torch, or kestrel-kernels where asked for.

The one module that imports ``kestrel_kernels``, a proprietary package whose licence allows use with
its own engine only; who turns it on needs M87 Labs' consent. Of the functions that its page on PyPI
documents, ``topk_fwd`` alone is called: the others are shown without the shapes and layouts that
calling them takes (expert products, ``moe_align``), have private names (attention), or draw by a
generator of the whole batch, where here a row's outcome depends on its own request (sampling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kestrel.config import KERNELS_INSTALL, ConfigError

Choice = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Router's scores [N, experts], experts per token k -> weights [N, k] in the scores' type, and the
experts' numbers int64 [N, k]."""

DEVICE = "cuda"
TRIED_ROWS = (1, 5, 64, 740)
AGREES = 1e-2
"""Largest difference from torch in a trial: weights of at most 1, in 8 or 11 bits."""


def choose(scores: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """The ``per_token`` largest scores of each row; softmax over those alone. The reference."""
    best, chosen = scores.topk(per_token, dim=-1)
    return best.softmax(dim=-1), chosen


def load() -> Any:
    """``topk_fwd``; ImportError or what else its import raises."""
    from kestrel_kernels.topk import topk_fwd

    return topk_fwd


def precompiled(experts: int, per_token: int, like: Tensor) -> Choice:
    """``choose`` by kestrel-kernels, for scores of the device and type of ``like``.

    It is tried here; raises ``ConfigError`` where it does not load, run or agree with ``choose``.
    """
    try:
        topk_fwd = load()
    except Exception as error:  # native libraries, drivers
        reason = f"do not load ({type(error).__name__}: {error}); {KERNELS_INSTALL}"
        raise _refused(reason) from error
    if like.device.type != DEVICE:
        raise _refused(f"need CUDA, and the model is on {like.device.type}")

    def chosen_by_kernel(scores: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
        weights, chosen = topk_fwd(scores, k=per_token, softmax=True)
        return weights.to(scores.dtype), chosen.long()

    try:
        differs = max(
            _trial(chosen_by_kernel, rows, experts, per_token, like) for rows in TRIED_ROWS
        )
    except Exception as error:  # shapes, types and architectures that it has no kernel for
        raise _refused(f"fail ({type(error).__name__}: {error})") from error
    if not differs <= AGREES:
        raise _refused(f"differ from torch by {differs:.3f}")
    return chosen_by_kernel


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"kestrel_kernels is on, but they {reason}; turn it off, or see python -m kestrel doctor"
    )


def _trial(kernel: Choice, rows: int, experts: int, per_token: int, like: Tensor) -> float:
    """Largest difference in any expert's weight from ``choose``; no two scores are alike."""
    chance = torch.Generator().manual_seed(rows)
    steps = torch.linspace(-4, 4, experts)
    scores = torch.stack([steps[torch.randperm(experts, generator=chance)] for _ in range(rows)])
    scores = scores.to(like)
    shares = []
    for choice in (choose, kernel):
        weights, chosen = choice(scores, per_token)
        if weights.shape != (rows, per_token) or chosen.shape != weights.shape:
            raise ValueError(f"shapes {[*weights.shape]} and {[*chosen.shape]}")
        shares.append(torch.zeros_like(scores).scatter_(1, chosen, weights))
    return float((shares[0] - shares[1]).float().abs().max())
