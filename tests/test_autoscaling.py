"""The look-ahead policy behind Serve's own interface, with Serve's own contexts and wrapper."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_graph import autoscaling, metrics
from serve_graph.args import Pool, RefinerPool
from serve_graph.autoscaling import latest

MODEL, REFINER, INGRESS = (
    DeploymentID(name, "segment") for name in ("Model", "Refiner", "Ingress")
)
BUSY = {"waiting": 20.0, "running": 8.0, "slots": 8.0, "seconds": 1.0, "left_s": 0.5, "share": 1.0}


def context(
    deployment: DeploymentID,
    pool: Pool,
    *,
    replicas: int = 1,
    target: int | None = None,
    requests: float = 0,
    reports: dict[str, float] | None = None,
) -> AutoscalingContext:
    ids = [ReplicaID(f"r{n}", deployment) for n in range(replicas)]
    series: dict[str, Any] = {
        key: {replica: [TimeStampedValue(1.0, value)] for replica in ids}
        for key, value in (reports or {}).items()
    }
    # Releases before 2.60 want this one too.
    asynchronous = {"total_pending_async_requests": 0}
    known = inspect.signature(AutoscalingContext).parameters
    return AutoscalingContext(
        **{name: value for name, value in asynchronous.items() if name in known},
        deployment_id=deployment,
        deployment_name=deployment.name,
        app_name=deployment.app_name,
        current_num_replicas=replicas,
        target_num_replicas=replicas if target is None else target,
        running_replicas=ids,
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={},
        raw_metrics=series,
        capacity_adjusted_min_replicas=pool.min_replicas,
        capacity_adjusted_max_replicas=pool.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(**pool.options(watched=True)["autoscaling_config"]),
    )


@pytest.fixture()
def policy() -> Any:
    """As the controller makes it of the application's ``autoscaling_policy``."""
    named = AutoscalingPolicy(policy_function="serve_graph.autoscaling:Policy")
    return _apply_app_level_autoscaling_config(_resolve_policy_callable(named))


ONE_TO_MANY = RefinerPool(min_replicas=1, max_replicas=50, upscale_delay_s=0, downscale_delay_s=60)


def test_refiners_grow_with_what_the_model_pool_holds(policy: Any) -> None:
    decisions, _ = policy(
        {
            MODEL: context(MODEL, Pool(), reports=BUSY, requests=28),
            REFINER: context(REFINER, ONE_TO_MANY, reports={"busy_s": 0.5}),
        }
    )
    # 8 a second of half a second each: more than 4 replicas, without one request at a refiner.
    assert decisions[REFINER] > 4


def test_refiners_that_are_starting_are_not_asked_for_again(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = context(MODEL, Pool(), reports=BUSY, requests=28)
    wanted, queue = [1], 0.0
    for second in range(8):
        monkeypatch.setattr(autoscaling.time, "monotonic", lambda at=float(second): at)
        pool = context(
            REFINER, ONE_TO_MANY, target=wanted[-1], requests=queue, reports={"busy_s": 0.5}
        )
        decisions, _ = policy({MODEL: model, REFINER: pool})
        wanted.append(decisions[REFINER])
        # 8 a second come and one refiner takes 2.
        queue += 8 - 2
    assert wanted[1] > 4 and set(wanted[1:]) == {wanted[1]}


def test_other_pools_follow_serves_default(policy: Any) -> None:
    pool = Pool(min_replicas=1, max_replicas=9, target_ongoing_requests=4, upscale_delay_s=0)
    decisions, _ = policy(
        {
            MODEL: context(MODEL, pool, reports=BUSY, requests=28),
            INGRESS: context(INGRESS, pool, requests=2),
        }
    )
    assert decisions == {MODEL: 7, INGRESS: 1}


def test_delays_of_the_pool_hold(policy: Any) -> None:
    slow = ONE_TO_MANY.model_copy(update={"upscale_delay_s": 30.0})
    decisions, state = policy(
        {
            MODEL: context(MODEL, Pool(), reports=BUSY),
            REFINER: context(REFINER, slow, reports={"busy_s": 0.5}),
        }
    )
    assert decisions[REFINER] == 1 and state[REFINER]
    idle = {**BUSY, "waiting": 0.0, "running": 0.0}
    decisions, _ = policy(
        {
            MODEL: context(MODEL, Pool(), reports=idle),
            REFINER: context(REFINER, ONE_TO_MANY, replicas=8, reports={"busy_s": 0.5}),
        }
    )
    assert decisions[REFINER] == 8


def test_pool_at_zero_is_woken_by_a_request_in_the_model(policy: Any) -> None:
    nobody = ONE_TO_MANY.model_copy(update={"min_replicas": 0})
    one = {**BUSY, "waiting": 0.0, "running": 1.0}
    decisions, _ = policy(
        {
            MODEL: context(MODEL, Pool(), reports=one, requests=1),
            REFINER: context(REFINER, nobody, replicas=0),
        }
    )
    assert decisions[REFINER] >= 1


def test_what_a_refinement_takes_is_known_when_no_refiner_is_left_to_ask(policy: Any) -> None:
    nobody = ONE_TO_MANY.model_copy(update={"min_replicas": 0})
    model = context(MODEL, Pool(), reports={**BUSY, "waiting": 0.0, "running": 1.0})

    def wanted(replicas: int, **reports: float) -> int:
        pool = context(REFINER, nobody, replicas=replicas, reports=reports)
        return policy({MODEL: model, REFINER: pool})[0][REFINER]

    # One a second, by the default 0.2 s each.
    assert wanted(0) == 1
    assert wanted(1, busy_s=0.5) == 1
    # What waits after 10 s takes one for 5 s, and what comes then two thirds of one.
    assert wanted(0) == 2


def test_without_reports_of_the_model_serves_default_decides(policy: Any) -> None:
    pool = ONE_TO_MANY.model_copy(update={"target_ongoing_requests": 2.0})
    for reports in ({}, {"waiting": 9.0}):
        decisions, _ = policy(
            {
                MODEL: context(MODEL, Pool(), reports=reports),
                REFINER: context(REFINER, pool, requests=12),
            }
        )
        assert decisions[REFINER] == 6


def test_applications_beside_each_other_export_their_own_decisions(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the controller's process, and the replica's tags of Serve are not there."""
    seen: dict[tuple[str, str, str], float] = {}
    gauge = metrics.level

    def level(spec: metrics.Spec, value: float, **tags: str) -> None:
        gauge(spec, value, **tags)
        seen[spec.name, tags["application"], tags["deployment"]] = value

    monkeypatch.setattr(metrics, "level", level)
    for application, running in (("segment", 8.0), ("other", 0.0)):
        model, refiner = DeploymentID("Model", application), DeploymentID("Refiner", application)
        busy = {**BUSY, "running": running, "waiting": 0.0}
        policy(
            {
                model: context(model, Pool(), reports=busy),
                refiner: context(refiner, ONE_TO_MANY, reports={"busy_s": 0.5}),
            }
        )
    assert seen["segment_autoscaling_due_per_s", "segment", "Refiner"] == pytest.approx(8.0)
    assert seen["segment_autoscaling_due_per_s", "other", "Refiner"] == 0
    assert seen["segment_autoscaling_wanted_refiners", "segment", "Refiner"] > 4


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def test_each_new_decision_is_logged_once_with_its_inputs(policy: Any) -> None:
    log, lines = logging.getLogger("ray.serve"), Lines()
    contexts = {
        MODEL: context(MODEL, Pool(), reports=BUSY),
        REFINER: context(REFINER, ONE_TO_MANY, reports={"busy_s": 0.5}),
    }
    log.addHandler(lines)
    try:
        policy(contexts)
        policy(contexts)
    finally:
        log.removeHandler(lines)
    (line,) = (line for line in lines.seen if line.startswith("refiners wanted="))
    assert "due_per_s=8 " in line and "model_waiting=20" in line and "grow" in line


def test_a_report_is_the_mean_of_the_last_three() -> None:
    seen = context(MODEL, Pool(), reports={"running": 0.0})
    assert seen.raw_metrics is not None
    (points,) = seen.raw_metrics["running"].values()
    points.extend(TimeStampedValue(float(n), float(n)) for n in range(10))
    assert list(latest(seen, "running").values()) == [8.0]
    assert latest(seen, "nothing") == {}


@pytest.mark.parametrize("kwargs", [{}, {"stat_s": 3}, {"drain_s": 0}], ids=str)
def test_aims_that_do_not_fit_stop_the_controller(
    policy: Any, caplog: pytest.LogCaptureFixture, kwargs: dict[str, Any]
) -> None:
    """It keeps up no application while a policy raises. ``serve deploy`` does not look at them."""
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    contexts = {
        MODEL: context(MODEL, Pool(), reports=BUSY, requests=28),
        REFINER: context(REFINER, ONE_TO_MANY),
    }
    by_default, _ = policy(contexts)
    contexts[REFINER].config.policy.policy_kwargs = kwargs
    try:
        for _ in range(3):
            decisions, _ = policy(contexts)
            assert decisions[REFINER] == by_default[REFINER]
    finally:
        logger.removeHandler(caplog.handler)
    told = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1 and "Refiner" in told[0]
