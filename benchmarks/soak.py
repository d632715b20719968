"""Whether a graph's processes grow while it serves (``benchmarks.overload --soak``)."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve_graph.node import RayNode

PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLE_S = 5.0
WARMUP = 0.3
"""Part of the time before which growth is not counted: caches fill."""
FLAT = 0.5
"""MB per minute that a process may grow by, and by which the service's ``SERVING`` may together."""
SERVING = ("Model", "Refiner", "Ingress", "ProxyActor", "ServeController", "haproxy")


def name_of(line: str) -> str:
    """What a process is, of its command line."""
    if line.startswith("ray::"):
        # "ray::ServeReplica:segment:Model.handle_request" while it works on one.
        return re.split(r"[.\s(]", line.removeprefix("ray::"))[0].rpartition(":")[2]
    words = [Path(word).name for word in line.split() if not word.startswith("-")]
    # A Python program is named by its script or module.
    return next((word for word in words if not word.startswith("python")), words[0])


def resident(node: RayNode) -> dict[tuple[int, str], float]:
    """Resident MB of each process of a node, by process id and what it is."""
    held: dict[tuple[int, str], float] = {}
    for pid in node.pids():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
        if line.strip():
            held[pid, name_of(line)] = pages * PAGE / 1e6
    return held


@dataclass
class Growth:
    """Samples of every process while a load runs."""

    node: RayNode
    at: list[float] = field(default_factory=list)
    held: list[dict[tuple[int, str], float]] = field(default_factory=list)

    async def watch(self, load: asyncio.Task[Any]) -> None:
        """Sample until the load is through; raises what it raised."""
        while not load.done():
            await asyncio.wait([load], timeout=SAMPLE_S)
            self.at.append(time.monotonic())
            self.held.append(await asyncio.to_thread(resident, self.node))
        load.result()

    def replaced(self) -> list[dict[str, Any]]:
        """Each process of ``SERVING`` that was not there all the time after the warm-up: whether it
        ``came`` or ``went`` in that time, and the MB that it had when it was first and last seen
        in it. One that was killed for its memory, and the one in its place, are among them."""
        samples = self.held[round(WARMUP * len(self.at)) :]
        rows = []
        for pid, process in sorted(set().union(*samples)):
            came, went = ((pid, process) not in samples[end] for end in (0, -1))
            if process in SERVING and (came or went):
                seen = [held[pid, process] for held in samples if (pid, process) in held]
                row = {
                    "process": process,
                    "pid": pid,
                    "came": came,
                    "went": went,
                    "mb_first": round(seen[0], 1),
                    "mb_last": round(seen[-1], 1),
                }
                rows.append(row)
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Of each process that was there all the time after the warm-up: MB at the beginning and
        the end of that time, and MB per minute of the line through it; growing ones first."""
        first = round(WARMUP * len(self.at))
        # A line through a curve that levels out says nothing of what comes after.
        by_minute = [
            int(np.searchsorted(self.at, self.at[0] + 60 * minute))
            for minute in range(int((self.at[-1] - self.at[0]) / 60) + 1)
        ]
        minutes = (np.array(self.at[first:]) - self.at[first]) / 60
        samples = self.held[first:]
        rows = []
        for key in set(samples[0]).intersection(*samples):
            megabytes = np.array([held[key] for held in samples])
            slope = float(np.polyfit(minutes, megabytes, 1)[0])
            row = {
                "process": key[1],
                "pid": key[0],
                "mb_first": round(float(megabytes[0]), 1),
                "mb_last": round(float(megabytes[-1]), 1),
                "mb_per_minute": round(slope, 3),
                "mb_by_minute": [round(self.held[n].get(key, 0.0), 1) for n in by_minute],
            }
            rows.append(row)
        return sorted(rows, key=lambda row: -float(row["mb_per_minute"]))


def flat(rows: list[dict[str, Any]]) -> bool:
    """No process grows, nor do those that serve requests together."""
    serving = sum(row["mb_per_minute"] for row in rows if row["process"] in SERVING)
    return serving <= FLAT and all(row["mb_per_minute"] <= FLAT for row in rows)
