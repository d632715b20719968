"""A running graph whose refiner pool looks ahead and may shrink to nothing, with traces on."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.constants import DEFAULT_TRACING_EXPORTER_IMPORT_PATH

from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import Sample
from serve_graph.launch import LocalCluster
from serve_graph.ports import free_port

pytestmark = pytest.mark.timeout(300)

QUICK: dict[str, Any] = {"metrics_interval_s": 0.5, "look_back_period_s": 1.5}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    tracing = {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": DEFAULT_TRACING_EXPORTER_IMPORT_PATH,
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
    }
    with LocalCluster(environment=tracing) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def http(cluster: LocalCluster) -> Iterator[httpx.Client]:
    config = read_config(LOCAL, free_port())
    (application,) = config["applications"]
    application["autoscaling_policy"] = {"policy_function": "serve_graph.autoscaling:Policy"}
    args = application["args"]
    args["refine_timeout_s"] = 60
    args["model_pool"].update(QUICK)
    args["refiner_pool"].update(QUICK, min_replicas=0, upscale_delay_s=0, downscale_delay_s=1)
    url = service_url(config)
    cluster.deploy(config)
    cluster.wait_ready(f"{url}/healthz")
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.2)
    return found


def refiners(cluster: LocalCluster) -> int:
    deployments = cluster.status()["applications"]["segment"]["deployments"]
    return sum(replica["state"] == "RUNNING" for replica in deployments["Refiner"]["replicas"])


def controller_log(cluster: LocalCluster) -> str:
    files = Path(cluster.dir).glob("session_*/logs/serve/controller_*.log")
    return "".join(file.read_text() for file in files)


def exported(cluster: LocalCluster) -> str:
    found = json.loads((Path(cluster.dir) / "prom_metrics_service_discovery.json").read_text())
    targets = {target for group in found for target in group["targets"]}
    return "".join(httpx.get(f"http://{target}/metrics").text for target in targets)


def spans(cluster: LocalCluster) -> list[dict[str, Any]]:
    """What Serve's own exporter wrote: JSON objects, one after the other, a file per process."""
    found = []
    for file in Path(cluster.dir).glob("session_2*/logs/serve/spans/*"):
        text = file.read_text()
        while text := text.strip():
            try:
                span, end = json.JSONDecoder().raw_decode(text)
            except ValueError:  # still being written
                break
            found.append(span)
            text = text[end:]
    return found


def unfinished(known: list[dict[str, Any]], found: list[dict[str, Any]]) -> set[str]:
    """Spans above those ``found`` that are not written yet."""
    above = {span["context"]["span_id"]: span["parent_id"] for span in known}
    missing = set()
    for span in found:
        parent = span["parent_id"]
        while parent is not None and parent in above:
            parent = above[parent]
        missing |= {parent} - {None}
    return missing


@pytest.fixture(scope="module")
def ask(samples: list[Sample]) -> dict[str, Any]:
    image = base64.b64encode(samples[0].image).decode()
    return {"object": samples[0].noun, "image_url": image, "return_base64": True}


def test_pool_at_zero_serves_the_first_request_and_shrinks_again(
    cluster: LocalCluster, http: httpx.Client, ask: dict[str, Any]
) -> None:
    until(lambda: refiners(cluster) == 0)
    reply = http.post("/v1/segment", json=ask)
    assert reply.status_code == 200
    assert "x-refinement" not in reply.headers and "refined_mask_base64" in reply.json()
    until(lambda: refiners(cluster) == 0)


def test_decisions_are_logged_with_their_inputs_and_exported(
    cluster: LocalCluster, http: httpx.Client
) -> None:
    lines = [x for x in controller_log(cluster).splitlines() if "refiners wanted=" in x]
    assert any("wanted=1: grow" in line for line in lines)
    assert any("wanted=0: shrink" in line for line in lines)
    assert all("due_per_s=" in line and "model_running=" in line for line in lines)
    for name in ("due_per_s", "wanted_refiners"):
        series = re.compile(rf'^ray_segment_autoscaling_{name}{{.*application="segment"', re.M)
        until(lambda series=series: series.search(exported(cluster)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_trace_through_three_deployments_by_one_id(
    cluster: LocalCluster, http: httpx.Client, ask: dict[str, Any], stream: bool
) -> None:
    name = f"traced-{stream}"
    headers = {"X-Request-Id": name}
    assert http.post("/v1/segment", json=ask | {"stream": stream}, headers=headers).is_success

    def mine() -> list[dict[str, Any]]:
        return [span for span in spans(cluster) if span["attributes"].get("request_id") == name]

    stages = {"prepare", "prefill", "decode", "raster", "refine", "clean", "trace", "encode"}
    until(lambda: stages <= {span["name"] for span in mine()})
    # A span is written when it ends, those around it last.
    until(lambda: not unfinished(spans(cluster), mine()))
    whole = {span["context"]["span_id"]: span for span in spans(cluster)}
    assert len({span["context"]["trace_id"] for span in mine()}) == 1
    handled = {
        span["attributes"]["deployment"]: span
        for span in mine()
        if span["name"].startswith("replica_handle_request")
    }
    assert set(handled) == {"Ingress", "Model", "Refiner"}
    for span in mine():
        if span["name"] in ("prefill", "raster"):
            deployment = {"prefill": "Model", "raster": "Refiner"}[span["name"]]
            # Serve's replica span is above it, and within the time of that it ran.
            parent = whole[span["parent_id"]]
            assert parent["attributes"]["deployment"] == deployment
            assert parent["start_time"] <= span["start_time"] <= span["end_time"]
    for deployment in ("Model", "Refiner"):
        above = handled[deployment]
        while above["attributes"].get("deployment") != "Ingress":
            above = whole[above["parent_id"]]
