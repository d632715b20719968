"""Memory that a process has freed, given back to the system.

A process that serves takes and frees memory in all sizes: pictures, masks, bodies. glibc keeps what
is freed between blocks in use. ``malloc_trim`` gives whole pages of it back; the milliseconds that
takes are nothing once in a while.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import lru_cache

EVERY_S = 60.0
"""Between two times, seconds."""
THREAD = "give back memory"


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; None with another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def available() -> bool:
    """Whether anything can be given back here."""
    return _malloc_trim() is not None


def give_back() -> None:
    """Give back all whole pages that nothing uses. Other threads run meanwhile."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class GivingBack:
    """A thread of a process that serves, which gives back from time to time."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        if available():
            threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            give_back()

    def stop(self) -> None:
        """Idempotent."""
        self._stopped.set()
