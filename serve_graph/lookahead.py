"""How many refiners the requests in the model pool will need: arithmetic alone, no Ray.

The autoscaler of a running graph (``serve_graph.autoscaling``) and the capacity planner
(``serve_graph.plan``) both decide with this code.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from serve_graph.args import LookAhead

SLACK = 0.8
"""A pool shrinks only when it would be busy less than this share of ``busy_target`` as it is, so
that a load at the border of two sizes does not swing between them."""


@dataclass(frozen=True)
class ModelLoad:
    """What one model replica has in hand."""

    waiting: float
    """Requests without a slot."""
    running: float
    """Requests in prefill or decode."""
    slots: float
    """Requests that run at most."""
    seconds: float
    """Mean time of a request in its slot."""
    left_s: float
    """Expected time until a running request is handed over, mean of those that run."""
    share: float = 1.0
    """Part of the finished requests that go to a refiner: those with an image and a path."""


@dataclass(frozen=True)
class RefinerLoad:
    """The refiner pool as it is."""

    requests: float
    """Requests that run or wait, wherever they wait."""
    replicas: int
    """Replicas that serve now."""
    target: int
    """Replicas asked for before, those that are still starting included."""
    busy_s: float
    """Seconds of a replica's full attention that one refinement takes: at full speed a replica
    finishes one every ``busy_s``."""
    starting: float = 0.0
    """What the replicas that are still starting will do within ``start_s`` from now, in replicas
    that serve all that time (``Starting``)."""


class Starting:
    """When the replicas that do not serve yet were asked for.

    One asked for a seconds ago serves in start_s - a, so for a of the next ``start_s`` seconds: it
    is worth a / ``start_s`` of a replica that serves already, and a whole one if it is overdue.
    Without it the queue that those replicas will take away would be seen anew with every decision
    until they serve, and replicas be asked for each time. Keep one for each pool.
    """

    def __init__(self) -> None:
        self._asked: deque[float] = deque()
        self._replicas = 0
        self._looked: float | None = None

    def __call__(self, replicas: int, target: int, now: float, start_s: float) -> float:
        """``RefinerLoad.starting`` of a pool in which ``replicas`` serve and ``target`` were asked
        for. ``now``: seconds of a clock that only goes forward."""
        # Asked for at the last look, seen at this one.
        since, self._looked = now if self._looked is None else self._looked, now
        # Those asked for first start first, those asked for last are called off first.
        for _ in range(min(len(self._asked), replicas - self._replicas)):
            self._asked.popleft()
        self._replicas = replicas
        while len(self._asked) > max(0, target - replicas):
            self._asked.pop()
        while len(self._asked) < target - replicas:
            self._asked.append(since)
        return sum(min(1.0, (now - asked) / start_s) for asked in self._asked)


@dataclass(frozen=True)
class Decision:
    """How many replicas, and everything that it came from."""

    wanted: int
    reason: str
    due_per_s: float
    """Requests that the model pool hands over per second."""
    queue: float
    """Requests that wait for a refiner now."""
    queue_ahead: float
    """Requests that will wait when a replica asked for now has started."""
    model_running: float
    model_waiting: float
    requests: float
    replicas: int
    target: int
    starting: float
    busy_s: float

    def __str__(self) -> str:
        inputs = asdict(self)
        wanted, reason = inputs.pop("wanted"), inputs.pop("reason")
        told = " ".join(f"{key}={value:.4g}" for key, value in inputs.items())
        return f"refiners wanted={wanted}: {reason}; {told}"


def due_per_s(model: ModelLoad, within_s: float) -> float:
    """Requests per second that a model replica will hand over in the next ``within_s`` seconds if
    its load stays what it is.

    n requests that each hold a slot for ``seconds`` leave at n / ``seconds`` (Little's law). Where
    ``within_s`` ends before they are done, those due later are left out: with their remaining times
    spread evenly around the mean ``left_s``, a part within_s / (2 left_s) is due in time.
    """
    held = min(model.running + model.waiting, model.slots)
    if held <= 0:
        return 0.0
    seconds = max(model.seconds, 1e-3)
    joining = held - min(model.running, held)
    left_s = ((held - joining) * model.left_s + joining * seconds) / held
    in_time = min(1.0, within_s / max(2 * left_s, 1e-9))
    return model.share * held * in_time / min(within_s, seconds)


def decide(models: Sequence[ModelLoad], refiner: RefinerLoad, options: LookAhead) -> Decision:
    """The size of the refiner pool, not yet held to its bounds.

    It is what keeps replicas busy ``busy_target`` of their time at the rate at which the model pool
    hands over, and what takes the queue that will be there after ``start_s`` away in ``drain_s``.
    Replicas that are starting shorten that queue by what they will have taken of it by then.
    """
    rate = sum(due_per_s(model, options.start_s) for model in models)
    queue = max(0.0, refiner.requests - refiner.replicas)
    left = queue + (rate - refiner.replicas / refiner.busy_s) * options.start_s
    ahead = max(0.0, left - refiner.starting / refiner.busy_s * options.start_s)
    drain = ahead * refiner.busy_s / options.drain_s
    busy = rate * refiner.busy_s
    grown = _ceil(busy / options.busy_target + drain)
    # Not less what those that are starting will take away: that would call them off.
    undrained = max(0.0, left) * refiner.busy_s / options.drain_s
    shrunk = _ceil(busy / (options.busy_target * SLACK) + undrained)
    if grown > refiner.target:
        wanted, reason = grown, "grow: a queue ahead" if drain else "grow: more is handed over"
    elif shrunk < refiner.target:
        wanted, reason = shrunk, "shrink: less is handed over"
    else:
        wanted, reason = refiner.target, "keep"
    return Decision(
        wanted=wanted,
        reason=reason,
        due_per_s=rate,
        queue=queue,
        queue_ahead=ahead,
        model_running=sum(model.running for model in models),
        model_waiting=sum(model.waiting for model in models),
        requests=refiner.requests,
        replicas=refiner.replicas,
        target=refiner.target,
        starting=refiner.starting,
        busy_s=refiner.busy_s,
    )


def _ceil(replicas: float) -> int:
    # Rounding errors must not cost a replica.
    return math.ceil(replicas - 1e-9)
