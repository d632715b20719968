"""The Serve configs that operators edit: they parse, and a typing error does not pass."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

pytest.importorskip("ray.serve")

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from kestrel.config import Limits, ModelSource, RefinerConfig, RuntimeConfig
from serve_graph.app import build
from serve_graph.args import ELSEWHERE, GraphArgs, LookAhead, Pool, RefinerPool

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load(name: str) -> dict[str, Any]:
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml"])
def test_config_is_what_serve_and_the_graph_accept(name: str) -> None:
    config = load(name)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    args = GraphArgs.model_validate(application["args"])
    assert application["import_path"] == "serve_graph.app:build"
    assert args.runtime.refiner is None


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml"])
def test_every_option_of_the_three_deployments_is_one_that_serve_knows(name: str) -> None:
    args = GraphArgs.model_validate(load(name)["applications"][0]["args"])
    assert isinstance(build(args), Application)


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml"])
def test_autoscaling_can_reach_its_target(name: str) -> None:
    args = GraphArgs.model_validate(load(name)["applications"][0]["args"])
    for pool in (args.ingress_pool, args.model_pool, args.refiner_pool):
        if pool.max_replicas > pool.min_replicas:
            assert pool.target_ongoing_requests < pool.max_ongoing_requests


def test_a_pool_that_scales_aims_at_more_than_a_replica_runs() -> None:
    aim = {"max_ongoing_requests": 3, "target_ongoing_requests": 4}
    with pytest.raises(
        ValueError, match=r"target_ongoing_requests \(4\) must not exceed max_ongoing"
    ):
        GraphArgs.model_validate({"model_pool": {**aim, "max_replicas": 2}})
    GraphArgs.model_validate({"model_pool": aim})  # nothing is aimed at
    GraphArgs.model_validate({"model_pool": {**aim, "max_replicas": 2, "max_ongoing_requests": 4}})


def shipped() -> dict[str, dict[str, Any]]:
    """Every Serve config of the repository, the manifest's too."""
    manifest = CONFIGS.parent / "deploy" / "kuberay" / "rayservice.yaml"
    found = {path.name: load(path.name) for path in CONFIGS.glob("*.yaml")}
    inner = yaml.safe_load(manifest.read_text())["spec"]["serveConfigV2"]
    return found | {manifest.name: yaml.safe_load(inner)}


@pytest.mark.parametrize("pool", ["ingress_pool", "model_pool", "refiner_pool"])
@pytest.mark.parametrize("name", list(shipped()))
def test_a_replica_that_hangs_is_given_up_while_its_requests_still_have_time(
    name: str, pool: str
) -> None:
    args = GraphArgs.model_validate(shipped()[name]["applications"][0]["args"])
    chosen: Pool = getattr(args, pool)
    checks = 3 * (chosen.health_check_period_s + chosen.health_check_timeout_s)
    given_up_s = checks + chosen.graceful_shutdown_timeout_s
    # Some of it is for the second try.
    assert given_up_s <= args.runtime.request_timeout_s - 5


def names(config: type) -> set[str]:
    return {field.name for field in fields(config)}


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml"])
def test_every_key_of_the_library_is_there_to_be_edited(name: str) -> None:
    args = load(name)["applications"][0]["args"]
    assert set(args) == set(GraphArgs.model_fields)
    assert set(args["runtime"]) == names(RuntimeConfig) - set(ELSEWHERE)
    assert set(args["runtime"]["limits"]) == names(Limits)
    assert set(args["refiner"]) == names(RefinerConfig)
    text = (CONFIGS / name).read_text()
    for key in names(ModelSource):
        assert re.search(rf"#.*\b{key}: ", text), key


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml"])
def test_every_value_has_its_meaning_beside_it_with_its_unit(name: str) -> None:
    units = {"_s": "seconds", "_bytes": "bytes"}
    for line in (CONFIGS / name).read_text().splitlines():
        key = re.match(r"\s*(?:- )?(\w+): *[^\s#]", line)
        if key:
            comment = line.partition("#")[2]
            assert comment.strip(), line
            for ending, unit in units.items():
                assert not key[1].endswith(ending) or unit in comment, line


def test_the_cluster_s_config_shows_every_key_of_a_pool() -> None:
    args = load("cluster.yaml")["applications"][0]["args"]
    pools = [args[f"{name}_pool"] for name in ("ingress", "model", "refiner")]
    shown = {key for pool in pools for key in pool}
    assert shown == set(RefinerPool.model_fields)
    assert set(args["refiner_pool"]["lookahead"]) == set(LookAhead.model_fields)


def test_the_readme_s_table_names_every_key() -> None:
    table = (CONFIGS.parent / "README.md").read_text().partition("## Configuration")[2]
    rows = " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    for key in (names(RuntimeConfig) - set(ELSEWHERE)) | names(RefinerConfig):
        assert re.search(rf"[`.]{key}`", rows), key
    for key in set(GraphArgs.model_fields) - {"runtime", "refiner"}:
        assert f"`{key}`" in rows or (key.endswith("_pool") and "`*_pool`" in rows), key


def test_settings_that_the_readme_shows_are_taken() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (CONFIGS.parent / "README.md").read_text(), re.DOTALL)
    shown = [yaml.safe_load(block) for block in blocks]
    assert any("model_pool" in args for args in shown)
    for args in shown:
        assert GraphArgs.model_validate(args).runtime.model == "moondream3"


def test_local_config_stays_on_this_machine_and_fits_two_cores() -> None:
    config = load("local.yaml")
    assert config["http_options"]["host"] == "127.0.0.1"
    args = GraphArgs.model_validate(config["applications"][0]["args"])
    pools = (args.ingress_pool, args.model_pool, args.refiner_pool)
    assert sum(pool.num_cpus * pool.max_replicas for pool in pools) <= 2
    assert not any(pool.num_gpus for pool in pools)


def test_cluster_config_keeps_the_gpu_for_the_model() -> None:
    args = GraphArgs.model_validate(load("cluster.yaml")["applications"][0]["args"])
    assert args.model_pool.num_gpus > 0
    assert args.refiner_pool.num_gpus == args.ingress_pool.num_gpus == 0


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"modell_pool": {}}, "modell_pool"),
        ({"model_pool": {"max_replica": 2}}, "max_replica"),
        ({"runtime": {"devic": "cpu"}}, "devic"),
        ({"runtime": {"limits": {"max_body": 1}}}, "max_body"),
        ({"runtime": {"refiner": None}}, "args.refiner"),
        ({"runtime": {"refiner_threads": 2}}, "refiner_pool.threads"),
        ({"refiner_pool": {"threads": 17}}, "max_ongoing_requests"),
        ({"runtime": {"source": {"path": "/models"}}}, "runtime.model"),
        ({"runtime": {"device": "cuda"}}, "num_gpus"),
        ({"runtime": ["nano"]}, "runtime"),
        ({"refiner": {"turdsiz": 2}}, "turdsiz"),
        ({"model_pool": {"min_replicas": 0}}, "model_pool.min_replicas"),
        ({"ingress_pool": {"min_replicas": 0}}, "ingress_pool.min_replicas"),
        ({"refiner_pool": {"max_replicas": 0, "min_replicas": 0}}, "max_replicas"),
        ({"refiner_pool": {"lookahead": {"busy_target": 1.5}}}, "busy_target"),
        ({"refiner_pool": {"lookahead": {"start": 1}}}, "start"),
        ({"model_pool": {"lookahead": {}}}, "lookahead"),
        ({"refiner_pool": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas"),
        ({"model_pool": {"max_ongoing_requests": 10_000}}, "max_queue"),
        ({"refine_timeout_s": 0}, "refine_timeout_s"),
        ({"ingress_pool": {"max_ongoing_requests": 512}}, "ingress_pool.max_ongoing_requests"),
        ({"runtime": {"max_held_requests": 2000}}, "runtime.max_held_requests"),
    ],
)
def test_wrong_args_are_refused_by_name(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        GraphArgs.model_validate(args)


def test_a_request_waits_where_its_deadline_runs_and_not_before_the_ingress() -> None:
    """Ray lets ``max_ongoing_requests`` in; behind HAProxy the rest waits unseen by the ingress."""
    args = GraphArgs()
    assert args.ingress_pool.max_ongoing_requests > args.runtime.max_held_requests
    for held, let_in in ((48, 47), (48, 48)):
        pool = {"max_ongoing_requests": let_in}
        given = {"runtime": {"max_held_requests": held}, "ingress_pool": pool}
        rule = rf"ingress_pool\.max_ongoing_requests \({let_in}\) must be over "
        with pytest.raises(ValidationError, match=rf"{rule}runtime\.max_held_requests \({held}\)"):
            GraphArgs.model_validate(given)
    # Also where another key of the pool is given.
    GraphArgs.model_validate({"ingress_pool": {"num_cpus": 1}})
    pool["max_ongoing_requests"] = 49
    assert GraphArgs.model_validate(given).ingress_pool.max_ongoing_requests == 49


INF, NAN = float("inf"), float("nan")
WHOLE = "num_gpus\n.*must be a whole number where it is over 1, not 1.5"
GRAINS = "must be 0 or at least 0.0001, not 1e-05"
FINITE = "should be a finite number"
FITS = "less than or equal to 2147483647"


@pytest.mark.parametrize(
    ("pool", "named"),
    [
        ({"num_gpus": 1.5}, WHOLE),
        ({"num_cpus": 1e-5}, f"num_cpus\n.*{GRAINS}"),
        ({"num_gpus": 1e-5}, f"num_gpus\n.*{GRAINS}"),
        ({"resources": {"a": 1e-5}}, rf"resources\.a\n.*{GRAINS}"),
        ({"resources": {"a": -1}}, r"resources\.a\n.*greater than or equal to 0"),
        ({"resources": {"a": NAN}}, r"resources\.a\n.*finite number"),
        *(
            ({"resources": {name: 1}}, rf"resources\n.*{name} is not a custom resource")
            for name in ("CPU", "GPU", "memory", "object_store_memory", "bundle")
        ),
        ({"resources": {"gerät": 1}}, "resources\n.*'gerät' must be ASCII"),
        *(
            ({name: value}, f"{name}\n.*{FINITE}")
            for name in (
                "num_cpus",
                "num_gpus",
                "target_ongoing_requests",
                "upscale_delay_s",
                "downscale_delay_s",
                "metrics_interval_s",
                "look_back_period_s",
                "graceful_shutdown_timeout_s",
                "health_check_period_s",
                "health_check_timeout_s",
            )
            for value in (INF, NAN)
        ),
        *(
            ({"max_replicas": 2**31, name: 2**31}, f"{name}\n.*{FITS}")
            for name in (
                "min_replicas",
                "max_replicas",
                "max_ongoing_requests",
                "max_queued_requests",
            )
        ),
    ],
)
@pytest.mark.parametrize("name", ["ingress_pool", "refiner_pool"])
def test_a_pool_that_ray_would_refuse_is_refused_by_its_field(
    name: str, pool: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=rf"{name}\.{named}"):
        GraphArgs.model_validate({name: pool})


@pytest.mark.parametrize(
    "pool",
    [
        {"num_cpus": 0, "num_gpus": 0},
        {"num_cpus": 1e-4, "num_gpus": 0.5},
        {"num_cpus": 1.5, "num_gpus": 3},
        {"resources": {"a": 1e-4, "b": 1.5, "c": 0, "node:10.0.0.1": 0.001, "bytes": 8e10}},
        {"max_replicas": 2**31 - 1, "max_ongoing_requests": 2**31 - 1},
    ],
)
def test_a_pool_that_ray_takes_is_taken(pool: dict[str, Any]) -> None:
    deployment = serve.deployment(**Pool.model_validate(pool).options())(type("Any", (), {}))
    assert deployment.ray_actor_options is not None
    deployment._deployment_config.to_proto_bytes()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"refine_timeout_s": INF}, "refine_timeout_s"),
        ({"refine_silence_s": INF}, "refine_silence_s"),
        ({"refiner_pool": {"stuck_s": INF}}, r"refiner_pool\.stuck_s"),
        ({"refiner_pool": {"lookahead": {"start_s": INF}}}, r"lookahead\.start_s"),
    ],
)
def test_a_time_that_never_ends_is_refused_by_its_field(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=rf"{named}\n.*{FINITE}"):
        GraphArgs.model_validate(args)


def test_fixed_pool_does_not_autoscale_and_a_range_does() -> None:
    fixed = Pool(min_replicas=2, max_replicas=2).options()
    assert fixed["num_replicas"] == 2 and "autoscaling_config" not in fixed
    ranged = Pool(min_replicas=1, max_replicas=3).options()
    assert ranged["autoscaling_config"]["max_replicas"] == 3 and "num_replicas" not in ranged


def test_refiners_may_scale_to_nothing_and_carry_the_aims_of_the_policy() -> None:
    pool = GraphArgs.model_validate(
        {"refiner_pool": {"min_replicas": 0, "max_replicas": 4, "lookahead": {"start_s": 7}}}
    ).refiner_pool
    config = AutoscalingConfig(**pool.options()["autoscaling_config"])
    assert config.min_replicas == 0
    assert config.policy.policy_kwargs["start_s"] == 7
    assert config.policy.is_default_policy_function()


def test_cluster_config_names_a_policy_that_is_there() -> None:
    (application,) = load("cluster.yaml")["applications"]
    policy = AutoscalingPolicy(**application["autoscaling_policy"])
    assert callable(policy.get_policy())
