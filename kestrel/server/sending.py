"""How answers leave: to clients that may be gone or do not read, and as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from kestrel import answers
from kestrel.api import DeadlineExceeded
from kestrel.deadlines import cancelled, within

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_S = 10.0
"""How long after its deadline an answer may still be on its way to a client that reads slowly."""
PIECE_BYTES = 64 * 1024
"""Of an answer, handed to the server at once: it takes the next piece when most of those before
are read, so that an answer that nobody reads waits in the place of its request."""


class ClientGone(Exception):
    """The client disconnected; nobody is there for an answer."""


class ClientStalled(ClientGone):
    """The client has not read its answer in time."""


def send_by(deadline: float) -> float:
    """Until when the answer of a request with this deadline has to be sent."""
    return deadline + GRACE_S


async def sent_in_time(scope: Scope, sending: Awaitable[None]) -> None:
    """Returns when the answer is sent; ClientStalled at ``scope["kestrel.send_by"]``."""
    try:
        await within(scope["kestrel.send_by"], sending)
    except DeadlineExceeded:
        raise ClientStalled from None


class _InPieces(Response):
    before_end: Callable[[], Awaitable[None]] | None = None
    """Waited for when the client has been sent all, and the server not told that it is all."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await sent_in_time(scope, self._send_pieces(send))

    async def _send_pieces(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        size = len(self.body)
        for at in range(0, max(1, size), PIECE_BYTES):
            end = at + PIECE_BYTES
            piece = bytes(self.body[at:end])
            more = end < size or self.before_end is not None
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        if self.before_end is not None:
            await self.before_end()
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class JsonAnswer(_InPieces, JSONResponse):
    """JSON to a client that may be slow, or not read at all."""


class HtmlAnswer(_InPieces, HTMLResponse):
    """As ``JsonAnswer``."""


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T], by: float | None = None) -> T:
    """``work``'s result; cancels it and raises ClientGone when the client disconnects first, or
    ClientStalled when ``time.monotonic()`` passes ``by``."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    left = None if by is None else max(0.0, by - time.monotonic())
    try:
        await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone if gone.done() else ClientStalled
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
        heard: Callable[[dict[str, Any]], None],
    ) -> None:
        """``heard``: called with each event before it is sent."""
        self._first, self._events, self._request_id = first, events, request_id
        self._heard = heard
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
            # One limit for all events: one for each would cost a task for each.
            await unless_gone(receive, self._send_all(scope, send), scope["kestrel.send_by"])

    async def _send_all(self, scope: Scope, send: Send) -> None:
        async def event(payload: dict[str, Any]) -> None:
            self._heard(payload)
            if isinstance(payload, answers.ErrorEvent):
                scope["kestrel.outcome"] = payload.outcome
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
            await event(answers.ErrorEvent(error, self._request_id))
        await _deliver(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def _deliver(send: Send, message: Message) -> None:
    try:
        await send(message)
    except OSError:  # how ASGI 2.4 servers say that the client is gone
        raise ClientGone from None
