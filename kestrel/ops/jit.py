"""Compiling by Numba, kept on disk where that can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(
    signature: str | list[str], function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """``function`` compiled for its signatures, without the GIL. ImportError without Numba.

    The first process of a machine takes seconds for it, others find the result beside the package
    or in the user's cache (``NUMBA_CACHE_DIR`` names another folder).
    """
    from numba import njit

    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return njit(signature, **options)(function)
