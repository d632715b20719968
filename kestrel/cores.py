"""Cores of the machine: how many this process may use, how many nobody uses, and who goes first."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container's limits are."""
RUNNING = Path("/proc/loadavg")
"""Its fourth field begins with how many threads of the machine run or are ready to."""


BEHIND = 5
"""By how much a thread that computes is nicer than its process: it has a quarter of a core that
another thread is never done with, and all of what the others leave."""


def give_way() -> None:
    """Have this thread, and those that it starts, go behind those that answer requests: what these
    do within a millisecond would else wait for those that compute all the time. Idempotent. Nothing
    happens where a niceness is not a thread's own."""
    if sys.platform == "linux":
        own = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + BEHIND)


def idle_cores() -> int:
    """Cores of the machine for which nothing is ready to run besides the caller: other processes'
    work counts. All others where the kernel does not tell."""
    cores = os.cpu_count() or 1
    try:
        running = int(RUNNING.read_text().split()[3].partition("/")[0])
    except (OSError, IndexError, ValueError):  # another kernel than Linux
        running = 1
    return max(0, cores - running)


def usable_cores() -> int:
    """Cores that this process may use."""
    # There is no ``sched_getaffinity`` on macOS.
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(there or 1, _quota(CGROUP))))


def _quota(folder: Path) -> float:
    """Cores whose time a container is limited to; infinity where it is not."""
    for limit, period in (
        ("cpu.max", "cpu.max"),
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),  # before cgroup 2
    ):
        with contextlib.suppress(OSError, ValueError, IndexError, ZeroDivisionError):
            # Not a number where there is no limit, or -1.
            cores = int((folder / limit).read_text().split()[0]) / int(
                (folder / period).read_text().split()[-1]
            )
            if cores > 0:
                return cores
    return math.inf
