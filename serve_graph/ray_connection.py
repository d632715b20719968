"""The connection of this process to Ray, which all clients in it share."""

from __future__ import annotations

import threading
from collections.abc import Callable

_lock = threading.Lock()
_sharing = 0
"""How many share the connection."""
_made_here = False
"""Whether one of them made it, and not the program itself."""


def join(connect: Callable[[], None]) -> None:
    """Share the connection; ``connect`` makes it where the process has none."""
    import ray

    global _sharing, _made_here
    with _lock:
        if not ray.is_initialized():
            connect()
            _made_here = True
        _sharing += 1


def leave() -> None:
    """The last of those who share the connection closes it, where one of them made it."""
    import ray

    global _sharing, _made_here
    with _lock:
        _sharing -= 1
        if not _sharing and _made_here:
            _made_here = False
            ray.shutdown()
