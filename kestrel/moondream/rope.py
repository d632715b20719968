"""Rotary position embedding (Su et al. 2021), split-half pairing, on part of each head."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(rotary_dim: int, positions: int, theta: float) -> Tensor:
    """Cosines and sines, float32 [positions, 2, rotary_dim // 2]."""
    freqs = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * freqs[None, :]
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the leading dimensions of every head.

    ``x`` [..., T, head_dim]; ``table`` float32 broadcastable to [..., T, 2, rotary_dim // 2].
    Computed in float32, given back in the dtype of ``x``.
    """
    cos, sin = table.unbind(-2)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = first.float(), second.float()
    return torch.cat(
        [(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest], dim=-1
    )
