"""Greedy and nucleus sampling of a whole batch, every row with its own settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Nucleus = Callable[[Tensor, Tensor], Tensor]

GREEDY_BELOW = 1e-4
"""Temperatures under it count as 0: dividing by them would leave one candidate anyway."""
HOTTEST = 1e6
"""Larger temperatures are taken as this one: already uniform, and still finite in float32."""

LARGEST_DRAW = 1 - 2**-24
"""Larger draws are taken as this one, the last below 1 in float32: 1 would be past every candidate,
also past those that are not allowed."""


def is_greedy(temperature: float) -> bool:
    """Whether a temperature means the most likely candidate, no draw."""
    return temperature < GREEDY_BELOW


def sample(
    logits: Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    draws: Sequence[float],
    nucleus: Nucleus | None = None,
) -> Tensor:
    """One candidate per row.

    ``logits`` [B, N], -inf where a candidate is not allowed; per row a temperature (0 is greedy),
    ``top_p`` in 0..1 (the smallest set of most likely candidates that reaches this probability,
    Holtzman et al. 2020) and a uniform draw in 0..1. The draws come from the caller so that a
    row's outcome depends on its own request only, never on its neighbours in the batch.
    ``nucleus``: a kernel in the place of ``by_rank``. Gives int64 [B] on the device of the logits.
    """
    best = logits.argmax(dim=-1)
    warm = [row for row, value in enumerate(temperatures) if not is_greedy(value)]
    if not warm:
        return best
    columns = (
        [min(temperatures[i], HOTTEST) for i in warm],
        [top_ps[i] for i in warm],
        [min(draws[i], LARGEST_DRAW) for i in warm],
    )
    settings = torch.tensor(columns, dtype=torch.float32, device=logits.device)
    temperature, top_p, draw = settings.unsqueeze(-1)
    best[warm] = _draw(logits[warm].float(), temperature, top_p, draw, nucleus or by_rank)
    return best


def _draw(
    logits: Tensor, temperature: Tensor, top_p: Tensor, draw: Tensor, nucleus: Nucleus
) -> Tensor:
    """Inverse transform sampling within the nucleus; settings are [B, 1]. Gives [B]."""
    # The maximum is taken off first: a small temperature then cannot overflow.
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(dim=-1)
    # The draw runs through the candidates by index, not by rank: neighbouring bins are about as
    # likely as each other, and the last bit of a logit must not tell them apart.
    reached = nucleus(probs, top_p).cumsum(dim=-1)
    return (reached <= draw * reached[:, -1:]).sum(dim=-1).clamp_(max=logits.shape[-1] - 1)


def by_rank(probs: Tensor, top_p: Tensor) -> Tensor:
    """``probs`` [B, N] of the smallest set of most likely candidates that reaches ``top_p``
    [B, 1], 0 elsewhere; the reference of what other kernels do."""
    ranked, order = probs.sort(dim=-1, descending=True)
    # A candidate is in the nucleus if those before it do not reach top_p; the first always is,
    # also where top_p is 0 or has become so in float32.
    kept = ranked.cumsum(dim=-1) - ranked < top_p
    kept[..., 0] = True
    return torch.zeros_like(probs).scatter_(-1, order, ranked * kept)
