"""A stream's events are late, lost, out of order, or a message each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from serve_graph.grouped import grouped

APART_S = 0.2


async def told(*steps: int | float | Exception) -> AsyncGenerator[int, None]:
    """Events (integers), seconds between them, and failures."""
    for step in steps:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            yield step


async def heard(*steps: int | float | Exception) -> list[list[int]]:
    return [group async for group in grouped(told(*steps), APART_S)]


async def test_fast_events_are_a_message_each() -> None:
    assert await heard(1, 2, 3, 4) == [[1], [2, 3, 4]]


async def test_slow_events_wait_for_others() -> None:
    assert await heard(1, 0.25, 2, 0.25, 3) == [[1], [2], [3]]
    assert await heard(1, 0.25, 2, 3, 0.25, 4) == [[1], [2], [3], [4]]


async def test_an_event_waits_for_one_that_does_not_come() -> None:
    events = grouped(told(1, 2, 60.0, 3), APART_S)
    assert [await anext(events), await asyncio.wait_for(anext(events), 20)] == [[1], [2]]
    await events.aclose()


async def test_the_end_waits() -> None:
    groups: list[list[int]] = []
    async with asyncio.timeout(20) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
        async for group in grouped(told(1, 2), 60.0):
            groups.append(group)
    assert groups == [[1], [2]]


async def test_what_came_before_a_failure_is_lost_with_it() -> None:
    events = grouped(told(1, 2, 3, ValueError("no")), 60.0)
    assert [await anext(events), await anext(events)] == [[1], [2, 3]]
    with pytest.raises(ValueError, match="no"):
        await anext(events)


async def test_nothing_is_something() -> None:
    assert await heard() == []
    with pytest.raises(ValueError):
        await heard(ValueError())


async def test_who_leaves_leaves_work_behind() -> None:
    ended = asyncio.Event()

    async def endless() -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield 2
            await asyncio.sleep(60)
        finally:
            ended.set()

    source = endless()
    events = grouped(source, APART_S)
    assert [await anext(events), await anext(events)] == [[1], [2]]
    leaving = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.05)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert ended.is_set()
    await source.aclose()
