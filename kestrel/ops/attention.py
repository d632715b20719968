"""Scaled dot-product attention: one call, the right kernel for where it runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of ``q`` [B, H, T, D] over ``k``, ``v`` [B, Hkv, S, D]; gives [B, H, T, D].

    ``mask`` is boolean, broadcastable to [B, H, T, S], True where a query sees a key.
    H must be a multiple of Hkv (grouped-query attention).
    """
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # The fused kernel's backward on CPU takes almost half of a training step at the lengths
        # of the shipped model; two plain matmuls do not.
        scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
