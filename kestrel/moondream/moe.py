"""Mixture-of-experts MLP of the text decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.moondream.initial import normal_weights
from kestrel.ops import experts, routing
from kestrel.ops.graphs import capturing
from kestrel.ops.linear import FinalLinear, Product, final, reorders, shape_of

GATHER_LIMIT = 32
"""Up to this many (token, expert) pairs, gathering expert weights beats visiting every expert."""
EVERY_LIMIT = 64
"""Up to this many tokens, CUDA runs every expert on every token: a decode step reads most experts'
weights in any case, and nothing in it waits for the host. More tokens are grouped by expert where
the device can, or do so while they are captured, when nothing may wait."""


class ExpertWeights(nn.Module):
    """One stacked matrix per expert, without bias: [experts, out, in]."""

    def __init__(self, experts: int, out_dim: int, in_dim: int) -> None:
        super().__init__()
        self.weight = normal_weights(experts, out_dim, in_dim, std=in_dim**-0.5)

    def products(self) -> list[Product]:
        """Each expert's product, its weights in the order of the CPU's kernels. What those hold
        alone is left here as a mere shape."""
        products = [Product(weight, None, reorder=True) for weight in self.weight.detach()]
        if all(product.weight is None for product in products):
            self.weight = shape_of(self.weight)
        return products


class MixtureOfExperts(nn.Module):
    """Top-k experts per token; softmax over the chosen k router logits only.

    An expert halves ``fc1(x)`` into h and g and gives ``fc2(gelu(h) * (g + 1))`` (erf GELU).
    """

    def __init__(self, dim: int, inner_dim: int, count: int, per_token: int) -> None:
        super().__init__()
        self.per_token = per_token
        self.choose: routing.Choice = routing.choose
        self.router: nn.Linear | FinalLinear = nn.Linear(dim, count)
        self.fc1 = ExpertWeights(count, 2 * inner_dim, dim)
        self.fc2 = ExpertWeights(count, dim, inner_dim)
        self._products: list[tuple[Product, Product]] | None = None

    def finalize(self) -> None:
        """Make ready to serve; the weights are then final. On a CPU a token's numbers then are the
        same whatever other tokens come with it."""
        if self._products is None and reorders(self.fc1.weight):
            self.router = final(self.router)
            pairs = zip(self.fc1.products(), self.fc2.products(), strict=True)
            self._products = list(pairs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.choose(self.router(tokens), self.per_token)
        if self._products is not None:
            mixed = self._visited(tokens, chosen, weights)
        elif chosen.numel() <= GATHER_LIMIT:
            mixed = self._gathered(tokens, chosen, weights)
        elif tokens.is_cuda and len(tokens) <= EVERY_LIMIT:
            mixed = self._every(tokens, chosen, weights)
        elif experts.can_group(tokens):
            mixed = self._grouped(tokens, chosen, weights)
        elif capturing(tokens.device):
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

    def _grouped(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = flat.new_zeros(len(self.fc1.weight)).scatter_add_(0, flat, torch.ones_like(flat))
        ends = counts.cumsum(0).to(torch.int32)
        hidden = experts.grouped(tokens[order // self.per_token], self.fc1.weight, ends)
        h, g = hidden.chunk(2, dim=-1)
        out = experts.grouped(F.gelu(h) * (g + 1), self.fc2.weight, ends)
        # Back in the order of the tokens: their parts add up in the same order each time.
        parts = torch.empty_like(out)
        parts[order] = out
        return (parts.view(*chosen.shape, -1) * weights[..., None].to(out.dtype)).sum(dim=1)

    def _visited(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        mixed = torch.zeros_like(tokens)
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.per_token
        counts = torch.bincount(chosen.flatten(), minlength=len(self.fc1.weight)).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            picked = order[start : start + count]
            row = rows[start : start + count]
            start += count
            into, out_of = self._expert(expert)
            h, g = into(tokens[row]).chunk(2, dim=-1)
            # In one piece: rows that lie apart are read in another way than one row.
            out = out_of(F.gelu(h.contiguous()) * (g + 1))
            mixed.index_add_(0, row, out * weights.flatten()[picked, None])
        return mixed

    def _expert(self, number: int) -> tuple[Product, Product]:
        if self._products is not None:
            return self._products[number]
        first, second = self.fc1.weight[number], self.fc2.weight[number]
        return Product(first, None, reorder=False), Product(second, None, reorder=False)
