"""Where a test of tensors runs: the CPU always, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    ],
)
DEVICES = [CPU, GPU]
