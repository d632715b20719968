"""Health checks of the engine: however many ask, one picture is segmented for all of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kestrel import InferenceEngine
from kestrel.job import EngineError


class Idle(InferenceEngine):
    """An engine without a model, on which nothing has completed of late."""

    def __init__(self) -> None:
        self._scheduler = SimpleNamespace(last_success=-1e9)  # type: ignore[assignment]
        self.checks = 0
        self.fault: Exception | None = None

    async def _check(self) -> None:
        self.checks += 1
        await asyncio.sleep(0.05)
        if self.fault is not None:
            raise self.fault


async def test_calls_at_once_share_one_check() -> None:
    engine = Idle()
    await asyncio.gather(*(engine.health() for _ in range(40)))
    assert engine.checks == 1
    await engine.health()
    assert engine.checks == 2


async def test_all_of_them_hear_that_it_failed() -> None:
    engine = Idle()
    engine.fault = EngineError("stuck")
    said = await asyncio.gather(*(engine.health() for _ in range(3)), return_exceptions=True)
    assert said == [engine.fault] * 3 and engine.checks == 1


async def test_one_that_leaves_does_not_end_the_check_of_the_others() -> None:
    engine = Idle()
    first, second = (asyncio.create_task(engine.health()) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert engine.checks == 1


def test_a_check_of_another_event_loop_is_not_waited_for() -> None:
    engine = Idle()

    async def left_behind() -> None:
        asyncio.create_task(engine.health())  # noqa: RUF006
        await asyncio.sleep(0.01)

    asyncio.run(left_behind())
    asyncio.run(engine.health())
    assert engine.checks == 2
