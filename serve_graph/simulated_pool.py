"""A pool of replicas as the planner simulates it: who has room, who works how fast, how many.

A replica is a processor that its requests share: while it holds b of them each advances at
1 / seconds(b) of its work per second, seconds(b) being measured (``serve_graph.profile``). Requests
go to the less loaded of two replicas with room, chosen at random, as Serve's router does; where no
replica has room they wait in one queue per pool.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serve_graph.args import LookAhead

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


class Cores:
    """What a machine's busy threads share evenly, as its scheduler shares it.

    ``worked`` is a clock that runs with what one busy thread has had: it falls behind time while
    there are more threads than cores. All that works on the machine goes by this clock, so that
    nothing must be calculated anew when a thread comes or goes. Cores without number: it is time.
    """

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self.worked = 0.0
        self._busy = 0.0
        self._at = 0.0
        self._speed = 1.0

    def advance(self, now: float) -> None:
        """Let the clock run until ``now``, seconds."""
        self.worked += (now - self._at) * self._speed
        self._at = now

    def occupy(self, threads: float) -> None:
        """So many threads more are busy from now on (fewer: negative); parts of one are busy so
        much of the time."""
        self._busy += threads
        self._speed = min(1.0, self.cores / self._busy) if self._busy > 0 else 1.0

    def when(self, worked: float) -> float:
        """The time at which the clock shows ``worked`` if no thread comes or goes before."""
        return self._at + max(0.0, worked - self.worked) / self._speed


class Replica:
    """Requests that share one processor; ``progress`` is what each has had of it."""

    __slots__ = ("changed", "dead", "held", "leaving", "place", "progress", "version", "waiting")

    def __init__(self, worked: float) -> None:
        self.held: list[tuple[float, int]] = []
        """Heap of (progress at which it is done, request)."""
        self.waiting: deque[int] = deque()
        """Admitted to the replica, without a slot."""
        self.progress = 0.0
        self.changed = worked
        """Reading of ``Cores.worked`` up to which ``progress`` counts."""
        self.version = 0
        self.place = -1
        """Index in its pool's list of replicas with room; -1: full."""
        self.leaving = False
        """Takes no more requests and is gone when it has finished those that it has."""
        self.dead = False

    @property
    def load(self) -> int:
        return len(self.held) + len(self.waiting)


class SimulatedPool:
    """Replicas of one kind, the queue before them, and how many there should be."""

    def __init__(
        self,
        plan: PoolPlan,
        seconds: Sequence[float],
        work: Sequence[float],
        cores: Cores,
        threads: Sequence[float],
    ) -> None:
        """``seconds[b]``: time of a request of work 1 on a replica that runs b, up to as many as it
        has slots, and ``threads[b]`` that it keeps busy meanwhile. ``work``: of each request; they
        are used again and again."""
        self.plan = plan
        self.slots = len(seconds) - 1
        self.seconds = seconds
        self.work = work
        self.cores = cores
        self._threads = threads
        self.replicas: list[Replica] = []
        self.roomy: list[Replica] = []
        self.queue: deque[int] = deque()
        self.starting: list[object] = []
        """A token of each replica that does not serve yet, in the order of asking."""
        self.target = plan.replicas
        nodes = plan.nodes if plan.nodes is not None else math.ceil(plan.replicas / plan.per_node)
        self.node_ready = [0.0] * nodes
        """When each node is there, seconds; replicas fill them in order."""
        self.most_queued = 0
        self.paid_s = 0.0
        self.held_s = 0.0
        self.used_s = 0.0
        self.holding = 0
        """Requests in the replicas."""
        self._in_slots = 0
        self._counted = 0.0
        self._delay = Delay(plan)
        self.seen: deque[float] = deque(maxlen=max(1, round(plan.look_back_s / TICK_S)))

    def started_at(self, now: float) -> float:
        """When one more replica serves, on a node that is there or on a new one."""
        node = (len(self.replicas) + len(self.starting)) // self.plan.per_node
        if node == len(self.node_ready):
            self.node_ready.append(now + self.plan.node_start_s)
        return max(now, self.node_ready[node]) + self.plan.start_s

    def count(self, now: float) -> None:
        """Bring the running sums up to ``now``; before every change of what they count."""
        passed = now - self._counted
        self.paid_s += (len(self.replicas) + len(self.starting)) * passed
        self.held_s += self._in_slots * passed
        self._counted = now

    def add(self, now: float) -> Replica:
        """One more replica that serves."""
        self.count(now)
        replica = Replica(self.cores.worked)
        self.replicas.append(replica)
        self._room(replica)
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
            self.advance(replica)
            replica.dead = True
            self.holding -= replica.load
            self._in_slots -= len(replica.held)
            self.cores.occupy(-self._threads[len(replica.held)])
            lost += [request for _, request in replica.held]
            lost += replica.waiting
        return lost

    def lose_nodes(self, number: int) -> None:
        """So many nodes are gone, their replicas having died; others start once they are needed."""
        del self.node_ready[:number]

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

    def advance(self, replica: Replica) -> None:
        """Let the requests of a replica progress until now."""
        held, passed = len(replica.held), self.cores.worked - replica.changed
        if held and passed:
            replica.progress += passed / self.seconds[held]
            self.used_s += passed * held / self.seconds[held]
        replica.changed = self.cores.worked

    def take(self, replica: Replica, request: int, now: float) -> None:
        """Give a request to a replica with room."""
        self.count(now)
        self.advance(replica)
        if len(replica.held) < self.slots:
            self._begin(replica, request)
        else:
            replica.waiting.append(request)
        self.holding += 1
        if replica.load >= self.plan.max_ongoing:
            self._full(replica)

    def finish(self, replica: Replica, now: float) -> int:
        """Take the request out that is done, let the next in; the request."""
        self.count(now)
        self.advance(replica)
        held = len(replica.held)
        _, request = heapq.heappop(replica.held)
        self.cores.occupy(self._threads[held - 1] - self._threads[held])
        self._in_slots -= 1
        self.holding -= 1
        if replica.waiting:
            self._begin(replica, replica.waiting.popleft())
        self._room(replica)
        return request

    def _begin(self, replica: Replica, request: int) -> None:
        work = self.work[request % len(self.work)]
        held = len(replica.held)
        heapq.heappush(replica.held, (replica.progress + work, request))
        self.cores.occupy(self._threads[held + 1] - self._threads[held])
        self._in_slots += 1

    def due(self, replica: Replica) -> float:
        """The reading of ``Cores.worked`` at which the next request of a replica is done, if
        nothing joins before."""
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
