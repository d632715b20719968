"""What operators see of a running graph: its metrics, and one id from the request to the answer."""

from __future__ import annotations

import base64
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from running_graph import Graph, wait_for

from serve_graph import metrics
from serve_graph.demo import Sample

pytestmark = pytest.mark.timeout(600)

EXPORT_PERIOD_S = 10.0
"""Ray's default, ``metrics_report_interval_ms``."""


def base64_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def scraped(graph: Graph) -> str:
    """What Prometheus would read from every node of the cluster."""
    found = json.loads(
        (Path(graph.cluster.dir) / "prom_metrics_service_discovery.json").read_text()
    )
    targets = [target for group in found for target in group["targets"]]
    return "".join(httpx.get(f"http://{target}/metrics").text for target in targets)


def test_metrics_of_both_pools_reach_prometheus(graph: Graph, samples: list[Sample]) -> None:
    sample = samples[0]
    ask = {"object": sample.noun, "image_url": base64_text(sample.image), "return_base64": True}
    assert graph.http.post("/v1/segment", json=ask).status_code == 200
    assert graph.http.post("/v1/segment", json={}).status_code == 400
    expected = {f"ray_{spec.name}" for spec in metrics.METRICS} - {
        # This graph has pools of fixed size; see test_scaling.py.
        f"ray_{metrics.REFINERS_DUE.name}",
        f"ray_{metrics.REFINERS_WANTED.name}",
    }
    expected |= {"ray_serve_deployment_queued_queries", "ray_serve_deployment_replica_healthy"}
    end = time.monotonic() + 4 * EXPORT_PERIOD_S
    while True:
        text = scraped(graph)
        there = {
            re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"^\w+", text, re.M)
        }
        requests = re.findall(
            r'^ray_segment_requests_total{.*outcome="(\w+)".*} (\S+)$', text, re.M
        )
        ended = {outcome for outcome, count in requests if float(count) > 0}
        if (expected <= there and {"ok", "invalid"} <= ended) or time.monotonic() > end:
            break
        time.sleep(1)
    assert expected <= there, expected - there
    assert {"ok", "invalid"} <= ended
    # What has not happened yet is there too.
    assert {outcome for outcome, _ in requests} == set(metrics.OUTCOMES)
    assert 0 in {float(count) for _, count in requests}
    for deployment, name in (("Model", "model_slots"), ("Refiner", "refiner_running_requests")):
        lines = [x for x in text.splitlines() if x.startswith(f"ray_segment_{name}{{")]
        assert lines and all(f'deployment="{deployment}"' in x for x in lines)


def overloaded(graph: Graph) -> float:
    """How many requests were refused for want of a place, as exported."""
    pattern = r'^ray_segment_requests_total{.*outcome="overloaded".*} (\S+)$'
    return sum(map(float, re.findall(pattern, scraped(graph), re.M)))


def test_refusals_by_haproxy_are_counted_nowhere(graph: Graph, samples: list[Sample]) -> None:
    before = overloaded(graph)
    ask = {"object": samples[0].noun, "image_url": base64_text(samples[0].image)}
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: graph.http.post("/v1/segment", json=ask), range(120)))
    said = [answer.json()["error"] for answer in answers if answer.status_code == 503]
    assert "the server is full" in said, "all of them by the replica"
    assert len(said) < 120
    # Told with the next request.
    wait_for(lambda: graph.http.post("/v1/segment", json=ask).status_code == 200)
    assert wait_for(lambda: overloaded(graph) >= before + len(said), 4 * EXPORT_PERIOD_S)


def test_a_request_has_one_id_in_header_and_body(graph: Graph, samples: list[Sample]) -> None:
    ask = {"object": samples[0].noun, "image_url": base64_text(samples[0].image)}
    for headers in ({}, {"X-Request-Id": "edge-7.abc"}):
        response = graph.http.post("/v1/segment", json=ask, headers=headers)
        ids = response.headers.get_list("x-request-id")
        assert ids == [response.json()["request_id"]]
        assert not headers or ids == ["edge-7.abc"]
