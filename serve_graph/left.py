"""What is left of a deadline, told to another process."""

from __future__ import annotations

import time


class Left:
    """What is left until ``deadline`` (by ``time.monotonic()``), seconds: whoever is called gets it
    as the number that it is when the call is sent, which is after a replica was found for it."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (max(0.001, self.deadline - time.monotonic()),)
