"""HTTP transport over a backend: the one-process application and the graph's ingress use it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kestrel import answers, api
from kestrel.api import ModelResult, RequestError, SegmentRequest, TooLarge
from kestrel.api_keys import RateLimits, plain_key_warning
from kestrel.config import RuntimeConfig
from kestrel.docs_page import docs_page
from kestrel.openapi import openapi_document
from kestrel.server.compose import Refinement, cancelled, server_timing, within
from kestrel.server.room import Place, Room

log = logging.getLogger(__name__)

T = TypeVar("T")

READY_POLL_S = 2.0
"""``Retry-After`` of a server that is still starting, seconds."""
DRAIN_S = 2.0
"""How long the rest of a refused body is read, so that its sender gets to see the answer."""


Ended = Callable[[str, float], None]
"""Called with the outcome of a request (``kestrel.api.outcome``, or ``broken_stream``: its error
came as an event) and its seconds from arrival to the last byte."""


class Backend(Protocol):
    """What does the work behind the HTTP door."""

    config: RuntimeConfig
    """Limits, API keys, model name and the longest deadline."""

    @property
    def max_context(self) -> int | None:
        """Bound of ``settings.max_tokens``; None where it is not known."""

    async def ready(self) -> str | None:
        """None when everything works, else what does not."""

    async def serving(self) -> str | None:
        """None when a request can be taken, else why not."""

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> tuple[ModelResult, Refinement]:
        """The finished request; raises RequestError. Cancelling it frees what it holds."""

    def events(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """SSE payloads: RequestError before the first only, one final or error payload last."""


class ClientGone(Exception):
    """The client disconnected; nobody is there for an answer."""


def build_app(
    backend: Backend,
    *,
    rates: RateLimits | None = None,
    room: Room | None = None,
    ended: Ended | None = None,
    name_answers: bool = True,
    **starlette_options: Any,
) -> Starlette:
    """The routes of the contract over ``backend``.

    ``rates`` counts the requests of the API keys that have a rate; None: this process alone serves
    them. ``room`` bounds what is held at once; None: no other door shares it. ``ended`` is called
    at the end of each segment request. ``name_answers``: add the request id to the headers of
    answers; False where the server in front does. ``starlette_options`` are passed on
    (``lifespan``).
    """
    warning = plain_key_warning(backend.config.api_keys)
    if warning is not None:
        log.warning(warning)
    routes = _Routes(backend, rates or RateLimits(), room or Room(backend.config))
    app = Starlette(
        routes=[
            Route("/v1/segment", routes.segment, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
            Route("/openapi.json", routes.openapi, methods=["GET"]),
            Route("/docs", routes.docs, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_exception},
        **starlette_options,
    )
    # A redirect would make some clients repeat a POST as a GET.
    app.router.redirect_slashes = False
    app.add_middleware(_Envelope, ended=ended, name_answers=name_answers)
    return app


class _Routes:
    """The endpoints; one object so that they share the backend."""

    def __init__(self, backend: Backend, rates: RateLimits, room: Room) -> None:
        self.backend = backend
        self.rates = rates
        self.room = room

    async def segment(self, request: Request) -> Response:
        config = self.backend.config
        arrived = time.monotonic()
        key = api.check_auth(request.headers, config.api_keys)
        wait_s = self.rates.wait_s(key)
        if wait_s:
            raise api.RateLimited("the rate of this API key is used up", retry_after_s=wait_s)
        timeout_s = api.timeout_from_headers(request.headers, config.request_timeout_s)
        deadline = arrived + timeout_s
        # Left by the envelope: an event stream goes on after this returns.
        place = request.scope["kestrel.places"].enter_context(self.room.enter())
        body = await within(deadline, _read_body(request, config.limits.max_body_bytes, place))
        asked = api.parse_segment_json(
            body,
            limits=config.limits,
            served_model=config.model,
            max_context=self.backend.max_context,
            refiners=config.refiners,
        )
        del body  # the image is held decoded from base64; tens of megabytes need no second copy
        reason = await within(deadline, self.backend.serving())
        if reason is not None:
            raise api.Overloaded(reason, retry_after_s=READY_POLL_S)
        request_id: str = request.scope["kestrel.request_id"]
        left = deadline - time.monotonic()
        if asked.stream:
            events = self.backend.events(asked, request_id, left)
            try:
                # Awaited before the 200, so that an early refusal keeps its status.
                first = await _unless_gone(request.receive, _first(events))
            except BaseException:
                # Not left to _first: cancelled just as its event came, it ends with that event.
                await events.aclose()
                raise
            return _EventStream(first, events, request_id)
        model, refined = await _unless_gone(
            request.receive, within(deadline, self.backend.complete(asked, request_id, left))
        )
        answer = answers.segment_response(model, refined, return_base64=asked.return_base64)
        headers = {"Server-Timing": server_timing(model, refined)}
        if refined is not None and refined.reason == "unavailable":
            headers["X-Refinement"] = "unavailable"
        return JSONResponse(answer, headers=headers)

    async def models(self, request: Request) -> Response:
        config = self.backend.config
        api.check_auth(request.headers, config.api_keys)
        served = {"id": config.model, "object": "model", "owned_by": "kestrel"}
        context = self.backend.max_context
        if context is not None:
            served["max_context"] = context  # type: ignore[assignment]
        return JSONResponse({"object": "list", "data": [served]})

    async def healthz(self, request: Request) -> Response:
        reason = await self.backend.ready()
        if reason is not None:
            raise api.Overloaded(reason, retry_after_s=READY_POLL_S)
        return JSONResponse({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi_document(self.backend.config))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(docs_page(openapi_document(self.backend.config)))


async def _first(events: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    try:
        return await anext(events)
    except StopAsyncIteration:
        raise RuntimeError("the backend gave no event") from None


async def _read_body(request: Request, limit: int, place: Place) -> bytes:
    """The body; TooLarge from its Content-Length or while it is read, Overloaded likewise when
    there is no space for it."""
    declared = request.headers.get("content-length", "")
    size = int(declared[:20]) if declared.isdigit() else 0
    chunks = request.stream()
    body = bytearray()
    try:
        _check_size(size, limit, place)
        async for chunk in chunks:
            body += chunk
            _check_size(len(body), limit, place)
    except RequestError:
        body.clear()
        await _drain(chunks, limit)
        raise
    return bytes(body)


def _check_size(size: int, limit: int, place: Place) -> None:
    if size > limit:
        raise TooLarge(f"the body is larger than {limit} bytes")
    place.hold(size)


async def _drain(chunks: AsyncGenerator[bytes, None], limit: int) -> None:
    """Read on a while: a server that closes on unread bytes resets, and the answer is lost."""

    async def read() -> None:
        dropped = 0
        async for chunk in chunks:
            dropped += len(chunk)
            if dropped > limit:
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DRAIN_S)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
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


class _EventStream(Response):
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
            await _unless_gone(receive, self._send_all(scope, send))

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


class _Envelope:
    """Gives every request an id, and every failure the contract's JSON answer."""

    def __init__(self, app: ASGIApp, *, ended: Ended | None, name_answers: bool) -> None:
        self._app = app
        self._ended = ended
        self._name_answers = name_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["kestrel.request_id"] = _request_id(scope)
        arrived = time.monotonic()
        started = False
        failure: BaseException | None = None

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._name_answers:
                    named = [*message["headers"], (b"x-request-id", request_id.encode())]
                    message = {**message, "headers": named}
            await send(message)

        try:
            with contextlib.ExitStack() as scope["kestrel.places"]:
                await self._app(scope, receive, send_named)
        except ClientGone:
            failure = asyncio.CancelledError()
            log.info("request %s: the client disconnected, its work is cancelled", request_id)
        except RequestError as error:
            failure = error
            await _refusal(error, request_id)(scope, receive, send_named)
        except Exception as error:
            failure = error
            log.exception("request %s failed", request_id)
            if not started:
                await _fault(request_id)(scope, receive, send_named)
        except BaseException as error:
            failure = error
            raise
        finally:
            if self._ended is not None and _segments(scope):
                outcome = scope.get("kestrel.outcome") or api.outcome(failure)
                self._ended(outcome, time.monotonic() - arrived)


def _segments(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] == "/v1/segment"


_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def _request_id(scope: Scope) -> str:
    """The id that the client or the proxy in front chose, where it is fit for a log; else a new
    one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex


def _refusal(error: RequestError, request_id: str) -> Response:
    if error.status >= 500 and error.status not in (503, 504):
        log.error("request %s failed: %s", request_id, error.message)
        return _fault(request_id)
    if error.field == "image":
        # The half that decodes knows the image by its Python name.
        message = error.message.replace("image ", "image_url ", 1)
        error = type(error)(message, "image_url", error.retry_after_s)
    return JSONResponse(error.body(), error.status, error.headers())


def _fault(request_id: str) -> Response:
    return JSONResponse({"error": "internal error", "request_id": request_id}, 500)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path[:128]} here; POST /v1/segment, see /docs",
        405: f"{request.method[:16]} is not for {request.url.path[:128]}",
    }.get(error.status_code, error.detail)
    return JSONResponse({"error": message}, error.status_code, error.headers)
