"""The graph in both serving modes beside one process: the same two stages, the same cores, one run.

    python benchmarks/graph.py --out graph.json

Everything is up at once and measured in turns, so that the ratios hold on a machine whose clock
wanders; what does not start or fails requests is said so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kestrel import InferenceEngine, RuntimeConfig
from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.launch import REPOSITORY, LaunchError, LocalCluster, free_port
from serve_graph.measure import SAMPLES, bodies

LOGS = Path(tempfile.gettempdir()) / "graph-benchmark"
NAMES = ("graph", "defaults", "one-process")
KILOBYTES = 300
CLIENTS = 16
START_S = 300.0
SLOW_MODE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}
"""Serve as it comes."""
ONE_PROCESS = """
import sys, uvicorn
from kestrel.config import RuntimeConfig
from kestrel.server.http import create_app
app = create_app(RuntimeConfig(torch_threads=1, max_batch_size=8, refiner_threads=2))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""
"""``python -m kestrel serve`` with the graph's batch and threads."""


@dataclass
class System:
    """One server under test."""

    name: str
    url: str
    problem: str = ""
    """Why it is not measured."""
    log: Path | None = None
    seen: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Load -> one entry per round."""


def picture() -> tuple[bytes, str]:
    """The shipped sample, filled to ``KILOBYTES`` with bytes behind its end, and its noun."""
    sample = json.loads((SAMPLES / "samples.json").read_text())[0]
    content = (SAMPLES / sample["file"]).read_bytes()
    return content.ljust(KILOBYTES * 1000, b"\0"), sample["noun"]


def requests(masks_each: int) -> Iterator[bytes]:
    """Bodies of which each ``masks_each``-th asks for masks; 0: none."""
    image, noun = picture()
    plain, masks = bodies(image, noun, False), bodies(image, noun, True)
    for number in itertools.count():
        yield next(masks if masks_each and number % masks_each == 0 else plain)


async def closed_loop(url: str, clients: int, seconds: float, masks_each: int) -> dict[str, float]:
    """So many clients, one request each at a time."""
    took: list[float] = []
    failed = 0
    asked = requests(masks_each)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(until: float) -> None:
            nonlocal failed
            while time.monotonic() < until:
                body = next(asked)
                began = time.monotonic()
                headers = {"Content-Type": "application/json"}
                try:
                    reply = await client.post("/v1/segment", content=body, headers=headers)
                    good = reply.status_code == 200 and bool(reply.json().get("path"))
                except httpx.HTTPError:
                    good = False
                if good:
                    took.append(time.monotonic() - began)
                else:
                    failed += 1

        began = time.monotonic()
        await asyncio.gather(*(one(began + seconds) for _ in range(clients)))
        whole = time.monotonic() - began
    return {
        "requests_per_s": len(took) / whole,
        "p50_ms": float(np.percentile(took, 50)) * 1e3 if took else float("nan"),
        "p99_ms": float(np.percentile(took, 99)) * 1e3 if took else float("nan"),
        "failed": failed,
    }


async def in_process(seconds: float) -> dict[str, float]:
    """One caller in this process, without HTTP; and the CPU seconds that both stages take."""
    config = RuntimeConfig(torch_threads=1, max_batch_size=8, refiner_threads=2)
    image, noun = picture()
    took: list[float] = []
    async with await InferenceEngine.create(config) as engine:
        cpu, began = time.process_time(), time.monotonic()
        for number in itertools.count():
            started = time.monotonic()
            if started > began + seconds:
                break
            await engine.segment(image=image + number.to_bytes(8, "big"), object=noun)
            took.append(time.monotonic() - started)
        cpu = time.process_time() - cpu
    return {"p50_ms": statistics.median(took) * 1e3, "cpu_s": cpu / len(took)}


@contextlib.contextmanager
def process(name: str, command: list[str], port: int, folder: Path) -> Iterator[System]:
    """A server in a process group of its own, killed at the end."""
    system = System(name, f"http://127.0.0.1:{port}", log=folder / f"{name}.log")
    assert system.log is not None
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with system.log.open("wb") as log:
        child = subprocess.Popen(
            command,
            env=environment,
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        system.problem = started(system, child)
        yield system
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)


def started(system: System, child: subprocess.Popen[bytes]) -> str:
    """ "" once a request was answered, else what went wrong."""
    assert system.log is not None
    body = next(requests(0))
    headers = {"Content-Type": "application/json"}
    reason = "no connection"
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if child.poll() is not None:
            return f"it ended: {system.log.read_text(errors='replace')[-300:]}"
        try:
            reply = httpx.post(
                f"{system.url}/v1/segment", content=body, headers=headers, timeout=60
            )
            if reply.status_code == 200:
                return ""
            reason = f"HTTP {reply.status_code}: {reply.text[:200]}"
            if reply.status_code < 500:
                return reason
        except httpx.HTTPError as error:
            reason = repr(error)
        time.sleep(0.5)
    return f"not ready after {START_S:g} s: {reason}"


@contextlib.contextmanager
def graph(name: str, environment: dict[str, str] | None) -> Iterator[System]:
    """This graph on a cluster of its own."""
    settings = read_config(LOCAL, free_port())
    settings["applications"][0]["args"]["refine_timeout_s"] = 60
    system = System(name, service_url(settings))
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(LocalCluster(environment=environment))
            cluster.deploy(settings)
            cluster.wait_ready(f"{system.url}/healthz", timeout_s=START_S)
        except (LaunchError, OSError) as error:
            system.problem = repr(error)
        yield system


def loads(seconds: float) -> dict[str, tuple[int, float, int]]:
    """Load -> the arguments of ``closed_loop`` after the URL."""
    return {
        "1 client": (1, seconds, 0),
        f"{CLIENTS} clients": (CLIENTS, seconds, 0),
        f"{CLIENTS} clients, masks for half": (CLIENTS, seconds, 2),
    }


def one_process(folder: Path) -> contextlib.AbstractContextManager[System]:
    """The one-process server."""
    port = free_port()
    return process("one process", [sys.executable, "-c", ONE_PROCESS, str(port)], port, folder)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start what was asked for, measure in turns, stop it."""
    folder = options.logs
    starts: dict[str, Callable[[], contextlib.AbstractContextManager[System]]] = {
        "graph": lambda: graph("graph", None),
        "defaults": lambda: graph("graph, Serve's defaults", SLOW_MODE),
        "one-process": lambda: one_process(folder),
    }
    bases = [asyncio.run(in_process(options.seconds))]
    with contextlib.ExitStack() as stack:
        systems = [stack.enter_context(starts[name]()) for name in options.only]
        for number, (name, load) in itertools.product(
            range(options.rounds), loads(options.seconds).items()
        ):
            # The order turns, so that nobody always comes after the same neighbour.
            turn = number % len(systems)
            for system in systems[turn:] + systems[:turn]:
                if not system.problem:
                    told = asyncio.run(closed_loop(system.url, *load))
                    system.seen.setdefault(name, []).append(told)
    bases.append(asyncio.run(in_process(options.seconds)))
    found: dict[str, Any] = {
        "in process": {key: statistics.median(b[key] for b in bases) for key in bases[0]},
        "systems": {},
    }
    for system in systems:
        medians = {
            name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
            for name, rounds in system.seen.items()
        }
        found["systems"][system.name] = {"problem": system.problem, "loads": medians}
    return found


def table(found: dict[str, Any]) -> str:
    """The result for people, with what the targets speak of."""
    base = found["in process"]
    cores = os.cpu_count() or 1
    bound = cores / base["cpu_s"]
    lines = [
        f"in process: p50 {base['p50_ms']:.1f} ms, {base['cpu_s'] * 1e3:.0f} ms of CPU; "
        f"{cores} cores allow {bound:.1f} requests/s",
    ]
    for name, system in found["systems"].items():
        if system["problem"]:
            lines.append(f"{name}: not measured: {system['problem']}")
        for load, told in system["loads"].items():
            lines.append(
                f"{name:24} {load:28} {told['requests_per_s']:7.2f} rps "
                f"({told['requests_per_s'] / bound:4.0%})  p50 {told['p50_ms']:8.1f} ms "
                f"({told['p50_ms'] - base['p50_ms']:+8.1f})  p99 {told['p99_ms']:8.1f} ms  "
                f"failed {told['failed']:.0f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each load in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=LOGS, help="logs of servers")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="systems to run")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    found = run(options)
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    found["load_average"] = os.getloadavg()
    print(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
