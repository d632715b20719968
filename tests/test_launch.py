"""What is decided before Ray starts: its token, config, ports and environment, and how a graph is
drained."""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import answering, has_ipv6

from kestrel.serve_config import http_address
from serve_graph import __main__, launch, serve_api
from serve_graph.args import longest_request_s
from serve_graph.environment import HAPROXY, HARD_STOP
from serve_graph.errors import LaunchError
from serve_graph.haproxy import BINARY_PATH
from serve_graph.launch import LocalCluster
from serve_graph.node import RayNode, kill
from serve_graph.placement import no_room
from serve_graph.ports import INGRESS_BLOCK, free_port, require_free

SECRET = "a-plain-key-of-a-client-0001"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home and a folder for clusters of the test's own; Ray is not started."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))

    def start(*_: Any, **__: Any) -> None:
        pytest.fail("Ray would have been started")

    monkeypatch.setattr(launch, "RayNode", start)


# Ray's token


@pytest.mark.parametrize("mode", ["disabled", "Disabled", "off"])
def test_a_variable_alone_does_not_turn_the_token_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    for given in ({}, {"RAY_AUTH_TOKEN": "0" * 32}):
        with pytest.raises(RuntimeError, match="--without-token"):
            LocalCluster(environment=given)
    assert not list(tmp_path.glob("segment-ray-*"))


@pytest.mark.parametrize("command", ["up", "demo"])
def test_the_commands_refuse_to_start_without_the_token(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("sys.argv", ["serve_graph", command])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert "RAY_AUTH_MODE=disabled" in str(ended.value.code)


def test_whoever_asks_for_it_gets_a_cluster_without_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = LocalCluster(without_token=True)
    assert cluster.variables["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize("mode", [None, "token", "TOKEN"])
def test_otherwise_there_is_a_token_that_only_the_user_can_read(
    monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    variables = LocalCluster().variables
    assert variables["RAY_AUTH_MODE"] == "token"
    path = Path(variables["RAY_AUTH_TOKEN_PATH"])
    assert len(path.read_text()) == 64 and path.stat().st_mode & 0o77 == 0


# Its config


def graph(**keys: Any) -> dict[str, Any]:
    """The application of a Serve config that is the graph."""
    return {"name": "segment", "import_path": "serve_graph.app:build", **keys}


OTHER = {"name": "other", "route_prefix": "/other", "import_path": "mine:app"}


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def with_keys(where: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(__main__.LOCAL.read_text())
    (application,) = config["applications"]
    if where == "args":
        application["args"]["runtime"]["api_keys"] = [SECRET]
    else:
        ingress = {"name": "Ingress", "user_config": {"api_keys": [SECRET]}}
        application["deployments"] = [{"name": "Model"}, ingress]
    return config


@pytest.mark.parametrize("where", ["args", "user_config"])
def test_a_key_in_the_clear_never_reaches_ray_s_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    path = written(tmp_path, with_keys(where))
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", "--config", str(path)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert "hash-key" in str(ended.value.code) and SECRET not in str(ended.value.code)


@pytest.mark.parametrize("port", [None, 8080])
@pytest.mark.parametrize("options", [{}, {"http_options": None}, {"http_options": {}}])
def test_without_a_host_the_door_is_on_the_loopback_interface(
    tmp_path: Path, port: int | None, options: dict[str, Any]
) -> None:
    path = written(tmp_path, {**options, "applications": [graph()]})
    config = __main__.read_config(path, port)
    # Said to Serve, which would listen on every interface.
    assert config["http_options"]["host"] == "127.0.0.1"
    assert config["http_options"].get("port") == port
    assert __main__.service_url(config) == f"http://127.0.0.1:{port or 8000}"


def test_a_config_without_a_host_is_known_to_be_open_to_all() -> None:
    serve = pytest.importorskip("ray.serve.schema").HTTPOptionsSchema()
    assert http_address({"applications": [graph()]}) == (serve.host, serve.port)


@pytest.mark.parametrize("prefix", ["/seg", "/a/b"])
def test_the_service_is_where_the_graph_s_prefix_says(tmp_path: Path, prefix: str) -> None:
    applications = [OTHER, graph(route_prefix=prefix)]
    config = __main__.read_config(written(tmp_path, {"applications": applications}), 8080)
    assert __main__.service_url(config) == f"http://127.0.0.1:8080{prefix}"


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("here", "here")],
)
def test_the_service_is_reached_at_the_address_where_it_listens(
    tmp_path: Path, host: str, reached: str
) -> None:
    config = {"http_options": {"host": host}, "applications": [graph()]}
    config = __main__.read_config(written(tmp_path, config), None)
    assert __main__.service_url(config) == f"http://{reached}:8000"


HASH = "sha256:" + 64 * "0"


@pytest.mark.parametrize(
    ("application", "asked"),
    [
        (graph(), False),
        (graph(args={"runtime": {"api_keys": [HASH]}}), True),
        (graph(deployments=[{"name": "Ingress", "user_config": {"api_keys": [HASH]}}]), True),
        (
            graph(
                args={"runtime": {"api_keys": [HASH]}},
                deployments=[{"name": "Ingress", "user_config": {"api_keys": []}}],
            ),
            False,
        ),
        ({"import_path": "theirs:app", "args": {"runtime": ["api_keys"]}}, False),
    ],
)
def test_the_printed_request_has_no_place_for_the_key_that_it_needs(
    application: dict[str, Any], asked: bool
) -> None:
    said = __main__.curl_line({"applications": [application]}, Path("/tmp/a b/request.json"))
    assert said.startswith("curl -s http://127.0.0.1:8000/v1/segment -H 'Content-Type: app")
    assert said.endswith(" -d @'/tmp/a b/request.json'")
    assert ("-H 'Authorization: Bearer KEY'" in said) == asked


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "segment.example"])
def test_up_has_haproxy_look_for_replicas_where_none_listens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    """They listen at the door's address, and it asks them at their node's."""
    path = written(tmp_path, {"http_options": {"host": host}, "applications": [graph()]})
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", "--num-cpus=3", f"--config={path}"])
    with pytest.raises(SystemExit, match=rf"http_options\.host: .* at {host}; say 127\.0\.0\.1"):
        __main__.main()


@pytest.mark.parametrize("path", ["serve_graph.app.build", "their.app:around_build"])
def test_a_graph_that_goes_by_another_path_is_served(tmp_path: Path, path: str) -> None:
    applications = [graph(import_path=path, route_prefix="/seg")]
    config = __main__.read_config(written(tmp_path, {"applications": applications}), 8080)
    assert __main__.service_url(config) == "http://127.0.0.1:8080/seg"
    (drained,) = serve_api.draining(config)["applications"]
    assert drained["deployments"] == [{"name": "Ingress", "user_config": {"draining": True}}]


def scaled(policy: Any, **keys: Any) -> dict[str, Any]:
    """A Serve config of the graph with an ``autoscaling_policy``."""
    return {"applications": [graph(autoscaling_policy=policy, **keys)]}


def deployed(**keys: Any) -> dict[str, Any]:
    """A Serve config of the graph that says something of its refiners."""
    return {"applications": [graph(deployments=[{"name": "Refiner", **keys}])]}


def overriding(name: str, args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A Serve config of the graph in which Serve's own options of a deployment replace ``args``."""
    first = {"name": "Refiner"}
    return {
        "applications": [graph(args=args or {}, deployments=[first, {"name": name, **options}])]
    }


POLICY = "serve_graph.autoscaling:Policy"
OF_POLICY = r"applications\[0\]\.autoscaling_policy"
OF_REFINER = r"applications\[0\]\.deployments\[0\]"
OVERRIDE = r"applications\[0\]\.deployments\[1\]"
SCALES = {"model_pool": {"max_replicas": 3}}
GROWS = {"refiner_pool": {"max_replicas": 4}}
AIMED = {"refiner_pool": {"max_replicas": 4, "lookahead": {"start_s": 7}}}
ON_GPU = {"runtime": {"device": "cuda"}, "model_pool": {"num_gpus": 1}}


def ahead(args: dict[str, Any], **options: dict[str, Any]) -> dict[str, Any]:
    """A Serve config of the graph that looks ahead, with Serve's own options of deployments."""
    deployments = [{"name": name, **given} for name, given in options.items()]
    return scaled({"policy_function": POLICY}, args=args, deployments=deployments)


CERTIFICATE = {"ssl_keyfile": "/etc/segment/key.pem", "ssl_certfile": "/etc/segment/cert.pem"}
UNSERVABLE = {
    "no graph": ({"applications": [OTHER, {**OTHER, "name": "b"}]}, "serve_graph.app:build"),
    "no application": ({"applications": None}, "serve_graph.app:build"),
    "two graphs": ({"applications": [graph(), graph(name="again")]}, "serve_graph.app:build"),
    "no door": ({"applications": [graph(route_prefix=None)]}, "route_prefix"),
    "options": ({"http_options": [8000], "applications": [graph()]}, "http_options"),
    "host": ({"http_options": {"host": 1}, "applications": [graph()]}, "http_options.host"),
    "label": ({"http_options": {"host": 64 * "a"}, "applications": [graph()]}, "http_options.host"),
    **{
        f"host {host[:9]!r}": (
            {"http_options": {"host": host}, "applications": [graph()]},
            r"http_options\.host must be a name or an address",
        )
        for host in ("a..b", "...", ".a", "a\0b", "a b", "a\n", 60 * "é", 200 * "a.")
    },
    "misspelt": ({"http_option": {"port": 80}, "applications": [graph()]}, "unknown key http_opt"),
    "misspelt host": (
        {"http_options": {"hots": "127.0.0.1"}, "applications": [graph()]},
        r"unknown key http_options\.hots; known keys are host, ",
    ),
    "misspelt prefix": (
        {"applications": [graph(route_prefx="/seg")]},
        r"unknown key applications\[0\]\.route_prefx",
    ),
    "misspelt settings": (
        {"applications": [graph(deployments=[{"name": "Refiner", "user_confg": {}}])]},
        r"unknown key applications\[0\]\.deployments\[0\]\.user_confg",
    ),
    "misspelt policy": (
        scaled({"policy_fuction": POLICY}),
        rf"unknown key {OF_POLICY}\.policy_fuction; known keys are policy_function, policy_kwargs",
    ),
    "policy of nothing": (scaled({}), rf"{OF_POLICY}\.policy_function must be package.module:name"),
    "policy of null": (
        scaled({"policy_function": None}),
        rf"{OF_POLICY}\.policy_function must be package\.module:name, not None",
    ),
    "text as policy": (scaled(POLICY), rf"{OF_POLICY} must be a mapping"),
    **{
        f"policy {path!r}": (
            scaled({"policy_function": path}),
            rf"{OF_POLICY}\.policy_function cannot be imported: '{path}'",
        )
        for path in ("serve_graph.autoscaling:Polcy", "no_such.module:Policy", "a:b:c", "")
    },
    "policy that decides nothing": (
        scaled({"policy_function": "serve_graph.autoscaling:REPORTS"}),
        rf"{OF_POLICY}\.policy_function must be a function or a class",
    ),
    "policy with what it does not take": (
        scaled({"policy_function": POLICY, "policy_kwargs": {"start_s": 1}}),
        rf"{OF_POLICY}\.policy_kwargs do not fit '{POLICY}': .*'start_s'",
    ),
    "policy with null": (
        scaled({"policy_function": POLICY, "policy_kwargs": None}),
        rf"{OF_POLICY}\.policy_kwargs must be a mapping",
    ),
    "misspelt bounds": (
        deployed(autoscaling_config={"min_replica": 3}),
        rf"unknown key {OF_REFINER}\.autoscaling_config\.min_replica; .*min_replicas",
    ),
    "misspelt policy of a deployment": (
        deployed(autoscaling_config={"policy": {"policy_fuction": POLICY}}),
        rf"unknown key {OF_REFINER}\.autoscaling_config\.policy\.policy_fuction",
    ),
    "null as policy of a deployment": (
        deployed(autoscaling_config={"policy": None}),
        rf"{OF_REFINER}\.autoscaling_config\.policy must be a mapping",
    ),
    "lost policy of a deployment": (
        deployed(autoscaling_config={"policy": {"policy_function": "no_such.module:decide"}}),
        rf"{OF_REFINER}\.autoscaling_config\.policy\.policy_function cannot be imported",
    ),
    "misspelt resources": (
        deployed(ray_actor_options={"num_cpu": 3}),
        rf"unknown key {OF_REFINER}\.ray_actor_options\.num_cpu; .*num_cpus",
    ),
    **{
        f"misspelt logging of {place or 'all'}": (
            config,
            rf"unknown key {place}logging_config\.log_levle; .*log_level",
        )
        for place, config in (
            ("", {**deployed(), "logging_config": {"log_levle": "DEBUG"}}),
            (
                r"applications\[0\]\.",
                {"applications": [graph(logging_config={"log_levle": "DEBUG"})]},
            ),
            (rf"{OF_REFINER}\.", deployed(logging_config={"log_levle": "DEBUG"})),
        )
    },
    "deployment that is not there": (
        overriding("Modle", max_ongoing_requests=2),
        rf"{OVERRIDE}\.name: there is no deployment 'Modle'; the deployments are Ingress, Model, R",
    ),
    "deployment twice": (overriding("Refiner"), rf"{OVERRIDE}\.name: 'Refiner' is there twice"),
    **{
        f"override, {rule}": (config, rf"{OVERRIDE}\.{rule}")
        for config, rule in (
            (
                overriding("Ingress", max_ongoing_requests=2),
                r"max_ongoing_requests: ingress_pool\.max_ongoing_requests \(2\) must be over",
            ),
            (
                overriding("Model", max_ongoing_requests=5000, num_replicas=2),
                r"max_ongoing_requests: model_pool\.max_ongoing_requests \(5000\) must not",
            ),
            (
                overriding("Model", SCALES, max_ongoing_requests=1),
                r"max_ongoing_requests: .*target_ongoing_requests \(2\) must not exceed",
            ),
            (
                overriding("Model", autoscaling_config={"min_replicas": 3}),
                r"autoscaling_config: .*max_replicas must be at least min_replicas",
            ),
            (
                overriding("Ingress", autoscaling_config={"min_replicas": 0, "max_replicas": 2}),
                r"autoscaling_config: ingress_pool\.min_replicas must be at least 1: only refiners",
            ),
            (
                overriding("Model", num_replicas="auto", max_ongoing_requests=1),
                r"max_ongoing_requests, .*num_replicas: .*target_ongoing_requests \(2\) must not",
            ),
            (
                overriding("Model", SCALES, num_replicas=2),
                r"num_replicas: num_replicas \(2\) changes nothing where a pool scales",
            ),
            (
                overriding("Model", num_replicas=0),
                r"num_replicas: model_pool\.max_replicas: Input should be greater",
            ),
            (
                overriding("Model", ON_GPU, ray_actor_options={"num_cpus": 4}),
                r"ray_actor_options: runtime\.device is cuda, so model_pool\.num_gpus must be over",
            ),
            (
                overriding("Model", ray_actor_options={"resources": {"CPU": 1}}),
                r"ray_actor_options: .*CPU is not a custom resource",
            ),
            (
                overriding("Model", max_queued_requests=-1),
                r"max_queued_requests: model_pool\.max_queued_requests: Input should be greater",
            ),
            (
                overriding("Model", autoscaling_config=[1]),
                r"autoscaling_config: autoscaling_config must be a mapping",
            ),
            (
                overriding("Ingress", graceful_shutdown_timeout_s=20),
                r"graceful_shutdown_timeout_s: 20 must be at least 65, which is runtime\.re",
            ),
        )
    },
    **{
        f"look-ahead {what}": (config, rf"{OF_REFINER}\.{rule}")
        for what, config, rule in (
            (
                "dropped",
                ahead(AIMED, Refiner={"autoscaling_config": {"max_replicas": 9}}),
                r"autoscaling_config .* drops refiner_pool\.lookahead",
            ),
            (
                "dropped by nothing",
                ahead(AIMED, Refiner={"autoscaling_config": {}}),
                r"autoscaling_config .* drops refiner_pool\.lookahead",
            ),
            (
                "misspelt",
                ahead(
                    GROWS,
                    Refiner={
                        "autoscaling_config": {
                            "max_replicas": 9,
                            "policy": {"policy_kwargs": {"stat_s": 7, "drain_s": 0}},
                        }
                    },
                ),
                r"autoscaling_config\.policy\.policy_kwargs: .*stat_s: unknown key",
            ),
            (
                "of what does not scale by args",
                ahead({}, Refiner={"autoscaling_config": {"max_replicas": 9}}),
                r"autoscaling_config: the look-ahead policy would not see the model pool",
            ),
            (
                "at a model that does not report",
                ahead(GROWS, Model={"autoscaling_config": None}),
                r"autoscaling_config: the look-ahead policy would not see the model pool",
            ),
        )
    },
    "threads without work": (
        deployed(max_ongoing_requests=1),
        rf"{OF_REFINER}\.max_ongoing_requests: .*threads \(2\) must not exceed max_ongoing",
    ),
    "proxies": (
        {"proxy_location": "Everywhere", "applications": [graph()]},
        r"proxy_location: Input should be 'Disabled', 'HeadOnly' or 'EveryNode'",
    ),
    "no proxies": (
        {"proxy_location": "Disabled", "applications": [graph()]},
        r"proxy_location: Disabled leaves no HTTP door",
    ),
    "TLS": (
        {"http_options": CERTIFICATE, "applications": [graph()]},
        r"http_options\.ssl_keyfile: .* in the clear",
    ),
    "no capacity": (
        {"target_capacity": 0, "applications": [graph()]},
        r"target_capacity: 0 keeps no replica",
    ),
    "prefix of two": (
        {"applications": [graph(), {**OTHER, "route_prefix": "/"}]},
        "route_prefix",
    ),
    "name of two": ({"applications": [graph(), {**OTHER, "name": "segment"}]}, "duplicates"),
    **{
        f"prefix {prefix!r}": (
            {"applications": [{**OTHER, "route_prefix": "/mine"}, graph(route_prefix=prefix)]},
            rf"applications\[1\]\.route_prefix must begin with / .*, not '{prefix}'",
        )
        for prefix in ("seg", "/seg/", "/{seg}", "", "//")
    },
    "application without a path": (
        {"applications": [graph(), {"name": "other", "route_prefix": "/other"}]},
        r"applications\.1\.import_path: Field required",
    ),
    "log level": (
        {**deployed(), "logging_config": {"log_level": "LOUD"}},
        r"logging_config\.log_level",
    ),
    "bounds of a deployment": (
        deployed(autoscaling_config={"max_replicas": 3, "upscaling_factor": -1}),
        rf"{OF_REFINER}\.autoscaling_config: upscaling_factor: Input should be greater",
    ),
    "date": (
        {"applications": [graph(runtime_env={"env_vars": {"BUILT": datetime.date(2026, 11, 30)}})]},
        "none of JSON, write it as text: .*date",
    ),
    "port": ({"http_options": {"port": "80"}, "applications": [graph()]}, "http_options.port"),
    "names": ({"applications": ["segment"]}, "applications must be a list of mappings"),
    "mapping": ({"applications": {"a": 1}}, "applications must be a list of mappings"),
    "deployments": (
        {"applications": [graph(deployments=["Refiner"])]},
        "deployments must be a list of mappings",
    ),
}


@pytest.mark.parametrize(("config", "named"), UNSERVABLE.values(), ids=UNSERVABLE)
def test_a_config_that_up_could_not_serve_is_refused_by_its_key(
    tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    path = written(tmp_path, config)
    with pytest.raises(LaunchError, match=named) as refused:
        __main__.read_config(path, None)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        scaled({"policy_function": POLICY}),
        scaled(None),
        # It is imported where that environment is.
        scaled({"policy_function": "theirs.alone:Policy"}, runtime_env={"pip": ["theirs"]}),
        deployed(autoscaling_config={"max_replicas": 3, "policy": {"policy_kwargs": {}}}),
        deployed(
            autoscaling_config=None,
            ray_actor_options={"num_cpus": 1, "resources": {"any": 1}},
            logging_config={"log_level": "DEBUG"},
            user_config={"turdsize": 3},
        ),
        deployed(autoscaling_config={"min_replicas": 0, "max_replicas": 2}),
        ahead(GROWS, Refiner={"autoscaling_config": {"max_replicas": 9}}),
        ahead(AIMED, Refiner={"num_replicas": "auto"}, Model={"max_queued_requests": 9}),
        ahead(AIMED, Refiner={"autoscaling_config": None}, Model={"autoscaling_config": None}),
        ahead(AIMED, Refiner={"autoscaling_config": {"policy": {"policy_kwargs": {"drain_s": 3}}}}),
        ahead({**SCALES, "refiner_pool": {}}, Refiner={"autoscaling_config": {"max_replicas": 3}}),
        # Another policy may have other arguments.
        {
            "applications": [
                graph(
                    args=AIMED,
                    deployments=[{"name": "Refiner", "autoscaling_config": {"max_replicas": 9}}],
                )
            ]
        },
        overriding("Ingress", max_ongoing_requests=2000, graceful_shutdown_timeout_s=90),
        overriding("Model", SCALES, autoscaling_config=None, num_replicas=2),
        overriding("Model", num_replicas="auto", max_queued_requests=7, health_check_period_s=1),
        overriding("Model", ON_GPU, ray_actor_options={"num_gpus": 0.5, "num_cpus": None}),
    ],
)
def test_what_serve_takes_beside_args_is_taken(tmp_path: Path, config: dict[str, Any]) -> None:
    path = written(tmp_path, config)
    assert __main__.read_config(path, None)["applications"] == config["applications"]


def test_args_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    args = {
        "runtime": {"max_queu": 1},
        "model_pool": {"num_cpu": 1, "max_replicas": 0},
        "refiner_pool": {"threads": 2, "max_ongoing_requests": 1},
    }
    path = written(tmp_path, {"applications": [graph(args=args)]})
    with pytest.raises(LaunchError) as refused:
        __main__.read_config(path, None)
    said = str(refused.value)
    assert said.startswith(f"{path}: runtime: unknown key 'max_queu'; known keys are ")
    assert "; model_pool.num_cpu: unknown key" in said
    assert "; model_pool.max_replicas: Input should be greater than or equal to 1" in said
    assert "; refiner_pool: threads (2) must not exceed" in said
    assert "\n" not in said and "pydantic" not in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"applications: [\n  - {name: a\n", "line 2"),
        (b"applications: \xff", "utf-8"),
        (b"- applications", "mapping"),
    ],
    ids=["missing", "broken", "binary", "list"],
)
def test_a_config_that_cannot_be_read_ends_up_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "serve.yaml"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", "--config", str(path)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    said = str(ended.value.code)
    assert said.startswith(f"error: {path}") and reason in said and "\n" not in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("num-cpus", "-1"), ("num-cpus", "0"), ("num-gpus", "-1"), ("drain-s", "-1"),
     ("drain-s", "nan"), ("drain-s", "inf"), ("start-s", "0"), ("start-s", "inf")],
)  # fmt: skip
def test_up_refuses_a_number_that_nothing_can_be_started_with(
    monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", f"--{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    said = str(ended.value.code)
    assert said.startswith(f"error: --{option} must be in") and said.endswith(f"not {value}")


ONE_OF_EACH = {"ingress_pool": {"num_cpus": 0}}


@pytest.mark.parametrize(
    ("application", "lacking"),
    [
        ({"args": {"model_pool": {"num_cpus": 1.5}, **ONE_OF_EACH}}, "need 2.5 CPU .*--num-cpus"),
        ({"args": {"model_pool": {"num_gpus": 0.5}, **ONE_OF_EACH}}, "need 0.5 GPU .*--num-gpus"),
        (
            {"args": {"refiner_pool": {"resources": {"cpu_node": 0.001}}, **ONE_OF_EACH}},
            "need 0.001 cpu_node .*only nodes of a cluster have it",
        ),
        (
            {
                "args": {
                    "model_pool": {
                        "num_cpus": 0.1,
                        "min_replicas": 2,
                        "max_replicas": 2,
                        "max_replicas_per_node": 1,
                    }
                }
            },
            "model_pool has 2 replicas, and max_replicas_per_node is 1",
        ),
        (
            {
                "args": ONE_OF_EACH,
                "deployments": [{"name": "Refiner", "num_replicas": 4}],
            },
            "need 5 CPU",
        ),
        ({"args": {"refiner_pool": {"min_replicas": 0, "num_cpus": 3}}}, "need 4.5 CPU"),
    ],
    ids=["CPUs", "GPUs", "custom", "per node", "overridden", "a refiner that sleeps"],
)
def test_up_waits_for_room_that_never_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, application: dict[str, Any], lacking: str
) -> None:
    """For five minutes, and then says that the application did not start."""
    path = written(tmp_path, {"applications": [graph(**application)]})
    ports = [f"{name}={free_port()}" for name in ("--port", "--dashboard-port", "--client-port")]
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", f"--config={path}", *ports])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert re.match(
        f"error: {path} would never run on this one node: .*{lacking}", str(ended.value.code)
    )


@pytest.mark.parametrize(
    "args",
    [
        ONE_OF_EACH,
        {"ingress_pool": {"num_cpus": 0.3}, "model_pool": {"num_cpus": 0.7}},
        {"refiner_pool": {"max_replicas": 9}, **ONE_OF_EACH},
        {
            "model_pool": {"num_gpus": 0.5, "min_replicas": 2, "max_replicas": 4, "num_cpus": 0.5},
            **ONE_OF_EACH,
        },
    ],
)
def test_what_has_room_on_one_node_is_refused(args: dict[str, Any]) -> None:
    config = {"applications": [OTHER, graph(args=args)]}
    assert no_room(config, {"CPU": 2, "GPU": 1}) is None


@pytest.mark.parametrize("mine", [True, False])
def test_the_demo_looks_at_its_folder_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mine: bool
) -> None:
    folder = tmp_path / "out"
    if mine:
        folder.write_text("a file")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != folder)  # as if not root
    monkeypatch.setattr("sys.argv", ["serve_graph", "demo", "--output", str(folder)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert str(ended.value.code).startswith(f"error: --output {folder} ")


def test_only_the_graph_is_drained() -> None:
    config = {"applications": [OTHER, graph()]}
    other, drained = serve_api.draining(config)["applications"]
    assert other == OTHER
    assert drained["deployments"] == [{"name": "Ingress", "user_config": {"draining": True}}]


@pytest.mark.parametrize(
    "settings", [{}, {"user_config": None}, {"user_config": {"draining": False}}]
)
def test_a_graph_is_told_to_drain_whatever_its_config_says(settings: dict[str, Any]) -> None:
    given = {"applications": [graph(deployments=[{"name": "Ingress", **settings}])]}
    before = copy.deepcopy(given)
    (application,) = serve_api.draining(given)["applications"]
    assert application["deployments"] == [{"name": "Ingress", "user_config": {"draining": True}}]
    assert given == before


@pytest.mark.parametrize("deployments", [None, [], [{"name": "Model"}]])
def test_an_ingress_that_the_config_does_not_name_is_drained_too(deployments: Any) -> None:
    config = {"applications": [graph(deployments=deployments)]}
    (application,) = serve_api.draining(config)["applications"]
    *others, last = application["deployments"]
    assert others == (deployments or [])
    assert last == {"name": "Ingress", "user_config": {"draining": True}}


@pytest.mark.parametrize("name", [{}, {"name": None}, {"name": 5}, {"name": ""}])
def test_a_deployment_without_a_name_is_refused_by_its_place(
    tmp_path: Path, name: dict[str, Any]
) -> None:
    nameless = {"num_replicas": 1, **name}
    config = {"applications": [graph(deployments=[{"name": "Model"}, nameless])]}
    rule = r"deployments\[1\]\.name must be a non-empty string"
    with pytest.raises(ValueError, match=rule):
        serve_api.draining(config)
    with pytest.raises(LaunchError, match=rule):
        __main__.read_config(written(tmp_path, config), None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_up_lets_requests_finish_before_it_stops_ray(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    done: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_, **__: done.append(what)

    monkeypatch.setattr(LocalCluster, "start", note("start"))
    monkeypatch.setattr(LocalCluster, "deploy", note("deploy"))
    monkeypatch.setattr(LocalCluster, "wait_ready", note("wait"))
    at_once: list[bool] = []

    def drain(_: LocalCluster, *given: Any) -> None:
        done.append("drain")
        os.kill(os.getpid(), number)
        at_once.append(given[-1].is_set())

    monkeypatch.setattr(LocalCluster, "drain", drain)
    monkeypatch.setattr(LocalCluster, "stop", note("stop"))
    # Asked every two seconds whether Ray is there: the signal comes between.
    monkeypatch.setattr(LocalCluster, "check", lambda _: os.kill(os.getpid(), number))
    ports = [f"{name}={free_port()}" for name in ("--port", "--dashboard-port", "--client-port")]
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", *ports])
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.getsignal(one) for one in handled}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else a program is to outlive its terminal
    try:
        __main__.main()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert done == ["start", "deploy", "wait", "drain", "stop"]
    # A terminal that closes says so more than once.
    assert at_once == [number == signal.SIGTERM]
    # What a Ray program needs stands there to be copied.
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("handle ")]
    variables = dict(one.split("=") for one in line.split()[1:])
    assert variables.pop("RAY_ADDRESS").startswith("127.0.0.1:")
    assert variables == {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / ".ray" / "auth_token"),
    }


@pytest.fixture
def slow_dashboard() -> Iterator[tuple[LocalCluster, list[bytes]]]:
    """A cluster whose dashboard takes half a second for a config, and the configs that it got."""
    got: list[bytes] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            time.sleep(0.5)
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cluster = LocalCluster(dashboard_port=server.server_port)
        cluster.check = lambda: None  # type: ignore[method-assign]
        yield cluster, got
        server.shutdown()


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_a_drain_that_may_take_no_time_is_an_error(
    slow_dashboard: tuple[LocalCluster, list[bytes]], seconds: float
) -> None:
    cluster, got = slow_dashboard
    assert not cluster.drain({"applications": [graph()]}, "http://127.0.0.1:1", seconds)
    assert len(got) == (seconds > 0)
    assert all(b"draining" in config for config in got)


SHOWN = """
import os{first}
from serve_graph.ray_token import use_token
use_token()
from ray._raylet import AuthenticationMode, get_authentication_mode
print(get_authentication_mode() == AuthenticationMode.TOKEN, os.environ.get("RAY_AUTH_MODE"))
"""


@pytest.mark.parametrize(
    ("given", "first", "shown"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 32}, "", "True token"),
        ({"RAY_AUTH_TOKEN_PATH": "token"}, ", ray", "True token"),
        ({"HOME": "home"}, ", ray", "True token"),
        ({}, "", "False None"),
        ({"HOME": "home", "RAY_AUTH_MODE": "disabled"}, "", "False disabled"),
    ],
    ids=["variable", "file", "home", "none", "turned off"],
)
def test_a_program_with_a_token_does_not_show_it(
    tmp_path: Path, given: dict[str, str], first: str, shown: str
) -> None:
    """Also where it has imported Ray before, which then has read how to connect."""
    for file in (tmp_path / "token", tmp_path / "home" / ".ray" / "auth_token"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("0" * 32)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(launch.REPOSITORY), "HOME": "/-"}
    ran = subprocess.run(
        [sys.executable, "-c", SHOWN.format(first=first)],
        env={**environment, **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == shown


# Its ports


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("option", ["--port", "--dashboard-port", "--client-port"])
def test_up_names_the_option_of_a_port_that_somebody_else_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int, option: str
) -> None:
    ports = {name: free_port() for name in ("--port", "--dashboard-port", "--client-port")}
    given = [f"{name}={port}" for name, port in {**ports, option: taken}.items()]
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", *given])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert f":{taken}" in str(ended.value.code) and option in str(ended.value.code)
    assert not list(tmp_path.glob("segment-ray-*"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("--port", "--dashboard-port"), ("--port", "--client-port"),
     ("--dashboard-port", "--client-port")],
)  # fmt: skip
def test_up_has_two_listen_on_one_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: str, other: str
) -> None:
    """Nobody listens there before, so that it looks free to both."""
    ports = {name: free_port() for name in ("--port", "--dashboard-port", "--client-port")}
    ports[other] = ports[one]
    given = [f"{name}={port}" for name, port in ports.items()]
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", *given])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    said = str(ended.value.code)
    assert f"{other} are both {ports[one]}: each needs" in said and one in said
    assert not list(tmp_path.glob("segment-ray-*"))


@pytest.mark.parametrize(("haproxy", "room"), [(True, 32), (False, 40)], ids=["haproxy", "ray"])
def test_sockets_below_a_deep_folder_for_temporary_files_have_too_long_paths(
    monkeypatch: pytest.MonkeyPatch, haproxy: bool, room: int
) -> None:
    most = room - len("/segment-ray-12345678")
    too_long = rf"at most {most} bytes, .*set TMPDIR"
    for length, said in ((most, "Ray would have been started"), (most + 1, too_long)):
        folder = Path("/tmp") / secrets.token_hex(length)[: length - len("/tmp/")]
        folder.mkdir()
        try:
            monkeypatch.setattr(launch.tempfile, "tempdir", str(folder))
            with pytest.raises((LaunchError, pytest.fail.Exception), match=said):
                LocalCluster(haproxy=haproxy).start()
        finally:
            shutil.rmtree(folder)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_is_taken_for_every_address_that_covers_it(taken: int, host: str) -> None:
    with pytest.raises(LaunchError, match=f"{taken}.*--port"):
        require_free(host, taken, "HTTP", "--port")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")
def test_a_port_of_an_ipv6_address_is_told_from_that_of_another(taken: int) -> None:
    require_free("::1", taken, "HTTP", "--port")
    with socket.create_server(("::1", free_port()), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"\[::1\]:{port}, for HTTP, is taken"):
            require_free("::1", port, "HTTP", "--port")


def test_an_address_that_cannot_be_listened_to_hides_none_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """A name has several, and a machine need not have each: localhost without IPv6."""
    of_localhost = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, taken))
        for host in ("203.0.113.1", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: of_localhost)
    with pytest.raises(LaunchError, match=f"localhost:{taken}"):
        require_free("localhost", taken, "HTTP", "--port")


@pytest.mark.parametrize("port", [0, 65536, "8000", None])
def test_what_is_no_port_is_refused_by_its_option(port: Any) -> None:
    with pytest.raises(LaunchError, match=r"--port.*1 to 65535"):
        require_free("127.0.0.1", port, "HTTP", "--port")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_there_is_not_is_blamed_on_the_config(port: int) -> None:
    with pytest.raises(LaunchError, match=f"^--port must be in 0..65535, not {port}$"):
        __main__.read_config(__main__.LOCAL, port)


def test_a_port_whose_server_has_just_ended_is_free() -> None:
    """The system keeps its closed connections for a minute, as after a restart."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as client:
            server.accept()[0].close()
            client.recv(1)
    require_free(*address, "HTTP", "--port")


def test_what_begins_like_the_dashboard_s_address_is_not_told_the_token() -> None:
    told: list[str | None] = []

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # Port 2345 and port 23456.
        cluster = LocalCluster(dashboard_port=server.server_port // 10)
        cluster.api.call(f"http://127.0.0.1:{server.server_port}/healthz")
        server.shutdown()
    assert told == [None]


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str | None]]]:
    """What the proxy of the environment was asked, and with which authorization."""
    asked: list[tuple[str, str | None]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield asked
        server.shutdown()


def test_a_proxy_is_told_the_token(
    monkeypatch: pytest.MonkeyPatch, proxy: list[tuple[str, str | None]]
) -> None:
    cluster = LocalCluster(dashboard_port=free_port())
    monkeypatch.setattr(cluster, "check", lambda: None)
    assert not cluster.api.answers(f"{cluster.dashboard}/api/version")
    assert not cluster.api.answers("http://127.0.0.1:1/healthz")
    assert proxy == []


def test_a_dashboard_without_ray_is_asked_nothing(taken: int) -> None:
    """Ray has ended, and somebody else may have its port."""
    cluster = LocalCluster(dashboard_port=taken)
    with pytest.raises(LaunchError, match="Ray ended"):
        cluster.status()
    with pytest.raises(LaunchError, match="Ray ended"):
        cluster.deploy({}, timeout_s=5)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nhalf",
    ],
    ids=["no HTTP", "a cut answer", "a cut refusal"],
)
def test_an_answer_that_is_none_ends_the_wait_or_the_drain(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """Of a dashboard or door that is about to start or to end: Ray would be stopped for it, with
    requests under way."""
    with answering(said) as url:
        cluster = LocalCluster(dashboard_port=int(url.rpartition(":")[2]))
        monkeypatch.setattr(cluster, "check", lambda: None)
        assert not cluster.api.serves(url) and not cluster.api.answers(url)
        with pytest.raises(LaunchError):
            cluster.deploy({"applications": [graph()]}, timeout_s=0.5)
        monkeypatch.setattr(cluster.api, "deploy", lambda *_: None)
        assert not cluster.drain({"applications": [graph()]}, url, 0.3)


@contextlib.contextmanager
def saying(
    application: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LocalCluster, str]]:
    """A cluster whose dashboard says this of the application, and the dashboard's address."""
    body = json.dumps({"applications": {"segment": application}}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with answering(head + body) as url:
        cluster = LocalCluster(dashboard_port=int(url.rpartition(":")[2]))
        monkeypatch.setattr(cluster, "check", lambda: None)
        yield cluster, url


def test_a_replica_that_cannot_start_is_named_with_what_it_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve's word for the application names the deployment alone."""
    raised = 'Error:\n  File "model.py"\nConfigError: model.path: there is no checkpoint at /nope\n'
    deployments = {
        "Model": {"status": "DEPLOY_FAILED", "message": raised},
        "Refiner": {"status": "HEALTHY", "message": ""},
    }
    failed = {
        "status": "DEPLOY_FAILED",
        "message": "Failed to update ['Model'].",
        "deployments": deployments,
    }
    with saying(failed, monkeypatch) as (cluster, url), pytest.raises(LaunchError) as error:
        cluster.api.serves(url)
    assert str(error.value).endswith(
        "\nModel: ConfigError: model.path: there is no checkpoint at /nope"
    )


def test_a_start_that_takes_longer_than_it_may_hides_how_to_give_it_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a checkpoint that every node fetches first, say."""
    starting = {"status": "DEPLOYING", "message": "", "deployments": {}}
    with saying(starting, monkeypatch) as (cluster, url), pytest.raises(LaunchError) as error:
        cluster.wait_ready(f"{url}/healthz", 0.5)
    said = str(error.value)
    assert said.startswith("the application did not start in 0.5 s (serve_graph up has --start-s")
    assert "\nsegment is DEPLOYING: no reason given\n" in said


def test_up_gives_a_start_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def wait_ready(_: LocalCluster, url: str, timeout_s: float, *__: Any) -> None:
        given.append(timeout_s)
        raise LaunchError("enough")

    for name in ("start", "deploy", "stop"):
        monkeypatch.setattr(LocalCluster, name, lambda *_, **__: None)
    monkeypatch.setattr(LocalCluster, "wait_ready", wait_ready)
    ports = [f"{name}={free_port()}" for name in ("--port", "--dashboard-port", "--client-port")]
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.getsignal(one) for one in handled}
    monkeypatch.setattr("sys.argv", ["serve_graph", "up", "--start-s=3600", *ports])
    try:
        with pytest.raises(SystemExit, match="enough"):
            __main__.main()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert given == [3600]


# Being told to stop


def test_a_deployment_that_hangs_is_left_when_told_to_stop(
    taken: int,
) -> None:
    cluster = LocalCluster(dashboard_port=taken)
    cluster.head = RayNode(["-c", "import time; time.sleep(300)"], {**os.environ}, cluster.log)
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    began = time.monotonic()
    try:
        cluster.deploy({"applications": [graph()]}, timeout_s=120, stop=stop)
    finally:
        cluster.stop()
    assert 1 <= time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("raised", "kept"), [(KeyboardInterrupt, False), (SystemExit, False), (LaunchError, True)]
)
def test_a_start_that_is_interrupted_leaves_its_folder(
    monkeypatch: pytest.MonkeyPatch, raised: type[BaseException], kept: bool
) -> None:
    """It is for the logs of one that failed."""

    def interrupted(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(launch, "RayNode", interrupted)
    with tempfile.TemporaryDirectory(dir="/tmp") as near:
        monkeypatch.setattr(launch.tempfile, "tempdir", near)
        cluster = LocalCluster(haproxy=False)
        with pytest.raises(raised):
            cluster.start()
        assert cluster.dir.exists() == kept


SLEEPER = """
import signal, sys, time, serve_graph.launch as launch
class Sleeper(launch.RayNode):
    def __init__(self, command, environment, log):
        super().__init__(["-c", "import time; time.sleep(300)"], environment, log)
        print("began", self._ray.pid, flush=True)
        # A signal that comes before the node is noted is no less heard.
        time.sleep(0.5)
launch.RayNode = Sleeper
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
from serve_graph.__main__ import main
sys.argv = sys.argv[1:]
main()
"""
"""The command with a program in the place of Ray, whose process id it prints."""


@contextlib.contextmanager
def sleeper(folder: Path, how: str, command: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``command`` while "Ray" starts, and the id of that."""
    given = ["--no-haproxy"]  # whose sockets need a folder near the root
    if command == "up":
        ports = ("--port", "--dashboard-port", "--client-port")
        given += [f"{name}={free_port()}" for name in ports]
    else:
        given += [f"--output={folder / 'out'}"]
    environment = {**os.environ, "PYTHONPATH": str(launch.REPOSITORY)}
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as near,
        subprocess.Popen(
            [sys.executable, "-c", SLEEPER, how, command, *given],
            env={**environment, "TMPDIR": near},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        began = process.stdout.readline()
        assert began.startswith("began "), "it ended before it began"
        ray = int(began.split()[1])
        try:
            yield process, ray
        finally:
            process.kill()
            kill(ray)


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("command", ["up", "demo"])
def test_what_it_started_stays_when_its_terminal_closes_or_it_is_told_to_end(
    tmp_path: Path, command: str, number: signal.Signals
) -> None:
    with sleeper(tmp_path, "plain", command) as (process, ray):
        # A terminal that closes sends more than one.
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.1)
        process.wait(60)
        assert not runs(ray)


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_program_that_is_to_outlive_its_terminal_ends_with_it(
    tmp_path: Path, command: str
) -> None:
    with sleeper(tmp_path, "nohup", command) as (process, ray):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert runs(ray)


# Its environment


ENDS = ("MIN", "MAX")


@pytest.mark.parametrize("haproxy", [True, False], ids=["haproxy", "python"])
def test_nodes_that_others_start_get_what_the_launcher_sets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], haproxy: bool
) -> None:
    asked = "--haproxy" if haproxy else "--no-haproxy"
    monkeypatch.setattr("sys.argv", ["serve_graph", "env", asked])
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    printed = dict(line.removeprefix("export ").split("=") for line in lines)
    own = LocalCluster(haproxy=haproxy).variables
    # What only a cluster of one machine has: loopback, its token, and nobody to drain for; and
    # files and ports of HAProxy that are its own; and a dashboard that it waits for.
    local = ("RAY_SERVE_HAPROXY_", "RAY_SERVE_DIRECT_INGRESS_M", "RAY_SERVE_FALLBACK_")
    kept = (BINARY_PATH, HARD_STOP, "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S")
    own = {k: v for k, v in own.items() if not k.startswith(local) or k in kept}
    there = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}
    there |= {"RAY_DASHBOARD_STARTUP_TIMEOUT_S"}
    drain = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert float(printed.pop(drain)) > 30 and own.pop(drain) == "0"
    assert printed == {name: value for name, value in own.items() if name not in there}


def test_serve_s_own_proxy_asks_ingress_replicas_of_every_node_alike() -> None:
    """Each has its share of an API key's rate, and by default that proxy asks its own node's."""
    name = "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"
    environment = {**os.environ, **LocalCluster(haproxy=False).variables}
    code = f"from ray.serve._private import constants; print(constants.{name})"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["False"]


def test_serve_s_own_proxy_is_asked_for_where_haproxy_is_in_the_environment() -> None:
    """As in the images, and in a shell that has evaluated ``serve_graph env``."""
    environment = {**os.environ, **HAPROXY, **LocalCluster(haproxy=False).variables}
    names = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS")
    code = f"from ray.serve._private import constants as c; print(c.{names[0]}, c.{names[1]})"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("asked", "seconds"), [(None, 120), (60, 120), (105, 120), (105.5, 121), (86_400, 86_415)]
)
def test_haproxy_cuts_requests_before_their_deadline_when_serve_reloads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: float | None, seconds: int
) -> None:
    runtime = {} if asked is None else {"request_timeout_s": asked}
    applications = [OTHER, graph(args={"runtime": runtime})]
    path = written(tmp_path, {"applications": applications})
    given: list[dict[str, str]] = []

    def start(cluster: LocalCluster, **_: Any) -> None:
        given.append(cluster.variables)
        raise LaunchError("enough")

    monkeypatch.setattr(LocalCluster, "start", start)
    ports = [f"{name}={free_port()}" for name in ("--port", "--dashboard-port", "--client-port")]
    monkeypatch.setattr(
        "sys.argv", ["serve_graph", "up", "--haproxy", f"--config={path}", "--num-cpus=3", *ports]
    )
    with pytest.raises(SystemExit, match="enough"):
        __main__.main()
    assert given[0][HARD_STOP] == str(seconds)


def test_ray_reads_when_haproxy_stops_for_good_elsewhere() -> None:
    environment = {**os.environ, **LocalCluster(haproxy=True, longest_request_s=600).variables}
    code = f"from ray.serve._private import constants; print(constants.{HARD_STOP})"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["615"]


@pytest.mark.parametrize("value", [None, "long", True, float("inf"), [60]])
def test_args_of_an_application_that_is_not_the_graph_end_the_launcher(value: Any) -> None:
    runtime = {"request_timeout_s": value}
    for args in (None, {"runtime": None}, {"runtime": runtime}, [runtime]):
        others = [{**OTHER, "args": args}, graph(args={"runtime": {"request_timeout_s": 90}})]
        assert longest_request_s({"applications": others}) == 90


def test_a_port_is_given_twice() -> None:
    """One for the dashboard and for Ray Client, say: Ray then refuses to start."""
    ports = [free_port() for _ in range(600)]
    assert len(set(ports)) == len(ports)


def test_two_clusters_of_one_machine_share_ports_of_their_ingress() -> None:
    clusters = [LocalCluster(haproxy=True).variables for _ in range(10)]
    ports = [
        range(*(int(variables[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ENDS))
        for variables in clusters
    ]
    taken = [port for block in ports for port in block]
    assert len(set(taken)) == len(taken) == 10 * INGRESS_BLOCK
    assert len({variables["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] for variables in clusters}) == 10
