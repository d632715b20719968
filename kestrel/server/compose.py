"""From the model's events and a refinement to the answers of the contract.

Used by the one-process server and by the graph's ingress, so that both compose alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from kestrel import answers
from kestrel.api import DeadlineExceeded, ModelDone, ModelEvent, ModelResult, RequestError
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

log = logging.getLogger(__name__)

Refinement = SegmentRefineBitmapsResult | None
T = TypeVar("T")


async def within(deadline: float, work: Awaitable[T]) -> T:
    """``work``'s result; cancelled and ``DeadlineExceeded`` when ``time.monotonic()`` passes.

    Not ``asyncio.wait_for``, which until Python 3.12 forgets that it was cancelled when the work
    ends at the same time: a stream would go on for a client that is gone.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=max(0.0, deadline - time.monotonic()))
        if not task.done():
            raise DeadlineExceeded()
        return task.result()
    finally:
        await cancelled(task)


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Returns when the work is no longer under way, which is made so if need be."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            log.error("cancelled work raised", exc_info=error)


def server_timing(model: ModelResult, refined: Refinement) -> str:
    """Where a request's time went, as the value of a ``Server-Timing`` header, milliseconds:
    ``prepare`` (wait and picture), ``prefill``, ``decode``, ``refine``."""
    times = model.metrics
    stages = {
        "prepare": times.ttft_ms - times.prefill_time_ms,
        "prefill": times.prefill_time_ms,
        "decode": times.decode_time_ms,
    }
    if refined is not None and refined.timings_ms:
        stages["refine"] = sum(refined.timings_ms.values())
    return ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in stages.items())


async def compose_events(
    events: AsyncGenerator[ModelEvent, None],
    refine: Callable[[ModelResult], Awaitable[Refinement]],
    *,
    request_id: str,
    timeout_s: float,
    return_base64: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """SSE payloads of one request: box, path chunks, then exactly one final or error payload.

    Raises (RequestError, or what ``events`` raises) before the first payload only. ``timeout_s``
    bounds the whole, refinement included. However this generator is left, ``events`` is closed
    and a refinement under way is cancelled.
    """
    deadline = time.monotonic() + timeout_s
    started = False
    try:
        async with contextlib.aclosing(events):
            while True:
                event = await within(deadline, anext(events))
                if isinstance(event, ModelDone):
                    break
                started = True
                yield answers.event_payload(event)
        refined = await within(deadline, refine(event.result))
        yield answers.final_event(event.result, refined, return_base64=return_base64)
    except Exception as error:
        if isinstance(error, StopAsyncIteration):
            error = RuntimeError("the model half ended without a result")
        if not started:
            raise error
        if not isinstance(error, RequestError):
            log.error("request %s failed after its first event", request_id, exc_info=error)
        yield answers.error_event(error, request_id)
