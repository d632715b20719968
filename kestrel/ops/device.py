"""Device and number format by the names that configurations use."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kestrel.config import ConfigError

SMALL_MODEL = 30_000_000
"""Parameters under which a model on a CPU gets one thread, and encodes images in bfloat16 by itself
where that is faster: a second copy of its weights costs little."""


def resolve_device(device: str) -> torch.device:
    """``auto`` -> CUDA where torch sees a GPU, else CPU; ``ConfigError`` for a GPU that is not
    there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no GPU; install a CUDA build of torch "
            "(pip install torch) and check nvidia-smi, or set device: cpu"
        )
    if device.startswith("cuda"):
        gpu_index(device, torch.cuda.device_count())
    return torch.device(device)


def gpu_index(device: str, count: int) -> int:
    """Which of ``count`` GPUs ``cuda:N`` names; 0 for a name without a number. ``ConfigError`` for
    one beyond the last."""
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        seen = "1 GPU, cuda:0" if count == 1 else f"{count} GPUs, the last is cuda:{count - 1}"
        raise ConfigError(f"device is {device}, but torch sees {seen}")
    return index


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` -> bfloat16 on CUDA, float32 on CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[dtype]


def has_bfloat16_products() -> bool:
    """Whether the processor has products of bfloat16 matrices (AMX, AVX512-BF16), at least twice as
    fast as those of float32."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def has_matrix_unit() -> bool:
    """Whether the processor has a unit for products of matrices (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def resolve_image_dtype(
    image_dtype: str | None,
    device: torch.device,
    dtype: torch.dtype,
    stored: Iterable[torch.dtype | None],
    parameters: int,
) -> torch.dtype:
    """What images are encoded in by a model that computes in ``dtype``.

    ``bfloat16`` counts for float32 on a CPU, where ``auto`` means it for a model under
    ``SMALL_MODEL`` parameters whose weights are ``stored`` in bfloat16, so that none of them is
    rounded, where the processor has products for it. None: ``dtype``.
    """
    if image_dtype is None or device.type != "cpu" or dtype != torch.float32:
        return dtype
    if image_dtype == "auto" and not (_small(stored, parameters) and has_bfloat16_products()):
        return dtype
    return torch.bfloat16


def resolve_kv_dtype(
    kv_dtype: str | None,
    images: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
    stored: Iterable[torch.dtype | None],
    parameters: int,
) -> torch.dtype:
    """What keys and values are kept in by a model that computes in ``dtype`` and encodes images in
    ``images``: ``bfloat16`` counts for float32 on a CPU, where ``auto`` means it as
    ``RuntimeConfig.kv_dtype`` says. None: ``dtype``."""
    if kv_dtype is None or device.type != "cpu" or dtype != torch.float32:
        return dtype
    if kv_dtype == "auto" and images == dtype and not _small(stored, parameters):
        return dtype
    return torch.bfloat16


def _small(stored: Iterable[torch.dtype | None], parameters: int) -> bool:
    """Whether a model is under ``SMALL_MODEL``, its weights all stored in bfloat16."""
    return parameters < SMALL_MODEL and all(kind == torch.bfloat16 for kind in stored)
