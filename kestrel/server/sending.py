"""How answers leave: to clients that may be gone, and as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kestrel import answers
from kestrel.server.compose import cancelled

log = logging.getLogger(__name__)

T = TypeVar("T")


class ClientGone(Exception):
    """The client disconnected; nobody is there for an answer."""


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """``work``'s result; cancels it and raises ClientGone when the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        # Waited for, so that slot and refinement are free before anything else happens.
        await cancelled(gone)
        await cancelled(task)


class EventStream(Response):
    """Server-sent events; a disconnect closes the events, a failure never cuts the connection."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: dict[str, Any],
        events: AsyncGenerator[dict[str, Any], None],
        request_id: str,
    ) -> None:
        self._first, self._events, self._request_id = first, events, request_id
        self.status_code = 200
        self.background = None
        self.body = b""
        # No Content-Length: the body has none. Proxies are asked not to buffer.
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await unless_gone(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        async def event(payload: dict[str, Any]) -> None:
            if payload["type"] == "error":
                scope["kestrel.outcome"] = "broken_stream"
            body = answers.sse_frame(payload)
            await _deliver(send, {"type": "http.response.body", "body": body, "more_body": True})

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await _deliver(send, start)
        await event(self._first)
        try:
            async for payload in self._events:
                await event(payload)
        except ClientGone:
            raise
        except Exception as error:
            log.exception("request %s failed in its event stream", self._request_id)
            await event(answers.error_event(error, self._request_id))
        await _deliver(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def _deliver(send: Send, message: Message) -> None:
    try:
        await send(message)
    except OSError:  # how ASGI 2.4 servers say that the client is gone
        raise ClientGone from None
