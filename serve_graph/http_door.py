"""The HTTP door of the client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from kestrel.api import DeadlineExceeded, error_from_response

LAST = ("final", "error")
"""Types of the event that ends a stream."""
# A body without a length ends where its connection does, whole or not.
CUT = "the stream ended without its last event"


class HttpDoor:
    """POST /v1/segment, plain and SSE. Calls are the contract's fields."""

    def __init__(self, address: str, *, api_key: str | None, timeout_s: float) -> None:
        headers = {"X-Request-Timeout-Ms": str(max(1, round(timeout_s * 1e3)))}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        options: dict[str, Any] = {
            "base_url": address.rstrip("/"),
            "timeout": timeout_s,
            "headers": headers,
        }
        self._options = options
        self._client = httpx.Client(**options)
        self._lock = threading.Lock()
        self._async_clients: dict[AbstractEventLoop, httpx.AsyncClient] = {}
        """By event loop: connections belong to the loop that opened them."""

    def call(self, fields: dict[str, Any]) -> dict[str, Any]:
        with _plain_errors():
            response = self._client.post("/v1/segment", json=_body(fields, stream=False))
            _check(response)
            return _answer(response)

    async def acall(self, fields: dict[str, Any]) -> dict[str, Any]:
        with _plain_errors():
            response = await self._aclient().post("/v1/segment", json=_body(fields, stream=False))
            _check(response)
            return _answer(response)

    def events(self, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with (
            _plain_errors(),
            self._client.stream("POST", "/v1/segment", json=_body(fields, stream=True)) as response,
        ):
            if response.is_error:
                response.read()
            _check(response)
            ended = False
            for line in response.iter_lines():
                if line.startswith("data:"):
                    event = _event(line)
                    ended = event.get("type") in LAST
                    yield event
            if not ended:
                raise ConnectionError(CUT)

    async def aevents(self, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        with _plain_errors():
            async with self._aclient().stream(
                "POST", "/v1/segment", json=_body(fields, stream=True)
            ) as response:
                if response.is_error:
                    await response.aread()
                _check(response)
                ended = False
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        event = _event(line)
                        ended = event.get("type") in LAST
                        yield event
                if not ended:
                    raise ConnectionError(CUT)

    def _aclient(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._async_clients.get(loop)
            if client is None:
                # Nothing can be awaited in a loop that has ended: its sockets close as they go.
                for ended in [other for other in self._async_clients if other.is_closed()]:
                    del self._async_clients[ended]
                client = self._async_clients[loop] = httpx.AsyncClient(**self._options)
        return client

    def close(self) -> None:
        self._client.close()

    async def aclose(self) -> None:
        self._client.close()
        with self._lock:
            client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except httpx.ConnectTimeout as error:
        # No service has the request yet, whose deadline it could be.
        raise ConnectionError(f"no connection in time: {error}") from error
    except httpx.TimeoutException as error:
        raise DeadlineExceeded() from error
    except httpx.TransportError as error:
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
