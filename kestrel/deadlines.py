"""Waiting for work up to a deadline, and for its end when nobody wants it any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from kestrel.errors import DeadlineExceeded

log = logging.getLogger(__name__)

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
