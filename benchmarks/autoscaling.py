"""The look-ahead policy beside Serve's default: a step of load and a ramp.

    python benchmarks/autoscaling.py --out autoscaling.json
    python benchmarks/autoscaling.py --cold-start

Serve, its controller, the policy and the pools' options are the real ones. The two stages are
stand-ins that hold a slot for a fixed time and compute nothing: refinements that compute would not
get faster by replicas that share one machine's cores. Beside each run stands what the planner's
simulation says of it. ``--cold-start`` measures the real graph with
no refiner left: how long the first request takes, and the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import platform
import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from serve_graph.__main__ import LOCAL, read_config, sample_request, service_url
from serve_graph.args import LookAhead, Pool, RefinerPool
from serve_graph.arrivals import Paced
from serve_graph.launch import LocalCluster
from serve_graph.ports import free_port
from serve_graph.profile import Profile
from serve_graph.simulation import PoolPlan, Scenario, Simulation

MODEL_S = 3.0
"""Seconds that a request holds a slot of the model, as a few hundred tokens do."""
SLOTS = 32
REFINE_S = 0.5
"""Seconds that a request holds a refiner."""
LOW, HIGH = 1.0, 6.0
"""Requests per second before and after."""
MODEL_POOL = Pool(num_cpus=0, max_ongoing_requests=64, max_queued_requests=1000)
REFINER_POOL = RefinerPool(
    num_cpus=0,
    min_replicas=1,
    max_replicas=8,
    target_ongoing_requests=1,
    max_ongoing_requests=1,
    threads=1,
    max_queued_requests=1000,
    upscale_delay_s=0,
    downscale_delay_s=20,
    metrics_interval_s=1,
    look_back_period_s=5,
    lookahead=LookAhead(start_s=8, drain_s=5, busy_target=0.7, busy_s=REFINE_S),
)


class StandInModel:
    """Holds one of ``SLOTS`` slots for ``MODEL_S`` seconds; reports like ``ModelDeployment``."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(SLOTS)
        self._admitted: list[float] = []
        self._waiting = 0

    async def complete(self) -> None:
        self._waiting += 1
        async with self._slots:
            self._waiting -= 1
            admitted = time.monotonic()
            self._admitted.append(admitted)
            try:
                await asyncio.sleep(MODEL_S)
            finally:
                self._admitted.remove(admitted)

    def record_autoscaling_stats(self) -> dict[str, float]:
        now = time.monotonic()
        left = [max(0.0, MODEL_S - (now - admitted)) for admitted in self._admitted]
        return {
            "waiting": float(self._waiting),
            "running": float(len(left)),
            "slots": float(SLOTS),
            "seconds": MODEL_S,
            "left_s": sum(left) / len(left) if left else MODEL_S,
            "share": 1.0,
        }


class StandInRefiner:
    """Holds its replica for ``REFINE_S`` seconds; reports like ``RefinerDeployment``."""

    async def refine(self) -> None:
        await asyncio.sleep(REFINE_S)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"busy_s": REFINE_S}


class StandInIngress:
    """Model, then refiner; answers with the seconds that the second took, its queue included."""

    def __init__(self, model: DeploymentHandle, refiner: DeploymentHandle) -> None:
        self._model, self._refiner = model, refiner

    async def __call__(self, request: Request) -> dict[str, float]:
        await self._model.complete.remote()
        began = time.monotonic()
        await self._refiner.refine.remote()
        return {"refine_s": time.monotonic() - began}


def build(args: dict[str, Any]) -> Application:
    model = serve.deployment(name="Model", **MODEL_POOL.options(watched=True))(StandInModel)
    refiner = serve.deployment(name="Refiner", **REFINER_POOL.options())(StandInRefiner)
    ingress = serve.deployment(
        name="Ingress", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )(StandInIngress)
    return ingress.bind(model.bind(), refiner.bind())


def config(policy: str, port: int) -> dict[str, Any]:
    application: dict[str, Any] = {
        "name": "segment",
        "route_prefix": "/",
        "import_path": "benchmarks.autoscaling:build",
        "args": {},
    }
    if policy == "lookahead":
        application["autoscaling_policy"] = {"policy_function": "serve_graph.autoscaling:Policy"}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 120},
        "applications": [application],
    }


@dataclass(frozen=True)
class Load:
    """Requests per second over time: from ``LOW`` to ``HIGH`` within ``rise_s``."""

    name: str
    rise_s: float

    def rate(self, at_s: float) -> float:
        part = 1.0 if self.rise_s == 0 else min(1.0, at_s / self.rise_s)
        return LOW + (HIGH - LOW) * (part if at_s >= 0 else 0.0)


POLICIES = ("default", "lookahead")
LOADS = (Load("step", 0.0), Load("ramp", 30.0))
BEFORE_S = 10.0


@dataclass
class Answer:
    sent: float
    """Seconds after the load began to rise."""
    total_s: float
    refine_s: float


def refiners(cluster: LocalCluster) -> int:
    """Refiner replicas that exist, those that are starting included: what is paid for."""
    replicas = cluster.status()["applications"]["segment"]["deployments"]["Refiner"]["replicas"]
    return sum(replica["state"] in ("STARTING", "RUNNING") for replica in replicas)


async def drive(cluster: LocalCluster, url: str, load: Load, seconds: float) -> dict[str, Any]:
    """Send by the clock, whatever the answers do; then wait for all of them."""
    answers: list[Answer] = []
    sizes: list[tuple[float, int]] = []
    failed = 0
    began = time.monotonic() + BEFORE_S
    done = asyncio.Event()

    async def ask(client: httpx.AsyncClient) -> None:
        nonlocal failed
        sent = time.monotonic()
        reply = await client.get(url)
        if reply.status_code == 200:
            total = time.monotonic() - sent
            answers.append(Answer(sent - began, total, reply.json()["refine_s"]))
        else:
            failed += 1

    async def watch() -> None:
        while not done.is_set():
            # The dashboard shares the cores and may answer late; the next look is soon.
            with contextlib.suppress(OSError):
                sizes.append((time.monotonic(), await asyncio.to_thread(refiners, cluster)))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        asked = []
        due = began - BEFORE_S
        while (at := due - began) < seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            asked.append(asyncio.create_task(ask(client)))
            due += 1 / load.rate(at)
        await asyncio.gather(*asked)
    done.set()
    await watching
    return summary(answers, sizes, failed, began)


def summary(
    answers: list[Answer], sizes: list[tuple[float, int]], failed: int, began: float
) -> dict[str, Any]:
    risen = sorted((a for a in answers if a.sent >= 0), key=lambda a: a.sent)
    queued = [a for a in risen if a.refine_s > 2 * REFINE_S]
    spent = sum(n * (b - a) for (a, n), (b, _) in itertools.pairwise(sizes))
    return {
        "answered": len(answers),
        "failed": failed,
        # Sent at, plus how long it took: when the last request that had to queue was done.
        "absorbed_s": max((a.sent + a.total_s for a in queued), default=0.0),
        "queued_share": len(queued) / len(risen),
        "p50_s": float(np.percentile([a.total_s for a in risen], 50)),
        "p99_s": float(np.percentile([a.total_s for a in risen], 99)),
        "replica_seconds": spent,
        "replicas_at_most": max(n for _, n in sizes),
        "replicas": [(round(at - began, 1), n) for at, n in sizes],
    }


def compare(seconds: float) -> dict[str, Any]:
    """Each policy under each load, one after the other, each in an application of its own."""
    found: dict[str, Any] = {load.name: {} for load in LOADS}
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with LocalCluster(num_cpus=4) as cluster:
        for load in LOADS:
            for policy in POLICIES:
                settings = config(policy, port)
                cluster.deploy(settings)
                cluster.wait_ready(url)
                told = asyncio.run(drive(cluster, url, load, seconds))
                told["simulated"] = simulated(policy, load, seconds)
                found[load.name][policy] = told
                for source, row in (("real", told), ("simulated", told["simulated"])):
                    print(
                        f"{load.name:5} {policy:10} {source:10} absorbed {row['absorbed_s']:5.1f} s"
                        f"  p50 {row['p50_s']:5.2f} s  p99 {row['p99_s']:5.2f} s"
                        f"  replica-seconds {row['replica_seconds']:5.0f}",
                        flush=True,
                    )
                # What the autoscaler remembers of this run goes with the application.
                cluster.deploy({**settings, "applications": []})
                while cluster.status()["applications"]:
                    time.sleep(0.2)
    return found


def simulated(policy: str, load: Load, seconds: float) -> dict[str, float]:
    """The same load through the planner's simulation."""
    profile = Profile(
        name="stand-ins",
        measured={},
        slots=SLOTS,
        held=(1.0, float(SLOTS)),
        slot_s=(MODEL_S, MODEL_S),
        work=(1.0, 1.0),
        refine_s=(REFINE_S, REFINE_S),
        refiner_cpus=1.0,
        overhead_s=(0.0, 0.0),
    )
    pool = REFINER_POOL
    refiner = PoolPlan(
        pool.min_replicas,
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        max_ongoing=pool.max_ongoing_requests,
        start_s=pool.lookahead.start_s,
        target_ongoing=pool.target_ongoing_requests,
        upscale_delay_s=pool.upscale_delay_s,
        downscale_delay_s=pool.downscale_delay_s,
        look_back_s=pool.look_back_period_s,
        lookahead=pool.lookahead if policy == "lookahead" else None,
    )
    outcome = Simulation(
        Scenario(
            profile=profile,
            model=PoolPlan(1, max_ongoing=MODEL_POOL.max_ongoing_requests),
            refiner=refiner,
            arrivals=Paced(lambda at: load.rate(at - BEFORE_S)),
            seconds=BEFORE_S + seconds,
            warmup_s=BEFORE_S,
        )
    ).run()
    queued = [end for end, took in outcome.finished if took - MODEL_S > 2 * REFINE_S]
    return {
        "absorbed_s": float(max(queued, default=BEFORE_S) - BEFORE_S),
        "p50_s": outcome.percentile(50),
        "p99_s": outcome.percentile(99),
        "replica_seconds": float(outcome.refiner_seconds),
    }


def cold_start(rounds: int) -> dict[str, Any]:
    """Seconds of a request that finds no refiner, and of the next; the real graph."""
    settings = read_config(LOCAL, free_port())
    application = settings["applications"][0]
    application["autoscaling_policy"] = {"policy_function": "serve_graph.autoscaling:Policy"}
    application["args"]["refine_timeout_s"] = 60
    application["args"]["refiner_pool"].update(
        min_replicas=0,
        max_replicas=1,
        upscale_delay_s=0,
        downscale_delay_s=1,
        metrics_interval_s=0.5,
        look_back_period_s=2,
    )
    application["args"]["model_pool"].update(metrics_interval_s=0.5, look_back_period_s=2)
    url = service_url(settings)
    cold: list[float] = []
    warm: list[float] = []
    with LocalCluster() as cluster, httpx.Client(base_url=url, timeout=120) as http:
        cluster.deploy(settings)
        cluster.wait_ready(f"{url}/healthz")
        _, file = sample_request(cluster.dir)
        request = json.loads(file.read_text())
        for _ in range(rounds):
            while refiners(cluster):
                time.sleep(0.2)
            for times in (cold, warm):
                began = time.monotonic()
                reply = http.post("/v1/segment", json=request)
                times.append(time.monotonic() - began)
                assert reply.status_code == 200 and "x-refinement" not in reply.headers
    print(f"no refiner: {np.median(cold):.1f} s, one there: {np.median(warm):.2f} s (medians)")
    return {"cold_s": cold, "warm_s": warm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="after the rise began")
    parser.add_argument("--cold-start", action="store_true", help="measure this in place of loads")
    parser.add_argument("--rounds", type=int, default=3, help="of --cold-start")
    parser.add_argument("--out", help="write JSON here")
    options = parser.parse_args()
    found = cold_start(options.rounds) if options.cold_start else compare(options.seconds)
    found["machine"] = f"{platform.processor() or platform.machine()}, no GPU"
    if options.out:
        with open(options.out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
