"""The look-ahead policy as Ray Serve calls it: one policy for the whole application.

An application names it beside its ``args``::

    autoscaling_policy: {policy_function: "serve_graph.autoscaling:Policy"}

Refiners are then scaled by ``serve_graph.lookahead``, the other pools by Serve's default; the
bounds and the delays of each pool hold as before, Serve applies them to what is decided here.
Serve's default alone cannot look ahead: it knows of a refiner's work when a request has reached
the refiner's queue, which for a long decode is seconds too late.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

from serve_graph import metrics
from serve_graph.args import LookAhead
from serve_graph.errors import reason
from serve_graph.lookahead import Decision, ModelLoad, RefinerLoad, Starting, decide

if TYPE_CHECKING:
    from ray.serve._private.common import DeploymentID, TimeSeries
    from ray.serve.config import AutoscalingContext

logger = logging.getLogger("ray.serve")

REPORTS = 3
"""Latest reports of a replica whose mean is taken: one alone is a snapshot of a batch that changes
many times a second."""


class Policy:
    """Called by the Serve controller, several times a second, with every pool's load."""

    def __init__(self) -> None:
        self._busy_s: float | None = None
        self._starting = Starting()
        self._last: tuple[int, int, str] | None = None
        self._complaint: str | None = None

    def __call__(
        self, contexts: dict[DeploymentID, AutoscalingContext]
    ) -> tuple[dict[DeploymentID, float], dict[DeploymentID, dict[str, Any]]]:
        """Replicas wanted of each pool that scales."""
        wanted: dict[DeploymentID, float] = {}
        states: dict[DeploymentID, dict[str, Any]] = {}
        models = [
            load
            for deployment, context in contexts.items()
            if deployment.name == "Model"
            for load in model_loads(context)
        ]
        for deployment, context in contexts.items():
            if deployment.name == "Refiner" and models:
                wanted[deployment] = self._refiners(models, context)
            else:
                # No model replica has reported yet: there is nothing to look ahead with.
                wanted[deployment], states[deployment] = replica_queue_length_autoscaling_policy(
                    context
                )
        return wanted, states

    def _refiners(self, models: list[ModelLoad], context: AutoscalingContext) -> int:
        assert context.config is not None
        options = self._aims(context.config.policy.policy_kwargs)
        measured = latest(context, "busy_s").values()
        if measured:
            # Kept for when no refiner is left to ask.
            self._busy_s = sum(measured) / len(measured)
        replicas, target = context.current_num_replicas, context.target_num_replicas
        load = RefinerLoad(
            requests=context.total_num_requests,
            replicas=replicas,
            target=target,
            busy_s=self._busy_s or options.busy_s,
            starting=self._starting(replicas, target, time.monotonic(), options.start_s),
        )
        decision = decide(models, load, options)
        self._tell(decision, context)
        return decision.wanted

    def _aims(self, given: dict[str, Any]) -> LookAhead:
        """Those of ``refiner_pool.lookahead``; the defaults, and a line in the log, where the
        ``deployments`` of a config have others that do not fit, or dropped them."""
        complaint, aims = None, LookAhead()
        try:
            aims = LookAhead(**given)
        except ValueError as error:
            # Not raised: the controller would stop at it, and keep up no application any more.
            complaint = f"policy_kwargs of the deployment Refiner are refused: {reason(error)}"
        if not given:
            complaint = "the deployment Refiner has an autoscaling_config without policy_kwargs"
        if complaint is not None and complaint != self._complaint:
            logger.error(
                "%s; the look-ahead goes by the defaults of refiner_pool.lookahead", complaint
            )
        self._complaint = complaint
        return aims

    def _tell(self, decision: Decision, context: AutoscalingContext) -> None:
        """Log what is new; most of the decisions repeat the one before."""
        # By themselves metrics have Serve's tags in replicas only.
        refiners = context.deployment_id
        pool = {"application": refiners.app_name, "deployment": refiners.name}
        metrics.level(metrics.REFINERS_DUE, decision.due_per_s, **pool)
        metrics.level(metrics.REFINERS_WANTED, decision.wanted, **pool)
        told = (decision.wanted, decision.target, decision.reason)
        if told != self._last:
            self._last = told
            logger.info("%s", decision)


def latest(context: AutoscalingContext, name: str) -> dict[Any, float]:
    """What each running replica last reported under ``name``: the mean of its last reports."""
    series: Mapping[Any, TimeSeries] = (context.raw_metrics or {}).get(name, {})
    return {
        replica: sum(point.value for point in points[-REPORTS:]) / len(points[-REPORTS:])
        for replica, points in series.items()
        if points
    }


def model_loads(context: AutoscalingContext) -> list[ModelLoad]:
    """The load of each model replica that has reported all of it."""
    reports = {field.name: latest(context, field.name) for field in fields(ModelLoad)}
    whole = set.intersection(*(set(report) for report in reports.values()))
    return [
        ModelLoad(**{name: report[replica] for name, report in reports.items()})
        for replica in sorted(whole, key=str)
    ]
