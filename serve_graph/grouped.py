"""Events in groups, so that a message to another process need not be paid for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TypeVar

from kestrel.deadlines import cancelled

T = TypeVar("T")


async def grouped(events: AsyncGenerator[T, None], apart_s: float) -> AsyncGenerator[list[T], None]:
    """All of ``events`` in their order. One that comes ``apart_s`` seconds or more after a group is
    given at once and alone; those that come sooner wait for that time together.

    A failure comes after what came before it. Does not close ``events``.
    """
    group: list[T] = []
    given = -apart_s
    while True:
        coming = asyncio.ensure_future(anext(events))
        try:
            if group:
                left = given + apart_s - time.monotonic()
                await asyncio.wait({coming}, timeout=max(0.0, left))
                if not coming.done():
                    yield group
                    group, given = [], time.monotonic()
            group.append(await coming)
        except StopAsyncIteration:
            break
        except Exception:
            if group:
                yield group
            raise
        finally:
            await cancelled(coming)
        if time.monotonic() - given >= apart_s:
            yield group
            group, given = [], time.monotonic()
    if group:
        yield group
