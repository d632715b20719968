"""Clients that do not read their answer hold no place past their deadline and a grace."""

from __future__ import annotations

import json
import select
from typing import Any

import httpx
import pytest
from scripted import ASK, BOX, WELL, Reader, ScriptedBackend
from serving import connected, post_bytes, served, until

from kestrel.api import BboxEvent, Overloaded, PathDelta
from kestrel.server import sending
from kestrel.server.connection import protocol
from kestrel.server.room import Room
from kestrel.server.routes import build_app

LONG = "L" + "1" * 20_000
"""A command of a path; a thousand of them are more than the buffers of a connection take."""


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
    monkeypatch.setattr(sending, "GRACE_S", 0.2)
    made = ScriptedBackend(max_held_requests=1, request_timeout_s=0.5)
    made.script = [BboxEvent(BOX), *(PathDelta(LONG, n) for n in range(1, 1001))]
    return made


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_gives_its_place_back_and_is_cut_off(backend, stream):
    room = Room(backend.config)
    with served(build_app(backend, room=room), http=protocol) as url, connected(url) as sock:
        sock.sendall(post_bytes(url, ASK | {"stream": stream}))
        until(lambda: backend.begun)
        # Its answer is more than the server may write unread.
        assert room.requests == 1
        until(lambda: room.requests == 0 and backend.held == 0, 5)
        poll = select.poll()
        poll.register(sock, select.POLLHUP)
        assert poll.poll(5_000), "the connection is still open"
        backend.script = list(WELL)
        assert httpx.post(f"{url}/v1/segment", json=ASK, timeout=5).status_code == 200


@pytest.mark.parametrize("takes", [0, 1])
@pytest.mark.parametrize(
    ("what", "method", "path"),
    [
        ("a stream", "POST", "/v1/segment"),
        ("an answer", "POST", "/v1/segment"),
        ("a refusal", "POST", "/v1/segment"),
        ("a fault", "POST", "/v1/segment"),
        *(("", "GET", path) for path in ("/v1/models", "/healthz", "/openapi.json", "/docs", "/x")),
    ],
)
async def test_no_answer_waits_for_ever_for_its_reader(backend, what, method, path, takes):
    refused = {"a refusal": [Overloaded("full")], "a fault": [KeyError("a bug")]}
    backend.script = refused.get(what, list(WELL))
    room, ends = Room(backend.config), []
    app = build_app(backend, room=room, ended=lambda outcome, seconds: ends.append(outcome))
    await Reader(takes).request(app, method, path, ASK | {"stream": what == "a stream"})
    assert (room.requests, backend.held) == (0, 0)
    if method == "POST":
        assert ends == [{"a refusal": "overloaded", "a fault": "fault"}.get(what, "left")]


async def test_the_deadline_of_the_request_counts_and_not_the_longest(backend):
    backend.script = list(WELL)
    object.__setattr__(backend.config, "request_timeout_s", 60.0)
    scope_headers = [(b"x-request-timeout-ms", b"300")]
    reader, app = Reader(1), build_app(backend)

    async def with_deadline(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "headers": scope_headers}, receive, send)

    await reader.request(with_deadline, "POST", "/v1/segment", ASK)


async def test_a_long_answer_is_sent_in_pieces_so_that_unread_ones_wait_in_its_place(backend):
    backend.script = [BboxEvent(BOX), PathDelta(LONG * 15, 9)]
    reader = Reader(1000)
    await reader.request(build_app(backend), "POST", "/v1/segment", ASK)
    start, *pieces = reader.sent
    assert max(len(piece["body"]) for piece in pieces) <= sending.PIECE_BYTES < 300_000
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    whole = b"".join(piece["body"] for piece in pieces)
    assert json.loads(whole)["path"] == LONG * 15
    assert dict(start["headers"])[b"content-length"] == str(len(whole)).encode()
