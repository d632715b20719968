"""The planner's simulation against the real graph: throughput, p50 and p99 within 20 %?

    python benchmarks/planner.py --out planner.json

Measures the graph of ``configs/local.yaml`` with closed loops, as ``plan --measure`` does, then
sends it requests at random times and simulates the same load with what was measured just before and
after. How far measurements of the same level lie apart says how much of an error is the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.launch import LocalCluster, free_port
from serve_graph.measure import SAMPLES, Level, ask, bodies, measure, profile_of
from serve_graph.profile import Profile
from serve_graph.simulation import PoolPlan, Scenario, Simulation, arrivals

SHARES = (0.3, 0.6, 0.8)
"""Of the most that the first closed loops got through: how much is then sent."""
LOOSE = 0.2
"""How far the simulation may be off."""
SEEDS = range(8)


async def send(url: str, times: list[float], requests: Any) -> tuple[list[float], float]:
    """Each request at its time, whatever became of the others; latencies, and seconds in all."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        began = time.monotonic()

        async def one(at: float) -> float:
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            return (await ask(client, next(requests))).total

        took = await asyncio.gather(*(one(at) for at in times))
        return list(took), time.monotonic() - began


def merged(rounds: list[list[Level]]) -> list[Level]:
    """The same level of several rounds as one."""
    return [
        Level(
            same[0].clients,
            float(np.mean([level.per_s for level in same])),
            [answer for level in same for answer in level.answers],
        )
        for same in zip(*rounds, strict=True)
    ]


def simulated(
    profile: Profile, rate: float, seconds: float, args: dict[str, Any]
) -> dict[str, float]:
    """Mean over seeds of what the simulation says of this load."""
    outcomes = [
        Simulation(
            Scenario(
                profile=profile,
                model=PoolPlan(1, max_ongoing=args["model_pool"]["max_ongoing_requests"]),
                refiner=PoolPlan(1, max_ongoing=args["refiner_pool"]["max_ongoing_requests"]),
                rate=lambda _: rate,
                seconds=seconds,
                seed=seed,
            )
        ).run()
        for seed in SEEDS
    ]
    return {
        "per_s": float(np.mean([outcome.answered_per_s for outcome in outcomes])),
        "p50_s": float(np.mean([outcome.percentile(50) for outcome in outcomes])),
        "p99_s": float(np.mean([outcome.percentile(99) for outcome in outcomes])),
    }


def run(level_seconds: float, seconds: float) -> dict[str, Any]:
    settings = read_config(LOCAL, free_port())
    args = settings["applications"][0]["args"]
    # Nothing is to be refused: the simulation's queue has no bound either.
    args["model_pool"].update(max_queued_requests=1000, max_ongoing_requests=40)
    args["refiner_pool"].update(max_queued_requests=1000)
    args["ingress_pool"].update(max_queued_requests=1000, max_ongoing_requests=1000)
    args["refine_timeout_s"] = 60
    url, slots = service_url(settings), args["runtime"]["max_batch_size"]
    sample = json.loads((SAMPLES / "samples.json").read_text())[0]
    image, noun = (SAMPLES / sample["file"]).read_bytes(), sample["noun"]
    requests = bodies(image, noun, masks=False)
    rows = []
    with LocalCluster() as cluster:
        cluster.deploy(settings)
        cluster.wait_ready(f"{url}/healthz")

        def measured() -> list[Level]:
            return asyncio.run(measure(url, image, noun, slots=slots, seconds=level_seconds))

        before = measured()
        most = max(level.per_s for level in before)
        for share in SHARES:
            rng = np.random.default_rng(round(100 * share))
            times = arrivals(lambda _, rate=share * most: rate, seconds, rng)  # type: ignore[misc]
            took, whole = asyncio.run(send(url, times, requests))
            after = measured()
            profile = profile_of("local", merged([before, after]), slots, 1.0, {})
            drift = max(
                max(a.per_s, b.per_s) / min(a.per_s, b.per_s)
                for a, b in zip(before, after, strict=True)
            )
            before = after
            real = {
                "per_s": len(took) / whole,
                "p50_s": float(np.percentile(took, 50)),
                "p99_s": float(np.percentile(took, 99)),
            }
            # What was sent is what is simulated: chance decides how many that were.
            said = simulated(profile, len(took) / seconds, seconds, args)
            rows.append({"share": share, "real": real, "simulated": said, "drift": drift})
            for key in real:
                off = said[key] / real[key] - 1
                verdict = "" if abs(off) <= LOOSE else "OFF"
                print(
                    f"{share:4.0%} of capacity  {key:6}  real {real[key]:7.3f}  "
                    f"simulated {said[key]:7.3f}  {off:+6.1%}  {verdict}",
                    flush=True,
                )
            print(f"     the machine's speed changed up to {drift:.2f} times meanwhile")
    return {"profile": asdict(profile), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--level-seconds", type=float, default=6)
    parser.add_argument("--seconds", type=float, default=20, help="of random arrivals, each")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    found = run(options.level_seconds, options.seconds)
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    found["load_average"] = os.getloadavg()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
