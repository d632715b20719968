"""The errors of the contract: what each is over HTTP, and what operators call it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any


class RequestError(ValueError):
    """A request that is refused: HTTP status, message, the field at fault, when to come back."""

    status = 400

    def __init__(
        self, message: str, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.field, self.retry_after_s)

    def body(self) -> dict[str, str]:
        """The JSON body of the HTTP answer."""
        said = {"error": self.message} | ({"field": self.field} if self.field else {})
        # Half of a surrogate pair, quoted from a request, is no text that JSON in UTF-8 can carry.
        return {key: text.encode(errors="backslashreplace").decode() for key, text in said.items()}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds where there is one, ``WWW-Authenticate`` for a 401."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class InvalidRequest(RequestError):
    """400: a field of the wrong type or out of range."""


class Unauthorized(RequestError):
    """401: an API key is configured and the request's is not it."""

    status = 401

    def __init__(
        self,
        message: str = "missing or wrong API key (Authorization: Bearer or X-Moondream-Auth)",
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, field, retry_after_s)


class UnknownModel(RequestError):
    """404: the named model is not served here."""

    status = 404


class TooLarge(RequestError):
    """413: too many bytes or pixels."""

    status = 413


class PromptTooLong(RequestError):
    """422: the prompt does not fit the model's context."""

    status = 422


class Overloaded(RequestError):
    """503: queue full, starting, or a part is away; ``retry_after_s`` says when to come back."""

    status = 503

    def __init__(
        self, message: str, field: str | None = None, retry_after_s: float | None = 1.0
    ) -> None:
        super().__init__(message, field, retry_after_s)


FULL_HEADER = "X-Service-Full"
"""Of an answer: no other request would have been taken either."""


class Full(Overloaded):
    """503: there is no place for one more request, whatever it asks."""

    def headers(self) -> dict[str, str]:
        return super().headers() | {FULL_HEADER: "1"}


class RateLimited(Overloaded):
    """429: the API key has used up its rate; ``retry_after_s`` says when to come back."""

    status = 429


class DeadlineExceeded(RequestError):
    """504: the deadline passed; the work is cancelled."""

    status = 504

    def __init__(
        self,
        message: str = "the request's deadline passed",
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, field, retry_after_s)


class ServiceFault(RequestError):
    """500 as a client sees it: the answer carries a request id and nothing of the server."""

    status = 500


OUTCOMES = {
    400: "invalid",
    401: "unauthorized",
    404: "unknown",
    413: "too_large",
    422: "too_long",
    429: "rate_limited",
    503: "overloaded",
    504: "late",
}
"""What operators call the end of a refused request, by its status."""


EARLY_S = 0.1
"""Whoever waits for a request has its deadline too, and leaves or cancels it up to so long before
it passes here, seconds: it began to count when it sent the request."""


def outcome(error: BaseException | None, deadline: float | None = None) -> str:
    """How a request ended, for metrics: ``ok``, an ``OUTCOMES``, ``left`` (its client went away)
    or ``fault``. A client that leaves at its ``deadline`` (by ``time.monotonic()``; None: there is
    none) or later did not get its answer in time: ``late``."""
    if error is None:
        return "ok"
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        late = deadline is not None and deadline - time.monotonic() < EARLY_S
        return "late" if late else "left"
    return OUTCOMES.get(error.status, "fault") if isinstance(error, RequestError) else "fault"


def error_from_response(
    status: int, body: Mapping[str, Any], retry_after: str | None
) -> RequestError:
    """The error that a server meant by its HTTP answer; the client's side of ``body``."""
    kinds: tuple[type[RequestError], ...] = (
        InvalidRequest,
        Unauthorized,
        UnknownModel,
        TooLarge,
        PromptTooLong,
        Overloaded,
        RateLimited,
        DeadlineExceeded,
    )
    by_status = {kind.status: kind for kind in kinds}
    after = float(retry_after) if retry_after and retry_after.isdigit() else None
    kind = by_status.get(status, ServiceFault)
    message = str(body.get("error", f"HTTP {status}"))
    if "request_id" in body:
        message += f" (request {body['request_id']})"
    return kind(message, body.get("field"), after)
