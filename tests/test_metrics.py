"""What operators watch: outcomes that are counted wrong, names that drifted apart, ids that do not
lead from an answer to the log."""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from scripted import ASK, WELL, ScriptedBackend, ingress_over
from serving import connected, picture, post_bytes, served, until

pytest.importorskip("ray.serve")

import ray
from ray.serve.metrics import Counter, Gauge, Histogram

from kestrel.api import (
    DeadlineExceeded,
    InvalidRequest,
    ModelEvent,
    Overloaded,
    PromptTooLong,
    RequestError,
    SegmentRequest,
    TooLarge,
    outcome,
)
from kestrel.config import Limits, RefinerConfig, RuntimeConfig
from kestrel.seg_refiner.backends import BACKENDS
from kestrel.server.room import Room
from kestrel.server.routes import build_app
from serve_graph import metrics
from serve_graph.args import GraphArgs
from serve_graph.ingress import COUNTED, IngressDeployment
from serve_graph.model import ModelDeployment
from serve_graph.reconfigured import FormerSettings
from serve_graph.refiner import RefinerDeployment

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
MANIFEST = "deploy/kuberay/rayservice.yaml"
OPERATIONS = ROOT / "docs" / "operations.md"


class Watched:
    """A backend behind an application that notes how its requests ended."""

    def __init__(self, **config: Any) -> None:
        self.backend = ScriptedBackend(**config)
        self.backend.script = list(WELL)
        self.outcomes: list[str] = []
        self.seconds: list[float] = []
        self.app = build_app(self.backend, ended=self.note)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def note(self, how: str, seconds: float) -> None:
        self.outcomes.append(how)
        self.seconds.append(seconds)


# Outcomes


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "ok"),
        (InvalidRequest("image cannot be decoded", "image"), "invalid"),
        (PromptTooLong("too long"), "too_long"),
        (Overloaded("full"), "overloaded"),
        (DeadlineExceeded(), "late"),
        (KeyError("bug"), "fault"),
    ],
)
async def test_each_end_of_a_request_is_counted_once_by_its_name(error, expected, stream):
    watched = Watched()
    if error is not None:
        watched.backend.script = [error]
    await watched.client.post("/v1/segment", json=ASK | {"stream": stream})
    assert watched.outcomes == [expected]
    assert 0 <= watched.seconds[0] < 30


async def test_refusals_before_the_model_are_counted_too():
    watched = Watched(api_keys=["a-key", {"key": "slow-key", "rate_per_s": 0.001}])
    headers = {"Authorization": "Bearer a-key"}
    post = watched.client.post
    await post("/v1/segment", json=ASK)
    await post("/v1/segment", json={}, headers=headers)
    await post("/v1/segment", json=ASK | {"model": "other"}, headers=headers)
    await post("/v1/segment", content=b"x" * 30_000, headers=headers)
    for _ in range(2):
        await post("/v1/segment", json=ASK, headers={"X-Moondream-Auth": "slow-key"})
    expected = ["unauthorized", "invalid", "unknown", "too_large", "ok", "rate_limited"]
    assert watched.outcomes == expected


async def test_probes_and_documents_are_not_counted_as_requests():
    watched = Watched()
    for path in ("/healthz", "/v1/models", "/docs", "/openapi.json", "/nowhere", "/v1/segment"):
        await watched.client.get(path)
    assert watched.outcomes == []


async def test_requests_below_a_prefix_are_counted_and_nothing_else_is():
    # Serve leaves its route_prefix in the path and names it as root_path too, as httpx does here.
    watched = Watched()
    transport = httpx.ASGITransport(watched.app, root_path="/seg")
    async with httpx.AsyncClient(transport=transport, base_url="http://test/seg") as client:
        assert (await client.post("/v1/segment", json=ASK)).status_code == 200
        await client.post("/v1/segment", json=ASK, headers={"X-Request-Id": "two words"})
        watched.backend.script = [Overloaded("full")]
        await client.post("/v1/segment", json=ASK)
        await client.get("/v1/segment")
        await client.post("/seg/v1/segment", json=ASK)
    assert watched.outcomes == ["ok", "invalid", "overloaded"]


async def test_a_stream_that_breaks_after_its_200_is_not_counted_as_ok():
    watched = Watched()
    watched.backend.script = [*WELL[:2], RuntimeError("lost")]
    response = await watched.client.post("/v1/segment", json=ASK | {"stream": True})
    assert response.status_code == 200 and watched.outcomes == ["broken_stream"]


async def test_a_file_that_is_too_large_over_http_is_taken_by_handle(monkeypatch):
    watched = Watched()
    monkeypatch.setattr(metrics, "request_ended", lambda _, how, s: watched.note(how, s))
    ingress = ingress_over(watched.backend)
    file = picture() + bytes(watched.backend.config.limits.max_body_bytes)
    with pytest.raises(TooLarge, match=r"^image is larger than 20000 bytes$"):
        await ingress.segment(object="disc", image=file)
    assert watched.outcomes == ["too_large"] and watched.backend.begun == 0


STREAM_ENDS = [
    (DeadlineExceeded(), "late"),
    (Overloaded("the refiner is unavailable"), "overloaded"),
    (InvalidRequest("image cannot be decoded", "image"), "invalid"),
    (RuntimeError("lost"), "broken_stream"),
]


@pytest.mark.parametrize("door", ["http", "handle"])
@pytest.mark.parametrize(("error", "expected"), STREAM_ENDS)
async def test_an_error_after_the_first_event_is_counted_as_it_is_before_it(
    error, expected, door, monkeypatch
):
    watched = Watched()
    watched.backend.script = [*WELL[:2], error]
    if door == "http":
        await watched.client.post("/v1/segment", json=ASK | {"stream": True})
    else:
        monkeypatch.setattr(metrics, "request_ended", lambda _, how, s: watched.note(how, s))
        ingress = ingress_over(watched.backend)
        events = [event async for event in ingress.stream(object="disc")]
        assert [event["type"] for event in events] == ["bbox", "path_delta", "error"]
        # Whoever calls need not have this package to unpickle them.
        assert {type(event) for event in events} == {dict}
    assert watched.outcomes == [expected]


async def test_a_stream_that_passes_its_own_deadline_is_late():
    watched = Watched()
    watched.backend.script = [WELL[0], 5.0]
    soon = {"X-Request-Timeout-Ms": "200"}
    response = await watched.client.post("/v1/segment", json=ASK | {"stream": True}, headers=soon)
    assert response.status_code == 200 and watched.outcomes == ["late"]


@pytest.mark.parametrize(("error", "expected"), STREAM_ENDS)
async def test_an_error_that_a_backend_raises_late_is_counted_alike(error, expected):
    watched = Watched()

    async def broken(*_: Any) -> AsyncGenerator[dict[str, Any], None]:
        yield {"type": "path_delta"}
        raise error

    watched.backend.events = broken  # type: ignore[method-assign]
    await watched.client.post("/v1/segment", json=ASK | {"stream": True})
    assert watched.outcomes == [expected]


async def test_a_backend_that_breaks_its_promise_is_counted_as_a_broken_stream():
    watched = Watched()

    async def broken(*_: Any) -> AsyncGenerator[dict[str, Any], None]:
        yield {"type": "path_delta"}
        raise OSError("the backend broke off")

    watched.backend.events = broken  # type: ignore[method-assign]
    await watched.client.post("/v1/segment", json=ASK | {"stream": True})
    assert watched.outcomes == ["broken_stream"]


LEFT = [("left", 0.0), ("late", 1e3)]
"""How a client that goes away is counted, by how long before its deadline it counts as gone at it,
seconds; a client has its deadline by its own clock."""


@pytest.mark.parametrize(("expected", "early_s"), LEFT)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_counted_as_left_or_at_its_deadline_as_late(
    stream, expected, early_s, monkeypatch
):
    monkeypatch.setattr("kestrel.errors.EARLY_S", early_s, raising=False)
    watched = Watched()
    script: list[ModelEvent | Exception | float] = [WELL[0], 30.0]
    watched.backend.script = script
    with served(watched.app) as url:
        with connected(url) as sock:
            sock.sendall(post_bytes(url, ASK | {"stream": stream}))
            until(lambda: watched.backend.held == 1)
        until(lambda: watched.outcomes)
    assert watched.outcomes == [expected]


@pytest.mark.parametrize(("expected", "early_s"), LEFT)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_by_handle_that_is_cancelled_is_counted_alike(
    stream, expected, early_s, monkeypatch
):
    monkeypatch.setattr("kestrel.errors.EARLY_S", early_s, raising=False)
    watched = Watched()
    monkeypatch.setattr(metrics, "request_ended", lambda _, how, s: watched.note(how, s))
    ingress = ingress_over(watched.backend)
    watched.backend.script = [30.0]
    calls = {False: ingress.segment, True: lambda **fields: anext(ingress.stream(**fields))}
    await left(calls[stream](object="disc"), lambda: watched.backend.held == 1)
    assert watched.outcomes == [expected]


@pytest.mark.parametrize(("expected", "due_s"), [("left", 30.0), ("late", 0.0)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_by_handle_that_was_long_on_its_way_is_cancelled_when_it_is_due(
    stream, expected, due_s, monkeypatch
):
    watched = Watched()
    monkeypatch.setattr(metrics, "request_ended", lambda _, how, s: watched.note(how, s))
    ingress = ingress_over(watched.backend)
    watched.backend.script = [30.0]
    calls = {False: ingress.segment, True: lambda **fields: anext(ingress.stream(**fields))}
    call = calls[stream](object="disc", timeout_s=60.0, due=time.time() + due_s)
    await left(call, lambda: watched.backend.held == 1)
    assert watched.outcomes == [expected]


@pytest.mark.parametrize(("expected", "early_s"), LEFT)
@pytest.mark.parametrize("method", ["complete", "generate"])
async def test_a_model_s_request_that_is_cancelled_is_counted_alike(
    method, expected, early_s, monkeypatch
):
    monkeypatch.setattr("kestrel.errors.EARLY_S", early_s, raising=False)
    counted: list[Any] = []
    monkeypatch.setattr(metrics, "count", lambda spec, **tags: counted.append((spec, tags)))
    model: Any = SimpleNamespace(_running=0, _outcomes={"cancelled": 0}, _engine=NeverDone())
    model._counted = partial(ModelDeployment._counted, model)
    call = getattr(ModelDeployment, method)(model, SegmentRequest("disc"), "id", 60.0)
    await left(call if method == "complete" else anext(call), lambda: model._running == 1)
    assert counted == [(metrics.MODEL_REQUESTS, {"outcome": expected})]


@pytest.mark.parametrize(("expected", "early_s"), LEFT)
async def test_a_refinement_that_is_given_up_is_counted_alike(expected, early_s, monkeypatch):
    monkeypatch.setattr("kestrel.errors.EARLY_S", early_s, raising=False)
    counted: list[Any] = []
    monkeypatch.setattr(metrics, "count", lambda spec, **tags: counted.append((spec, tags)))
    go = threading.Event()
    go.set()  # for the built-in picture
    monkeypatch.setitem(BACKENDS, "slow", lambda config: lambda image, mask: mask * go.wait(60))
    refiner = RefinerDeployment(RefinerConfig(selectable=("slow",)), Limits(), 1, 30.0)
    go.clear()
    square, whole = "M0 0H1V1H0Z", {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    pixels = np.zeros((32, 32, 3), np.uint8)
    call = refiner.refine(pixels, square, whole, False, "slow", timeout_s=60.0)
    asyncio.get_running_loop().call_later(0.5, go.set)
    await left(call, lambda: refiner.stats()["running"] == 1)
    assert counted == [(metrics.REFINER_REQUESTS, {"outcome": expected})]


class NeverDone:
    """An engine that does not get to its requests."""

    async def complete(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[ModelEvent, None]:
        await asyncio.Event().wait()
        yield WELL[0]  # type: ignore[misc]


async def left(call: Awaitable[Any], begun: Callable[[], bool]) -> None:
    """Make the call, and cancel it once it is under way."""
    task = asyncio.ensure_future(call)
    while not begun():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait({task})


def test_every_status_of_the_contract_has_an_outcome_that_is_documented():
    def kinds(kind: type[RequestError]) -> list[type[RequestError]]:
        return [kind, *(deeper for sub in kind.__subclasses__() for deeper in kinds(sub))]

    for kind in kinds(RequestError):
        assert outcome(kind("x")) in metrics.OUTCOMES, kind
    assert {outcome(KeyError()), outcome(asyncio.CancelledError())} <= set(metrics.OUTCOMES)
    assert all(f"`{one}`" in OPERATIONS.read_text() for one in metrics.OUTCOMES)


# One request id


async def test_the_id_of_the_proxy_in_front_is_kept_in_header_body_and_log(caplog):
    watched = Watched()
    given = {"X-Request-Id": "edge-7:abc.DEF_1"}
    response = await watched.client.post("/v1/segment", json=ASK, headers=given)
    assert response.headers["x-request-id"] == response.json()["request_id"] == "edge-7:abc.DEF_1"
    watched.backend.script = [KeyError("bug")]
    await watched.client.post("/v1/segment", json=ASK, headers=given)
    assert any("edge-7:abc.DEF_1" in record.getMessage() for record in caplog.records)


UNFIT = [[""], ["two words"], ["x" * 129], ["<b>"], ["ä"], ["a\tb"], ["one", "two"]]


@pytest.mark.parametrize(
    ("given", "path", "name_answers"),
    [(given, "/v1/segment", True) for given in UNFIT]
    + [(UNFIT[1], path, False) for path in ("/v1/models", "/healthz", "/docs", "/nothing")],
)
async def test_an_id_that_is_not_fit_for_a_log_is_refused_by_name(given, path, name_answers):
    # Replaced, it would be another than the one that Serve has for its header, log and traces.
    watched = Watched()
    app = build_app(watched.backend, name_answers=name_answers)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    headers = [("X-Request-Id", one.encode()) for one in given]
    if path == "/v1/segment":
        response = await client.post(path, json=ASK, headers=headers)
    else:
        response = await client.get(path, headers=headers)
    body = response.json()
    assert (response.status_code, body["field"]) == (400, "X-Request-Id")
    assert "X-Request-Id must be one of at most 128 letters" in body["error"]
    assert watched.backend.begun == 0
    if name_answers:
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


async def test_a_refused_id_is_an_invalid_request_of_the_metrics():
    watched = Watched()
    await watched.client.post("/v1/segment", json=ASK, headers={"X-Request-Id": "two words"})
    assert watched.outcomes == ["invalid"]


async def test_behind_a_server_that_names_answers_there_is_one_header_not_two():
    app = build_app(Watched().backend, name_answers=False)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    response = await client.post("/v1/segment", json=ASK, headers={"X-Request-Id": "edge-1"})
    assert "x-request-id" not in response.headers
    assert response.json()["request_id"] == "edge-1"


# Names

EXPORTED = {f"ray_{spec.name}": spec for spec in metrics.METRICS}


def test_buckets_are_narrow_where_requests_end_and_reach_beyond_the_default_deadline():
    times = metrics.TIMES_MS
    usual = [ms for ms in times if 10 <= ms <= 30_000]
    assert all(later <= 5 / 3 * ms for ms, later in itertools.pairwise(usual))
    assert times[-1] >= 10 * 1000 * RuntimeConfig().request_timeout_s


def test_names_say_their_units():
    for spec in metrics.METRICS:
        assert spec.name.startswith("segment_") and spec.description.endswith(".")
        last = spec.name.rsplit("_", 1)[1]
        assert (
            last
            in {
                Counter: ("total",),
                Histogram: ("ms",),
                Gauge: ("requests", "bytes", "slots", "s", "refiners", "replicas"),
            }[spec.kind]
        )
    assert len(EXPORTED) == len(metrics.METRICS)


def test_every_metric_is_listed_and_recorded_somewhere():
    specs = {name: value for name, value in vars(metrics).items() if value in metrics.METRICS}
    assert len(specs) == len(metrics.METRICS)
    used = set()
    for path in (ROOT / "serve_graph").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif path.name == "metrics.py" and isinstance(node, ast.Call):
                used |= {arg.id for arg in node.args if isinstance(arg, ast.Name)}
    assert set(specs) <= used


async def test_the_first_queue_to_fill_is_exported(monkeypatch):
    levels: dict[str, float] = {}
    monkeypatch.setattr(metrics, "level", lambda spec, value: levels.update({spec.name: value}))
    room = Room(RuntimeConfig())
    ingress = IngressDeployment.__new__(IngressDeployment)
    ingress._backend = SimpleNamespace(room=room)  # type: ignore[assignment]
    ingress._former = FormerSettings()
    with room.enter(), room.enter() as place:
        place.hold(1000)
        watching = asyncio.create_task(ingress._watch())
        await asyncio.sleep(0)
        watching.cancel()
    assert levels == {
        "segment_ingress_held_requests": 2,
        "segment_ingress_held_bytes": 1000,
        "segment_former_settings_replicas": 0,
    }


def test_a_metric_without_one_of_its_tags_is_a_fault_and_not_a_lost_number():
    for spec in metrics.METRICS:
        tags = dict.fromkeys(spec.tags, "x")
        record = {
            Counter: metrics.count,
            Gauge: metrics.level,
            Histogram: metrics.observe,
        }[spec.kind]
        record(spec, 1, **tags)
        if tags:
            tags.popitem()
            with pytest.raises(ValueError, match="Missing value for tag"):
                record(spec, 1, **tags)


def test_an_empty_pool_is_told_by_what_it_lacks():
    """Serve exports no health of a pool without replicas, which is the one to page about; how many
    it wants is there, 0 for ``refiner_pool.min_replicas: 0`` that is idle."""
    (rule,) = [rule for rule in rules() if rule["alert"] == "SegmentPoolEmpty"]
    wanted, healthy = rule["expr"].split("unless on (application, deployment)")
    assert "ray_serve_autoscaling_target_replicas" in wanted and wanted.strip().endswith("> 0)")
    assert "ray_serve_deployment_replica_healthy" in healthy.partition(">= 1)")[0]


def names(expression: str) -> set[str]:
    """The metrics of a PromQL expression, without what histograms add."""
    found = set(re.findall(r"\bray_[a-z0-9_]+", expression))
    return {name.removesuffix("_bucket") for name in found}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


EXPRESSIONS = [t["expr"] for p in panels() for t in p["targets"]] + [r["expr"] for r in rules()]


@pytest.fixture(scope="module")
def names_in_ray() -> set[str]:
    """Every string in the parts of Ray that export metrics."""
    folder = Path(ray.__file__).parent
    parts = [folder / "serve" / "_private", folder / "dashboard" / "modules" / "reporter"]
    text = "".join(path.read_text() for part in parts for path in part.rglob("*.py"))
    return set(re.findall(r"\"([a-z0-9_]+)\"", text))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_and_alarms_use_metrics_that_are_exported(expression, names_in_ray):
    used = names(expression)
    assert used
    for name in used - set(EXPORTED):
        assert name.removeprefix("ray_") in names_in_ray, name
    for name in used & set(EXPORTED):
        if EXPORTED[name].kind is Histogram:
            assert f"{name}_bucket" in expression
        # A label that no metric has makes a panel empty.
        for labels in re.findall(rf"{name}(?:_bucket)?{{([^}}]*)}}", expression):
            assert set(re.findall(r"(\w+)=", labels)) <= set(EXPORTED[name].tags)
    tags = {tag for name in used & set(EXPORTED) for tag in EXPORTED[name].tags}
    for by in re.findall(r"by \(([^)]*)\)", expression):
        assert set(re.split(r",\s*", by)) <= tags | {"le", "application", "deployment"}
    for value in re.findall(r'(?:outcome)=~?"([^"]*)"', expression):
        assert set(value.split("|")) <= set(metrics.OUTCOMES)


def test_reasons_in_alarms_are_reasons_of_the_refiner():
    from kestrel.seg_refiner.result import REASONS

    for expression in EXPRESSIONS:
        for value in re.findall(r'reason=~"([^"]*)"', expression):
            assert set(value.split("|")) <= set(REASONS)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alarm_does_not_go_by_the_name_that_an_operator_gives_the_application(rule):
    """Under another one SegmentPoolEmpty paged for good, and saw no pool that was empty."""
    assert not re.search(r"\bapplication\s*=", rule["expr"])
    serves = re.findall(r"ray_serve_\w+(?:{([^}]*)})?", rule["expr"])
    deployments = {tuple(re.findall(r'deployment=~?"([^"]*)"', labels)) for labels in serves}
    # Its deployments have names of the graph's own, which others beside it need not share.
    assert {name for one in deployments for name in one} <= {"Ingress|Model|Refiner", "Model"}
    assert () not in deployments


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_what_an_alarm_counts_is_there_at_0_before_the_first_burst(rule):
    """To Prometheus a series that appears at 40 has not increased."""
    counted = re.findall(r"(?:rate|increase)\s*\(\s*(\w+)(?:{([^}]*)})?\[", rule["expr"])
    assert len(counted) == len(re.findall(r"\b(?:rate|increase)\b", rule["expr"]))
    for name, selector in counted:
        there = [tags for spec, tags in COUNTED if spec is EXPORTED[name]]
        assert there and all(set(tags) == set(EXPORTED[name].tags) for tags in there)
        for tag, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            assert set(values.split("|")) <= {tags[tag] for tags in there}


@pytest.mark.parametrize("file", ["configs/cluster.yaml", "configs/local.yaml", MANIFEST])
def test_the_alarm_of_a_long_queue_is_reached_before_a_queue_is_full(file):
    whole = yaml.safe_load((ROOT / file).read_text())
    config = yaml.safe_load(whole["spec"]["serveConfigV2"]) if file == MANIFEST else whole
    args = GraphArgs.model_validate(config["applications"][0]["args"])
    model, ingress = args.model_pool, args.ingress_pool
    slots = args.runtime.max_batch_size
    # Most replicas with fewest routers before them: the longest queue is needed, with least room.
    full = {
        "ray_segment_model_waiting_requests": model.max_replicas
        * (model.max_ongoing_requests - slots),
        "ray_serve_deployment_queued_queries": ingress.min_replicas * model.max_queued_requests,
    }
    (expression,) = (r["expr"] for r in rules() if r["alert"] == "SegmentModelQueueLong")
    waiting, _, most = expression.partition(">")
    assert names(most) == {"ray_segment_model_slots"}
    assert sum(full[name] for name in names(waiting)) > model.max_replicas * slots


def test_every_series_that_an_ingress_replica_may_count_is_there_from_its_start():
    from kestrel.seg_refiner.result import REASONS

    there = {(spec.name, *tags.values()) for spec, tags in COUNTED}
    doors = {(metrics.REQUESTS.name, d, o) for d in ("http", "handle") for o in metrics.OUTCOMES}
    assert doors | {(metrics.REFINEMENTS.name, reason) for reason in REASONS} <= there
    assert {(metrics.LOST_REPLICAS.name, half) for half in ("model", "refiner")} <= there
    for spec, tags in COUNTED:
        metrics.begin(spec, **tags)


def test_every_metric_of_ours_is_on_the_dashboard():
    shown = set().union(*(names(t["expr"]) for panel in panels() for t in panel["targets"]))
    assert set(EXPORTED) <= shown


def test_dashboard_panels_do_not_overlap_and_say_what_they_show():
    places = set()
    for panel in panels():
        assert panel["title"] and panel["description"] and panel["targets"]
        at = panel["gridPos"]
        places.add((at["x"], at["y"]))
        assert at["x"] + at["w"] <= 24
    assert len(places) == len(panels()) == len({panel["id"] for panel in panels()})


def test_every_metric_and_every_alarm_is_documented():
    text = OPERATIONS.read_text()
    for name in EXPORTED:
        assert f"`{name}`" in text, name
    for rule in rules():
        assert f"`{rule['alert']}`" in text, rule["alert"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")
