"""How many refiners the requests in the model pool will need: arithmetic alone, no Ray.

The autoscaler of a running graph (``serve_graph.autoscaling``) and the capacity planner
(``serve_graph.plan``) both decide with this code.
"""

from __future__ import annotations

import math
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
    """
    rate = sum(due_per_s(model, options.start_s) for model in models)
    queue = max(0.0, refiner.requests - refiner.replicas)
    speed = refiner.replicas / refiner.busy_s
    ahead = max(0.0, queue + (rate - speed) * options.start_s)
    drain = ahead * refiner.busy_s / options.drain_s
    busy = rate * refiner.busy_s
    grown = _ceil(busy / options.busy_target + drain)
    shrunk = _ceil(busy / (options.busy_target * SLACK) + drain)
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
        busy_s=refiner.busy_s,
    )


def _ceil(replicas: float) -> int:
    # Rounding errors must not cost a replica.
    return math.ceil(replicas - 1e-9)
