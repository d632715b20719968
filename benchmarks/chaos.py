"""Mixed faults on a cluster of six nodes under steady load: nothing may be lost.

    python -m benchmarks.chaos --minutes 10 --out chaos.json

A head, one more node with nothing but a door, two nodes with a (logical) GPU for the model and two
without for the refiner, all on this machine. Requests go to the first two nodes' doors, which are
killed in turn; those nodes are not. Every answer is compared with the undisturbed one, and after
each fault the time is taken until every part is there again. Exit status 1 when a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.traffic import (
    GRACE_S,
    KINDS,
    LEFT,
    REFUSED,
    RIGHT,
    UNREFINED,
    Traffic,
    connections,
    learn,
)
from serve_graph.__main__ import LOCAL, read_config
from serve_graph.demo import load_samples
from serve_graph.errors import LaunchError
from serve_graph.haproxy import haproxy_binary
from serve_graph.launch import LocalCluster
from serve_graph.node import RayNode, kill
from serve_graph.ports import free_port

CPU_NODE = {"cpu_node": 1.0}
TIMES_WHOLE = 4
"""Looks, half a second apart, at which all must be well for a fault to be over."""
REPLICA = "ray::ServeReplica:segment:"
DOOR = haproxy_binary() or "ray::ProxyActor"
"""How the command line of an HTTP door begins."""


@dataclass
class Bench:
    """The cluster under test and the ways to hurt it."""

    cluster: LocalCluster
    config: dict[str, Any]
    doors: list[str]
    gpu: list[RayNode] = field(default_factory=list)
    cpu: list[RayNode] = field(default_factory=list)
    chance: random.Random = field(default_factory=random.Random)
    stopped: list[int] = field(default_factory=list)
    door_nodes: list[RayNode] = field(default_factory=list)
    """Those of ``doors``."""

    def pids(self, title: str) -> list[int]:
        """Processes of that title that run, those that were stopped left out."""
        return [pid for pid in self._all_pids(title) if pid not in self.stopped]

    def _all_pids(self, title: str) -> list[int]:
        assert self.cluster.head is not None
        nodes = [self.cluster.head, *(node for node in self.cluster.nodes if node.running)]
        return [pid for node in nodes for pid in node.pids(title)]

    def kill_stopped(self) -> None:
        """Those that still are: they would hear of no end, and their numbers may be others' now."""
        for pid in set(self._all_pids(REPLICA)) & set(self.stopped):
            kill(pid)

    def whole(self) -> bool:
        """Whether every part is there, each pool at its size, and both doors answer."""
        args = self.config["applications"][0]["args"]
        for name, pool in (("Model", "model_pool"), ("Refiner", "refiner_pool")):
            if len(self.pids(f"{REPLICA}{name}")) != args[pool]["min_replicas"]:
                return False
        try:
            applications = self.cluster.status()["applications"].values()
            healthy = all(one["status"] == "RUNNING" for one in applications)
            doors = [httpx.get(f"{door}/healthz", timeout=5).status_code for door in self.doors]
        except (OSError, ValueError, httpx.TransportError):
            return False
        return bool(applications) and healthy and doors == [200] * len(doors)

    def _kill(self, title: str, number: signal.Signals = signal.SIGKILL) -> str:
        found = self.pids(title)
        if not found:
            return "nothing there to be killed"
        pid = self.chance.choice(found)
        kill(pid, number)
        if number == signal.SIGSTOP:
            self.stopped.append(pid)
        return f"pid {pid}"

    def refiner_killed(self) -> str:
        return self._kill(f"{REPLICA}Refiner")

    def model_killed(self) -> str:
        return self._kill(f"{REPLICA}Model")

    def refiner_hangs(self) -> str:
        return self._kill(f"{REPLICA}Refiner", signal.SIGSTOP)

    def model_hangs(self) -> str:
        return self._kill(f"{REPLICA}Model", signal.SIGSTOP)

    def controller_killed(self) -> str:
        return self._kill("ray::ServeController")

    def proxy_killed(self) -> str:
        # Only a door that is asked can be missed; in turn, as a rolling failure would.
        self.door_nodes.append(self.door_nodes.pop(0))
        # All of it: some may be left of before the last change, until their connections end.
        pids = self.door_nodes[-1].pids(DOOR)
        for pid in pids:
            kill(pid)
        return f"pids {pids}"

    def cpu_node_killed(self) -> str:
        self.cpu.pop(0).kill()
        self.cpu.append(self.cluster.add_node(resources=CPU_NODE))
        return "and another one started"

    def gpu_node_killed(self) -> str:
        self.gpu.pop(0).kill()
        self.gpu.append(self.cluster.add_node(num_gpus=1))
        return "and another one started"

    def user_config_changed(self) -> str:
        seconds = self.chance.choice([8.0, 9.0, 11.0])
        self.config["applications"][0]["deployments"] = [
            {"name": "Ingress", "user_config": {"refine_timeout_s": seconds}}
        ]
        self.cluster.deploy(self.config)
        return f"refine_timeout_s {seconds:g}"

    def redeployed(self) -> str:
        args = self.config["applications"][0]["args"]
        args["runtime"]["max_queue"] = args["runtime"].get("max_queue", 32) + 1
        self.cluster.deploy(self.config)
        return f"every replica replaced, max_queue {args['runtime']['max_queue']}"


FAULTS: dict[str, Callable[[Bench], str]] = {
    "refiner killed": Bench.refiner_killed,
    "model killed": Bench.model_killed,
    "refiner hangs": Bench.refiner_hangs,
    "model hangs": Bench.model_hangs,
    "controller killed": Bench.controller_killed,
    "proxy killed": Bench.proxy_killed,
    "CPU node killed": Bench.cpu_node_killed,
    "GPU node killed": Bench.gpu_node_killed,
    "user_config changed": Bench.user_config_changed,
    "redeployed": Bench.redeployed,
}

OF_NODES = ("CPU node killed", "GPU node killed")

CALM_S = 5.0
"""Between the moment at which every part is there again and the next fault, seconds."""
GIVE_UP_S = 120.0
"""The next fault comes after this long, whole or not, seconds."""


def graph_config(port: int) -> dict[str, Any]:
    """The local config spread over the nodes."""
    config = copy.deepcopy(read_config(LOCAL, port))
    config["proxy_location"] = "EveryNode"
    args = config["applications"][0]["args"]
    args["runtime"].update(max_queue=64)
    args["ingress_pool"].update(num_cpus=0, min_replicas=6, max_replicas=6, max_replicas_per_node=1)
    args["model_pool"].update(num_gpus=1, min_replicas=2, max_replicas=2, num_cpus=0.5)
    args["refiner_pool"].update(
        min_replicas=2, max_replicas=2, max_replicas_per_node=1, resources={"cpu_node": 0.001}
    )
    for pool in ("ingress_pool", "model_pool", "refiner_pool"):
        args[pool].update(health_check_period_s=3, health_check_timeout_s=6)
    return config


def turns(names: list[str], chance: random.Random) -> Iterator[str]:
    """Faults without end: all in turn, shuffled anew each round."""
    while True:
        yield from chance.sample(names, len(names))


async def run(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    async with connections(120) as client:
        expected = await learn(client, bench.doors[0], load_samples())
    traffic = Traffic(bench.doors, expected, rate=options.rate, leave_every=50)
    seconds = options.minutes * 60
    load = asyncio.create_task(traffic.run(seconds))
    began, happened = time.monotonic(), list[dict[str, Any]]()
    names = options.faults or [n for n in FAULTS if not (options.one_node and n in OF_NODES)]
    for name in turns(names, bench.chance):
        await asyncio.sleep(CALM_S)
        now = time.monotonic()
        if now > began + seconds - CALM_S:
            break
        try:
            said = await asyncio.to_thread(FAULTS[name], bench)
        except (OSError, LaunchError) as error:
            said = f"not done: {error}"
        fault = {"fault": name, "at_s": round(now - began, 1), "what": said, "t": now}
        happened.append(fault)
        end = min(now + GIVE_UP_S, began + seconds + GRACE_S)
        back = await asyncio.to_thread(until_whole, bench, end)
        fault["whole_after_s"] = None if back is None else round(back - now, 1)
        print(
            f"{fault['at_s']:6.1f} s  {name}: {said}; whole again after {fault['whole_after_s']} s",
            flush=True,
        )
    await load
    return report(traffic, happened, began, options)


def until_whole(bench: Bench, end: float) -> float | None:
    """When every part was there again, on the monotonic clock; None: not before ``end``."""
    # What was killed is noticed only in a moment: whole once is not yet whole again.
    times_whole = 0
    while time.monotonic() < end:
        now = time.monotonic()
        times_whole = times_whole + 1 if bench.whole() else 0
        if times_whole == 1:
            since = now
        if times_whole == TIMES_WHOLE:
            return since
        time.sleep(0.5)
    return None


def report(
    traffic: Traffic, happened: list[dict[str, Any]], began: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Counts of the whole, and for each fault what its window held and when it was over."""
    ends = [fault["t"] for fault in happened[1:]] + [float("inf")]
    for fault, end in zip(happened, ends, strict=True):
        at = fault.pop("t")
        during = [s for s in traffic.sent if at <= s.at + s.seconds and s.at < end]
        unserved = [s for s in during if s.outcome not in (RIGHT, LEFT)]
        fault["outcomes"] = {
            name: sum(s.outcome == name for s in during) for name in {s.outcome for s in during}
        }
        fault["redials"] = sum(s.redials for s in during)
        fault["slowest_s"] = round(max((s.seconds for s in during), default=0.0), 2)
        fault["until_all_right_s"] = round(
            max((s.at + s.seconds - at for s in unserved), default=0.0), 1
        )
    outcomes = traffic.outcomes()
    served = sorted(s.seconds for s in traffic.sent if s.outcome == RIGHT)
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "minutes": options.minutes,
        "requests_per_s": options.rate,
        "seed": options.seed,
        "kinds": list(KINDS),
        "sent": len(traffic.sent),
        "right": outcomes[RIGHT],
        "right_unrefined": outcomes[UNREFINED],
        "refused": outcomes[REFUSED],
        "other": {n: c for n, c in outcomes.items() if n not in (RIGHT, UNREFINED, REFUSED)},
        "lost": len(traffic.lost()),
        "lost_requests": [
            {
                "at_s": round(s.at - began, 1),
                "kind": s.kind,
                "s": round(s.seconds, 2),
                "how": s.outcome,
            }
            for s in traffic.lost()
        ][:50],
        "said": dict(Counter(s.said for s in traffic.sent if s.said).most_common(20)),
        "p50_s": round(served[len(served) // 2], 3) if served else None,
        "p99_s": round(served[int(len(served) * 0.99)], 3) if served else None,
        "faults": happened,
    }


def start(options: argparse.Namespace, cluster: LocalCluster) -> Bench:
    """Returns when the graph is up, on a head and the five nodes that join it or on one node."""
    assert cluster.head is not None
    port, other = free_port(), free_port()
    if options.one_node:
        config = graph_config(port)
        for pool in ("ingress_pool", "model_pool", "refiner_pool"):
            config["applications"][0]["args"][pool].update(
                num_gpus=0, num_cpus=0.2, max_replicas_per_node=None, resources={}
            )
        config["applications"][0]["args"]["ingress_pool"].update(min_replicas=1, max_replicas=1)
        bench = Bench(cluster, config, [f"http://127.0.0.1:{port}"])
        bench.chance.seed(options.seed)
        bench.door_nodes = [cluster.head]
        cluster.deploy(config)
        cluster.wait_ready(f"{bench.doors[0]}/healthz")
        return bench
    bench = Bench(cluster, graph_config(port), [f"http://127.0.0.1:{p}" for p in (port, other)])
    bench.chance.seed(options.seed)
    # The first CPU node to be killed is the one without a door of ours.
    bench.cpu = [cluster.add_node(resources=CPU_NODE) for _ in range(2)]
    bench.gpu = [cluster.add_node(num_gpus=1) for _ in range(2)]
    bench.door_nodes = [cluster.head, cluster.add_node(num_cpus=1, http_port=other)]
    cluster.deploy(bench.config)
    for door in bench.doors:
        cluster.wait_ready(f"{door}/healthz")
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-node", action="store_true", help="leave out the death of nodes")
    parser.add_argument("--faults", nargs="*", choices=list(FAULTS), help="default: all")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    if options.one_node and (asked := [n for n in options.faults or () if n in OF_NODES]):
        parser.error(f"--one-node has no node for: {', '.join(asked)}")
    began = time.monotonic()
    with LocalCluster(num_cpus=1) as cluster:
        bench = start(options, cluster)
        print(f"the graph is up after {time.monotonic() - began:.0f} s", flush=True)
        try:
            found = asyncio.run(run(bench, options))
        finally:
            bench.kill_stopped()
        if options.out:
            options.out.write_text(json.dumps(found, indent=2))
        print(json.dumps(found, indent=2))
    sys.exit(found["lost"] > 0)


if __name__ == "__main__":
    main()
