"""From the model's events and a refinement to the answers of the contract.

Used by the one-process server and by the graph's ingress, so that both compose alike.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from kestrel import answers
from kestrel.api import ModelDone, ModelEvent, ModelResult, RequestError
from kestrel.deadlines import within
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

log = logging.getLogger(__name__)

Refinement = SegmentRefineBitmapsResult | None


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
    """SSE payloads of one request: box, path chunks, then exactly one final payload or
    ``answers.ErrorEvent``.

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
        yield answers.ErrorEvent(error, request_id)
