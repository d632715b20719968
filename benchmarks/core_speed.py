"""How fast this machine's cores are from moment to moment.

Clocks, and neighbours of a virtual machine, change the speed of a core by half within minutes. A
thread does a little fixed work again and again: the CPU time that it takes, which waiting for a
core is no part of, says how slow the cores are.
"""

from __future__ import annotations

import threading
import time

import numpy as np

PERIOD_S = 0.25
"""Between two looks; each takes about two milliseconds."""
VALUES = 16_384
"""float32 numbers of one operation: they stay in a core's own cache."""
REPEATS = 150


class CoreSpeed:
    """Looks for as long as it is entered."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._seen: list[tuple[float, float]] = []
        """Monotonic seconds and CPU seconds of the work."""

    def __enter__(self) -> CoreSpeed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def slowness(self, began: float, ended: float) -> float:
        """Mean CPU seconds of the work between two times (monotonic seconds)."""
        took = [seconds for at, seconds in self._seen if began <= at <= ended]
        if not took:
            raise ValueError("nothing was looked at between these times")
        return float(np.mean(took))

    def _look(self) -> None:
        values = np.linspace(0.5, 1.5, VALUES, dtype=np.float32)
        room = np.empty_like(values)
        while not self._stop.wait(PERIOD_S):
            began = time.thread_time()
            for _ in range(REPEATS):
                np.multiply(values, values, out=room)
                np.sqrt(room, out=room)
            self._seen.append((time.monotonic(), time.thread_time() - began))
