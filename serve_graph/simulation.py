"""A discrete-event simulation of the two pools, with the policy that scales the real ones.

Only arrivals, completions and changes of a pool are events, so that the cost grows with the
requests and hardly with the replicas. Where everything runs on one machine, model, refiners and
the HTTP door share its cores (``simulated_pool.Cores``); else every replica has its own.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kestrel.busy import at_full_speed
from serve_graph.arrivals import Arrivals, ClosedLoop
from serve_graph.lookahead import ModelLoad, RefinerLoad, Starting, decide
from serve_graph.profile import Profile, draw
from serve_graph.simulated_pool import TICK_S, Cores, PoolPlan, Replica, SimulatedPool

DRAWN = 10_000
"""Different requests of a closed loop, whose number nobody knows beforehand."""
DOOR_PROCESSES = 3
"""Client, HTTP proxy and ingress: so many requests at once are on their way in or out."""
ANY = 10**9
"""Requests that the door holds."""


@dataclass(frozen=True)
class Scenario:
    """What is simulated."""

    profile: Profile
    model: PoolPlan
    refiner: PoolPlan
    arrivals: Arrivals
    seconds: float
    """Requests come for so long."""
    refined_share: float = 1.0
    """Part of the requests that go to a refiner."""
    warmup_s: float = 0.0
    """What arrives before this is not in the results."""
    cores: float = math.inf
    """Cores of the one machine that model, refiners and the HTTP door share, their client too;
    without number: every replica has what it was measured on to itself."""
    lost_at_s: float = math.inf
    """When ``lost_models`` and ``lost_refiners`` replicas die at once. As many as fill a node die
    with it, and come back on another, which must start first."""
    lost_models: int = 0
    lost_refiners: int = 0
    seed: int = 1


class Look(NamedTuple):
    """What the autoscaler saw."""

    at: float
    rate: float
    """Requests that arrive, per second."""
    models: int
    refiners: int
    model_queue: int
    """Requests that wait for a slot."""
    refiner_queue: int


@dataclass
class Outcome:
    """What a simulation gave; times in seconds."""

    latency: np.ndarray
    """Of each answered request that arrived after the warm-up, in order of completion."""
    answered_per_s: float
    model_queue: int
    """Most requests that waited for a model replica, those inside replicas not counted."""
    refiner_queue: int
    refiner_seconds: float
    """Replica-seconds, starting replicas included."""
    model_busy: float
    """Part of the slots that were held."""
    refiner_busy: float
    """Part of the replicas' speed that was used."""
    finished: list[tuple[float, float]] = field(default_factory=list)
    """(end, latency) of each answer in ``latency``."""
    trace: list[Look] = field(default_factory=list)

    def percentile(self, q: float) -> float:
        """Latency percentile, seconds; infinite when nothing was answered."""
        return float(np.percentile(self.latency, q)) if len(self.latency) else math.inf


ARRIVE, STARTED, TICK, LOSE = range(4)


class Simulation:
    """One run of a scenario; ``run`` gives its outcome."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        profile = scenario.profile
        self.draws = random.Random(scenario.seed)
        rng = np.random.default_rng(scenario.seed)
        self.closed = isinstance(scenario.arrivals, ClosedLoop)
        self.arrivals = scenario.arrivals.times(scenario.seconds, rng)
        size = DRAWN if self.closed else max(1, len(self.arrivals))
        work = draw(rng, profile.work, size)
        refine_s = draw(rng, profile.refine_s, size)
        mean_refine_s = float(np.mean(profile.refine_s))
        self.overhead = draw(rng, profile.overhead_s, size)
        self.refined = rng.random(size) < scenario.refined_share
        threads = scenario.refiner.max_ongoing
        self.cores = Cores(scenario.cores)
        shared = math.isfinite(scenario.cores)
        # On a shared machine each of a refiner's threads takes what it gets of all cores; by
        # itself it has those that its replica was measured with.
        cpus = math.inf if shared else profile.refiner_cpus
        at_once = at_full_speed(cpus, threads)
        held = np.arange(profile.slots + 1)
        model_cores = profile.model_cores if shared else 1.0
        self.model = SimulatedPool(
            scenario.model,
            (profile.seconds(held) / model_cores).tolist(),
            work.tolist(),
            self.cores,
            [0.0] + [model_cores] * profile.slots,
        )
        self.refiner = SimulatedPool(
            scenario.refiner,
            [mean_refine_s * max(1.0, k / at_once) for k in range(threads + 1)],
            (refine_s / mean_refine_s).tolist(),
            self.cores,
            range(threads + 1),
        )
        self.refiner_s = mean_refine_s / at_once
        self.starting = Starting()
        self.door: SimulatedPool | None = None
        if shared and profile.door_s:
            # Half of its work on the way in, half on the way out.
            half = [profile.door_s / 2] * (DOOR_PROCESSES + 1)
            plan = PoolPlan(1, max_ongoing=ANY)
            self.door = SimulatedPool(plan, half, [1.0], self.cores, range(DOOR_PROCESSES + 1))
        else:
            self.overhead += profile.door_s
        self.events: list[tuple[float, int, int, Any]] = []
        self.ends: list[tuple[float, int, SimulatedPool, Replica, int]] = []
        """Heap of (reading of ``Cores.worked``, number, pool, replica, its version)."""
        self.numbers = itertools.count()
        self.leaving: set[int] = set()
        """Requests on their way out through the door."""
        self.answers = 0
        self.finished: list[tuple[float, float]] = []
        self.trace: list[Look] = []

    def push(self, at: float, kind: int, what: Any) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), kind, what))

    def run(self) -> Outcome:
        """Everything until the last request is answered."""
        for pool in (self.model, self.refiner, *([self.door] if self.door else [])):
            for _ in range(pool.plan.replicas):
                pool.add(0.0)
        # A closed loop's begin together; of an open one each brings the next.
        for request in range(len(self.arrivals) if self.closed else min(1, len(self.arrivals))):
            self.push(self.arrivals[request], ARRIVE, request)
        self.push(0.0, TICK, None)
        if self.scenario.lost_at_s < self.scenario.seconds:
            self.push(self.scenario.lost_at_s, LOSE, None)
        now = 0.0
        # Replicas that come back after the last answer are no part of the load.
        while (self.events or self.ends) and self.answers < len(self.arrivals):
            ends_at = self.cores.when(self.ends[0][0]) if self.ends else math.inf
            if self.events and self.events[0][0] <= ends_at:
                at, _, kind, what = heapq.heappop(self.events)
                if kind == TICK and at > self.scenario.seconds:
                    continue
                self.cores.advance(now := at)
                self.handle(now, kind, what)
            else:
                _, _, pool, replica, version = heapq.heappop(self.ends)
                if version != replica.version or replica.dead:
                    continue
                self.cores.advance(now := ends_at)
                self.done(now, pool, replica)
        return self.outcome(now)

    def handle(self, now: float, kind: int, what: Any) -> None:
        if kind == ARRIVE:
            if not self.closed and what + 1 < len(self.arrivals):
                self.push(self.arrivals[what + 1], ARRIVE, what + 1)
            self.enter(now, self.door or self.model, what)
        elif kind == STARTED:
            self.started(now, *what)
        elif kind == LOSE:
            self.lose(now, self.model, self.scenario.lost_models)
            self.lose(now, self.refiner, self.scenario.lost_refiners)
        else:
            self.tick(now)

    def enter(self, now: float, pool: SimulatedPool, request: int) -> None:
        """A request asks for a replica of a pool."""
        replica = pool.choose(self.draws) if not pool.queue else None
        if replica is None:
            pool.queue.append(request)
            pool.most_queued = max(pool.most_queued, len(pool.queue))
            return
        self.give(now, pool, replica, request)

    def give(self, now: float, pool: SimulatedPool, replica: Replica, request: int) -> None:
        pool.take(replica, request, now)
        self.schedule(pool, replica)

    def schedule(self, pool: SimulatedPool, replica: Replica) -> None:
        replica.version += 1
        if replica.held:
            end = (pool.due(replica), next(self.numbers), pool, replica, replica.version)
            heapq.heappush(self.ends, end)

    def serve_queue(self, now: float, pool: SimulatedPool) -> None:
        while pool.queue and (replica := pool.choose(self.draws)) is not None:
            self.give(now, pool, replica, pool.queue.popleft())

    def done(self, now: float, pool: SimulatedPool, replica: Replica) -> None:
        """A replica is through with a request, which goes on to the next stage."""
        request = pool.finish(replica, now)
        self.schedule(pool, replica)
        self.serve_queue(now, pool)
        if pool is self.door and request not in self.leaving:
            self.enter(now, self.model, request)
        elif pool is self.model and self.refined[request % len(self.refined)]:
            self.enter(now, self.refiner, request)
        elif pool is self.door or self.door is None:
            self.answered(now, request)
        else:
            self.leaving.add(request)
            self.enter(now, self.door, request)

    def answered(self, now: float, request: int) -> None:
        self.leaving.discard(request)
        overhead = float(self.overhead[request % len(self.overhead)])
        end = now + overhead
        self.answers += 1
        if self.arrivals[request] >= self.scenario.warmup_s:
            self.finished.append((end, end - self.arrivals[request]))
        if self.closed and end < self.scenario.seconds:
            self.arrivals.append(end)
            self.push(end, ARRIVE, len(self.arrivals) - 1)

    def started(self, now: float, pool: SimulatedPool, start: object) -> None:
        if start in pool.starting:  # else it was called off
            pool.count(now)
            pool.starting.remove(start)
            pool.add(now)
            self.serve_queue(now, pool)

    def lose(self, now: float, pool: SimulatedPool, number: int) -> None:
        """Replicas die with what they hold, and with the nodes that they fill; the ingress tries
        those requests again."""
        dying = pool.replicas[:number]
        # By what was to be lost: there may be fewer, which do not fill the nodes that go.
        pool.lose_nodes(number // pool.plan.per_node)
        for request in pool.kill(now, dying):
            self.enter(now, pool, request)
        self.resize(now, pool, pool.target)

    def resize(self, now: float, pool: SimulatedPool, target: int) -> None:
        """Start or stop replicas until ``target`` of them run or start. Like Serve, stop those that
        do not serve yet before those that do."""
        pool.target = target
        pool.count(now)
        for _ in range(target - len(pool.replicas) - len(pool.starting)):
            # Serve starts replicas side by side.
            start = object()
            self.push(pool.started_at(now), STARTED, (pool, start))
            pool.starting.append(start)
        del pool.starting[max(0, target - len(pool.replicas)) :]
        if len(pool.replicas) > target:
            idle = sorted(pool.replicas, key=lambda replica: replica.load)
            pool.retire(now, idle[: len(pool.replicas) - target])

    def tick(self, now: float) -> None:
        """The autoscaler looks at the pools."""
        for pool in (self.model, self.refiner):
            pool.seen.append(len(pool.queue) + pool.holding)
            if pool.plan.max_replicas is not None:
                self.resize(now, pool, pool.wanted(self.decided(pool, now), now))
        self.trace.append(
            Look(
                at=now,
                rate=self.scenario.arrivals.rate(now),
                models=len(self.model.replicas),
                refiners=len(self.refiner.replicas),
                model_queue=len(self.model.queue)
                + sum(len(replica.waiting) for replica in self.model.replicas),
                refiner_queue=len(self.refiner.queue),
            )
        )
        self.push(now + TICK_S, TICK, None)

    def decided(self, pool: SimulatedPool, now: float) -> float:
        """What the pool's policy wants."""
        seen = sum(pool.seen) / len(pool.seen)
        if pool.plan.lookahead is None:
            if not pool.replicas:
                return max(1, pool.target) if seen else pool.target
            return seen / pool.plan.target_ongoing
        replicas, aims = len(pool.replicas), pool.plan.lookahead
        starting = self.starting(replicas, pool.target, now, aims.start_s)
        load = RefinerLoad(seen, replicas, pool.target, self.refiner_s, starting)
        models = [self.model_load(replica) for replica in self.model.replicas]
        return decide(models, load, aims).wanted

    def model_load(self, replica: Replica) -> ModelLoad:
        held = len(replica.held)
        seconds = self.model.seconds[max(1, held)]
        left = 0.0
        if held:
            self.model.advance(replica)
            left = (sum(end for end, _ in replica.held) / held - replica.progress) * seconds
        waiting = len(replica.waiting) + len(self.model.queue) / len(self.model.replicas)
        slots = self.model.slots
        return ModelLoad(
            waiting, held, slots, seconds, left or seconds, self.scenario.refined_share
        )

    def outcome(self, now: float) -> Outcome:
        for pool in (self.model, self.refiner):
            pool.count(now)
        last = max((end for end, _ in self.finished), default=now)
        span = max(last - self.scenario.warmup_s, 1e-9)
        return Outcome(
            latency=np.array([took for _, took in self.finished]),
            finished=self.finished,
            answered_per_s=len(self.finished) / span,
            model_queue=self.model.most_queued,
            refiner_queue=self.refiner.most_queued,
            refiner_seconds=self.refiner.paid_s,
            model_busy=self.model.held_s / max(self.model.paid_s * self.model.slots, 1e-9),
            refiner_busy=self.refiner.used_s * self.refiner_s / max(self.refiner.paid_s, 1e-9),
            trace=self.trace,
        )
