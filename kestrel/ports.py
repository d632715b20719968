"""TCP ports: how an address is written, whether it is this machine's, and whether somebody listens
there."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit


def written(host: str, port: int) -> str:
    """``host:port`` as a URL has it: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def leads_here(url: str) -> bool:
    """Whether a URL names the loopback interface, where a proxy would find another machine."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_port(number: object) -> bool:
    """Whether it is an integer that a server may be told to listen on; 0: any that is free."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= 65_535


def check_port(url: str) -> None:
    """ValueError for a URL whose port no connection can be made to: httpx takes it, and fails in
    the middle of the first request by an error that is none of its own."""
    _ = urlsplit(url).port


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens on ``port`` of an address that ``host`` names.

    What else may be wrong with an address, whoever listens there in the end knows better.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_in_use(family, address) for family, _, _, _, address in found)


def _in_use(family: int, address: tuple[Any, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Else connections count whose server has ended, for a minute.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
