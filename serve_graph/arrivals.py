"""When requests come: the loads that the planner simulates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Rate = Callable[[float], float]
"""Requests per second at a time, seconds from the start."""


class Arrivals(Protocol):
    """A load: when its requests come, whatever becomes of those before."""

    def times(self, seconds: float, rng: np.random.Generator) -> list[float]:
        """Seconds from the start of each request of the first ``seconds`` seconds, sorted."""

    def rate(self, at: float) -> float:
        """Requests per second at a time, as the plots show it."""


@dataclass(frozen=True)
class Poisson:
    """Many clients that know nothing of each other, at a rate that may change."""

    rate: Rate

    def times(self, seconds: float, rng: np.random.Generator) -> list[float]:
        """By thinning: drawn at the highest rate, kept with the part that the rate is of it."""
        grid = np.linspace(0, seconds, 1001)
        rates = np.array([self.rate(float(at)) for at in grid])
        most = float(rates.max())
        if most <= 0:
            return []
        number = rng.poisson(most * seconds)
        times = np.sort(rng.random(number) * seconds)
        kept = rng.random(number) * most < np.interp(times, grid, rates)
        found: list[float] = times[kept].tolist()
        return found


@dataclass(frozen=True)
class Paced:
    """By the clock: each 1 / rate after the one before."""

    rate: Rate

    def times(self, seconds: float, rng: np.random.Generator) -> list[float]:
        times = [0.0]
        while (following := times[-1] + 1 / self.rate(times[-1])) < seconds:
            times.append(following)
        return times


@dataclass(frozen=True)
class Recorded:
    """Times at which requests were really sent, so that chance is the same in both."""

    moments: tuple[float, ...]

    def times(self, seconds: float, rng: np.random.Generator) -> list[float]:
        return [moment for moment in self.moments if moment < seconds]

    def rate(self, at: float) -> float:
        return len(self.moments) / max(self.moments[-1], 1e-9) if self.moments else 0.0


@dataclass(frozen=True)
class ClosedLoop:
    """So many clients, each with its next request as soon as it has its answer."""

    clients: int

    def times(self, seconds: float, rng: np.random.Generator) -> list[float]:
        """The first request of each; the simulation adds the others as it answers."""
        return [0.0] * self.clients

    def rate(self, at: float) -> float:
        """Unknown beforehand."""
        return float("nan")
