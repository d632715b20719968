"""Mixture-of-experts MLP of the text decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATHER_LIMIT = 32
"""Up to this many (token, expert) pairs, gathering expert weights beats visiting every expert."""
EVERY_LIMIT = 64
"""Up to this many tokens, CUDA runs every expert on every token: a decode step reads most experts'
weights in any case, and nothing in it waits for the host, so that it can be captured."""


class ExpertWeights(nn.Module):
    """One stacked matrix per expert, without bias: [experts, out, in]."""

    def __init__(self, experts: int, out_dim: int, in_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_dim, in_dim))
        nn.init.normal_(self.weight, std=in_dim**-0.5)


class MixtureOfExperts(nn.Module):
    """Top-k experts per token; softmax over the chosen k router logits only.

    An expert halves ``fc1(x)`` into h and g and gives ``fc2(gelu(h) * (g + 1))`` (erf GELU).
    """

    def __init__(self, dim: int, inner_dim: int, experts: int, per_token: int) -> None:
        super().__init__()
        self.per_token = per_token
        self.router = nn.Linear(dim, experts)
        self.fc1 = ExpertWeights(experts, 2 * inner_dim, dim)
        self.fc2 = ExpertWeights(experts, dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        tokens = x.reshape(-1, x.shape[-1])
        scores, chosen = self.router(tokens).topk(self.per_token, dim=-1)
        weights = scores.softmax(dim=-1)
        if chosen.numel() <= GATHER_LIMIT:
            mixed = self._gathered(tokens, chosen, weights)
        elif tokens.is_cuda and len(tokens) <= EVERY_LIMIT:
            mixed = self._every(tokens, chosen, weights)
        else:
            mixed = self._visited(tokens, chosen, weights)
        return mixed.view_as(x)

    def _gathered(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.einsum("nkoi,ni->nko", self.fc1.weight[chosen], tokens)
        h, g = hidden.chunk(2, dim=-1)
        out = torch.einsum("nkoi,nki->nko", self.fc2.weight[chosen], F.gelu(h) * (g + 1))
        return (out * weights[..., None]).sum(dim=1)

    def _every(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        # Experts that a token did not choose count 0.
        share = torch.zeros(
            len(tokens), len(self.fc1.weight), dtype=tokens.dtype, device=tokens.device
        )
        share = share.scatter_(1, chosen, weights.to(tokens.dtype)).T[..., None]
        h, g = (tokens @ self.fc1.weight.transpose(1, 2)).chunk(2, dim=-1)
        return ((F.gelu(h) * (g + 1)) @ self.fc2.weight.transpose(1, 2) * share).sum(dim=0)

    def _visited(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        mixed = torch.zeros_like(tokens)
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.per_token
        counts = torch.bincount(chosen.flatten(), minlength=self.router.out_features).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            picked = order[start : start + count]
            row = rows[start : start + count]
            start += count
            h, g = F.linear(tokens[row], self.fc1.weight[expert]).chunk(2, dim=-1)
            out = F.linear(F.gelu(h) * (g + 1), self.fc2.weight[expert])
            mixed.index_add_(0, row, out * weights.flatten()[picked, None])
        return mixed
