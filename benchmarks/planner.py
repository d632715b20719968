"""The planner's simulation against the real graph: throughput, p50 and p99 within 20 %?

    python -m benchmarks.planner --out planner.json
    python -m benchmarks.planner --profile serve_graph/profiles/nano-on-cpu.json --machine "..."

Measures the graph of ``configs/local.yaml`` with closed loops and by the CPU time of its processes,
which share this machine's cores with each other and with the client. Then it sends requests, at
random times and from closed loops, and simulates the same load with what was measured just before
and after: the random times are the same in both. A shared machine's cores change their speed from
minute to minute: all times are counted at the speed that the cores had during the load
(``benchmarks.core_speed``). How far the two measurements of a level then lie apart says how much of
an error is left to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import time
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.core_speed import CoreSpeed
from serve_graph import cpu_time
from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.arrivals import Arrivals, ClosedLoop, Poisson, Recorded
from serve_graph.cpu_time import CpuTime
from serve_graph.demo import load_samples
from serve_graph.launch import LocalCluster
from serve_graph.measure import (
    WARMUP,
    Level,
    ask,
    bodies,
    closed_loop,
    measure,
    profile_in_cpu_time,
)
from serve_graph.ports import free_port
from serve_graph.profile import Profile
from serve_graph.simulated_pool import PoolPlan
from serve_graph.simulation import Scenario, Simulation

SHARES = (0.3, 0.6, 0.85)
"""Of the most that the closed loops got through: how much is then sent at random times."""
CLIENTS = (3, 6, 12)
"""Closed loops of other sizes than the measured ones."""
LOOSE = 0.2
"""How far the simulation may be off."""
SEEDS = range(8)
SETTLE_S = 10.0
IDLE_S = 10.0
"""What runs all the time is looked at for so long, so long after the graph's first requests: what
starts a graph goes on for a while after it answers."""


@dataclass(frozen=True)
class Seen:
    """A load, as it was answered or as it was simulated."""

    per_s: float
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, latencies: Any, per_s: float) -> Seen:
        return cls(per_s, float(np.percentile(latencies, 50)), float(np.percentile(latencies, 99)))


def mixed() -> Iterator[bytes]:
    """Requests about every shipped sample in turn, each with other bytes."""
    each = [bodies(sample.image, sample.noun, masks=False) for sample in load_samples()]
    return itertools.chain.from_iterable(zip(*each, strict=True))


async def send(url: str, times: list[float], requests: Iterator[bytes]) -> Seen:
    """Each request at its time, whatever became of the others."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        began = time.monotonic()

        async def one(at: float) -> float:
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            return (await ask(client, next(requests))).total

        took = await asyncio.gather(*(one(at) for at in times))
        return Seen.of(took, len(times) / (time.monotonic() - began))


async def loop(url: str, clients: int, seconds: float, requests: Iterator[bytes]) -> Seen:
    """So many clients, each with its next request as soon as it has its answer."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        level = await closed_loop(client, requests, clients, seconds)
    return Seen.of([answer.total for answer in level.answers], level.per_s)


def at_speed(level: Level, slowness: float) -> Level:
    """A level as it would have been on cores so many times slower."""
    assert level.cpu is not None
    return Level(
        level.clients,
        level.per_s / slowness,
        [
            replace(
                answer,
                total=answer.total * slowness,
                slot=answer.slot * slowness,
                refine=None if answer.refine is None else answer.refine * slowness,
                prepare=answer.prepare * slowness,
            )
            for answer in level.answers
        ],
        level.cpu.each(1 / slowness),
    )


def profile_at_speed(profile: Profile, slowness: float) -> Profile:
    """A profile as it would have been measured on cores so many times slower."""

    def slower(times: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(seconds * slowness for seconds in times)

    return replace(
        profile,
        slot_s=slower(profile.slot_s),
        refine_s=slower(profile.refine_s),
        overhead_s=slower(profile.overhead_s),
        door_s=profile.door_s * slowness,
    )


def merged(rounds: list[list[Level]]) -> list[Level]:
    """The same level of several rounds as one."""
    found = []
    for same in zip(*rounds, strict=True):
        answers = [answer for level in same for answer in level.answers]
        parts = [level.cpu for level in same if level.cpu is not None]
        cpu = CpuTime(*np.mean([list(asdict(part).values()) for part in parts], axis=0).tolist())
        per_s = float(np.mean([level.per_s for level in same]))
        found.append(Level(same[0].clients, per_s, answers, cpu))
    return found


def simulated(
    profile: Profile,
    arrivals: Arrivals,
    seconds: float,
    cores: float,
    share: float,
    args: dict[str, Any],
) -> Seen:
    """Mean over seeds of what the simulation says of this load."""
    closed = isinstance(arrivals, ClosedLoop)
    rows = []
    for seed in SEEDS:
        outcome = Simulation(
            Scenario(
                profile=profile,
                model=PoolPlan(1, max_ongoing=args["model_pool"]["max_ongoing_requests"]),
                refiner=PoolPlan(1, max_ongoing=args["refiner_pool"]["threads"]),
                arrivals=arrivals,
                seconds=seconds,
                warmup_s=WARMUP * seconds if closed else 0.0,
                refined_share=share,
                cores=cores,
                seed=seed,
            )
        ).run()
        per_s = outcome.answered_per_s
        if isinstance(arrivals, ClosedLoop):
            # As it is measured: nobody ever pauses.
            per_s = arrivals.clients / float(outcome.latency.mean())
        rows.append(asdict(Seen.of(outcome.latency, per_s)))
    return Seen(**{key: float(np.mean([row[key] for row in rows])) for key in rows[0]})


def compared(name: str, real: Seen, said: Seen) -> dict[str, Any]:
    """Print a load's three numbers with their errors; all of it as a row."""
    row: dict[str, Any] = {"load": name, "real": asdict(real), "simulated": asdict(said)}
    row["error"] = {key: row["simulated"][key] / row["real"][key] - 1 for key in row["real"]}
    for key, off in row["error"].items():
        verdict = "within 20 %" if abs(off) <= LOOSE else "OFF"
        print(
            f"{name:22} {key:6}  real {row['real'][key]:7.3f}  "
            f"simulated {row['simulated'][key]:7.3f}  {off:+6.1%}  {verdict}",
            flush=True,
        )
    return row


def drift(before: list[Level], after: list[Level]) -> float:
    """How much the speed of the same level changed, at most."""
    pairs = [(a.per_s, b.per_s) for a, b in zip(before, after, strict=True)]
    return max(max(pair) / min(pair) for pair in pairs)


def run(options: argparse.Namespace) -> dict[str, Any]:
    settings = read_config(LOCAL, free_port())
    args = settings["applications"][0]["args"]
    # Nothing is to be refused: the simulation's queue has no bound either.
    args["model_pool"].update(max_queued_requests=1000, max_ongoing_requests=40)
    args["refiner_pool"].update(max_queued_requests=1000)
    args["ingress_pool"].update(max_queued_requests=1000, max_ongoing_requests=2000)
    args["runtime"].update(max_held_requests=1000)
    args["refine_timeout_s"] = 60
    url, slots = service_url(settings), args["runtime"]["max_batch_size"]
    requests, seconds = mixed(), options.seconds
    loads: list[tuple[str, Arrivals, Seen, float]] = []
    with CoreSpeed() as speed, LocalCluster() as cluster:
        cluster.deploy(settings)
        cluster.wait_ready(f"{url}/healthz")

        def now() -> CpuTime:
            assert cluster.head is not None
            return cpu_time.read(cluster.head)

        def measured() -> list[Level]:
            """The levels at the speed of ``usual``."""
            looks: list[float] = []

            def look() -> CpuTime:
                looks.append(time.monotonic())
                return now()

            levels = asyncio.run(
                measure(url, requests, slots=slots, seconds=options.level_seconds, cpu_time=look)
            )
            # At the beginning and the end of each.
            slow = [speed.slowness(a, b) for a, b in zip(looks[::2], looks[1::2], strict=True)]
            return [at_speed(level, usual / s) for level, s in zip(levels, slow, strict=True)]

        asyncio.run(loop(url, 2, 2.0, requests))
        time.sleep(SETTLE_S)
        started, began = now(), time.monotonic()
        time.sleep(IDLE_S)
        idle = (now() - started).each(time.monotonic() - began)
        usual = speed.slowness(began, time.monotonic())
        before = measured()
        most = max(level.per_s for level in before)

        def under(name: str, arrivals: Arrivals, load: Coroutine[Any, Any, Seen]) -> None:
            """Keep how this load is answered, and how slow the cores were meanwhile."""
            began = time.monotonic()
            real = asyncio.run(load)
            loads.append((name, arrivals, real, speed.slowness(began, time.monotonic()) / usual))

        for share in SHARES:
            rng = np.random.default_rng(round(100 * share))
            times = Poisson(lambda _, rate=share * most: rate).times(seconds, rng)  # type: ignore[misc]
            under(f"{share:.0%} of capacity", Recorded(tuple(times)), send(url, times, requests))
        for clients in CLIENTS:
            under(
                f"{clients} clients",
                ClosedLoop(clients),
                loop(url, clients, seconds / 2, requests),
            )
        after = measured()
    levels = merged([before, after])
    # What runs all the time, the graph's own idling included, is not there for requests.
    cores = (os.cpu_count() or 1) - idle.machine
    machine = options.machine or f"{platform.machine()}, {os.cpu_count()} shared cores, no GPU"
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "model": "nano",
        "pictures": "the shipped samples",
        "masks": False,
        "times": "CPU seconds, a core to each replica",
    }
    profile = profile_in_cpu_time(options.name, levels, slots, idle, about)
    answers = [answer for level in levels for answer in level.answers]
    refined = sum(answer.refine is not None for answer in answers) / len(answers)
    others = max(
        level.per_s * (level.cpu.machine - level.cpu.ours) for level in levels if level.cpu
    )
    slowness = [slow for *_, slow in loads]
    print(
        f"{cores:.2f} cores free; a request's CPU: model {1e3 / profile.model_per_s:.1f} ms in a "
        f"full batch, {1e3 * profile.slot_s[0]:.1f} ms alone, refiner "
        f"{1e3 * np.mean(profile.refine_s):.1f} ms, door {1e3 * profile.door_s:.1f} ms\n"
        f"other programs had up to {others:.2f} cores; the same work took the cores "
        f"{min(slowness):.2f} to {max(slowness):.2f} of its usual time during the loads; beside "
        f"that, the graph's speed changed up to {drift(before, after):.2f} times meanwhile",
        flush=True,
    )
    rows = []
    for name, arrivals, real, slow in loads:
        span = seconds / 2 if isinstance(arrivals, ClosedLoop) else seconds
        said = simulated(profile_at_speed(profile, slow), arrivals, span, cores, refined, args)
        rows.append(compared(name, real, said))
    good = sum(abs(off) <= LOOSE for row in rows for off in row["error"].values())
    print(f"{good} of {3 * len(rows)} within {LOOSE:.0%}", flush=True)
    if options.profile:
        profile.save(options.profile)
    return {
        "machine": machine,
        "capacity_per_s": most,
        "cores": cores,
        "others_cores": others,
        "slowness": {name: slow for name, _, _, slow in loads},
        "drift": drift(before, after),
        "refined_share": refined,
        "profile": asdict(profile),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--level-seconds", type=float, default=6)
    parser.add_argument("--seconds", type=float, default=50, help="of random arrivals, each")
    parser.add_argument("--profile", type=Path, help="write what was measured here")
    parser.add_argument("--name", default="nano-on-cpu", help="of the profile")
    parser.add_argument("--machine", help="what is written down as the machine")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    found = run(options)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
