"""How long refinements take, and whether one hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MEAN_WEIGHT = 0.05
"""Weight of one refinement in the running mean of what they take."""


def at_full_speed(cpus: float, threads: int) -> float:
    """Refinements that one refiner runs at once without slowing each other down: each keeps a CPU
    busy, of which there is one at least, and a thread."""
    return min(float(threads), max(1.0, cpus))


class Busy:
    """How long one refinement takes of a process's full attention.

    The process gives all of it to ``at_once`` refinements, each of which has a CPU then, and to
    more, which share the CPUs; fewer leave the rest of it free. So each counts the part that was
    used of the time that passes, divided by how many there were. What one that raises took counts
    for the next: it would else make all seem quick that nobody waits for to the end. Safe to use
    from several threads.
    """

    def __init__(self, at_once: float = 1.0) -> None:
        """``at_once``: refinements that run without slowing each other down, at least 1."""
        self._at_once = at_once
        self.mean_s: float | None = None
        """Running mean, seconds; None before the first."""
        self._lock = threading.Lock()
        self._began: list[float] = []
        self._since = time.monotonic()
        self._spent = 0.0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Around one refinement, in its thread."""
        with self._lock:
            began = self._pass()
            self._began.append(began)
        ended = False
        try:
            yield
            ended = True
        finally:
            with self._lock:
                self._pass()
                self._began.remove(began)
                if ended:
                    self._measured()

    def _measured(self) -> None:
        # All that was used, over all that finished.
        spent, self._spent = self._spent, 0.0
        mean = spent if self.mean_s is None else self.mean_s
        self.mean_s = mean + MEAN_WEIGHT * (spent - mean)

    def _pass(self) -> float:
        now = time.monotonic()
        if self._began:
            used = min(1.0, len(self._began) / self._at_once)
            self._spent += used * (now - self._since)
        self._since = now
        return now

    def longest_s(self) -> float:
        """For how long the oldest refinement that runs has run, seconds; 0: none does."""
        with self._lock:
            return time.monotonic() - min(self._began) if self._began else 0.0
