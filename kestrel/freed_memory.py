"""Memory of a process that serves for long: what it no longer uses is freed, and given back.

Requests leave objects that refer to each other, which only Python's garbage collector finds. By
itself it looks through all that lives once there are tens of thousands of them: megabytes, and a
pause of a tenth of a second where libraries are loaded. Looked for once a minute they are few, and
:func:`settle` takes what was there before the first request out of the search: a millisecond.

glibc keeps what is freed between blocks in use. ``malloc_trim`` gives whole pages of it back; the
milliseconds that takes are nothing once in a while.
"""

from __future__ import annotations

import ctypes
import gc
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
    """Whether pages can be given back here."""
    return _malloc_trim() is not None


def give_back() -> None:
    """Free what only refers to itself, and give back all whole pages that nothing uses. Other
    threads run while they are given back."""
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def settle() -> None:
    """What a process has loaded is there for good: the garbage collector looks only at what comes
    from now on. What is garbage already is freed first.

    To be called anew when something large has been replaced, which would not be found else.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class GivingBack:
    """A thread of a process that serves, which gives back from time to time until it is stopped."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            give_back()

    def stop(self) -> None:
        """Give nothing back any more; what was there for good need not be. Idempotent."""
        self._stopped.set()
        gc.unfreeze()
