"""What Serve makes of a pool by a config's ``deployments``, beside what is checked of it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.application_state import override_deployment_info
from ray.serve._private.build_app import build_app
from ray.serve._private.config import ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.schema import ServeApplicationSchema

from serve_graph.app import build
from serve_graph.args import GraphArgs, Pool
from serve_graph.overrides import overridden

ARGS = {
    "a pool of one": {},
    "a fixed pool": {"model_pool": {"min_replicas": 3, "max_replicas": 3, "num_cpus": 0.5}},
    "a pool that scales": {"model_pool": {"min_replicas": 2, "max_replicas": 5, "num_gpus": 1}},
    "a fixed pool that is watched": {
        "model_pool": {"min_replicas": 2, "max_replicas": 2},
        "refiner_pool": {"max_replicas": 3},
    },
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"autoscaling_config": None},
    {"autoscaling_config": {}},
    {"autoscaling_config": {"max_replicas": 7}},
    {"autoscaling_config": {"max_replicas": 7, "target_ongoing_requests": 3}, "num_replicas": None},
    {"autoscaling_config": None, "num_replicas": 4},
    {"num_replicas": "auto"},
    {"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}},
    {"ray_actor_options": {}},
    {"ray_actor_options": {"num_cpus": None, "num_gpus": 0.5}},
    {"ray_actor_options": {"num_cpus": 2, "resources": {"marked": 1}}},
    {"max_ongoing_requests": 9, "max_queued_requests": 5, "max_replicas_per_node": 2},
    {"health_check_period_s": 1, "health_check_timeout_s": 2, "graceful_shutdown_timeout_s": 3},
]


def served(args: GraphArgs, options: dict[str, Any]) -> dict[str, Any]:
    """Keys of the model pool, as Serve's controller would run it."""
    built = {one.name: one for one in build_app(build(args), name="segment").deployments}
    model = built["Model"]
    replica: ReplicaConfig = model._replica_config
    info = DeploymentInfo(
        deployment_config=model._deployment_config,
        replica_config=replica,
        start_time_ms=0,
        deployer_job_id="",
    )
    schema = ServeApplicationSchema.model_validate(
        {"import_path": "serve_graph.app:build", "deployments": [{"name": "Model", **options}]}
    )
    changed = override_deployment_info({"Model": info}, schema)["Model"]
    config, reserved = changed.deployment_config, changed.replica_config.ray_actor_options
    scaling = config.autoscaling_config
    # Without a number Serve runs one.
    low = scaling.min_replicas if scaling else config.num_replicas or 1
    high = scaling.max_replicas if scaling else low
    found = {
        "min_replicas": low,
        "max_replicas": high,
        "num_cpus": reserved["num_cpus"],
        "num_gpus": reserved.get("num_gpus", 0),
        "resources": reserved.get("resources", {}),
        "max_replicas_per_node": changed.replica_config.max_replicas_per_node,
    }
    if high > low:
        found["target_ongoing_requests"] = scaling.target_ongoing_requests
    for key in ("max_ongoing_requests", "max_queued_requests", "graceful_shutdown_timeout_s"):
        found[key] = getattr(config, key)
    for key in ("health_check_period_s", "health_check_timeout_s"):
        found[key] = getattr(config, key)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", ARGS.values(), ids=ARGS)
def test_the_pool_that_is_checked_is_not_the_one_that_serve_runs(
    given: dict[str, Any], options: dict[str, Any]
) -> None:
    args = GraphArgs.model_validate(given)
    pool: Pool = overridden(args, {"name": "Model", **options}, "here").model_pool
    for key, value in served(args, options).items():
        assert getattr(pool, key) == value, key


def test_a_number_of_replicas_changes_a_pool_that_scales() -> None:
    """It is refused, as the bounds are what Serve goes by."""
    args = GraphArgs.model_validate(ARGS["a pool that scales"])
    found = served(args, {"num_replicas": 4})
    assert (found["min_replicas"], found["max_replicas"]) == (2, 5)
