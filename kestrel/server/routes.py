"""HTTP transport over a backend: the one-process application and the graph's ingress use it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from kestrel import answers, api
from kestrel.api import ModelResult, RequestError, SegmentRequest, TooLarge
from kestrel.api_keys import RateLimits, plain_key_warning
from kestrel.config import RuntimeConfig
from kestrel.deadlines import within
from kestrel.docs_page import docs_page
from kestrel.openapi import openapi_document
from kestrel.server.compose import Refinement, server_timing
from kestrel.server.envelope import Ended, Envelope
from kestrel.server.room import Place, Room
from kestrel.server.sending import (
    ClientGone,
    EventStream,
    HtmlAnswer,
    JsonAnswer,
    send_by,
    unless_gone,
)

log = logging.getLogger(__name__)

READY_POLL_S = 2.0
"""``Retry-After`` of a server that is still starting, seconds."""


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
        """SSE payloads: RequestError before the first only, one final payload or
        ``answers.ErrorEvent`` last."""


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
    app.add_middleware(
        Envelope,
        longest_s=lambda: backend.config.request_timeout_s,
        longest_body=lambda: backend.config.limits.max_body_bytes,
        ended=ended,
        name_answers=name_answers,
    )
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
        request.scope["kestrel.send_by"] = send_by(deadline)
        request.scope["kestrel.deadline"] = deadline
        # Left by the envelope: an event stream goes on after this returns.
        place = request.scope["kestrel.places"].enter_context(self.room.enter(timeout_s))
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
        left = deadline - time.monotonic()
        place.begin(left)
        request_id: str = request.scope["kestrel.request_id"]
        if asked.stream:
            events = self.backend.events(asked, request_id, left)
            try:
                # Awaited before the 200, so that an early refusal keeps its status.
                first = await unless_gone(request.receive, _first(events))
            except BaseException:
                # Not left to _first: cancelled just as its event came, it ends with that event.
                await events.aclose()
                raise
            return EventStream(first, events, request_id, place.heard)
        model, refined = await unless_gone(
            request.receive, within(deadline, self.backend.complete(asked, request_id, left))
        )
        place.done()
        answer = answers.segment_response(model, refined, return_base64=asked.return_base64)
        headers = {"Server-Timing": server_timing(model, refined)}
        if refined is not None and refined.reason == "unavailable":
            headers["X-Refinement"] = "unavailable"
        return JsonAnswer(answer, headers=headers)

    async def models(self, request: Request) -> Response:
        config = self.backend.config
        api.check_auth(request.headers, config.api_keys)
        served = {"id": config.model, "object": "model", "owned_by": "kestrel"}
        context = self.backend.max_context
        if context is not None:
            served["max_context"] = context  # type: ignore[assignment]
        return JsonAnswer({"object": "list", "data": [served]})

    async def healthz(self, request: Request) -> Response:
        reason = await self.backend.ready()
        if reason is not None:
            raise api.Overloaded(reason, retry_after_s=READY_POLL_S)
        return JsonAnswer({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        return JsonAnswer(self._document(request))

    async def docs(self, request: Request) -> Response:
        return HtmlAnswer(docs_page(self._document(request)))

    def _document(self, request: Request) -> dict[str, Any]:
        return openapi_document(self.backend.config, request.scope.get("root_path", ""))


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
    body = bytearray()
    try:
        _check_size(size, limit, place)
        async for chunk in request.stream():
            body += chunk
            _check_size(len(body), limit, place)
    except RequestError:
        body.clear()  # the error holds on to it until all is read
        raise
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


def _check_size(size: int, limit: int, place: Place) -> None:
    if size > limit:
        raise TooLarge(f"the body is larger than {limit} bytes")
    place.hold(size)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    root = request.scope.get("root_path", "")
    message = {
        404: f"there is no {request.url.path[:128]} here; POST {root}/v1/segment, see {root}/docs",
        405: f"{request.method[:16]} is not for {request.url.path[:128]}",
    }.get(error.status_code, error.detail)
    answer = JsonAnswer({"error": message}, error.status_code, error.headers)
    answer.before_end = request.scope["kestrel.rest_of_body"]()
    return answer
