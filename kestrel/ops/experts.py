"""Products of many rows with one matrix of several: what a mixture of experts is made of."""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

AGREES = 2e-2
"""Largest difference from one product after another in a trial, whose values are of order 1."""


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ``ends[e - 1]`` to ``ends[e]`` of ``x`` [N, in] times ``weight[e]`` [out, in]; ``ends``
    int32 [experts]. Gives [N, out]; nothing waits for the device."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def can_group(like: Tensor) -> bool:
    """Whether :func:`grouped` runs for this device and dtype, and agrees with plain products."""
    if like.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    return _agrees(like.device, like.dtype)


@cache
def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        differs = trial(device, dtype)
    except Exception as error:  # another torch, a GPU or a dtype that it has no kernel for
        log.warning("experts are visited one by one: %s: %s", type(error).__name__, error)
        return False
    if not differs <= AGREES:
        log.warning("experts are visited one by one: grouped products differ by %.3f", differs)
    return differs <= AGREES


def trial(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference from one product after another, one group being empty."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=chance).to(device, dtype)
    weight = (torch.randn(4, 32, 64, generator=chance) / 8).to(device, dtype)
    ends = [17, 17, 40, 48]
    got = grouped(x, weight, torch.tensor(ends, dtype=torch.int32, device=device))
    parts = zip([0, *ends], ends, weight, strict=False)
    expected = torch.cat([x[start:end] @ own.T for start, end, own in parts])
    return float((got - expected).abs().max())
