"""Scaled dot-product attention: one call, the right kernel for where it runs."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kestrel.ops.bits import bits_of, numpy_name
from kestrel.ops.device import has_matrix_unit

log = logging.getLogger(__name__)

MODULE = "kestrel.ops.unmasked"
"""By name: Numba, which it needs, may be missing."""
HEAD = 32
"""Heads of a multiple of so many numbers are taken by it."""
FEW = 4
"""Fewer queries are left to torch."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of ``q`` [B, H, T, D] over ``k``, ``v`` [B, Hkv, S, D]; gives [B, H, T, D].

    ``mask`` is boolean, broadcastable to [B, H, T, S], True where a query sees a key.
    H must be a multiple of Hkv (grouped-query attention).
    """
    trained = q.device.type == "cpu" and torch.is_grad_enabled()
    if mask is None and not trained and (kernel := _kernel_for(q)) is not None:
        return _unmasked(kernel, q, k, v)
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if trained:
        # The fused kernel's backward on CPU takes almost half of a training step at the lengths
        # of the shipped model; two plain matmuls do not.
        scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _kernel_for(q: Tensor) -> Callable[..., None] | None:
    """The compiled kernel where it takes less time than torch's: for one thread of a CPU, and in
    bfloat16 where there is no unit for products of matrices."""
    if q.device.type != "cpu" or q.shape[2] < FEW or torch.get_num_threads() > 1:
        return None
    return _kernel(numpy_name(q.dtype)) if _faster(q.dtype, q.shape[-1]) else None


def _faster(dtype: torch.dtype, head_dim: int) -> bool:
    half = dtype == torch.bfloat16 and not has_matrix_unit()
    return head_dim % HEAD == 0 and (dtype == torch.float32 or half)


def by_query(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether, with one thread of a CPU, a query of an image sees the same, to the last bit,
    whichever others are asked with it, of ``FEW`` or more."""
    return _faster(dtype, head_dim) and _kernel(numpy_name(dtype)) is not None


@cache
def _kernel(numbers: str) -> Callable[..., None] | None:
    try:
        kernel: Callable[..., None] = importlib.import_module(MODULE).unmasked(numbers)
        return kernel
    except Exception as error:  # not installed, or not for this Python, NumPy or processor
        log.warning(
            "images are encoded by torch's attention, which takes twice as long "
            "(%s: %s); pip install numba",
            type(error).__name__,
            error,
        )
        return None


def _unmasked(kernel: Callable[..., None], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``attend`` without a mask by the compiled kernel."""
    batch, heads, count, dim = q.shape
    out = q.new_empty(batch, count, heads, dim)
    numbers = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
    for n in range(batch):
        kernel(*(bits_of(t[n].transpose(0, 1)) for t in numbers), bits_of(out[n]))
    return out.transpose(1, 2)
