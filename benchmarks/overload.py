"""What the graph does with three times the load that it can carry, and its memory over a soak.

    python -m benchmarks.overload --seconds 60 --soak-minutes 10 --out overload.json

Capacity is what a closed loop of clients gets. Then requests come on a clock, three times as fast,
each with a deadline: those that are let in should meet it, and be nine tenths of the capacity; the
rest should hear 503 at once. The client shares the machine with the graph, so it takes part of the
capacity in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.traffic import LATE, REFUSED, RIGHT, Expected, Sent, Traffic, learn
from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import load_samples
from serve_graph.launch import LocalCluster, free_port

PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLE_S = 5.0


def quantile(values: list[float], q: float) -> float | None:
    """The ``q``-quantile in milliseconds; None of nothing."""
    if not values:
        return None
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))] * 1e3, 1)


async def capacity(url: str, expected: list[Expected], clients: int, seconds: float) -> float:
    """Right answers per second of so many clients that each wait for their answer."""
    traffic = Traffic([url], expected)
    began = time.monotonic()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        while time.monotonic() < began + seconds:
            await traffic.one(http, number)
            number += clients

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return traffic.outcomes()[RIGHT] / (time.monotonic() - began)


async def overload(
    url: str, expected: list[Expected], rate: float, deadline_s: float, seconds: float
) -> list[Sent]:
    """What became of requests that came on a clock."""
    traffic = Traffic([url], expected, rate=rate, timeout_s=deadline_s)
    await traffic.run(seconds)
    return traffic.sent


def described(sent: list[Sent], seconds: float, capacity_per_s: float) -> dict[str, Any]:
    """Goodput against capacity, and how soon the others were told."""
    by = {name: [s.seconds for s in sent if s.outcome == name] for name in (RIGHT, REFUSED, LATE)}
    # The last answers come after the last request: the span is what they all took.
    span = max(s.at + s.seconds for s in sent if s.outcome == RIGHT) - min(s.at for s in sent)
    return {
        "sent": len(sent),
        "sent_per_s": round(len(sent) / seconds, 2),
        "right": len(by[RIGHT]),
        "goodput_per_s": round(len(by[RIGHT]) / span, 2),
        "goodput_of_capacity": round(len(by[RIGHT]) / span / capacity_per_s, 3),
        "refused": len(by[REFUSED]),
        "let_in_and_late": len(by[LATE]),
        "lost": sum(s.lost for s in sent),
        "right_p50_ms": quantile(by[RIGHT], 0.5),
        "right_p99_ms": quantile(by[RIGHT], 0.99),
        "refused_p50_ms": quantile(by[REFUSED], 0.5),
        "refused_p99_ms": quantile(by[REFUSED], 0.99),
    }


def resident(cluster: LocalCluster) -> dict[str, float]:
    """Megabytes of the graph's processes by what they are."""
    assert cluster.head is not None
    held: dict[str, float] = {}
    for kind in (
        "ServeReplica:segment:Model",
        "ServeReplica:segment:Refiner",
        "ServeReplica:segment:Ingress",
        "ProxyActor",
        "ServeController",
    ):
        for pid in cluster.head.pids(f"ray::{kind}"):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            name = kind.rpartition(":")[2]
            held[name] = held.get(name, 0.0) + pages * PAGE / 2**20
    return held


async def soak(
    cluster: LocalCluster, url: str, expected: list[Expected], rate: float, minutes: float
) -> dict[str, Any]:
    """Memory of each kind of process in the first and the last quarter of a steady load."""
    traffic = Traffic([url], expected, rate=rate)
    load = asyncio.create_task(traffic.run(minutes * 60))
    samples = []
    while not load.done():
        await asyncio.wait([load], timeout=SAMPLE_S)
        samples.append(await asyncio.to_thread(resident, cluster))
    quarter = max(1, len(samples) // 4)

    def mean(part: list[dict[str, float]], kind: str) -> float:
        return sum(held.get(kind, 0.0) for held in part) / len(part)

    # The first quarter is left out: caches fill.
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    return {
        "minutes": minutes,
        "requests_per_s": round(rate, 2),
        "outcomes": dict(traffic.outcomes()),
        "mib_second_and_last_quarter": {
            kind: [round(mean(early, kind), 1), round(mean(late, kind), 1)] for kind in samples[-1]
        },
    }


async def measure(cluster: LocalCluster, url: str, options: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=120) as client:
        expected = await learn(client, url, load_samples())
    await capacity(url, expected, options.clients, 5)
    most = await capacity(url, expected, options.clients, options.seconds)
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU, the client among them",
        "capacity_per_s": round(most, 2),
        "clients": options.clients,
        "deadline_s": options.deadline_s,
    }
    print(json.dumps(found), flush=True)
    for times in (1.0, options.times):
        sent = await overload(url, expected, times * most, options.deadline_s, options.seconds)
        found[f"at_{times:g}_times"] = described(sent, options.seconds, most)
        print(times, json.dumps(found[f"at_{times:g}_times"]), flush=True)
    again = await capacity(url, expected, options.clients, options.seconds)
    found["capacity_per_s_afterwards"] = round(again, 2)
    if options.soak_minutes:
        found["soak"] = await soak(cluster, url, expected, 0.7 * most, options.soak_minutes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--times", type=float, default=3.0, help="the overload, in capacities")
    parser.add_argument("--deadline-s", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop")
    parser.add_argument("--soak-minutes", type=float, default=0.0)
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    config = read_config(LOCAL, free_port())
    url = service_url(config)
    with LocalCluster(haproxy=options.haproxy) as cluster:
        cluster.deploy(config)
        cluster.wait_ready(f"{url}/healthz")
        found = asyncio.run(measure(cluster, url, options))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
