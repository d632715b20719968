"""Whether decode steps on this machine may run compiled (``kestrel.ops.compiled``)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TypeVar

log = logging.getLogger(__name__)

Built = TypeVar("Built")


def compiled(build: Callable[[ModuleType], Built]) -> Built | None:
    """What ``build`` makes of ``kestrel.ops.compiled``; None, with a warning, where that cannot be
    compiled.

    The first process of a machine takes some seconds for it, others find it beside the package or
    in the user's cache (``NUMBA_CACHE_DIR`` names another folder).
    """
    try:
        return build(importlib.import_module("kestrel.ops.compiled"))
    except Exception as error:  # not installed, or not for this Python, NumPy or processor
        _warn(f"{type(error).__name__}: {error}")
        return None


@cache
def _warn(reason: str) -> None:
    """Say it once for every reason."""
    log.warning(
        "decode steps run operator by operator, which takes several times as long (%s); "
        "pip install numba",
        reason,
    )
