"""Real sockets for the tests: an application behind uvicorn, and pictures to send to it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from PIL import Image
from starlette.types import ASGIApp


@contextlib.contextmanager
def served(app: ASGIApp, **options: Any) -> Iterator[str]:
    """The base URL of ``app``, served from a thread on a free port. ``options`` are uvicorn's."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), 30)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Returns once ``condition()`` holds; AssertionError when it never does. A machine that is busy
    with something else may keep the server's thread waiting for seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)


def has_ipv6() -> bool:
    """Whether this machine can listen on its own IPv6 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int = 64, height: int = 48) -> bytes:
    """A PNG with a bright disc on a dark ground."""
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[disc] = (220, 80, 30)
    return encoded(Image.fromarray(pixels))


def base64_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def sse_events(body: str) -> list[dict[str, Any]]:
    """The events of an SSE body; every frame must be whole and in the contract's form."""
    *frames, rest = body.split("\n\n")
    assert rest == "", "the stream ends inside a frame"
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame[len("data: ") :]) for frame in frames]


class connected:
    """A raw connection to the server; leaving closes it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)

    def __enter__(self) -> socket.socket:
        return self.sock

    def __exit__(self, *_: Any) -> None:
        self.sock.close()


def accepts(url: str) -> bool:
    """Whether somebody listens there."""
    try:
        with connected(url):
            return True
    except OSError:
        return False


def post_head(url: str, headers: dict[str, str]) -> bytes:
    lines = ["POST /v1/segment HTTP/1.1", f"Host: {urlsplit(url).netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post_bytes(url: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return post_head(url, {"Content-Length": str(len(content))}) + content


class Server(socketserver.ThreadingTCPServer):
    """As many clients as a test has may connect at once."""

    request_queue_size = 256


@contextlib.contextmanager
def answering(answer: bytes | Callable[[], Iterable[bytes]]) -> Iterator[str]:
    """The address of a server that gives each request these bytes, or these after each other until
    its client leaves, and closes its connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()).strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            with contextlib.suppress(ConnectionError):
                for part in [answer] if isinstance(answer, bytes) else answer():
                    self.wfile.write(part)

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
