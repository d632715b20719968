"""One real graph for all end-to-end tests: its own Ray cluster, ports and token."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import httpx
import pytest

pytest.importorskip("ray.serve")

from running_graph import KEY, REFINE_TIMEOUT_S, Driver, Graph

from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import Sample, load_samples
from serve_graph.launch import LocalCluster, free_port


@pytest.fixture(scope="session")
def graph() -> Iterator[Graph]:
    token = secrets.token_hex(16)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    config = read_config(LOCAL, free_port())
    args = config["applications"][0]["args"]
    args["runtime"]["api_keys"] = [KEY]
    args["refine_timeout_s"] = REFINE_TIMEOUT_S
    # Two refiners, so that one can die; short queues, so that they can be filled.
    args["refiner_pool"].update(num_cpus=0.5, min_replicas=2, max_replicas=2)
    args["model_pool"].update(max_ongoing_requests=8, max_queued_requests=4)
    url = service_url(config)
    cluster = LocalCluster(environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    with cluster:
        cluster.deploy(config)
        cluster.wait_ready(f"{url}/healthz")
        driver = Driver(cluster.address, environment)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
            yield Graph(cluster, config, url, http, driver, environment)
        driver.close()


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return load_samples()
