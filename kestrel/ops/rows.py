"""Whether decode steps on this machine may run compiled (``kestrel.ops.compiled``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

log = logging.getLogger(__name__)

LayerRows = Callable[..., None]
"""``kestrel.ops.compiled.layer_rows``."""


@cache
def compiled() -> LayerRows | None:
    """The pass over the rows of one layer; None, with a warning, where it cannot be compiled.

    The first process of a machine takes some seconds for it, others find it beside the package or
    in the user's cache (``NUMBA_CACHE_DIR`` names another folder).
    """
    try:
        from kestrel.ops.compiled import layer_rows
    except Exception as error:  # not installed, or not for this Python, NumPy or processor
        log.warning(
            "decode steps run operator by operator, at about half the speed (%s: %s); "
            "pip install numba",
            type(error).__name__,
            error,
        )
        return None
    return layer_rows
