"""What the graph counts and times, for Prometheus; Ray adds ``ray_`` before each name.

Ray Serve's own metrics (queue lengths, replicas, latencies of each deployment) are beside these and
not repeated. Every metric also carries Serve's tags: application, deployment and replica; those of
the look-ahead policy, which runs in Serve's controller, the first two.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

TIMES_MS = [
    *(1, 2, 5, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1_000, 1_500, 2_000, 3_000),
    *(5_000, 7_000, 10_000, 15_000, 20_000, 30_000, 60_000, 120_000, 300_000, 600_000),
]
"""Upper bounds of the histograms' buckets, milliseconds. A quantile is a guess within its bucket,
and over the last of them it is that one: so they are narrow, and go on to ten minutes."""


@dataclass(frozen=True)
class Spec:
    """One metric: its unit is the last part of its name, ``_total`` for counts that only grow."""

    name: str
    kind: type
    description: str
    tags: tuple[str, ...] = ()


OUTCOMES = (
    "ok",
    "invalid",
    "unauthorized",
    "unknown",
    "too_large",
    "too_long",
    "rate_limited",
    "overloaded",
    "late",
    "fault",
    "left",
    "broken_stream",
)
"""How a request may end: ``kestrel.api.outcome``, or a fault that came as a stream's event."""

REQUESTS = Spec(
    "segment_requests_total",
    Counter,
    f"Requests that ended, by door (http, handle) and outcome ({', '.join(OUTCOMES)}).",
    ("door", "outcome"),
)
REQUEST_MS = Spec(
    "segment_request_duration_ms",
    Histogram,
    "From arrival at the ingress to the last byte of the answer.",
    ("door", "outcome"),
)
HELD_REQUESTS = Spec(
    "segment_ingress_held_requests",
    Gauge,
    "Requests that an ingress replica holds, bodies being read included; at most "
    "runtime.max_held_requests.",
)
HELD_BYTES = Spec(
    "segment_ingress_held_bytes",
    Gauge,
    "Bytes of the bodies of those; at most runtime.max_held_bytes.",
)
REFINEMENTS = Spec(
    "segment_refinements_total",
    Counter,
    "Requests by what came of their refinement: refined, or why not.",
    ("reason",),
)
LOST_REPLICAS = Spec(
    "segment_lost_replicas_total",
    Counter,
    "Calls that lost their replica, by half (model, refiner). Tried again, up to a bound.",
    ("half",),
)
HEDGED_REFINEMENTS = Spec(
    "segment_hedged_refinements_total",
    Counter,
    "Refinements that were asked of another replica too, because none had answered for long.",
)
MODEL_REQUESTS = Spec(
    "segment_model_requests_total",
    Counter,
    "Requests that ended in a model replica, by outcome as in segment_requests_total.",
    ("outcome",),
)
MODEL_STAGE_MS = Spec(
    "segment_model_stage_duration_ms",
    Histogram,
    "Stages of a completed request: first_token (wait, image and prefill), prefill, decode.",
    ("stage",),
)
MODEL_STEPS = Spec("segment_model_steps_total", Counter, "Steps of the batch.")
MODEL_TOKENS = Spec(
    "segment_model_tokens_total",
    Counter,
    "Tokens of all requests; per step this is the batch size.",
)
MODEL_RUNNING = Spec("segment_model_running_requests", Gauge, "Requests in the batch now.")
MODEL_WAITING = Spec("segment_model_waiting_requests", Gauge, "Requests that wait for a slot.")
MODEL_SLOTS = Spec("segment_model_slots", Gauge, "Slots of the batch: max_batch_size.")
REFINER_REQUESTS = Spec(
    "segment_refiner_requests_total",
    Counter,
    "Requests that ended in a refiner replica, by outcome as in segment_requests_total.",
    ("outcome",),
)
REFINER_STAGE_MS = Spec(
    "segment_refiner_stage_duration_ms",
    Histogram,
    "Stages of a refinement: decode (of the picture), raster, refine, clean, trace, encode.",
    ("stage",),
)
REFINER_RUNNING = Spec("segment_refiner_running_requests", Gauge, "Refinements that hold a thread.")
REFINER_WAITING = Spec("segment_refiner_waiting_requests", Gauge, "Refinements without a thread.")
REFINERS_DUE = Spec(
    "segment_autoscaling_due_per_s",
    Gauge,
    "Requests per second that the model pool is about to hand over, as the look-ahead policy sees.",
    ("application", "deployment"),
)
REFINERS_WANTED = Spec(
    "segment_autoscaling_wanted_refiners",
    Gauge,
    "Refiners that the look-ahead policy wants, before bounds and delays.",
    ("application", "deployment"),
)

FORMER_SETTINGS = Spec(
    "segment_former_settings_replicas",
    Gauge,
    "1 where a replica was last given a user_config that does not fit, and goes on without it.",
)

METRICS = (
    REQUESTS,
    REQUEST_MS,
    HELD_REQUESTS,
    HELD_BYTES,
    REFINEMENTS,
    LOST_REPLICAS,
    HEDGED_REFINEMENTS,
    MODEL_REQUESTS,
    MODEL_STAGE_MS,
    MODEL_STEPS,
    MODEL_TOKENS,
    MODEL_RUNNING,
    MODEL_WAITING,
    MODEL_SLOTS,
    REFINER_REQUESTS,
    REFINER_STAGE_MS,
    REFINER_RUNNING,
    REFINER_WAITING,
    REFINERS_DUE,
    REFINERS_WANTED,
    FORMER_SETTINGS,
)


@cache
def _metric(spec: Spec) -> Any:
    """The metric of this process; made at its first use, when the replica's tags are known."""
    options: dict[str, Any] = {"boundaries": TIMES_MS} if spec.kind is Histogram else {}
    return spec.kind(spec.name, description=spec.description, tag_keys=spec.tags, **options)


def count(spec: Spec, by: float = 1, **tags: str) -> None:
    """Add ``by``, where it is over 0, to a counter."""
    if by > 0:
        _metric(spec).inc(by, tags=tags)


def begin(spec: Spec, **tags: str) -> None:
    """Export a counter at 0, before it counts.

    To Prometheus a series that appears at 40 has not increased: alarms would miss a first burst.
    """
    _metric(spec)._record(0, tags=tags)  # ``inc`` refuses 0


def observe(spec: Spec, value: float, **tags: str) -> None:
    """Put a value into a histogram."""
    _metric(spec).observe(value, tags=tags)


def level(spec: Spec, value: float, **tags: str) -> None:
    """Set a gauge."""
    _metric(spec).set(value, tags=tags)


def request_ended(door: str, outcome: str, seconds: float) -> None:
    """One request of a door, from its arrival to its last byte."""
    count(REQUESTS, door=door, outcome=outcome)
    observe(REQUEST_MS, seconds * 1e3, door=door, outcome=outcome)


def log_with_serve() -> None:
    """Send the library's log where Serve's goes: its lines then carry replica and request id."""
    serve_log, library_log = logging.getLogger("ray.serve"), logging.getLogger("kestrel")
    library_log.handlers = serve_log.handlers
    library_log.setLevel(serve_log.getEffectiveLevel())
    library_log.propagate = False
