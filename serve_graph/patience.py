"""How long the client waits for the events of a stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

LATE_S = 1.0
"""How long the events of a stream that has begun are waited for when the deadline is over, seconds
in all: the service says so in an event of its own, and what came in time takes a moment to be
fetched."""


class Patience:
    """Up to when the events of one stream are waited for. Time that its reader takes for himself
    between them, also beyond the deadline, does not count."""

    def __init__(self, seconds: float) -> None:
        """``seconds``: the deadline of the request, from now."""
        self.deadline = time.monotonic() + seconds
        self._late_s = 0.0
        """What is left of the wait beyond the deadline: nothing, until an event has come."""
        self._begun = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[float]:
        """Wait for the next event within: gives up to when, by ``time.monotonic()``."""
        began = max(self.deadline, time.monotonic())
        yield began + self._late_s
        if not self._begun:
            self._begun, self._late_s = True, LATE_S
        self._late_s -= max(0.0, time.monotonic() - began)
