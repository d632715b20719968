"""What is held at once is bounded by count and by bytes, and what is left gives its room back."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from scripted import ASK, WELL, ScriptedBackend
from serving import served, until

from kestrel.api import Overloaded
from kestrel.config import ConfigError, Limits, RuntimeConfig
from kestrel.server.room import Room
from kestrel.server.routes import build_app


def sent(backend: ScriptedBackend, room: Room) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(backend, room=room))
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)


async def begun(backend: ScriptedBackend, requests: int) -> None:
    end = time.monotonic() + 5
    while backend.begun < requests:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_request_too_many_is_a_503_at_once_and_the_others_end_well(stream: bool) -> None:
    backend = ScriptedBackend(max_held_requests=3)
    backend.script = [*WELL, 0.5]
    room = Room(backend.config)
    ask = ASK | {"stream": stream}
    async with sent(backend, room) as client:
        running = [asyncio.create_task(client.post("/v1/segment", json=ask)) for _ in range(3)]
        await begun(backend, 3)
        began = time.monotonic()
        refused = await client.post("/v1/segment", json=ask)
        assert time.monotonic() - began < 0.4
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert [reply.status_code for reply in await asyncio.gather(*running)] == [200] * 3
        assert (room.requests, room.bytes) == (0, 0)
        assert (await client.post("/v1/segment", json=ask)).status_code == 200


async def test_bodies_are_bounded_together_by_bytes() -> None:
    large = ASK | {"extra": "x" * 2_000}
    size = len(json.dumps(large).encode())
    backend = ScriptedBackend()
    object.__setattr__(backend.config, "max_held_bytes", int(2.5 * size))
    backend.script = [*WELL, 0.5]
    room = Room(backend.config)

    async def in_chunks() -> Any:
        body = json.dumps(large).encode()
        for at in range(0, len(body), 512):
            yield body[at : at + 512]

    async with sent(backend, room) as client:
        running = [asyncio.create_task(client.post("/v1/segment", json=large)) for _ in range(2)]
        await begun(backend, 2)
        assert room.bytes >= 2 * size - 200
        for body in ({"json": large}, {"content": in_chunks()}):
            assert (await client.post("/v1/segment", **body)).status_code == 503
        # What is small still fits.
        assert (await client.post("/v1/segment", json={"object": "cat"})).status_code == 200
        assert [reply.status_code for reply in await asyncio.gather(*running)] == [200] * 2
    assert (room.requests, room.bytes) == (0, 0)


def test_bytes_are_held_up_to_the_bound_and_each_once() -> None:
    room = Room(RuntimeConfig(limits=Limits(max_body_bytes=1000), max_held_bytes=1000))
    with room.enter() as place, room.enter() as other:
        # Of a body its length is told first, and then comes what has come of it.
        for size, held in ((400, 400), (300, 400), (1000, 1000)):
            place.hold(size)
            assert room.bytes == held
        with pytest.raises(Overloaded, match="1000 bytes"):
            other.hold(1)
    assert (room.requests, room.bytes) == (0, 0)


async def test_refused_and_failed_requests_give_their_room_back() -> None:
    backend = ScriptedBackend(max_held_requests=1)
    room = Room(backend.config)
    async with sent(backend, room) as client:
        for script, body in (
            ([Overloaded("full")], ASK),
            ([*WELL, RuntimeError("a bug")], ASK),
            ([*WELL, RuntimeError("a bug")], ASK | {"stream": True}),
            ([], {"object": ""}),
            ([], []),
        ):
            backend.script = script
            await client.post("/v1/segment", json=body)
            assert (room.requests, room.bytes) == (0, 0)


def test_a_client_that_leaves_gives_its_room_back() -> None:
    backend = ScriptedBackend(max_held_requests=1, request_timeout_s=20.0)
    backend.script = [*WELL, 15.0]
    room = Room(backend.config)
    with served(build_app(backend, room=room)) as url:
        for stream in (False, True):
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{url}/v1/segment", json=ASK | {"stream": stream}, timeout=0.3)
            until(lambda: room.requests == 0)
    assert room.bytes == 0


def test_a_bound_under_one_body_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_held_bytes must be at least"):
        RuntimeConfig(max_held_bytes=1000)
