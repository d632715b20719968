"""The HTTP door of the client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx

from kestrel.api import TIMEOUT_HEADER, DeadlineExceeded, error_from_response
from kestrel.api_keys import given_key
from kestrel.deadlines import within
from kestrel.ports import check_port, leads_here
from serve_graph.patience import Patience

PATH = "/v1/segment"
LAST = ("final", "error")
"""Types of the event that ends a stream."""
# A body without a length ends where its connection does, whole or not.
CUT = "the stream ended without its last event"


class HttpDoor:
    """POST /v1/segment, plain and SSE. Calls are the contract's fields."""

    def __init__(self, address: str, *, api_key: str | None, timeout_s: float) -> None:
        if api_key:
            api_key = given_key(api_key, "api_key")
        self._timeout_s = timeout_s
        self._options: dict[str, Any] = {
            "base_url": address.rstrip("/"),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            # Of proxies, for one.
            "trust_env": not leads_here(address),
            # Reading the certificates takes its time, which is no call's.
            "verify": httpx.create_ssl_context(),
            # httpx's is for each step of a request; here the whole of it has a deadline.
            "timeout": None,
            # No queue before those of the service. Of idle ones httpx keeps its default: the time
            # that it takes for each request grows with the square of their number.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
        }
        self._lock = threading.Lock()
        self._clients: dict[AbstractEventLoop, httpx.AsyncClient] = {}
        """By event loop: connections belong to the loop that opened them."""

    async def acall(self, fields: dict[str, Any]) -> dict[str, Any]:
        sending = _Sending(time.monotonic() + self._timeout_s)
        with _plain_errors(sending):
            return await within(sending.deadline, self._answered(fields, sending))

    async def _answered(self, fields: dict[str, Any], sending: _Sending) -> dict[str, Any]:
        async with self._posted(_body(fields, stream=False), sending) as response:
            await response.aread()
            return _answer(response)

    async def aevents(self, fields: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        patience = Patience(self._timeout_s)
        sending = _Sending(patience.deadline)
        with _plain_errors(sending):
            async with contextlib.aclosing(self._streamed(fields, sending)) as events:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        with patience.waiting() as until:
                            event = await within(until, anext(events))
                        yield event

    async def _streamed(
        self, fields: dict[str, Any], sending: _Sending
    ) -> AsyncGenerator[dict[str, Any], None]:
        async with self._posted(_body(fields, stream=True), sending) as response:
            ended = False
            # To the end, so that the connection is there for another request.
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    event = _event(line)
                    ended = event.get("type") in LAST
                    yield event
            if not ended:
                raise ConnectionError(CUT)

    @contextlib.asynccontextmanager
    async def _posted(
        self, body: dict[str, Any], sending: _Sending
    ) -> AsyncGenerator[httpx.Response, None]:
        """The answer to a request that is not refused, its content not yet read."""
        async with self._client().stream(
            "POST",
            PATH,
            json=body,
            headers={TIMEOUT_HEADER: sending.left_ms()},
            extensions={"trace": sending.trace},
        ) as response:
            if response.is_error:
                await response.aread()
            _check(response)
            yield response

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._clients.get(loop)
            if client is None:
                try:
                    check_port(self._options["base_url"])
                except ValueError as error:
                    raise ConnectionError(str(error)) from None
                # Nothing can be awaited in a loop that has ended: its sockets close as they go.
                for ended in [other for other in self._clients if other.is_closed()]:
                    del self._clients[ended]
                client = self._clients[loop] = httpx.AsyncClient(**self._options)
        return client

    async def leave_loop(self) -> None:
        with self._lock:
            client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def close(self) -> None: ...


class _Sending:
    """A request on its way: the service is told what is left of the deadline when it is sent, which
    is after a connection was made."""

    def __init__(self, deadline: float) -> None:
        """``deadline``: by ``time.monotonic()``."""
        self.deadline = deadline
        self.sent = False

    def left_ms(self) -> str:
        return str(max(1, int((self.deadline - time.monotonic()) * 1e3)))

    async def trace(self, event: str, about: dict[str, Any]) -> None:
        """Hears from httpx of each step of the request."""
        if event != "http11.send_request_headers.started":
            return
        headers = about["request"].headers
        for place, (name, _) in enumerate(headers):
            # A proxy is asked for a connection without it.
            if name.lower() == TIMEOUT_HEADER.lower().encode():
                headers[place] = (name, self.left_ms().encode())
                self.sent = True


@contextlib.contextmanager
def _plain_errors(sending: _Sending) -> Iterator[None]:
    try:
        yield
    except DeadlineExceeded as error:
        if sending.sent:
            raise
        # No service has the request yet, whose deadline it could be.
        raise ConnectionError("no connection in time") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise ConnectionError(str(error)) from error


def _answer(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a plain answer; ConnectionError where it was cut."""
    try:
        answer = response.json()
    except ValueError as error:
        raise ConnectionError("the answer is no JSON object") from error
    if not isinstance(answer, dict):
        raise ConnectionError("the answer is no JSON object")
    return answer


def _event(line: str) -> dict[str, Any]:
    """The event of a ``data:`` line; ConnectionError where it was cut."""
    try:
        event = json.loads(line.removeprefix("data:"))
    except ValueError as error:
        raise ConnectionError(CUT) from error
    if not isinstance(event, dict):
        raise ConnectionError(CUT)
    return event


def _body(fields: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    body = {name: value for name, value in fields.items() if name != "image"} | {"stream": stream}
    if "image" in fields:
        body["image_url"] = base64.b64encode(fields["image"]).decode()
    return body


def _check(response: httpx.Response) -> None:
    if response.has_redirect_location:
        to = response.headers["location"][:200].removesuffix(PATH)
        raise ConnectionError(
            f"the service redirects to {to!r}: give that address to the client, which does not "
            "follow, as the API key would go there too"
        )
    if not response.is_error:
        return
    try:
        body = response.json()
    except ValueError:
        body = None
    # A proxy in between, or Serve's own, may answer in plain text.
    if not isinstance(body, dict):
        body = {"error": response.text[:200] or f"HTTP {response.status_code}"}
    raise error_from_response(response.status_code, body, response.headers.get("retry-after"))
