"""What the graph does with three times the load that it can carry, and its memory over a soak.

    python -m benchmarks.overload --seconds 60 --out overload.json
    python -m benchmarks.overload --soak 10

Capacity is what a closed loop of clients gets, before and after. Then requests come on a clock,
three times as fast, each with a deadline: those that are let in should meet it, and be nine tenths
of the capacity; the rest should hear 503 at once, which a process of its own takes the time of
(``benchmarks.probe``). The clients share the machine with the graph, so they take part of the
capacity in both. ``--soak MINUTES`` samples the memory of every process in place of all that. Exit
status 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.soak import FLAT, SERVING, Growth, flat
from benchmarks.traffic import (
    BROKEN,
    LATE,
    REFUSED,
    RIGHT,
    Expected,
    Sent,
    Traffic,
    connections,
    learn,
)
from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import load_samples
from serve_graph.haproxy import SUPPORTED
from serve_graph.launch import LocalCluster
from serve_graph.node import RayNode
from serve_graph.ports import free_port

AT_ONCE_S = 0.05
SETTLE = 0.1
"""Part of an overload before and after which the probe is not there."""
WARM_S = 5.0
SOAK_SHARE = 0.7


def quantile(values: list[float], q: float) -> float | None:
    """Milliseconds that a share ``q`` of the values does not exceed; None of nothing."""
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(q * len(values)) - 1)] * 1e3, 1)


async def capacity(url: str, expected: list[Expected], clients: int, seconds: float) -> float:
    """Right answers per second of so many clients that each wait for their answer."""
    traffic = Traffic([url], expected)
    began = time.monotonic()

    async def client(number: int, http: aiohttp.ClientSession) -> None:
        while time.monotonic() < began + seconds:
            await traffic.one(http, number)
            number += clients

    async with connections(120) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return traffic.outcomes()[RIGHT] / (time.monotonic() - began)


async def overload(
    url: str, expected: list[Expected], rate: float, deadline_s: float, seconds: float
) -> tuple[list[Sent], list[dict[str, float]]]:
    """What became of requests that came on a clock, and of those that ``benchmarks.probe`` sent
    meanwhile."""
    traffic = Traffic([url], expected, rate=rate, timeout_s=deadline_s)
    load = asyncio.create_task(traffic.run(seconds))
    # Once the queues are full.
    await asyncio.sleep(SETTLE * seconds)
    probe = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.probe", f"{url}/v1/segment"),
        *("--seconds", str((1 - 2 * SETTLE) * seconds), "--deadline-s", str(deadline_s)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await probe.communicate(expected[0].body("plain"))
    await load
    return traffic.sent, json.loads(said)


def described(
    sent: list[Sent], probed: list[dict[str, float]], seconds: float, capacity_per_s: float
) -> dict[str, Any]:
    """Goodput against capacity, and how soon the others were told."""
    by = {name: [s.seconds for s in sent if s.outcome == name] for name in (RIGHT, REFUSED, LATE)}
    # The last answers come after the last request: the span is what they all took.
    answered = [s for s in sent if s.outcome == RIGHT] or sent
    span = max(s.at + s.seconds for s in answered) - min(s.at for s in sent)
    refusals = [p["seconds"] for p in probed if p["status"] == 503 and p["retry_after"]]
    # Those that the probe got through are answers of the graph as well.
    right = len(by[RIGHT]) + sum(p["status"] == 200 for p in probed)
    # Too much to do is no reason to break off a stream that was let in.
    gone = [s for s in sent if s.lost or s.outcome == BROKEN]
    lost = Counter(f"{s.kind}: {s.outcome} {s.said}".strip() for s in gone)
    lost.update(
        f"probe: status {p['status']:.0f}, Retry-After {bool(p['retry_after'])}"
        for p in probed
        if p["status"] not in (200, 504) and not (p["status"] == 503 and p["retry_after"])
    )
    return {
        "sent": len(sent) + len(probed),
        "sent_per_s": round((len(sent) + len(probed)) / seconds, 2),
        "right": right,
        "goodput_per_s": round(right / span, 2),
        "goodput_of_capacity": round(right / span / capacity_per_s, 3),
        "refused": len(by[REFUSED]) + len(refusals),
        "let_in_and_late": len(by[LATE]) + sum(p["status"] == 504 for p in probed),
        "lost": sum(lost.values()),
        "lost_how": dict(lost),
        "right_p50_ms": quantile(by[RIGHT], 0.5),
        "right_p99_ms": quantile(by[RIGHT], 0.99),
        "right_longest_ms": quantile(by[RIGHT], 1.0),
        "probe_refused": len(refusals),
        "probe_refused_p50_ms": quantile(refusals, 0.5),
        "probe_refused_p99_ms": quantile(refusals, 0.99),
        "probe_refused_within_50_ms": sum(r < AT_ONCE_S for r in refusals) / max(1, len(refusals)),
        "load_client_refused_p50_ms": quantile(by[REFUSED], 0.5),
    }


def verdicts(found: dict[str, Any], deadline_s: float) -> dict[str, bool]:
    """Whether an overload was met as it should be."""
    refused_ms, longest_ms = found["probe_refused_p99_ms"], found["right_longest_ms"]
    return {
        "goodput is 90 % of capacity or more": found["goodput_of_capacity"] >= 0.9,
        "requests that were let in met their deadline": not found["let_in_and_late"]
        and not found["lost"]
        and longest_ms is not None
        and longest_ms <= deadline_s * 1e3,
        "99 of 100 refusals came within 50 ms": refused_ms is not None
        and refused_ms < AT_ONCE_S * 1e3,
    }


def tell(judged: dict[str, bool]) -> None:
    for what, holds in judged.items():
        print(f"{'holds' if holds else 'FAILS'}: {what}", flush=True)


async def learned(url: str) -> list[Expected]:
    async with connections(120) as client:
        return await learn(client, url, load_samples())


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Capacity, as much as that, the overload, capacity again."""
    expected = await learned(url)
    await capacity(url, expected, options.clients, WARM_S)
    before = await capacity(url, expected, options.clients, options.seconds / 2)
    parts = {}
    for times in (1.0, options.times):
        seconds = options.seconds / 2 if times == 1 else options.seconds
        sent, probed = await overload(url, expected, times * before, options.deadline_s, seconds)
        parts[times] = (sent, probed, seconds)
    after = await capacity(url, expected, options.clients, options.seconds / 2)
    most = (before + after) / 2
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} shared cores, {platform.machine()}, no GPU, client included",
        "capacity_per_s": round(most, 2),
        "capacity_before_and_after_per_s": [round(before, 2), round(after, 2)],
        "clients": options.clients,
        "deadline_s": options.deadline_s,
    }
    for times, (sent, probed, seconds) in parts.items():
        found[f"at_{times:g}_times"] = described(sent, probed, seconds, most)
    found["verdicts"] = verdicts(found[f"at_{options.times:g}_times"], options.deadline_s)
    print(json.dumps(found, indent=2), flush=True)
    tell(found["verdicts"])
    return found


async def soak(node: RayNode, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of every process under a steady load of ``SOAK_SHARE`` of the capacity."""
    expected = await learned(url)
    await capacity(url, expected, options.clients, WARM_S)
    rate = SOAK_SHARE * await capacity(url, expected, options.clients, options.seconds / 2)
    traffic, growth = Traffic([url], expected, rate=rate), Growth(node)
    await growth.watch(asyncio.create_task(traffic.run(options.soak * 60)))
    rows = growth.rows()
    for row in rows:
        print(
            f"{row['process'][:32]:32} {row['pid']:7}  {row['mb_first']:7.1f} MB -> "
            f"{row['mb_last']:7.1f} MB  {row['mb_per_minute']:+.3f} MB/minute"
        )
        if row["process"] in SERVING:
            print(" " * 34 + " ".join(f"{held:.0f}" for held in row["mb_by_minute"]))
    replaced = growth.replaced()
    for row in replaced:
        what = " and ".join(word for word in ("came", "went") if row[word])
        print(f"{row['process'][:32]:32} {row['pid']:7}  {what} with {row['mb_last']:.1f} MB")
    outcomes = dict(traffic.outcomes())
    print(f"{options.soak:g} minutes at {rate:.1f} requests/s: {outcomes}")
    judged = {
        f"no process, nor those that serve together, grows by over {FLAT:g} MB/minute": flat(rows),
        "no process that serves came or went": not replaced,
        "no request is lost": not traffic.lost(),
    }
    tell(judged)
    return {
        "minutes": options.soak,
        "requests_per_s": round(rate, 2),
        "outcomes": outcomes,
        "processes": rows,
        "replaced": replaced,
        "verdicts": judged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--times", type=float, default=3.0, help="the overload, in capacities")
    parser.add_argument("--deadline-s", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="memory in place of load")
    parser.add_argument("--haproxy", action=argparse.BooleanOptionalAction, default=SUPPORTED)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    config = read_config(LOCAL, free_port())
    url = service_url(config)
    with LocalCluster(haproxy=options.haproxy) as cluster:
        cluster.deploy(config)
        cluster.wait_ready(f"{url}/healthz")
        if options.soak:
            assert cluster.head is not None
            found = asyncio.run(soak(cluster.head, url, options))
        else:
            found = asyncio.run(measure(url, options))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))
    sys.exit(not all(found["verdicts"].values()))


if __name__ == "__main__":
    main()
