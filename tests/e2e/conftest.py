"""One real graph for all end-to-end tests: its own Ray cluster, ports and token."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve")

from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import Sample, load_samples
from serve_graph.launch import REPOSITORY, LocalCluster, free_port

KEY = "a-key-for-the-tests"
REFINE_TIMEOUT_S = 5.0


class Driver:
    """A process with a client of the graph; see driver.py."""

    def __init__(self, address: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py")), address],
            env={**environment, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._reply() == {"ok": "connected"}

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        # Libraries may print on their own account; replies are the lines that are JSON objects.
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the driver ended")

    def ask(self, command: str, **ask: Any) -> Any:
        """What the driver's client gave: ``{"ok": ...}`` or the RequestError's parts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, ask]) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class Graph:
    """Where the graph is, and ways to it."""

    cluster: LocalCluster
    url: str
    http: httpx.Client
    driver: Driver
    environment: dict[str, str]

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """What the replicas of each half say about themselves."""
        reply: dict[str, list[dict[str, Any]]] = self.driver.ask("stats")["ok"]
        return reply

    def count(self, half: str, key: str) -> int:
        """One number of all replicas of a half together."""
        return sum(replica[key] for replica in self.stats()[half])


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
            yield Graph(cluster, url, http, driver, environment)
        driver.close()


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return load_samples()
