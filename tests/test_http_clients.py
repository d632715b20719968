"""Clients that go away, that are slow, that send too much: over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from scripted import ASK, BOX, LIMITS, WELL, ScriptedBackend, refused
from serving import base64_text, connected, picture, post_bytes, post_head, served, until

from kestrel.config import Limits
from kestrel.deadlines import within
from kestrel.server import envelope
from kestrel.server.room import Room
from kestrel.server.routes import build_app

pytest_plugins = ["scripted"]


# Clients that go away


@pytest.fixture
def address(backend: ScriptedBackend) -> Iterator[str]:
    with served(build_app(backend)) as url:
        yield url


def test_a_plain_client_that_goes_away_frees_the_slot(address, backend):
    backend.script = [30.0]
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.held == 1)
    until(lambda: backend.held == 0, 3)
    assert backend.ended_by == ["CancelledError"]


def test_a_plain_client_that_goes_away_cancels_the_refinement(address, backend):
    backend.refinement = 30.0
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.begun == 2)
    until(lambda: backend.held == 0, 3)
    assert len(backend.ended_by) == 2 and backend.ended_by[-1] == "CancelledError"


@pytest.mark.parametrize("where", ["before the first event", "between events", "in refinement"])
def test_a_streaming_client_that_goes_away_frees_everything(address, backend, where):
    if where == "in refinement":
        backend.refinement = 30.0
    else:
        backend.script.insert(0 if where == "before the first event" else 1, 30.0)
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK | {"stream": True}))
        if where == "before the first event":
            until(lambda: backend.held == 1)
        else:
            seen = b""
            while b'"bbox"' not in seen:
                seen += sock.recv(4096)
            until(lambda: backend.begun == (2 if where == "in refinement" else 1))
    until(lambda: backend.held == 0, 3)
    assert backend.ended_by[-1] == "CancelledError"


async def test_a_client_that_leaves_just_as_the_first_event_comes_keeps_its_slot(backend):
    left, closed = asyncio.Event(), []

    async def events(*_: Any) -> AsyncGenerator[dict[str, Any], None]:
        try:
            left.set()
            # What asyncio.wait_for does when its work ends as it is cancelled (Python 3.11).
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            yield {"type": "bbox", "bbox": BOX}
        finally:
            closed.append(True)

    backend.events = events
    messages = iter([{"type": "http.request", "body": json.dumps(ASK | {"stream": True}).encode()}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there to be sent to")

    scope = {"type": "http", "method": "POST", "path": "/v1/segment", "headers": []}
    await build_app(backend)(scope, receive, send)
    assert closed == [True]


async def test_work_that_ends_as_it_is_cancelled_makes_its_caller_forget_the_cancelling():
    work = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(within(time.monotonic() + 30, work))
    await asyncio.sleep(0)
    work.set_result("an event")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_a_client_that_went_away_leaves_no_error_in_the_log(address, backend, caplog):
    backend.script = [30.0]
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.held == 1)
    until(lambda: backend.held == 0, 3)
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_events_are_sent_when_they_happen_not_when_all_is_done(address, backend):
    backend.script.insert(1, 30.0)
    with httpx.stream("POST", f"{address}/v1/segment", json=ASK | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert json.loads(next(response.iter_lines())[6:])["type"] == "bbox"


def test_one_stuck_request_does_not_hold_up_the_others(address, backend):
    backend.script = [30.0]
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.held == 1)
        backend.script = list(WELL)
        assert httpx.post(f"{address}/v1/segment", json=ASK, timeout=5).status_code == 200
        assert backend.held == 1


# Bodies that are too large


def test_a_declared_body_over_the_limit_is_a_413_before_it_is_sent(address, backend):
    with connected(address) as sock:
        sock.sendall(post_head(address, {"Content-Length": str(10**9)}))
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_over_the_limit_is_a_413(address, backend):
    def chunks() -> Iterator[bytes]:
        yield b'{"object": "'
        for _ in range(30):
            yield b"x" * 1000

    response = httpx.post(f"{address}/v1/segment", content=chunks())
    assert "content-length" not in response.request.headers
    assert "20000" in refused(response, 413)


def test_a_sender_of_a_body_over_the_limit_gets_the_answer_not_a_reset(address, backend):
    for _ in range(5):
        response = httpx.post(f"{address}/v1/segment", content=b"x" * (LIMITS.max_body_bytes + 1))
        refused(response, 413)


@pytest.mark.parametrize(("size", "status"), [(500, 503), (LIMITS.max_body_bytes + 1, 413)])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_refused_for_its_size_is_answered_first_and_read_on_then(
    backend, monkeypatch, size, status, declared
):
    monkeypatch.setattr(envelope, "DRAIN_S", 60.0)
    object.__setattr__(backend.config, "max_held_bytes", 100 if status == 503 else 10**9)
    order: list[Any] = []
    answered = asyncio.Event()
    chunks = iter([b"{" if declared else b"x" * size, b"y", b""])

    async def receive() -> dict[str, Any]:
        chunk = next(chunks)
        if chunk != b"{" and not chunk.startswith(b"x"):
            await answered.wait()
        order.append(chunk[:1])
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            order.append(message["status"])
            lengths.append(int(dict(message["headers"])[b"content-length"]))
            return
        order.append("more" if message["more_body"] else "end")
        lengths.append(len(message["body"]))
        answered.set()

    lengths: list[int] = []
    headers = [(b"content-length", str(size).encode())] if declared else []
    scope = {"type": "http", "method": "POST", "path": "/v1/segment", "headers": headers}
    await asyncio.wait_for(build_app(backend)(scope, receive, send), 5)
    # The client has all of its answer while it still sends; the server's end comes after.
    taken = [b"{"] if declared else [b"x"]
    began = [] if declared else taken
    rest = taken if declared else []
    assert order == [*began, status, "more", *rest, b"y", b"", "end"]
    assert lengths[0] == lengths[1] and lengths[2] == 0


def test_a_connection_whose_body_was_refused_and_read_takes_the_next_request(address, backend):
    with httpx.Client(base_url=address) as client:
        for _ in range(2):
            content = b"x" * (LIMITS.max_body_bytes + 1)
            began = time.monotonic()
            refused(client.post("/v1/segment", content=content), 413)
            assert client.get("/healthz").status_code == 200
            assert time.monotonic() - began < envelope.DRAIN_S


REFUSED = {
    401: {"path": "/v1/segment"},
    429: {"path": "/v1/segment", "X-Moondream-Auth": "first-key"},
    503: {"path": "/v1/segment", "X-Moondream-Auth": "second-key"},
    400: {"path": "/v1/segment", "X-Request-Id": "a b"},
    404: {"path": "/v1/segmnet"},
    405: {"path": "/v1/models"},
}


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("status", REFUSED)
def test_who_sends_a_picture_and_wants_no_further_answer_gets_a_reset(
    status: int, http: str
) -> None:
    """Python's urllib and load balancers ask with ``Connection: close``, and send all of a body
    before they look for the answer: a reset then says nothing of a key, or of when to come back."""
    pytest.importorskip(http)
    backend = ScriptedBackend(
        api_keys=({"key": "first-key", "rate_per_s": 0.001}, "second-key"), max_held_requests=1
    )
    object.__setattr__(backend.config, "limits", Limits())
    room = Room(backend.config)
    app = build_app(backend, room=room)
    headers = {"Connection": "close", **REFUSED[status]}
    path = headers.pop("path")
    body = b" " * 12_000_000
    with served(app, http=http) as url, room.enter():
        if status == 429:  # the one request of its rate; there is no room for it
            refused(httpx.post(f"{url}{path}", headers=headers), 503)
        place = urlsplit(url)
        connection = HTTPConnection(place.hostname or "", place.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            told = json.loads(answer.read())
    assert (answer.status, set(told) >= {"error"}) == (status, True)
    assert bool(answer.headers["Retry-After"]) == (status in (429, 503))


@pytest.mark.parametrize("refused_first", [False, True])
async def test_a_client_that_leaves_in_its_body_is_no_fault(backend, caplog, refused_first):
    ends: list[str] = []
    size = LIMITS.max_body_bytes + 1 if refused_first else 10
    messages = iter([{"type": "http.request", "body": b"x" * size, "more_body": True}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        assert refused_first

    app = build_app(backend, ended=lambda outcome, seconds: ends.append(outcome))
    scope = {"type": "http", "method": "POST", "path": "/v1/segment", "headers": []}
    await app(scope, receive, send)
    assert ends == ["too_large" if refused_first else "left"]
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_a_body_of_exactly_the_limit_is_read(client, backend):
    body = json.dumps(ASK).encode()
    body += b" " * (LIMITS.max_body_bytes - len(body))
    assert (await client.post("/v1/segment", content=body)).status_code == 200


async def test_an_image_over_the_pixel_limit_is_a_413_before_the_model(client, backend):
    ask = ASK | {"image_url": base64_text(picture(101, 100))}
    refused(await client.post("/v1/segment", json=ask), 413, "image_url")
    assert backend.begun == 0
