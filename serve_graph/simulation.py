"""A discrete-event simulation of the two pools, with the policy that scales the real ones.

A replica is a processor that its requests share: while it holds b of them each advances at
1 / seconds(b) of its work per second, seconds(b) being measured (``serve_graph.profile``). Requests
go to the less loaded of two replicas with room, chosen at random, as Serve's router does; where no
replica has room they wait in one queue per pool. Only arrivals, completions and changes of a pool
are events, so that the cost grows with the requests and hardly with the replicas.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve_graph.args import LookAhead
from serve_graph.lookahead import ModelLoad, RefinerLoad, decide
from serve_graph.profile import Profile, draw

TICK_S = 1.0
"""Time between two looks of the autoscaler."""


@dataclass(frozen=True)
class PoolPlan:
    """A pool as it is planned: the keys of ``serve_graph.args.Pool`` that matter here."""

    replicas: int
    """Replicas at the start."""
    max_replicas: int | None = None
    """None: the pool keeps its size."""
    min_replicas: int = 1
    max_ongoing: int = 2
    """Requests that one replica holds."""
    max_queued: int | None = None
    """Requests that may wait for a replica; None: any number."""
    start_s: float = 10.0
    """From a decision to a replica's first request, on a node that is there."""
    per_node: int = 1
    """Replicas of one node."""
    nodes: int | None = None
    """Nodes that are there at the start; None: as many as the replicas fill."""
    node_start_s: float = 0.0
    """How long a further node takes, seconds."""
    target_ongoing: float = 2.0
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 120.0
    look_back_s: float = 10.0
    lookahead: LookAhead | None = None
    """The look-ahead policy's aims (refiners only); None: Serve's default."""


@dataclass(frozen=True)
class Scenario:
    """What is simulated."""

    profile: Profile
    model: PoolPlan
    refiner: PoolPlan
    rate: Callable[[float], float]
    """Requests per second at a time, seconds from the start."""
    seconds: float
    refined_share: float = 1.0
    """Part of the requests that go to a refiner."""
    warmup_s: float = 0.0
    """What arrives before this is not in the results."""
    lost_at_s: float = math.inf
    """When ``lost_models`` and ``lost_refiners`` replicas die at once."""
    lost_models: int = 0
    lost_refiners: int = 0
    regular: bool = False
    """Arrivals by the clock, 1 / rate apart, in place of Poisson's."""
    seed: int = 1


@dataclass
class Outcome:
    """What a simulation gave; times in seconds."""

    latency: np.ndarray
    """Of each answered request that arrived after the warm-up, in order of completion."""
    answered_per_s: float
    refused: int
    arrived: int
    events: int
    model_queue: int
    """Most requests that waited for a model replica, those inside replicas not counted."""
    refiner_queue: int
    model_seconds: float
    """Replica-seconds, starting replicas included."""
    refiner_seconds: float
    model_busy: float
    """Part of the slots that were held."""
    refiner_busy: float
    """Part of the replicas' speed that was used."""
    models_at_most: int
    refiners_at_most: int
    finished: list[tuple[float, float]] = field(default_factory=list)
    """(end, latency) of each answer in ``latency``."""
    trace: list[tuple[float, float, int, int, int, int]] = field(default_factory=list)
    """(time, arrivals per second, model replicas, refiner replicas, waiting for each)."""

    def percentile(self, q: float) -> float:
        """Latency percentile, seconds; infinite when nothing was answered."""
        return float(np.percentile(self.latency, q)) if len(self.latency) else math.inf


class Replica:
    """Requests that share one processor; ``progress`` is what each has had of it."""

    __slots__ = ("changed", "dead", "held", "leaving", "place", "progress", "version", "waiting")

    def __init__(self) -> None:
        self.held: list[tuple[float, int]] = []
        """Heap of (progress at which it is done, request)."""
        self.waiting: deque[int] = deque()
        """Admitted to the replica, without a slot."""
        self.progress = 0.0
        self.changed = 0.0
        self.version = 0
        self.place = -1
        """Index in its pool's list of replicas with room; -1: full."""
        self.leaving = False
        """Takes no more requests and is gone when it has finished those that it has."""
        self.dead = False

    @property
    def load(self) -> int:
        return len(self.held) + len(self.waiting)


class Pool:
    """Replicas of one kind, the queue before them, and how many there should be."""

    def __init__(self, plan: PoolPlan, slots: int, seconds: Sequence[float]) -> None:
        """``seconds[b]``: time of a request of work 1 on a replica that runs b, up to ``slots``."""
        self.plan = plan
        self.slots = slots
        self.seconds = seconds
        self.replicas: list[Replica] = []
        self.roomy: list[Replica] = []
        self.queue: deque[int] = deque()
        self.starting = 0
        self.target = plan.replicas
        nodes = plan.nodes if plan.nodes is not None else math.ceil(plan.replicas / plan.per_node)
        self.node_ready = [0.0] * nodes
        """When each node is there, seconds; replicas fill them in order."""
        self.most_queued = 0
        self.most_replicas = plan.replicas
        self.paid_s = 0.0
        self.held_s = 0.0
        self.used_s = 0.0
        self.holding = 0
        """Requests in the replicas."""
        self._counted = 0.0
        self._delay = Delay(plan)
        self.seen: deque[float] = deque(maxlen=max(1, round(plan.look_back_s / TICK_S)))

    def started_at(self, now: float) -> float:
        """When one more replica serves, on a node that is there or on a new one."""
        node = (len(self.replicas) + self.starting) // self.plan.per_node
        if node == len(self.node_ready):
            self.node_ready.append(now + self.plan.node_start_s)
        return max(now, self.node_ready[node]) + self.plan.start_s

    def count(self, now: float) -> None:
        """Bring the running sums up to ``now``; before every change of what they count."""
        self.paid_s += (len(self.replicas) + self.starting) * (now - self._counted)
        self._counted = now

    def add(self, now: float) -> Replica:
        self.count(now)
        replica = Replica()
        replica.changed = now
        self.replicas.append(replica)
        self._room(replica)
        self.most_replicas = max(self.most_replicas, len(self.replicas))
        return replica

    def retire(self, now: float, leaving: list[Replica]) -> None:
        """Let replicas go once they have finished what they have."""
        self.count(now)
        for replica in leaving:
            self._full(replica)
            replica.leaving = True
        self.replicas = [replica for replica in self.replicas if not replica.leaving]

    def kill(self, now: float, dying: list[Replica]) -> list[int]:
        """Take replicas out at once; the requests that they held."""
        self.retire(now, dying)
        lost: list[int] = []
        for replica in dying:
            self.advance(replica, now)
            replica.dead = True
            self.holding -= replica.load
            lost += [request for _, request in replica.held]
            lost += replica.waiting
        return lost

    def _room(self, replica: Replica) -> None:
        if replica.place < 0 and not replica.leaving:
            replica.place = len(self.roomy)
            self.roomy.append(replica)

    def _full(self, replica: Replica) -> None:
        if replica.place >= 0:
            last = self.roomy.pop()
            if last is not replica:
                last.place = replica.place
                self.roomy[replica.place] = last
            replica.place = -1

    def choose(self, draws: random.Random) -> Replica | None:
        """The less loaded of two with room."""
        roomy = self.roomy
        if not roomy:
            return None
        one = roomy[int(draws.random() * len(roomy))]
        other = roomy[int(draws.random() * len(roomy))]
        return one if one.load <= other.load else other

    def advance(self, replica: Replica, now: float) -> None:
        """Let the requests of a replica progress until ``now``."""
        held, passed = len(replica.held), now - replica.changed
        if held and passed:
            replica.progress += passed / self.seconds[held]
            self.held_s += held * passed
            self.used_s += passed * held / self.seconds[held]
        replica.changed = now

    def take(self, replica: Replica, request: int, work: float, now: float) -> None:
        """Give a request to a replica with room."""
        self.advance(replica, now)
        if len(replica.held) < self.slots:
            heapq.heappush(replica.held, (replica.progress + work, request))
        else:
            replica.waiting.append(request)
        self.holding += 1
        if replica.load >= self.plan.max_ongoing:
            self._full(replica)

    def finish(self, replica: Replica, now: float, work: np.ndarray) -> int:
        """Take the request out that is done, let the next in; the request."""
        self.advance(replica, now)
        _, request = heapq.heappop(replica.held)
        self.holding -= 1
        if replica.waiting:
            following = replica.waiting.popleft()
            heapq.heappush(replica.held, (replica.progress + work[following], following))
        self._room(replica)
        return request

    def due(self, replica: Replica) -> float:
        """When the next request of a replica is done, if nothing joins before."""
        left = max(0.0, replica.held[0][0] - replica.progress)
        return replica.changed + left * self.seconds[len(replica.held)]

    def wanted(self, decided: float, now: float) -> int:
        """A decision held to delays and bounds, as Serve holds it."""
        assert self.plan.max_replicas is not None
        after = self._delay(decided, self.target, now)
        return max(self.plan.min_replicas, min(self.plan.max_replicas, after))


class Delay:
    """Serve's delays: a wish for more or fewer replicas must last before it is followed
    (``ray.serve.autoscaling_policy._apply_delay_logic``)."""

    def __init__(self, plan: PoolPlan) -> None:
        self._plan = plan
        self._direction = 0
        self._since = 0.0

    def __call__(self, decided: float, target: int, now: float) -> int:
        wish = math.ceil(decided - 1e-9)
        direction = (wish > target) - (wish < target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        if direction == 0:
            return target
        delay = self._plan.upscale_delay_s if direction > 0 else self._plan.downscale_delay_s
        if now - self._since < delay - 1e-6:
            return target
        self._direction = 0
        # Serve goes to zero from one only.
        return wish if direction > 0 or target == 1 else max(1, wish)


ARRIVE, DONE, STARTED, TICK, REFINE, LOSE = range(6)


class Simulation:
    """One run of a scenario; ``run`` gives its outcome."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        profile = scenario.profile
        self.draws = random.Random(scenario.seed)
        rng = np.random.default_rng(scenario.seed)
        chosen = paced if scenario.regular else arrivals
        self.arrivals = chosen(scenario.rate, scenario.seconds, rng)
        size = len(self.arrivals)
        self.work = draw(rng, profile.work, size)
        refine_s = draw(rng, profile.refine_s, size)
        mean_refine_s = float(np.mean(profile.refine_s))
        self.refine_work = refine_s / mean_refine_s
        self.overhead = draw(rng, profile.overhead_s, size)
        self.refined = rng.random(size) < scenario.refined_share
        slots = profile.slots
        model_s = profile.seconds(np.arange(slots + 1)).tolist()
        threads = scenario.refiner.max_ongoing
        cpus = max(1.0, profile.refiner_cpus)
        refiner_s = [mean_refine_s * max(1.0, k / cpus) for k in range(threads + 1)]
        self.model = Pool(scenario.model, slots, model_s)
        self.refiner = Pool(scenario.refiner, threads, refiner_s)
        self.refiner_s = mean_refine_s / min(threads, cpus)
        self.events: list[tuple[float, int, int, Any]] = []
        self.numbers = itertools.count()
        self.finished: list[tuple[float, float]] = []
        self.refused = 0
        self.handled = 0
        self.trace: list[tuple[float, float, int, int, int, int]] = []

    def push(self, at: float, kind: int, what: Any) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), kind, what))

    def run(self) -> Outcome:
        """Everything until the last request is answered."""
        for pool in (self.model, self.refiner):
            for _ in range(pool.plan.replicas):
                pool.add(0.0)
        if len(self.arrivals):
            self.push(self.arrivals[0], ARRIVE, 0)
        self.push(0.0, TICK, None)
        if self.scenario.lost_at_s < self.scenario.seconds:
            self.push(self.scenario.lost_at_s, LOSE, None)
        now = 0.0
        while self.events:
            at, _, kind, what = heapq.heappop(self.events)
            if kind == TICK and at > self.scenario.seconds:
                continue
            now = at
            self.handled += 1
            self.handle(now, kind, what)
        return self.outcome(now)

    def handle(self, now: float, kind: int, what: Any) -> None:
        if kind == DONE:
            pool, replica, version = what
            if version == replica.version and not replica.dead:
                self.done(now, pool, replica)
        elif kind == ARRIVE:
            if what + 1 < len(self.arrivals):
                self.push(self.arrivals[what + 1], ARRIVE, what + 1)
            self.enter(now, self.model, what)
        elif kind == REFINE:
            self.enter(now, self.refiner, what)
        elif kind == STARTED:
            self.started(now, what)
        elif kind == LOSE:
            self.lose(now, self.model, self.scenario.lost_models)
            self.lose(now, self.refiner, self.scenario.lost_refiners)
        else:
            self.tick(now)

    def enter(self, now: float, pool: Pool, request: int) -> None:
        """A request asks for a replica of a pool."""
        replica = pool.choose(self.draws) if not pool.queue else None
        if replica is None:
            bound = pool.plan.max_queued
            if bound is not None and len(pool.queue) >= bound:
                self.refused += 1
                return
            pool.queue.append(request)
            pool.most_queued = max(pool.most_queued, len(pool.queue))
            return
        self.give(now, pool, replica, request)

    def give(self, now: float, pool: Pool, replica: Replica, request: int) -> None:
        work = self.work if pool is self.model else self.refine_work
        pool.take(replica, request, work[request], now)
        self.schedule(pool, replica)

    def schedule(self, pool: Pool, replica: Replica) -> None:
        replica.version += 1
        if replica.held:
            self.push(pool.due(replica), DONE, (pool, replica, replica.version))

    def serve_queue(self, now: float, pool: Pool) -> None:
        while pool.queue and (replica := pool.choose(self.draws)) is not None:
            self.give(now, pool, replica, pool.queue.popleft())

    def done(self, now: float, pool: Pool, replica: Replica) -> None:
        work = self.work if pool is self.model else self.refine_work
        request = pool.finish(replica, now, work)
        self.schedule(pool, replica)
        self.serve_queue(now, pool)
        if pool is self.model and self.refined[request]:
            self.enter(now, self.refiner, request)
            return
        if self.arrivals[request] >= self.scenario.warmup_s:
            took = now - self.arrivals[request] + self.overhead[request]
            self.finished.append((now, float(took)))

    def started(self, now: float, pool: Pool) -> None:
        pool.count(now)
        pool.starting -= 1
        if len(pool.replicas) < pool.target:
            pool.add(now)
            self.serve_queue(now, pool)

    def lose(self, now: float, pool: Pool, number: int) -> None:
        """Replicas die with what they hold; the ingress tries those requests again."""
        for request in pool.kill(now, pool.replicas[:number]):
            self.enter(now, pool, request)
        self.resize(now, pool, pool.target)

    def resize(self, now: float, pool: Pool, target: int) -> None:
        """Start or stop replicas until ``target`` of them run or start."""
        pool.target = target
        needed = target - len(pool.replicas) - pool.starting
        pool.count(now)
        for _ in range(needed):
            # Serve starts replicas side by side.
            self.push(pool.started_at(now), STARTED, pool)
            pool.starting += 1
        if needed < 0:
            idle = sorted(pool.replicas, key=lambda replica: replica.load)
            pool.retire(now, idle[: min(-needed, len(pool.replicas) - target)])

    def tick(self, now: float) -> None:
        """The autoscaler looks at the pools."""
        for pool in (self.model, self.refiner):
            pool.seen.append(len(pool.queue) + pool.holding)
            if pool.plan.max_replicas is not None:
                self.resize(now, pool, pool.wanted(self.decided(pool, now), now))
        self.trace.append(
            (
                now,
                self.scenario.rate(now),
                len(self.model.replicas),
                len(self.refiner.replicas),
                len(self.model.queue) + sum(len(r.waiting) for r in self.model.replicas),
                len(self.refiner.queue),
            )
        )
        self.push(now + TICK_S, TICK, None)

    def decided(self, pool: Pool, now: float) -> float:
        """What the pool's policy wants."""
        seen = sum(pool.seen) / len(pool.seen)
        if pool.plan.lookahead is None:
            if not pool.replicas:
                return max(1, pool.target) if seen else pool.target
            return seen / pool.plan.target_ongoing
        load = RefinerLoad(seen, len(pool.replicas), pool.target, self.refiner_s)
        models = [self.model_load(replica, now) for replica in self.model.replicas]
        return decide(models, load, pool.plan.lookahead).wanted

    def model_load(self, replica: Replica, now: float) -> ModelLoad:
        held = len(replica.held)
        seconds = self.model.seconds[max(1, held)]
        left = 0.0
        if held:
            self.model.advance(replica, now)
            left = (sum(end for end, _ in replica.held) / held - replica.progress) * seconds
        waiting = len(replica.waiting) + len(self.model.queue) / len(self.model.replicas)
        slots = self.model.slots
        return ModelLoad(
            waiting, held, slots, seconds, left or seconds, self.scenario.refined_share
        )

    def outcome(self, now: float) -> Outcome:
        for pool in (self.model, self.refiner):
            pool.count(now)
        span = max(now - self.scenario.warmup_s, 1e-9)
        return Outcome(
            latency=np.array([took for _, took in self.finished]),
            finished=self.finished,
            answered_per_s=len(self.finished) / span,
            refused=self.refused,
            arrived=len(self.arrivals),
            events=self.handled,
            model_queue=self.model.most_queued,
            refiner_queue=self.refiner.most_queued,
            model_seconds=self.model.paid_s,
            refiner_seconds=self.refiner.paid_s,
            model_busy=self.model.held_s / max(self.model.paid_s * self.model.slots, 1e-9),
            refiner_busy=self.refiner.used_s * self.refiner_s / max(self.refiner.paid_s, 1e-9),
            models_at_most=self.model.most_replicas,
            refiners_at_most=self.refiner.most_replicas,
            trace=self.trace,
        )


def arrivals(
    rate: Callable[[float], float], seconds: float, rng: np.random.Generator
) -> list[float]:
    """Poisson arrivals at a rate that changes with time (thinning), sorted."""
    grid = np.linspace(0, seconds, 1001)
    most = max(rate(float(at)) for at in grid)
    if most <= 0:
        return []
    number = rng.poisson(most * seconds)
    times = np.sort(rng.random(number) * seconds)
    rates = np.array([rate(float(at)) for at in grid])
    kept = rng.random(number) * most < np.interp(times, grid, rates)
    found: list[float] = times[kept].tolist()
    return found


def paced(rate: Callable[[float], float], seconds: float, rng: np.random.Generator) -> list[float]:
    """Arrivals by the clock: each 1 / rate after the one before."""
    times = [0.0]
    while (following := times[-1] + 1 / rate(times[-1])) < seconds:
        times.append(following)
    return times
