"""How long a request will stay in a service, by how long others did."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

KEPT = 128
"""Requests that ended last, from which a stay is told."""
RECENT_S = 30.0
"""What ended longer ago tells nothing any more, seconds: a few full stays. With
10, what was learnt of being late was forgotten before it was of use."""
MOST = 0.98
"""Part of the requests that are to stay no longer than is said."""
GIVEN_UP = 1.25
"""Times that a request which was given up is taken to have needed; nobody knows how many."""
SPARE = 1.1
"""Times that a request is to have of what it will hardly stay longer than: no two are alike."""


class Stay(NamedTuple):
    """A request that is under way."""

    began: float
    others: int
    """Those that were under way before it."""
    ended_before: int
    told_s: float
    """How long it was to stay if all took alike; 0: not known."""


class _Ended(NamedTuple):
    at: float
    others: int
    pace: float
    """Requests per second that ended while it stayed."""
    longer: float
    """How many times as long as told it stayed; 0: nothing was told."""
    took_s: float
    """How long it stayed; infinite: it was given up."""


class Stays:
    """The pace at which requests end while others wait, and what that means for the next one.

    The pace is how many ended during a request's stay, over its length: of everything behind the
    door, however many stages and replicas that is. With others before it, a request waits until as
    many have ended. A pace is that of the service only where there was enough to do, so a stay says
    something about at most twice as many others as it had itself.

    Some of the others may not be in its way: one that is stuck, or where more run side by side than
    is known. So it is not to stay longer than those that had as many before them.
    """

    def __init__(self, unhindered: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``unhindered``: so many requests run side by side, and with fewer none waits."""
        self.under_way = 0
        self._unhindered = unhindered
        self._clock = clock
        self._count = 0
        self._ended: deque[_Ended] = deque(maxlen=KEPT)

    def begin(self) -> Stay:
        told_s = self._mean_s()
        self.under_way += 1
        return Stay(self._clock(), self.under_way - 1, self._count, told_s)

    def end(self, stay: Stay, *, late: bool = False) -> None:
        """It was answered; ``late``: it was given up at its deadline."""
        self.under_way -= 1
        self._count += 1
        now = self._clock()
        took = max(now - stay.began, 1e-6)
        pace = (self._count - stay.ended_before) / took
        longer = took / stay.told_s * (GIVEN_UP if late else 1.0) if stay.told_s else 0.0
        took_s = math.inf if late else took
        self._ended.append(_Ended(now, stay.others, pace, longer, took_s))

    def forget(self) -> None:
        """One ended in a way that tells nothing: refused, failed, left by its client."""
        self.under_way -= 1

    def expected_s(self) -> float:
        """Seconds that a request which comes now should have; 0 where that is not known, or so few
        are under way that it need not wait."""
        mean_s = self._mean_s()
        if not mean_s:
            return 0.0
        recent = self._recent()
        longer = [ended.longer for ended in recent if ended.longer]
        margin = max(1.0, _most(longer)) if longer else 1.0
        alike = [ended.took_s for ended in recent if ended.others >= self.under_way]
        return SPARE * min(margin * mean_s, _most(alike) if alike else math.inf)

    def _mean_s(self) -> float:
        others = self.under_way
        if others < self._unhindered:
            return 0.0
        paces = [ended.pace for ended in self._recent() if 2 * ended.others >= others]
        return (others + 1) / median(paces) if paces else 0.0

    def _recent(self) -> list[_Ended]:
        since = self._clock() - RECENT_S
        return [ended for ended in self._ended if ended.at >= since]


def _most(values: list[float]) -> float:
    """What ``MOST`` of them are not above."""
    return sorted(values)[int(MOST * len(values))]
