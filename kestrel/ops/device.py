"""Device and number format by the names that configurations use."""

from __future__ import annotations

import torch

from kestrel.config import ConfigError


def resolve_device(device: str) -> torch.device:
    """``auto`` -> CUDA where torch sees a GPU, else CPU; ``ConfigError`` for a GPU that is not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no GPU; install a CUDA build of torch "
            "(pip install torch) and check nvidia-smi, or set device: cpu"
        )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` -> bfloat16 on CUDA, float32 on CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[dtype]
