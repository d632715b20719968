"""One Ray node on this machine as processes: started, found by what they are, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


class RayNode:
    """A program that starts a Ray node and waits, and all that runs under it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("ab") as output:
            # A session of its own: Ctrl-C in the terminal reaches us, and we stop Ray in order.
            self._ray = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether that program is still there."""
        return self._ray.poll() is None

    def pids(self, title: str = "") -> list[int]:
        """The node's processes whose command line begins with ``title``; actors are titled
        ``ray::`` and their class: ``ray::ServeReplica:segment:Refiner``."""
        return [pid for pid, line in _tree(self._ray.pid).items() if line.startswith(title)]

    def kill(self) -> None:
        """SIGKILL to every process at once: the machine is gone."""
        for pid in self.pids():
            kill(pid, signal.SIGKILL)
        self._ray.wait()

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM as an operator's ``ray stop`` gives it; what is left after ``timeout_s`` seconds
        is killed."""
        self._ray.send_signal(signal.SIGTERM)
        try:
            self._ray.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process, or find it gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _tree(root: int) -> dict[int, str]:
    """Command lines of ``root`` and its descendants that run, by process id."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    left = [root] if Path(f"/proc/{root}").exists() else []
    while left:
        pid = left.pop()
        left += children.get(pid, [])
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if line:
            found[pid] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found
