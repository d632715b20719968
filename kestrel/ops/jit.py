"""Compiling by Numba, kept on disk where that can be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


def compiled(
    signature: str | list[str], function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """``function`` compiled for its signatures, without the GIL. ImportError without Numba.

    The first process of a machine takes seconds for it, others find the result beside the package
    or in the user's cache (``NUMBA_CACHE_DIR`` names another folder). The log says so, once.
    """
    from numba import njit
    from numba.core.event import install_listener

    with install_listener("numba:compile", _listener()):
        return _compiled(njit, signature, function, **options)


def _compiled(
    njit: Callable[..., Any],
    signature: str | list[str],
    function: Callable[..., Any],
    **options: Any,
) -> Callable[..., Any]:
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return njit(signature, **options)(function)


@cache
def _listener() -> Any:
    """Tells of the first function of this process that is not found compiled."""
    from numba.core.event import Listener

    class Compiling(Listener):
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                log.info("compiling for this processor, once on a machine: up to a minute")
            self.told = True

        def on_end(self, event: Any) -> None:
            pass

    return Compiling()
