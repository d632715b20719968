"""One real graph for all end-to-end tests: its own Ray cluster, ports and token."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve")

from running_graph import KEY, REFINE_TIMEOUT_S, Driver, Graph, body, enlarged

from kestrel.api_keys import hash_key
from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.args import longest_request_s
from serve_graph.demo import Sample, load_samples
from serve_graph.environment import LOOPBACK
from serve_graph.launch import LocalCluster
from serve_graph.ports import free_port

HERE = Path(__file__).parent
LAST = ("test_faults.py", "test_logs.py")
"""What leaves the graph changed, and what looks back at all that was asked of it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a cluster of their own come first: the graph, once it is there, stays to the end,
    and takes a seventh of a core also while nobody asks it."""

    def turn(item: pytest.Item) -> int:
        if HERE not in item.path.parents or "graph" not in getattr(item, "fixturenames", ()):
            return 0
        return 2 + LAST.index(item.path.name) if item.path.name in LAST else 1

    items.sort(key=turn)


def statuses_until_ready(cluster: LocalCluster, url: str) -> list[int]:
    """What ``url`` answers until it is 200; LaunchError where that never comes."""
    statuses: list[int] = []
    ready = threading.Event()

    def ask() -> None:
        while not ready.is_set() and 200 not in statuses:
            with contextlib.suppress(httpx.TransportError):
                statuses.append(httpx.get(url, timeout=30).status_code)
            time.sleep(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        cluster.wait_ready(url)
    finally:
        asking.join(5)
        ready.set()
        asking.join()
    return statuses


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    token = secrets.token_hex(16)
    # Programs of a user who has the token where Ray looks for it, and sets no more than what `up`
    # says of the address.
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("RAY_")}
    environment["HOME"] = str(home)
    config = read_config(LOCAL, free_port())
    args = config["applications"][0]["args"]
    # Serve writes the config as it stands into its own log.
    args["runtime"]["api_keys"] = [hash_key(KEY)]
    args["refine_timeout_s"] = REFINE_TIMEOUT_S
    args["runtime"]["request_timeout_s"] = 180  # a busy machine starts replicas slowly
    # Two refiners, so that one can die; short queues, so that they can be filled.
    args["refiner_pool"].update(num_cpus=0.5, min_replicas=2, max_replicas=2)
    args["model_pool"].update(max_ongoing_requests=8, max_queued_requests=4)
    args["runtime"]["max_held_requests"] = 12
    url = service_url(config)
    cluster = LocalCluster(
        longest_request_s=longest_request_s(config),
        environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
    )
    with cluster:
        cluster.deploy(config)
        health = statuses_until_ready(cluster, f"{url}/healthz")
        by_handle = {**LOOPBACK, "RAY_ADDRESS": cluster.address}
        driver = Driver(None, {**environment, **by_handle})
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
            yield Graph(cluster, config, url, http, driver, environment, health)
        driver.close()


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Some of them: all are judged without a cluster."""
    return load_samples()[:8]


@pytest.fixture(scope="session")
def huge(samples: list[Sample]) -> bytes:
    """40 megapixels: each half is busy for a while with its pixels alone."""
    return enlarged(samples[0], 8000, 5000)


@pytest.fixture(scope="session")
def answers(graph: Graph, samples: list[Sample]) -> list[dict[str, Any]]:
    """Each sample's plain answer with masks."""
    replies = [graph.http.post("/v1/segment", json=body(s, return_base64=True)) for s in samples]
    assert [reply.status_code for reply in replies] == [200] * len(samples)
    return [reply.json() for reply in replies]
