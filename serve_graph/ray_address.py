"""Whether Ray is at an address: asked first, as Ray itself tries for minutes, and ends the process
in the end."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from kestrel.ports import written

ANSWER_S = 10.0
"""How long a connection may take to be made, and then the first bytes on it to come, seconds."""

# Ray speaks first, in frames of HTTP/2 or, with TLS, to say that this is none. A server of another
# kind takes it for a request or for noise, and answers with text.
QUESTION = b"GET / HTTP/1.1\r\nHost: ray\r\nConnection: close\r\n\r\n"


def check_address(address: str | None) -> None:
    """ConnectionError where nobody listens at the address of a cluster, or something else than Ray.

    ``address`` as ``ray.init`` takes it. What names no host and port is left to Ray.
    """
    if address is None or address in ("", "auto"):
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        address = _found_by_ray()
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port
    except ValueError:
        return
    if place.scheme not in ("", "ray") or host is None or port is None:
        return
    wrong = _wrong(host, port)
    if wrong is not None:
        raise ConnectionError(
            f"no Ray cluster at {address}: {wrong}; for HTTP write http://{written(host, port)}"
        )
    looked_for = _taken_for(host) if not place.scheme else host
    if looked_for != host and _wrong(looked_for, port) is not None:
        raise ConnectionError(
            f"the Ray cluster at {address} stays on the loopback address, and Ray would look for "
            f"it at {looked_for}: set RAY_ADDRESS={written(host, port)} before the program starts"
        )


def _taken_for(host: str) -> str:
    """The host at which Ray looks for a cluster: for one on the loopback address the machine's own,
    unless it was told otherwise when it was imported (``environment.LOOPBACK``)."""
    try:
        from ray._private.services import resolve_ip_for_localhost

        return str(resolve_ip_for_localhost(host))
    except ImportError:  # another release of Ray
        return host


def _found_by_ray() -> str:
    """The address that Ray takes for "auto": that of a cluster on this machine, or of the last one
    that was started here, dead or not. Empty where it finds none, which it then says itself."""
    try:
        from ray._private.services import get_ray_address_from_environment

        return get_ray_address_from_environment("auto", None) or ""
    except (ImportError, OSError):  # another release of Ray; ConnectionError
        return ""


def _wrong(host: str, port: int) -> str | None:
    """Why Ray is not there; None where it may be."""
    try:
        connection = socket.create_connection((host, port), timeout=ANSWER_S)
    except OSError as error:
        return str(error)
    with connection:
        try:
            connection.sendall(QUESTION)
            said = connection.recv(1)
        except TimeoutError:
            return f"what listens there says nothing within {ANSWER_S:g} s"
        except OSError:
            return None
    return "a server of another kind answers there" if said.isalpha() else None
