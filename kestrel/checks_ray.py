"""The doctor's checks of Ray: its version, and the ports that it listens on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kestrel.diagnosis import Finding, Machine, Wanted, bad, ok


def check_ray(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    version = machine.version("ray")
    if version is None:
        remedy = "pip install -c constraints.txt '.[serve]'"
        yield bad("Ray", "not installed", remedy, needed=wanted.graph)
    elif tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 58):
        yield bad("Ray", f"{version} is too old", "pip install 'ray[serve]>=2.58'")
    else:
        yield ok("Ray", version)
    host, port = wanted.http
    if machine.port_free(host, port):
        yield ok("port", f"{host}:{port} is free")
    else:
        text = f"{host}:{port} is taken (by a server that already runs?)"
        yield bad("port", text, "stop it, or set http_options.port", needed=False)
