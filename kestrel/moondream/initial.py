"""Parameters as they are before a checkpoint is read."""

from __future__ import annotations

import torch
from torch import nn


def normal_weights(*shape: int, std: float) -> nn.Parameter:
    """Drawn from a normal distribution, but for those of the meta device, where drawing nothing
    would import torch's compiler: seconds of every start."""
    weights = nn.Parameter(torch.empty(shape))
    if not weights.is_meta:
        nn.init.normal_(weights, std=std)
    return weights
