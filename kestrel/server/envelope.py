"""What is around every request of the HTTP door: its id, its refusal, the count of its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kestrel import api
from kestrel.api import DeadlineExceeded, RequestError
from kestrel.deadlines import within
from kestrel.request_ids import given_request_id
from kestrel.server.sending import ClientGone, ClientStalled, JsonAnswer, send_by

log = logging.getLogger(__name__)

Ended = Callable[[str, float], None]
"""Called with the outcome of a request (``kestrel.api.outcome``, or ``broken_stream``: a fault came
as its event) and its seconds from arrival to the last byte."""


DRAIN_S = 2.0
"""How long the rest of a refused body is read, so that its sender gets to see the answer."""


class _Body:
    """The body of one request, of which some may not have come when the request is refused."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        # Who waits to be told to go on sends nothing to a server that refuses.
        self._more = announced and "expect" not in headers
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    def rest(self, limit: int) -> Callable[[], Awaitable[None]] | None:
        """What reads it for a while, up to ``limit`` bytes; None where all of it is here. A server
        that closes a connection on unread bytes resets it, and the answer may be lost."""
        return partial(self._drop, limit) if self._more else None

    async def _drop(self, limit: int) -> None:
        async def read() -> None:
            dropped = 0
            while self._more and dropped <= limit:
                dropped += len((await self.receive()).get("body", b""))

        with contextlib.suppress(DeadlineExceeded):
            await within(time.monotonic() + DRAIN_S, read())


class Envelope:
    """Gives every request an id, and every failure the contract's JSON answer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        longest_s: Callable[[], float],
        longest_body: Callable[[], int],
        ended: Ended | None,
        name_answers: bool,
    ) -> None:
        self._app = app
        self._longest_s = longest_s
        self._longest_body = longest_body
        self._ended = ended
        self._name_answers = name_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unfit: RequestError | None = None
        try:
            given = given_request_id(Headers(scope=scope).getlist("x-request-id"))
        except RequestError as error:
            given, unfit = None, error
        request_id = scope["kestrel.request_id"] = given or uuid.uuid4().hex
        arrived = time.monotonic()
        # A segment request puts its own deadline in the place of the longest.
        scope["kestrel.send_by"] = send_by(arrived + self._longest_s())
        body = _Body(scope, receive)
        # Its sender may wait for the answer before it sends on, so the answer goes first.
        scope["kestrel.rest_of_body"] = lambda: body.rest(self._longest_body())
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
            try:
                if unfit is not None:
                    raise unfit
                with contextlib.ExitStack() as scope["kestrel.places"]:
                    await self._app(scope, body.receive, send_named)
            except ClientGone:
                raise
            except RequestError as error:
                failure = error
                refusal = _refusal(error, request_id)
                if not isinstance(error, DeadlineExceeded):  # it was waited for long enough
                    refusal.before_end = scope["kestrel.rest_of_body"]()
                await refusal(scope, receive, send_named)
            except Exception as error:
                failure = error
                log.exception("request %s failed", request_id)
                if not started:
                    await _fault(request_id)(scope, receive, send_named)
        except ClientGone as gone:
            failure = failure or asyncio.CancelledError()
            if isinstance(gone, ClientStalled):
                scope.pop("kestrel.deadline", None)  # it was answered in time
                log.info("request %s: the client does not read its answer", request_id)
                await _hang_up(scope)
            else:
                log.info("request %s: the client disconnected, its work is cancelled", request_id)
        except BaseException as error:
            failure = error
            raise
        finally:
            if self._ended is not None and _segments(scope):
                outcome = scope.get("kestrel.outcome") or api.outcome(
                    failure, scope.get("kestrel.deadline")
                )
                self._ended(outcome, time.monotonic() - arrived)


async def _hang_up(scope: Scope) -> None:
    """Close the connection at once where the server lets us; any does so once all is read."""
    if "kestrel.hang_up" in scope:
        scope["kestrel.hang_up"]()
        await asyncio.sleep(0)  # until the server knows of it, which else logs a broken answer


def _segments(scope: Scope) -> bool:
    # Servers leave the prefix that they serve the application under (root_path) in the path.
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return scope["method"] == "POST" and path == "/v1/segment"


def _refusal(error: RequestError, request_id: str) -> JsonAnswer:
    if error.status >= 500 and error.status not in (503, 504):
        log.error("request %s failed: %s", request_id, error.message)
        return _fault(request_id)
    if error.field == "image":
        # The half that decodes knows the image by its Python name.
        message = error.message.replace("image ", "image_url ", 1)
        error = type(error)(message, "image_url", error.retry_after_s)
    return JsonAnswer(error.body(), error.status, error.headers())


def _fault(request_id: str) -> JsonAnswer:
    return JsonAnswer({"error": "internal error", "request_id": request_id}, 500)
