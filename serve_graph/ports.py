"""TCP ports of this machine, given to the parts of clusters that live side by side."""

from __future__ import annotations

import random
import socket
from collections import deque

from kestrel.ports import is_taken, written
from serve_graph.errors import LaunchError

PORTS = range(20_000, 30_000)
"""Below those that systems lend to outgoing connections, which could take a port before it is used,
and below those that Serve gives to ingress replicas behind HAProxy."""
INGRESS_PORTS = range(30_000, 32_600)
INGRESS_BLOCK = 100
"""Ports of one cluster for its ingress replicas behind HAProxy. Serve takes them as they come and
listens as one of several on each, so that clusters of one machine that have the same ones get each
other's requests."""
_given: deque[int] = deque(maxlen=len(PORTS) // 2)
_given_blocks: deque[int] = deque(maxlen=len(INGRESS_PORTS) // INGRESS_BLOCK // 2)


def page_ports() -> dict[str, str]:
    """Ports of HAProxy's own pages, which nodes of one machine cannot share."""
    pages = ("METRICS", "STATS")
    return {f"RAY_SERVE_HAPROXY_{page}_PORT": str(free_port()) for page in pages}


def ingress_block() -> int:
    """The first of ``INGRESS_BLOCK`` ports on which nothing listens, and that this process has not
    given before, as far as it remembers."""
    blocks = INGRESS_PORTS[::INGRESS_BLOCK]
    for first in random.sample(blocks, len(blocks)):
        ports = range(first, first + INGRESS_BLOCK)
        if first not in _given_blocks and all(map(_is_free, ports)):
            _given_blocks.append(first)
            return first
    raise LaunchError(f"no {INGRESS_BLOCK} TCP ports in a row are free in {_named(INGRESS_PORTS)}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _named(ports: range) -> str:
    return f"{ports.start} to {ports.stop}"


def free_port() -> int:
    """A TCP port that nothing listens on at this moment, and that this process has not been given
    before, as far as it remembers: what it was for may be about to listen."""
    for port in random.sample(PORTS, len(PORTS)):
        if port not in _given and _is_free(port):
            _given.append(port)
            return port
    raise LaunchError(f"no TCP port from {_named(PORTS)} is free")


def require_free(host: str, port: int, what: str, option: str) -> None:
    """LaunchError where somebody listens on ``port``, 1 to 65535, of an address of this machine.

    ``what`` is to listen there; ``option``: where another port is given.
    """
    if port not in range(1, 65536):
        raise LaunchError(f"{option} must be a port from 1 to 65535, not {port!r}")
    if is_taken(host, port):
        raise LaunchError(
            f"{written(host, port)}, for {what}, is taken (by a service that already runs?): stop "
            f"what listens there, or give another port with {option}"
        )
