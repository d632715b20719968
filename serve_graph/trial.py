"""One trial of a plan: pools of fixed size under a steady load, and while replicas are lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve_graph.arrivals import Poisson
from serve_graph.profile import Profile
from serve_graph.simulated_pool import PoolPlan
from serve_graph.simulation import Look, Outcome, Scenario, Simulation

CALM_S = 5.0
"""After the warm-up and before replicas are lost, seconds: how long requests wait then is what the
queues must come back to."""


@dataclass(frozen=True)
class Aim:
    """What a plan must hold."""

    rps: float
    p99_s: float
    seconds: float
    """Simulated time, after ``warmup_s``; of the outage where replicas are lost."""
    warmup_s: float
    refined_share: float
    lost_models: int
    lost_refiners: int
    seed: int
    busiest: float = 0.8
    """Part of what either pool can do that the load may be."""

    @property
    def loses(self) -> bool:
        """Whether the aim must hold while replicas are lost."""
        return bool(self.lost_models or self.lost_refiners)

    @property
    def work_off_s(self) -> float:
        """Time enough for what waits when the lost are back, seconds: it is no more than the pools
        do within ``p99_s`` where the aim holds, and they have a part of their speed to spare."""
        return 5.0 + 5 * self.p99_s


@dataclass(frozen=True)
class Starts:
    """How long replicas and nodes take to start, seconds, and how many replicas a node holds: model
    replicas one to a GPU, refiners as many as have their CPUs. Each pool has nodes of its own, at
    first those that it fills. A replica that finds no room on them waits for another node to start
    before it starts itself."""

    model_s: float
    refiner_s: float
    node_s: float
    gpus_per_node: int
    cpus_per_node: int

    def refiners_per_node(self, profile: Profile) -> int:
        """At least one: a refiner that is larger than a node has one of its own."""
        return max(1, int(self.cpus_per_node // max(1.0, profile.refiner_cpus)))

    def lost_nodes(self, profile: Profile, aim: Aim) -> tuple[int, int]:
        """Whole nodes that are lost, of the model pool and of the refiners."""
        return (
            aim.lost_models // self.gpus_per_node,
            aim.lost_refiners // self.refiners_per_node(profile),
        )

    def away_s(self, profile: Profile, aim: Aim) -> float:
        """How long the last of those that are lost is away; 0 when none is."""
        model_nodes, refiner_nodes = self.lost_nodes(profile, aim)
        return max(
            self.model_s + self.node_s * (model_nodes > 0) if aim.lost_models else 0.0,
            self.refiner_s + self.node_s * (refiner_nodes > 0) if aim.lost_refiners else 0.0,
        )


def scenario(
    profile: Profile, aim: Aim, starts: Starts, models: int, refiners: int, threads: int
) -> Scenario:
    """Pools of fixed size under a steady load. What is lost is lost soon, and the load lasts until
    it is back and what piled up is worked off; what came before the loss is not counted."""
    lost_at_s = aim.warmup_s + CALM_S if aim.loses else math.inf
    ends_s = aim.warmup_s + aim.seconds
    if aim.loses:
        ends_s = lost_at_s + starts.away_s(profile, aim) + aim.work_off_s
    return Scenario(
        profile=profile,
        model=PoolPlan(
            models,
            max_ongoing=2 * profile.slots,
            start_s=starts.model_s,
            per_node=starts.gpus_per_node,
            node_start_s=starts.node_s,
        ),
        refiner=PoolPlan(
            refiners,
            max_ongoing=threads,
            start_s=starts.refiner_s,
            per_node=starts.refiners_per_node(profile),
            node_start_s=starts.node_s,
        ),
        arrivals=Poisson(lambda _: aim.rps),
        seconds=ends_s,
        refined_share=aim.refined_share,
        warmup_s=lost_at_s if aim.loses else aim.warmup_s,
        lost_at_s=lost_at_s,
        lost_models=aim.lost_models,
        lost_refiners=aim.lost_refiners,
        seed=aim.seed,
    )


def trial(
    profile: Profile, aim: Aim, starts: Starts, models: int, refiners: int, threads: int
) -> Outcome:
    """What the pools make of the load for ``aim.seconds``. Where replicas are lost: of as many
    outages as have that time in them, the requests that came while replicas were away or while what
    had piled up was worked off."""
    pools = scenario(profile, aim, starts, models, refiners, threads)
    if not aim.loses:
        return Simulation(pools).run()
    away_s = starts.away_s(profile, aim)
    # What follows an outage takes as long to simulate, so the shortest are not repeated endlessly.
    outages = math.ceil(aim.seconds / max(away_s, aim.work_off_s))
    runs = [Simulation(replace(pools, seed=aim.seed + number)).run() for number in range(outages)]
    return _together(runs, pools, away_s)


def _waiting(look: Look) -> int:
    return look.model_queue + look.refiner_queue


def _of_outage(outcome: Outcome, pools: Scenario, away_s: float) -> list[tuple[float, float]]:
    """(end, latency) of those requests that came before no more waited than ever did in the calm:
    those after them would hide how long it took in the outage."""
    calm = max((_waiting(look) for look in outcome.trace if look.at < pools.lost_at_s), default=0)
    worked_off_s = next(
        (
            look.at
            for look in outcome.trace
            if look.at >= pools.lost_at_s + away_s and _waiting(look) <= calm
        ),
        math.inf,
    )
    return [(end, took) for end, took in outcome.finished if end - took < worked_off_s]


def _together(runs: Sequence[Outcome], pools: Scenario, away_s: float) -> Outcome:
    """Outages of the same pools as one outcome; its trace is that of one of them."""
    finished = [answer for run in runs for answer in _of_outage(run, pools, away_s)]
    counted_s = sum(
        max([pools.seconds, *(end for end, _ in run.finished)]) - pools.warmup_s for run in runs
    )
    return Outcome(
        latency=np.array([took for _, took in finished]),
        answered_per_s=sum(len(run.finished) for run in runs) / counted_s,
        model_queue=max(run.model_queue for run in runs),
        refiner_queue=max(run.refiner_queue for run in runs),
        refiner_seconds=sum(run.refiner_seconds for run in runs),
        model_busy=float(np.mean([run.model_busy for run in runs])),
        refiner_busy=float(np.mean([run.refiner_busy for run in runs])),
        finished=finished,
        trace=max((run.trace for run in runs), key=len),
    )
