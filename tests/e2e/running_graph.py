"""What the tests hold of a running graph."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from serve_graph.demo import Sample
from serve_graph.launch import REPOSITORY, LocalCluster
from serve_graph.node import RayNode

KEY = "a-key-for-the-tests"
REFINE_TIMEOUT_S = 10.0


class Driver:
    """A process with a client of the graph; see driver.py."""

    def __init__(self, address: str | None, environment: dict[str, str]) -> None:
        given = [] if address is None else [address]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py")), *given],
            env={**environment, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._reply() == {"ok": "connected"}

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        # Libraries may print on their own account; replies are the lines that are JSON objects.
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the driver ended")

    def ask(self, command: str, **ask: Any) -> Any:
        """What the driver's client gave: ``{"ok": ...}`` or the RequestError's parts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, ask]) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class Graph:
    """Where the graph is, and ways to it."""

    cluster: LocalCluster
    config: dict[str, Any]
    """What is deployed, but for what a test changes and changes back."""
    url: str
    http: httpx.Client
    driver: Driver
    environment: dict[str, str]
    health: list[int]
    """Statuses of /healthz from the deployment to the first 200."""

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """What the replicas of each half say about themselves."""
        reply = self.driver.ask("stats")
        assert "ok" in reply, reply
        halves: dict[str, list[dict[str, Any]]] = reply["ok"]
        return halves

    def pids(self, title: str) -> list[int]:
        """Processes of the head by their title, ``ray::ServeReplica:segment:Model`` for one."""
        assert self.cluster.head is not None
        return self.cluster.head.pids(title)

    def deploy(self, config: dict[str, Any], seconds: float = 300.0) -> None:
        """Deploy and wait until every replica is as the config says."""
        self.cluster.deploy(config)
        end = time.monotonic() + seconds
        while not self.settled():
            assert time.monotonic() < end, self.cluster.status()
            time.sleep(0.5)

    def settled(self) -> bool:
        """Whether every replica that there is to be has started."""
        (application,) = self.cluster.status()["applications"].values()
        deployments = application["deployments"].values()
        healthy = all(one["status"] == "HEALTHY" for one in deployments)
        return bool(application["status"] == "RUNNING" and deployments and healthy)

    def count(self, half: str, key: str) -> int:
        """One number of all replicas of a half together."""
        return sum(replica[key] for replica in self.stats()[half])


def listening_beyond_loopback(node: RayNode) -> dict[int, list[int]]:
    """TCP ports on which a node's processes listen for other machines too, by process."""
    found: dict[int, list[int]] = {}
    for pid in node.pids():
        sockets = set()
        with contextlib.suppress(FileNotFoundError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sockets.add(os.readlink(fd))
        ports = [port for inode, port in _listeners() if f"socket:[{inode}]" in sockets]
        if ports:
            found[pid] = ports
    return found


def _listeners() -> list[tuple[str, int]]:
    """Inode and port of every TCP socket that listens on an address other than loopback's."""
    lines = [line for table in ("tcp", "tcp6") for line in _table(table)]
    listen, loopback = "0A", ("7F", "00000001000000", "0100007F")
    return [
        (fields[9], int(fields[1].rpartition(":")[2], 16))
        for fields in map(str.split, lines)
        if fields[3] == listen and not fields[1].partition(":")[0].endswith(loopback)
    ]


def _table(name: str) -> list[str]:
    return Path(f"/proc/net/{name}").read_text().splitlines()[1:]


def body(sample: Sample, **fields: Any) -> dict[str, Any]:
    image = base64.b64encode(sample.image).decode()
    return {"object": sample.noun, "image_url": image, **fields}


def sse(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data:"):
            yield json.loads(line[5:])


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer in what does not change from call to call."""
    skipped = ("request_id", "metrics", "type", "chunk", "completed")
    return {key: value for key, value in answer.items() if key not in skipped}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def enlarged(sample: Sample, width: int, height: int) -> bytes:
    """The picture as a PNG of many pixels, which nobody can decode in part."""
    picture = io.BytesIO()
    small = Image.open(io.BytesIO(sample.image)).convert("RGB")
    small.resize((width, height), Image.Resampling.NEAREST).save(picture, "PNG", compress_level=1)
    return picture.getvalue()
