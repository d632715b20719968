"""A tensor's memory as NumPy, and so Numba, takes it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def numpy_name(dtype: torch.dtype) -> str:
    """The type of what ``bits_of`` gives."""
    return "uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def bits_of(numbers: Tensor) -> np.ndarray:
    """A tensor's memory for NumPy, which has no bfloat16: as the uint16 of their bits."""
    same = numbers.view(torch.uint16) if numbers.dtype == torch.bfloat16 else numbers
    return same.numpy()
