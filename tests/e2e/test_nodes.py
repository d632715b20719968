"""Three nodes: where each pool's replicas are, that each grows and shrinks alone, and the death of
a whole node."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve")

from PIL import Image
from running_graph import listening_beyond_loopback
from test_faults import load_while, wrong

from benchmarks.traffic import Expected, connections, learn
from serve_graph.__main__ import LOCAL, read_config
from serve_graph.demo import load_samples
from serve_graph.launch import LocalCluster
from serve_graph.node import RayNode
from serve_graph.ports import free_port

pytestmark = pytest.mark.timeout(600)

CPU_NODE = {"cpu_node": 1.0}
PATIENCE_S = 150.0
"""Deadline of the requests: a busy machine starts nodes and replicas slowly."""


@dataclass
class Nodes:
    """A head that runs no replica but an ingress, a node with (logical) GPUs, one without."""

    cluster: LocalCluster
    head: RayNode
    gpu: RayNode
    cpu: RayNode
    doors: list[str]

    def replicas(self, name: str) -> list[int]:
        """How many of a deployment are on the head, the GPU node and the CPU node."""
        nodes = (self.head, self.gpu, self.cpu)
        return [len(node.pids(f"ray::ServeReplica:segment:{name}")) for node in nodes]


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.3)


def port_of(door: str) -> int:
    return int(door.rpartition(":")[2])


def answers(door: str) -> bool:
    try:
        return httpx.get(f"{door}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ports = [free_port() for _ in range(3)]
    config = read_config(LOCAL, ports[0])
    config["proxy_location"] = "EveryNode"
    args = config["applications"][0]["args"]
    args["refine_timeout_s"] = PATIENCE_S
    args["runtime"]["request_timeout_s"] = PATIENCE_S
    quick = {
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
    }
    args["ingress_pool"].update(min_replicas=3, max_replicas=3, max_replicas_per_node=1)
    args["model_pool"].update(
        quick, num_cpus=0.5, num_gpus=1, max_replicas=2, target_ongoing_requests=3
    )
    args["refiner_pool"].update(
        quick, resources={"cpu_node": 0.001}, max_replicas=2, target_ongoing_requests=1
    )
    # A slow machine takes a minute to start them anew, and the traffic goes on.
    args["runtime"]["max_held_requests"] = 1000
    args["ingress_pool"]["max_ongoing_requests"] = 2000
    for pool in ("model_pool", "refiner_pool"):
        args[pool]["max_queued_requests"] = 1000
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with LocalCluster(num_cpus=1, environment=token) as cluster:
        assert cluster.head is not None
        gpu = cluster.add_node(num_gpus=2, http_port=ports[1])
        cpu = cluster.add_node(resources=CPU_NODE, http_port=ports[2])
        doors = [f"http://127.0.0.1:{port}" for port in ports]
        found = Nodes(cluster, cluster.head, gpu, cpu, doors)
        cluster.deploy(config)
        for door in doors:
            cluster.wait_ready(f"{door}/healthz")
        yield found


def test_models_are_on_the_gpu_node_refiners_on_the_cpu_node_and_a_door_on_each(
    nodes: Nodes,
) -> None:
    assert nodes.replicas("Model") == [0, 1, 0]
    assert nodes.replicas("Refiner") == [0, 0, 1]
    assert nodes.replicas("Ingress") == [1, 1, 1]
    assert all(answers(door) for door in nodes.doors)


def flood(nodes: Nodes, ask: dict[str, Any], clients: int, grown: Callable[[], bool]) -> None:
    """Ask again and again through every door until ``grown``; every answer must be a 200."""
    end = time.monotonic() + 120

    def client(number: int) -> set[int]:
        statuses = set()
        # One after the other: all at once, they would be a queue of the model's at first.
        time.sleep(number * 0.3)
        with httpx.Client(base_url=nodes.doors[number % 3], timeout=120) as http:
            while not grown() and time.monotonic() < end:
                statuses.add(http.post("/v1/segment", json=ask).status_code)
        return statuses

    with ThreadPoolExecutor(clients) as pool:
        statuses = set().union(*pool.map(client, range(clients)))
    assert grown(), "the pool did not grow"
    assert statuses <= {200}


def test_a_busy_model_grows_the_model_pool_alone(nodes: Nodes) -> None:
    sample = load_samples()[0]
    # A path that is cut off takes its time to decode and is not refined.
    ask = {
        "object": sample.noun,
        "image_url": base64.b64encode(sample.image).decode(),
        "settings": {"max_tokens": 45},
    }
    flood(nodes, ask, 12, lambda: nodes.replicas("Model") == [0, 2, 0])
    assert nodes.replicas("Refiner") == [0, 0, 1]
    until(lambda: nodes.replicas("Model") == [0, 1, 0])


def test_a_flood_of_plain_requests_that_cost_the_model_little_grows_the_refiners_alone(
    nodes: Nodes,
) -> None:
    sample = load_samples()[0]
    # The model keeps what it has seen of a picture; each refinement goes over all of its pixels.
    picture = io.BytesIO()
    Image.open(io.BytesIO(sample.image)).convert("RGB").resize((6000, 4500)).save(picture, "JPEG")
    ask = {
        "object": sample.noun,
        "image_url": base64.b64encode(picture.getvalue()).decode(),
    }
    flood(nodes, ask, 6, lambda: nodes.replicas("Refiner") == [0, 0, 2])
    assert nodes.replicas("Model") == [0, 1, 0]
    until(lambda: nodes.replicas("Refiner") == [0, 0, 1])
    assert nodes.replicas("Model") == [0, 1, 0]


def test_no_node_listens_beyond_this_machine_but_for_replicas_that_ask_for_the_token(
    nodes: Nodes,
) -> None:
    for node in (nodes.head, nodes.gpu, nodes.cpu):
        beyond = listening_beyond_loopback(node)
        assert set(beyond) <= set(node.pids("ray::ServeReplica:")), beyond


def blocked(pid: int) -> int:
    """The signals that a process blocks, a bit each."""
    (line,) = re.findall(r"^SigBlk:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(line, 16)


def test_the_daemons_of_a_node_do_not_hear_that_they_are_to_end(nodes: Nodes) -> None:
    sigterm = 1 << (signal.SIGTERM - 1)
    for node in (nodes.head, nodes.gpu, nodes.cpu):
        assert len(node.pids()) > 2
        assert not [pid for pid in node.pids() if blocked(pid) & sigterm]


def death_of(nodes: Nodes, door: str, die: Callable[[], None]) -> None:
    """A node dies under traffic and another takes its place: every request is answered right."""

    async def undisturbed() -> list[Expected]:
        async with connections(PATIENCE_S) as client:
            return await learn(client, nodes.doors[0], load_samples()[:2])

    began: list[float] = []

    def die_and_come_back() -> None:
        began.append(time.monotonic())
        die()
        until(lambda: answers(door))
        until(lambda: nodes.replicas("Model") == [0, 1, 0])
        until(lambda: nodes.replicas("Refiner") == [0, 0, 1])
        print(f"all parts are back after {time.monotonic() - began[0]:.1f} s")

    expected = asyncio.run(undisturbed())
    traffic = load_while(nodes.doors[:1], expected, die_and_come_back, timeout_s=PATIENCE_S)
    assert not wrong(traffic)


def test_the_death_of_the_node_with_all_refiners_costs_no_request(nodes: Nodes) -> None:
    door = nodes.doors[2]

    def die() -> None:
        nodes.cpu.kill()
        nodes.cpu = nodes.cluster.add_node(resources=CPU_NODE, http_port=port_of(door))

    death_of(nodes, door, die)


def test_the_death_of_the_node_with_all_models_costs_no_request(nodes: Nodes) -> None:
    door = nodes.doors[1]

    def die() -> None:
        nodes.gpu.kill()
        nodes.gpu = nodes.cluster.add_node(num_gpus=2, http_port=port_of(door))

    death_of(nodes, door, die)
