"""CPU time that a graph on this machine has had, by stage.

Where model, refiners and HTTP door share a machine's cores, how long a stage took says how busy the
others were; what it had of the processor is its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from serve_graph.node import RayNode

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuTime:
    """Seconds of CPU."""

    model: float
    refiner: float
    door: float
    """Everything else of the cluster, and this process: the client."""
    machine: float
    """All that ran on the machine, the above included."""

    def __sub__(self, other: CpuTime) -> CpuTime:
        return CpuTime(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def each(self, requests: float) -> CpuTime:
        """A request's part (or a second's)."""
        return CpuTime(*(seconds / requests for seconds in astuple(self)))

    @property
    def ours(self) -> float:
        """Of the graph and its client."""
        return self.model + self.refiner + self.door


def read(node: RayNode, application: str = "segment") -> CpuTime:
    """What the processes of a one-node cluster and of its client have had since they began."""
    title = f"ray::ServeReplica:{application}"
    model, refiner = node.pids(f"{title}:Model"), node.pids(f"{title}:Refiner")
    door = set(node.pids()) - {*model, *refiner}
    return CpuTime(
        _used(model), _used(refiner), _used(door) + time.process_time(), _used_by_machine()
    )


def _used(pids: Iterable[int]) -> float:
    """utime and stime of processes, seconds; see proc(5)."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def _used_by_machine() -> float:
    """All but idle and waiting for disks, what the hypervisor took included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S
