"""Greedy and nucleus sampling, each row with its own settings."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_p: Tensor | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pick one index a row.

    ``logits`` float [B, V]; ``temperature`` and ``top_p`` float32 [B], or None when every row is
    greedy. A row of temperature 0 takes its largest logit; others sample from the smallest set of
    indices whose probability reaches ``top_p`` (Holtzman et al. 2020). Gives int64 [B].
    """
    greedy = logits.argmax(dim=-1)
    if temperature is None or top_p is None:
        return greedy
    scaled = logits.float() / temperature.clamp(min=1e-5)[:, None]
    ordered, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
    # The first index whose probability crosses top_p still belongs to the set.
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p[:, None], 0.0)
    drawn = torch.multinomial(kept, 1, generator=generator)
    sampled = order.gather(1, drawn)[:, 0]
    return torch.where(temperature > 0, sampled, greedy)
