"""Replicas, the controller and the HTTP door die or hang under traffic; no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hanging import ALWAYS, HANGING, ONCE, marked
from running_graph import KEY, Graph, body, enlarged, wait_for, without_times

from benchmarks.traffic import RIGHT, Expected, Traffic, connections, learn
from kestrel.api_keys import hash_key
from serve_graph.demo import Sample
from serve_graph.haproxy import haproxy_binary
from serve_graph.node import kill

pytestmark = pytest.mark.timeout(600)

MODEL = "ray::ServeReplica:segment:Model"
REFINER = "ray::ServeReplica:segment:Refiner"
DOORS = {"haproxy": str(haproxy_binary()), "manager": "ray::HAProxyManager"}
"""HAProxy and the actor of Serve that started it."""
PATIENCE_S = 180.0
"""Deadline of the requests: a busy machine starts replicas slowly."""
ROOM = 256
"""Requests that every stage may hold."""
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="session")
def expected(graph: Graph, samples: list[Sample]) -> list[Expected]:
    async def ask() -> list[Expected]:
        async with connections(60, HEADERS) as client:
            return await learn(client, graph.url, samples[:4])

    return asyncio.run(ask())


def traffic_while(
    graph: Graph, expected: list[Expected], *deeds: Callable[[], Any], **options: Any
) -> Traffic:
    """Requests to the graph before, while and after the deeds are done, one after the other."""
    return load_while([graph.url], expected, *deeds, headers=HEADERS, **options)


def load_while(
    doors: list[str],
    expected: list[Expected],
    *deeds: Callable[[], Any],
    pause_s: float = 3.0,
    **options: Any,
) -> Traffic:
    """``traffic_while`` for any graph; ``options`` are ``Traffic``'s."""
    options = {"rate": 1.5, "timeout_s": PATIENCE_S} | options
    traffic = Traffic(doors, expected, **options)

    async def run() -> None:
        load = asyncio.create_task(traffic.run())
        for deed in deeds:
            await asyncio.sleep(pause_s)
            await asyncio.to_thread(deed)
        await asyncio.sleep(pause_s)
        traffic.stop()
        await load

    asyncio.run(run())
    assert traffic.sent
    return traffic


def wrong(traffic: Traffic) -> Counter[str]:
    """The requests that were not answered right, by kind, outcome and message."""
    return Counter(f"{s.kind}: {s.outcome} {s.said}" for s in traffic.sent if s.outcome != RIGHT)


def door_status(graph: Graph) -> int:
    """What the HTTP door says, 0 where nothing answers."""
    try:
        return httpx.get(f"{graph.url}/healthz", timeout=5).status_code
    except httpx.TransportError:
        return 0


def kill_one(graph: Graph, title: str, number: signal.Signals = signal.SIGKILL) -> int:
    # One that serves: replicas that die three times while they start are a failed deployment.
    assert wait_for(lambda: graph.settled() and bool(graph.pids(title)), PATIENCE_S)
    victim = graph.pids(title)[0]
    os.kill(victim, number)
    return victim


@pytest.fixture(scope="session")
def updated(graph: Graph, expected: list[Expected]) -> Traffic:
    """Every replica replaced under traffic: deeper queues, quick health checks. They stay to the
    end; see conftest.py."""
    config = copy.deepcopy(graph.config)
    args = config["applications"][0]["args"]
    args["refine_timeout_s"] = PATIENCE_S / 2
    args["refine_silence_s"] = 3
    args["refiner_pool"].update(stuck_s=10, graceful_shutdown_timeout_s=8)
    args["refiner"]["selectable"] = ["none", HANGING]
    # A slow machine takes half a minute to start a replica, for which nobody is to be refused.
    args["runtime"]["max_held_requests"] = ROOM
    args["ingress_pool"].update(max_ongoing_requests=2 * ROOM, max_queued_requests=ROOM)
    args["model_pool"].update(max_ongoing_requests=16, max_queued_requests=ROOM)
    args["refiner_pool"].update(max_queued_requests=ROOM)
    for pool in ("model_pool", "refiner_pool"):
        args[pool].update(health_check_period_s=1, health_check_timeout_s=3)
    before = graph.pids(MODEL)
    traffic = traffic_while(graph, expected, lambda: graph.deploy(config), rate=0.4)
    assert not set(before) & set(graph.pids(MODEL))
    graph.config = config
    return traffic


def test_no_request_fails_while_every_replica_is_replaced(updated: Traffic) -> None:
    assert not wrong(updated)


def test_refiners_killed_again_and_again_lose_nothing(
    graph: Graph, updated: Traffic, expected: list[Expected]
) -> None:
    traffic = traffic_while(graph, expected, *[lambda: kill_one(graph, REFINER)] * 3)
    assert not wrong(traffic)


def test_requests_and_streams_go_on_after_the_death_of_their_model_replica(
    graph: Graph, updated: Traffic, expected: list[Expected]
) -> None:
    traffic = traffic_while(graph, expected, *[lambda: kill_one(graph, MODEL)] * 2, rate=3.0)
    assert not wrong(traffic)


@pytest.mark.parametrize("title", [MODEL, REFINER])
def test_a_replica_that_hangs_is_replaced_and_its_requests_answered(
    graph: Graph, updated: Traffic, expected: list[Expected], title: str
) -> None:
    hung: list[int] = []

    def hang() -> None:
        hung.append(kill_one(graph, title, signal.SIGSTOP))
        assert wait_for(lambda: hung[0] not in graph.pids(title), 90)

    traffic = traffic_while(graph, expected, hang, rate=0.7)
    assert not wrong(traffic)


def test_a_refinement_that_hangs_is_answered_by_another_replica_and_its_own_is_replaced(
    graph: Graph, updated: Traffic, samples: list[Sample]
) -> None:
    ask = body(replace(samples[0], image=marked(samples[0].image, ONCE)), return_base64=True)
    ask["settings"] = {"refiner": HANGING}
    before = set(graph.pids(REFINER))
    reply = graph.http.post("/v1/segment", json=ask)
    assert reply.status_code == 200
    # What it hangs on, it hangs on no more.
    right = graph.http.post("/v1/segment", json=ask)
    assert without_times(reply.json()) == without_times(right.json())
    assert wait_for(lambda: not before <= set(graph.pids(REFINER)), 90)


def test_a_refinement_that_hangs_wherever_it_is_tried_is_a_504(
    graph: Graph, updated: Traffic, samples: list[Sample]
) -> None:
    ask = body(replace(samples[0], image=marked(samples[0].image, ALWAYS)), return_base64=True)
    ask["settings"] = {"refiner": HANGING}
    headers = {"X-Request-Timeout-Ms": "12000"}
    reply = graph.http.post("/v1/segment", json=ask, headers=headers)
    assert reply.status_code == 504, reply.text
    # Given up, what hangs keeps its place, so that others are not sent there.
    hung = {refiner["pid"] for refiner in graph.stats()["Refiner"] if refiner["running"]}
    assert hung
    after = graph.http.post("/v1/segment", json=body(samples[0], return_base64=True))
    assert after.status_code == 200 and "refined_mask_base64" in after.json()

    def replaced() -> bool:
        pids = set(graph.pids(REFINER))
        return len(pids) == 2 and not hung & pids

    assert wait_for(replaced, 120)


def test_the_death_of_the_controller_is_not_noticed(
    graph: Graph, updated: Traffic, expected: list[Expected]
) -> None:
    traffic = traffic_while(graph, expected, lambda: kill_one(graph, "ray::ServeController"))
    assert not wrong(traffic)

    def known_again() -> bool:
        with contextlib.suppress(OSError):
            return bool(graph.cluster.status()["applications"])
        return False

    assert wait_for(known_again, 60)


@pytest.mark.parametrize("door", DOORS)
def test_the_http_door_comes_back_and_only_its_own_connections_break(
    graph: Graph, updated: Traffic, expected: list[Expected], door: str
) -> None:
    killed_at: list[float] = []

    def kill_door() -> None:
        killed_at.append(time.monotonic())
        # Some may be left of before the last change, until their connections end.
        killed = set(graph.pids(DOORS[door]))
        for pid in killed:
            kill(pid)
        # It may be back before anybody has seen it gone.
        assert killed and wait_for(lambda: set(graph.pids(DOORS[door])) - killed, 60)
        assert wait_for(lambda: door_status(graph) == 200, 60)

    traffic = traffic_while(graph, expected, kill_door, pause_s=4.0)
    # A client tries again, as a load balancer would; nothing but the lost door made it do so.
    assert not wrong(traffic)
    assert all(not sent.redials or sent.at + sent.seconds > killed_at[0] for sent in traffic.sent)


def told(graph: Graph, words: str) -> set[str]:
    """The deployments in whose replicas' logs these words are."""
    logs = Path(graph.cluster.dir).glob("session_2*/logs/serve/replica_*.log")
    return {file.name.split("_")[2] for file in logs if words in file.read_text(errors="replace")}


def test_settings_change_without_a_new_replica(graph: Graph, expected: list[Expected]) -> None:
    before = {title: set(graph.pids(title)) for title in (MODEL, REFINER)}
    config = copy.deepcopy(graph.config)
    other = "another-key-for-the-tests"
    keys = [hash_key(KEY), hash_key(other)]
    config["applications"][0]["deployments"] = [
        {"name": "Ingress", "user_config": {"api_keys": keys, "refine_timeout_s": 30}},
        {"name": "Refiner", "user_config": {"refiner": "none"}},
    ]
    ask = body(expected[0].sample)

    def changed() -> bool:
        headers = {"Authorization": f"Bearer {other}"}
        return httpx.post(f"{graph.url}/v1/segment", json=ask, headers=headers).status_code == 200

    try:
        graph.deploy(config)
        assert wait_for(changed)
        assert wait_for(
            lambda: graph.http.post("/v1/segment", json=ask).json()["path"] != expected[0].path
        )
        # What does not fit stops nobody: replicas go on with what they have, and one that dies is
        # replaced.
        config["applications"][0]["deployments"] += [{"name": "Model"}]
        for deployment in config["applications"][0]["deployments"]:
            deployment["user_config"] = {"refine_timout_s": 30}
        graph.deploy(config)
        refused = {"Ingress", "Model", "Refiner"}
        assert wait_for(lambda: told(graph, "former settings stay") == refused)
        assert changed()
        before[REFINER].remove(kill_one(graph, REFINER))
        assert wait_for(lambda: len(graph.pids(REFINER)) > len(before[REFINER]), PATIENCE_S)
        assert wait_for(graph.settled, PATIENCE_S)
    finally:
        graph.deploy(graph.config)
    after = {title: set(graph.pids(title)) for title in (MODEL, REFINER)}
    assert after[MODEL] == before[MODEL] and after[REFINER] > before[REFINER]
    assert wait_for(lambda: not changed())


def test_draining_finishes_what_is_under_way_and_refuses_the_rest(
    graph: Graph, samples: list[Sample]
) -> None:
    slow = body(replace(samples[0], image=enlarged(samples[0], 8000, 5000)), return_base64=True)
    try:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(graph.http.post, "/v1/segment", json=slow)
            assert wait_for(lambda: graph.count("Model", "running") > 0)
            drained = pool.submit(graph.cluster.drain, graph.config, graph.url)
            assert wait_for(lambda: graph.http.get("/healthz").status_code == 503)
            refused = graph.http.post("/v1/segment", json=body(samples[0]))
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert running.result().status_code == 200
            assert "refined_mask_base64" in running.result().json()
            assert drained.result()
    finally:
        graph.deploy(graph.config)
    assert wait_for(lambda: graph.http.get("/healthz").status_code == 200)
