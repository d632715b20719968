"""HAProxy as Serve configures it, before a service of the test's."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import accepts, until

from serve_graph import haproxy
from serve_graph.ports import free_port

SERVE_S = """\
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 60s
frontend http_frontend
    bind 127.0.0.1:{door}
    acl is_app path_beg /
    use_backend app if is_app
backend app
    server one 127.0.0.1:{server}
"""


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Called with a port of a service: the address of HAProxy before it, as Serve configures it."""
    with contextlib.ExitStack() as running:

        def start(server: int, amended: Callable[[str], str] = haproxy.amended) -> str:
            door, configuration = free_port(), tmp_path / "haproxy.cfg"
            configuration.write_text(amended(SERVE_S.format(door=door, server=server)))
            binary = haproxy.haproxy_binary()
            assert binary is not None
            process = subprocess.Popen([binary, "-db", "-f", configuration])
            running.callback(process.wait, 20)
            running.callback(process.kill)
            url = f"http://127.0.0.1:{door}"
            until(lambda: process.poll() is not None or accepts(url))
            assert process.poll() is None, "HAProxy has ended"
            return url

        yield start
