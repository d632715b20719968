"""The graph in both serving modes beside other servers: the same stages and cores, one run.

    python -m benchmarks.graph --rivals /path/to/venv/bin/python --out graph.json

Everything is up at once and measured in turns, so that the ratios hold on a machine whose clock
wanders. LitServe and BentoML run from an environment of their own (``INSTALL`` makes one).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kestrel import InferenceEngine, RuntimeConfig
from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.environment import KEEP_MEMORY
from serve_graph.errors import LaunchError
from serve_graph.launch import REPOSITORY, LocalCluster
from serve_graph.measure import SAMPLES
from serve_graph.ports import free_port

LOGS = Path(tempfile.gettempdir()) / "graph-benchmark"
IN_PROCESS, FAST, DEFAULTS = "in process", "graph, fast mode", "graph, Serve's defaults"
ONE, LITSERVE, BENTOML = "one process", "LitServe", "BentoML"
NAMES = (IN_PROCESS, FAST, DEFAULTS, ONE, LITSERVE, BENTOML)
INSTALL = (
    "python3 -m venv rivals && rivals/bin/pip install torch==2.13.0 "
    "litserve==0.2.19 bentoml==1.4.40 ."
)
KILOBYTES = 300
CLIENTS = 16
START_S = 300.0
CONFIG = RuntimeConfig(torch_threads=1, max_batch_size=8, refiner_threads=2)
"""What ``configs/local.yaml`` says of the model, and the threads of its refiner."""
SLOW_MODE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}
"""Serve as it comes."""
ONE_PROCESS = """
import sys, uvicorn
from benchmarks.graph import CONFIG
from kestrel.server.http import create_app
uvicorn.run(create_app(CONFIG), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""
"""``python -m kestrel serve`` with the graph's batch and threads."""

SINGLE, MANY, MASKS = "1 client", f"{CLIENTS} clients", f"{CLIENTS} clients, masks for half"
LOADS: dict[str, tuple[int, int]] = {SINGLE: (1, 0), MANY: (CLIENTS, 0), MASKS: (CLIENTS, 2)}
"""Load -> clients, and each how manieth request asks for masks (0: none)."""

ADDED_MS, OF_BOUND, OF_LITSERVE = 8.0, 0.85, 0.95
"""Targets: added median at one client; parts of the CPU's bound and of LitServe's throughput."""

Ask = Callable[[int, bool], None]
"""One request, by its number and whether it asks for masks; raises where the answer is wrong."""


def picture() -> tuple[bytes, str]:
    """The shipped sample, filled to ``KILOBYTES`` with bytes behind its end, and its noun."""
    sample = json.loads((SAMPLES / "samples.json").read_text())[0]
    content = (SAMPLES / sample["file"]).read_bytes()
    return content.ljust(KILOBYTES * 1000, b"\0"), sample["noun"]


class Asker:
    """Requests over HTTP; one connection for each thread."""

    def __init__(self, port: int) -> None:
        image, noun = picture()
        assert len(image) % 3 == 0  # so that what follows can be encoded by itself
        head = json.dumps({"object": noun, "image_url": ""})[:-2].encode()
        self._start = head + base64.b64encode(image)
        self._end = {
            masks: b'", "return_base64": ' + json.dumps(masks).encode() + b"}"
            for masks in (False, True)
        }
        self._port = port
        self._thread = threading.local()

    def __call__(self, number: int, masks: bool) -> None:
        # The model remembers pictures by their bytes, so that each gets others.
        body = self._start + base64.b64encode(number.to_bytes(9, "big")) + self._end[masks]
        connection = getattr(self._thread, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            self._thread.connection = connection
        try:
            connection.request("POST", "/v1/segment", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            self._thread.connection = None
            raise
        if reply.status != 200:
            raise RuntimeError(f"HTTP {reply.status}: {content[:200]!r}")
        answer = json.loads(content)
        if not answer["path"] or ("refined_mask_base64" in answer) != masks:
            raise RuntimeError(f"not the answer: {content[:200]!r}")


@dataclass
class System:
    """One entry of the comparison."""

    name: str
    ask: Ask
    problem: str = ""
    """Why it is not measured."""
    log: Path | None = None
    seen: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Load -> one entry per round."""


NUMBERS = itertools.count(time.time_ns())


def closed_loop(ask: Ask, clients: int, seconds: float, masks_each: int) -> dict[str, float]:
    """So many clients, one request each at a time, and this process's CPU time, seconds."""
    took: list[float] = []
    failures: list[str] = []
    until = time.monotonic() + seconds

    def one() -> None:
        while time.monotonic() < until:
            number = next(NUMBERS)
            masks = bool(masks_each) and number % masks_each == 0
            began = time.monotonic()
            try:
                ask(number, masks)
                took.append(time.monotonic() - began)
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=one) for _ in range(clients)]
    began, cpu = time.monotonic(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole, cpu = time.monotonic() - began, time.process_time() - cpu
    if failures:
        print(f"{len(failures)} failed, the first: {failures[0]}", flush=True)
    return {
        "requests_per_s": len(took) / whole,
        "p50_ms": float(np.percentile(took, 50)) * 1e3 if took else float("nan"),
        "p99_ms": float(np.percentile(took, 99)) * 1e3 if took else float("nan"),
        "cpu_ms": cpu / max(1, len(took)) * 1e3,
        "failed": len(failures),
    }


@contextlib.contextmanager
def in_process() -> Iterator[System]:
    """The stages called from this process: no HTTP, no base64, no other process."""
    image, noun = picture()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def ask(number: int, masks: bool) -> None:
        content = image + number.to_bytes(9, "big")
        work = engine.segment(image=content, object=noun, return_base64=masks)
        asyncio.run_coroutine_threadsafe(work, loop).result()

    engine = asyncio.run_coroutine_threadsafe(InferenceEngine.create(CONFIG), loop).result()
    try:
        yield System(IN_PROCESS, ask)
    finally:
        asyncio.run_coroutine_threadsafe(engine.shutdown(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def process(name: str, command: list[str], port: int, folder: Path) -> Iterator[System]:
    """A server in a process group of its own, killed at the end."""
    system = System(name, Asker(port), log=folder / f"{name}.log")
    assert system.log is not None
    quiet = {"BENTOML_DO_NOT_TRACK": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(REPOSITORY)}
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
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)
        # Workers may outlive the process that started them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def started(system: System, child: subprocess.Popen[bytes]) -> str:
    """ "" once a request was answered, else what went wrong."""
    assert system.log is not None
    reason = "no connection"
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if child.poll() is not None:
            return f"it ended: {system.log.read_text(errors='replace')[-300:]}"
        try:
            system.ask(next(NUMBERS), False)
            return ""
        except Exception as error:
            reason = repr(error)
        time.sleep(0.5)
    return f"not ready after {START_S:g} s: {reason}"


@contextlib.contextmanager
def graph(name: str, *, haproxy: bool, environment: dict[str, str] | None) -> Iterator[System]:
    """This graph on a cluster of its own."""
    port = free_port()
    settings = read_config(LOCAL, port)
    settings["applications"][0]["args"]["refine_timeout_s"] = 60
    system = System(name, Asker(port))
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(LocalCluster(haproxy=haproxy, environment=environment))
            cluster.deploy(settings)
            cluster.wait_ready(f"{service_url(settings)}/healthz", timeout_s=START_S)
        except (LaunchError, OSError) as error:
            system.problem = repr(error)
        yield system


def rival(name: str, options: argparse.Namespace) -> contextlib.AbstractContextManager[System]:
    """LitServe or BentoML from its own environment."""
    python, port = options.rivals, free_port()
    if python is None or not python.exists():
        missing = f"no environment (--rivals); make one with: {INSTALL}"
        return contextlib.nullcontext(System(name, Asker(port), missing))
    command = [str(python), "-m", "benchmarks.rival_litserve", str(port)]
    if name == BENTOML:
        service = ["benchmarks.rival_bentoml:Model", "--host", "127.0.0.1", "--port", str(port)]
        command = [str(python), "-m", "bentoml", "serve", *service]
    return process(name, command, port, options.logs)


def start(name: str, options: argparse.Namespace) -> contextlib.AbstractContextManager[System]:
    """The entry of that name, up and warm."""
    if name == IN_PROCESS:
        return in_process()
    if name == FAST:
        return graph(name, haproxy=True, environment=None)
    if name == DEFAULTS:
        return graph(name, haproxy=False, environment=SLOW_MODE)
    if name == ONE:
        port = free_port()
        return process(name, [sys.executable, "-c", ONE_PROCESS, str(port)], port, options.logs)
    return rival(name, options)


def in_turn(systems: list[System], number: int) -> list[System]:
    """The order of a round: each begins with another, every second goes backwards, so that nobody
    always comes after the same neighbour."""
    turn = number % len(systems)
    return (systems[turn:] + systems[:turn])[:: -1 if number % 2 else 1]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start what was asked for, measure in turns, stop it."""
    with contextlib.ExitStack() as stack:
        systems = []
        for name in options.only:
            systems.append(stack.enter_context(start(name, options)))
            print(f"{name}: {systems[-1].problem or 'up'}", flush=True)
        running = [system for system in systems if not system.problem]
        for system in running:
            closed_loop(system.ask, CLIENTS, min(2.0, options.seconds), 2)
        for number in range(options.rounds if running else 0):
            for load, (clients, masks_each) in LOADS.items():
                for system in in_turn(running, number):
                    told = closed_loop(system.ask, clients, options.seconds, masks_each)
                    system.seen.setdefault(load, []).append(told)
    return {system.name: {"problem": system.problem, "rounds": system.seen} for system in systems}


class Ratios:
    """What the targets speak of: medians over rounds of what was measured within one round."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def values(self, name: str, load: str, key: str) -> np.ndarray:
        """One value per round; none where the entry was not measured."""
        rounds = self._found.get(name, {}).get("rounds", {}).get(load, [])
        return np.array([told[key] for told in rounds])

    def median(self, name: str, load: str, key: str) -> float:
        """Over the rounds; NaN where the entry was not measured."""
        values = self.values(name, load, key)
        return float(np.median(values)) if len(values) else float("nan")

    def throughput(self, name: str, other: str, load: str) -> float:
        """One entry's requests per second over another's; NaN where either was not measured, or the
        other answered nothing in a round."""
        ours, theirs = (self.values(one, load, "requests_per_s") for one in (name, other))
        if not len(ours) or not len(theirs) or not theirs.all():
            return float("nan")
        return float(np.median(ours / theirs))

    def added_ms(self, name: str, load: str = SINGLE) -> float:
        """An entry's median time less that of the call in process."""
        ours, theirs = self.values(name, load, "p50_ms"), self.values(IN_PROCESS, load, "p50_ms")
        return float(np.median(ours - theirs)) if len(ours) and len(theirs) else float("nan")

    def of_bound(self, name: str, load: str) -> float:
        """Requests per second over those that all cores could do of the two stages alone, whose
        CPU time is that of the calls in process under the same load."""
        rate = self.values(name, load, "requests_per_s")
        cpu_ms = self.values(IN_PROCESS, load, "cpu_ms")
        if not len(rate) or not len(cpu_ms):
            return float("nan")
        return float(np.median(rate * cpu_ms / 1e3 / (os.cpu_count() or 1)))


def verdicts(ratios: Ratios) -> dict[str, dict[str, Any]]:
    """Each target of the fast mode, what was measured, whether it holds (None: not measured)."""
    targets = {
        f"added p50 at {SINGLE}, ms": (ratios.added_ms(FAST), -ADDED_MS),
        f"of the CPU's bound, {MANY}": (ratios.of_bound(FAST, MANY), OF_BOUND),
        f"of BentoML's throughput, {MANY}": (ratios.throughput(FAST, BENTOML, MANY), 1.0),
        f"of BentoML's throughput, {MASKS}": (ratios.throughput(FAST, BENTOML, MASKS), 1.0),
        f"of LitServe's throughput, {MANY}": (ratios.throughput(FAST, LITSERVE, MANY), OF_LITSERVE),
        f"of LitServe's throughput, {MASKS}": (ratios.throughput(FAST, LITSERVE, MASKS), 1.0),
    }
    told = {}
    for name, (value, target) in targets.items():
        held = value <= -target if target < 0 else value >= target
        told[name] = {
            "measured": value,
            "target": abs(target),
            "holds": None if np.isnan(value) else bool(held),
        }
    return told


def table(found: dict[str, Any]) -> str:
    """The result for people: medians over rounds, and the targets."""
    ratios = Ratios(found)
    lines = []
    for load in LOADS:
        lines.append(f"{load:33}     rps  of bound  of LitServe   p50 ms   added   p99 ms  failed")
        for name, system in found.items():
            if system["problem"]:
                lines.append(f"  {name:28} not measured: {system['problem']}")
                continue
            failed = ratios.values(name, load, "failed").sum()
            lines.append(
                f"  {name:28} {ratios.median(name, load, 'requests_per_s'):10.2f}"
                f"  {ratios.of_bound(name, load):8.0%}"
                f"  {ratios.throughput(name, LITSERVE, load):11.2f}"
                f"  {ratios.median(name, load, 'p50_ms'):7.1f} {ratios.added_ms(name, load):+7.1f}"
                f"  {ratios.median(name, load, 'p99_ms'):7.1f}  {failed:6.0f}"
            )
        cpu_ms = ratios.median(IN_PROCESS, load, "cpu_ms")
        lines.append(f"  the two stages take {cpu_ms:.1f} ms of CPU per request in process")
    lines.append("targets of the fast mode")
    for name, told in verdicts(ratios).items():
        word = {True: "holds", False: "MISSED", None: "not measured"}[told["holds"]]
        lines.append(f"  {name:50} {told['measured']:7.2f}  target {told['target']:5.2f}  {word}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=6, help="of each load in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rivals", type=Path, help="python with LitServe and BentoML")
    parser.add_argument("--logs", type=Path, default=LOGS, help="logs of servers")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="entries to run")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():
        # The graph's launcher sets this for its processes: here everybody has it, from the start.
        command = [sys.executable, "-m", "benchmarks.graph", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_MEMORY})
    options.logs.mkdir(parents=True, exist_ok=True)
    found = run(options)
    print(table(found))
    if options.out:
        report = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
            "load_average": os.getloadavg(),
            "targets": verdicts(Ratios(found)),
            "systems": found,
        }
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
