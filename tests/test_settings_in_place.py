"""A ``user_config`` that replicas are given while they serve: what fits, and what must not hurt."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.build_app import build_app
from serving import picture

from kestrel.api_keys import ApiKey, hash_key, parse_keys
from kestrel.config import ConfigError, Limits, RefinerConfig, RuntimeConfig
from kestrel.seg_refiner.backends import BACKENDS
from kestrel.seg_refiner.result import REASONS
from serve_graph import metrics
from serve_graph.app import build
from serve_graph.args import POOLS, GraphArgs, refiner_settings
from serve_graph.compose import GraphBackend
from serve_graph.ingress import IngressDeployment
from serve_graph.model import ModelDeployment
from serve_graph.reconfigured import FormerSettings
from serve_graph.refiner import RefinerDeployment
from serve_graph.refusals import check

BUILD = "serve_graph.app:build"
HASH = hash_key("a key that nobody guesses")
SQUARE = "M0 0L1 0L1 1L0 1Z"
BOX = {"x_min": 0.3, "y_min": 0.3, "x_max": 0.6, "y_max": 0.6}


def config(user_config: dict[str, Any], name: str = "Refiner", **args: Any) -> dict[str, Any]:
    deployments = [{"name": name, "user_config": user_config}]
    application = {"import_path": BUILD, "args": args, "deployments": deployments}
    return {"applications": [application]}


@pytest.fixture(autouse=True)
def library_log() -> Iterator[None]:
    """What a replica changes for its whole process."""
    library = logging.getLogger("kestrel")
    before = library.handlers, library.level, library.propagate
    yield
    library.handlers, library.propagate = before[0], before[2]
    library.setLevel(before[1])


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The gauges that are set."""
    found: dict[str, float] = {}
    monkeypatch.setattr(metrics, "level", lambda spec, value: found.update({spec.name: value}))
    return found


@pytest.mark.parametrize(
    ("user_config", "error"),
    [
        ({"turdsiez": 1}, "turdsiez"),
        ({"turdsize": -1}, "turdsize"),
        ({"refiner": "boundry"}, "'boundry' is not known; known refiners are boundary, guided"),
        ({"refiner": "seghead", "device": "cuda"}, r"refiner_pool\.num_gpus must be over 0"),
        ([1], "user_config must be a mapping"),
        ({"selectable": []}, r"user_config\.selectable: the ingress offers what args\.refiner"),
    ],
)
def test_refiner_settings_that_do_not_fit_are_deployed(
    user_config: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        check(config(user_config))


@pytest.mark.parametrize("value", [False, 0, "", []])
def test_an_empty_value_in_the_place_of_a_mapping_is_taken(value: Any) -> None:
    """A replica would refuse it when it has started."""
    for name in ("Ingress", "Refiner"):
        given = config({})
        given["applications"][0]["deployments"] = [{"name": name, "user_config": value}]
        with pytest.raises(ValueError, match=r"user_config must be a mapping"):
            check(given)
    with pytest.raises(ValueError, match=r"args must be a mapping"):
        check({"applications": [{"import_path": BUILD, "args": value}]})


def test_settings_of_a_model_are_deployed_in_place() -> None:
    error = r"user_config\.max_batch_size: .*Model.* args\.runtime or args\.model_pool"
    with pytest.raises(ValueError, match=error):
        check(config({"max_batch_size": 4}, "Model"))
    check(config({}, "Model"))


def test_settings_of_a_deployment_that_is_not_there_are_deployed() -> None:
    with pytest.raises(ValueError, match=r"'Refinr'; the deployments are Ingress, Model, Refiner"):
        check(config({"refiner": "none"}, "Refinr"))
    there = build_app(build(GraphArgs()), name="segment").deployments
    assert {deployment.name for deployment in there} == set(POOLS)


def test_a_deployment_is_not_told_that_its_settings_are_gone() -> None:
    """Serve says nothing to a replica whose ``user_config`` is none."""
    there = build_app(build(GraphArgs()), name="segment").deployments
    assert [deployment.user_config for deployment in there] == [{}] * len(POOLS)


def test_refiner_settings_that_fit_are_refused() -> None:
    check(config({"refiner": "none", "turdsize": 3}))
    check(config({"refiner": "their.package:build"}))
    check(config({}))
    check({"applications": [{"import_path": BUILD, "args": None}]})
    check({"applications": [{"import_path": "another.app:build", "args": {"refiner": 1}}]})


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"refiner": {"refiner": "boundry"}}, "'boundry' is not known"),
        ({"refiner": {"selectable": ["none", "gudied"]}}, "'gudied' is not known"),
        (
            {"refiner": {"refiner": "seghead", "device": "cuda"}},
            r"refiner_pool\.num_gpus must be over 0",
        ),
    ],
)
def test_args_of_a_refiner_that_cannot_start_are_deployed(args: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        GraphArgs.model_validate(args)


def test_a_refiner_on_a_gpu_is_refused_its_gpu() -> None:
    on_gpu = {"refiner": "seghead", "device": "cuda"}
    GraphArgs.model_validate({"refiner": on_gpu, "refiner_pool": {"num_gpus": 0.5}})
    GraphArgs.model_validate({"refiner": {"device": "cuda"}})  # none of its backends uses one


def test_another_default_takes_away_what_requests_may_choose() -> None:
    args = RefinerConfig(refiner="boundary", selectable=("none",))
    assert refiner_settings(args, {"refiner": "guided"}).loaded == ("guided", "boundary", "none")
    assert refiner_settings(args, {}).loaded == args.loaded
    with pytest.raises(ConfigError, match="selectable"):
        refiner_settings(args, {"selectable": ["guided"]})


def test_a_refiner_loses_what_the_ingress_offers() -> None:
    args = RefinerConfig(refiner="guided", selectable=("none",))

    async def ask(replica: RefinerDeployment, name: str | None) -> str:
        return (await replica.refine(picture(), SQUARE, BOX, False, name)).reason

    async def run() -> None:
        replica = RefinerDeployment(args, Limits(), 1, 30.0)
        await replica.reconfigure({"refiner": "none"})
        for name in (None, *RuntimeConfig(refiner=args).refiners):
            assert await ask(replica, name) in REASONS

    asyncio.run(run())


def test_a_replica_that_starts_loads_its_backends_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setitem(
        BACKENDS, "counted", lambda config: built.append(config) or (lambda image, mask: mask)
    )

    async def run() -> None:
        args = RefinerConfig(refiner="counted", selectable=("none",))
        replica = RefinerDeployment(args, Limits(), 1, 30.0)
        await replica.reconfigure({})
        await replica.reconfigure({})

    asyncio.run(run())
    assert len(built) == 1


def test_requests_wait_while_a_backend_is_loaded_anew(
    monkeypatch: pytest.MonkeyPatch, levels: dict[str, float]
) -> None:
    """Networks take seconds to load, and minutes to fetch; health checks would fail meanwhile."""
    loading, answered = threading.Event(), threading.Event()

    def build(config: RefinerConfig) -> Any:
        if loading.is_set():
            assert answered.wait(2), "nothing was answered meanwhile"
        return lambda image, mask: mask

    monkeypatch.setitem(BACKENDS, "slow", build)

    async def run() -> None:
        args = RefinerConfig(refiner="slow", selectable=("none",))
        replica = RefinerDeployment(args, Limits(), 1, 30.0)
        loading.set()
        change = asyncio.create_task(replica.reconfigure({"refiner": "none"}))
        await asyncio.sleep(0)
        await replica.check_health()
        await replica.refine(picture(), SQUARE, BOX, False, "slow")
        answered.set()
        await change
        assert levels["segment_former_settings_replicas"] == 0

    asyncio.run(run())


def test_a_refiner_that_serves_stops_for_settings_that_do_not_fit(
    levels: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        replica = RefinerDeployment(RefinerConfig(refiner="none"), Limits(), 1, 30.0)
        await replica.reconfigure({"turdsize": 3})
        assert levels == {"segment_former_settings_replicas": 0}
        with caplog.at_level("ERROR", "ray.serve"):
            await replica.reconfigure({"turdsiez": 1})
        assert levels["segment_former_settings_replicas"] == 1
        assert "turdsiez" in caplog.text and "former settings stay" in caplog.text
        await replica.refine(picture(), SQUARE, BOX, False)
        await replica.reconfigure({})
        assert levels["segment_former_settings_replicas"] == 0

    asyncio.run(run())


def test_a_model_that_serves_stops_for_settings_that_do_not_fit(
    levels: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    """It has none that fit; its replicas serve, and new ones start."""
    replica: Any = SimpleNamespace(_former=FormerSettings())
    for user_config, refused in (({"max_batch_size": 4}, 1), ({}, 0), ({"device": "cuda"}, 1)):
        with caplog.at_level("ERROR", "ray.serve"):
            ModelDeployment.reconfigure(replica, user_config)
        assert levels == {"segment_former_settings_replicas": refused}
    assert "user_config.max_batch_size" in caplog.text


def test_a_refiner_cannot_start_with_settings_that_do_not_fit(
    levels: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    """A pool could not replace a replica that dies, nor grow."""

    async def run() -> None:
        replica = RefinerDeployment(RefinerConfig(refiner="none"), Limits(), 1, 30.0)
        with caplog.at_level("ERROR", "ray.serve"):
            await replica.reconfigure({"turdsiez": 1})
        assert levels == {"segment_former_settings_replicas": 1}
        assert "turdsiez" in caplog.text
        assert (await replica.refine(picture(), SQUARE, BOX, False)).reason in REASONS

    asyncio.run(run())


def ingress(**args: Any) -> Any:
    """An ingress replica that Serve has given no settings yet."""
    backend = GraphBackend.__new__(GraphBackend)
    backend._built = backend.config, _ = RuntimeConfig(refiner=None, **args), 10.0
    backend._refiner = SimpleNamespace(timeout_s=10.0)  # type: ignore[assignment]
    replica = IngressDeployment.__new__(IngressDeployment)
    replica._backend, replica._former, replica._keyed = backend, FormerSettings(), False
    return replica


def keys(replica: Any) -> tuple[ApiKey, ...]:
    return tuple(replica._backend.config.api_keys)


def test_an_ingress_cannot_start_with_settings_that_do_not_fit(levels: dict[str, float]) -> None:
    for user_config in ({"refine_timout_s": 30}, {"refine_timeout_s": -1}):
        replica = ingress(api_keys=[HASH])
        replica.reconfigure(user_config)
        assert levels == {"segment_former_settings_replicas": 1}
        assert keys(replica) == parse_keys([HASH])
        replica.reconfigure({"refine_timeout_s": 30})
        assert levels == {"segment_former_settings_replicas": 0}


def test_a_setting_that_is_taken_back_stays(levels: dict[str, float]) -> None:
    replica = ingress(api_keys=[HASH])
    replica.reconfigure({"refine_timeout_s": 30, "api_keys": []})
    assert (replica._backend._refiner.timeout_s, keys(replica)) == (30, ())
    replica.reconfigure({})
    assert (replica._backend._refiner.timeout_s, keys(replica)) == (10, parse_keys([HASH]))


def test_an_ingress_that_starts_opens_its_door_for_a_typing_error(levels: dict[str, float]) -> None:
    replica = ingress()
    replica.reconfigure({"api_keys": [HASH], "refine_timout_s": 30})
    assert levels == {"segment_former_settings_replicas": 1}
    assert keys(replica) == parse_keys([HASH])
    replica.reconfigure({"api_kyes": []})
    assert keys(replica) == parse_keys([HASH])
    for user_config in ({"api_kyes": [HASH]}, {"api_keys": ["in the clear"]}, {"api_keys": HASH}):
        with pytest.raises(ValueError, match="api_k"):
            ingress().reconfigure(user_config)


def test_settings_of_who_serves_hurt_it(levels: dict[str, float]) -> None:
    former = FormerSettings()
    for _ in range(2):
        with former.stay():
            raise ValueError("no")
        assert levels.pop("segment_former_settings_replicas") == 1
        former.export()  # as Ray forgets what is not set again
        assert levels.pop("segment_former_settings_replicas") == 1
        with former.stay():
            pass
        assert levels.pop("segment_former_settings_replicas") == 0


def test_the_gauges_of_an_idle_refiner_are_forgotten(levels: dict[str, float]) -> None:
    async def run() -> None:
        replica = RefinerDeployment(RefinerConfig(refiner="none"), Limits(), 1, 30.0)
        await replica.reconfigure({})
        levels.clear()
        await replica.check_health()

    asyncio.run(run())
    assert levels == {
        "segment_former_settings_replicas": 0,
        "segment_refiner_running_requests": 0,
        "segment_refiner_waiting_requests": 0,
    }
