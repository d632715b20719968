"""Health checks of the engine: however many ask, one picture is segmented for all of them, and no
request waits for it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import httpx
import pytest
from serving import base64_text

from kestrel import InferenceEngine
from kestrel.job import EngineError
from kestrel.server.http import EngineBackend
from kestrel.server.routes import build_app

pytest_plugins = ["engines"]


class Checks:
    """The engine's own checks, counted and slowed; ``fault`` is what they end with."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.begun = 0
        self.fault: Exception | None = None
        self._check = engine._check

    async def __call__(self) -> None:
        self.begun += 1
        await asyncio.sleep(0.05)
        if self.fault is not None:
            raise self.fault
        await self._check()


@pytest.fixture
def checks(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> Checks:
    """Nothing that completed of late counts: every ``health`` asks for a check."""
    made = Checks(engine)
    monkeypatch.setattr("kestrel.engine.HEALTHY_FOR_S", -1.0)
    monkeypatch.setattr(engine, "_check", made)
    return made


async def test_calls_at_once_share_one_check(engine: InferenceEngine, checks: Checks) -> None:
    completed = engine.stats()["completed"]
    await asyncio.gather(*(engine.health() for _ in range(40)))
    assert checks.begun == 1
    await engine.health()
    assert checks.begun == 2
    assert engine.stats()["completed"] == completed + 2


async def test_all_of_them_hear_that_it_failed(engine: InferenceEngine, checks: Checks) -> None:
    checks.fault = EngineError("stuck")
    said = await asyncio.gather(*(engine.health() for _ in range(3)), return_exceptions=True)
    assert said == [checks.fault] * 3 and checks.begun == 1


async def test_one_that_leaves_does_not_end_the_check_of_the_others(
    engine: InferenceEngine, checks: Checks
) -> None:
    first, second = (asyncio.create_task(engine.health()) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert checks.begun == 1


def test_a_check_of_another_event_loop_is_not_waited_for(
    engine: InferenceEngine, checks: Checks
) -> None:
    async def left_behind() -> None:
        asyncio.create_task(engine.health())  # noqa: RUF006
        await asyncio.sleep(0.01)

    asyncio.run(left_behind())
    asyncio.run(engine.health())
    assert checks.begun == 2


async def test_a_failed_check_that_all_have_left_is_no_unheard_exception(
    engine: InferenceEngine, checks: Checks
) -> None:
    checks.fault = EngineError("stuck")
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    asking = asyncio.create_task(engine.health())
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    check = engine._checking
    assert check is not None
    await asyncio.wait({check})
    del asking, check  # whose end is the last that could be told of it
    engine._checking = checks.fault = None
    gc.collect()
    await asyncio.sleep(0)
    assert not unheard


async def test_no_check_waits_for_a_slot_while_those_that_have_all_go_on(
    engine: InferenceEngine, ask: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kestrel.engine.HEALTHY_FOR_S", 0.5)
    batch, goes_on = engine._scheduler._batch, threading.Event()
    step = batch.step

    def slow(chunks: Any) -> Any:
        assert goes_on.wait(30)
        time.sleep(0.05)
        return step(chunks)

    monkeypatch.setattr(batch, "step", slow)
    goes_on.set()
    completed = engine.stats()["completed"]
    asked = [asyncio.create_task(engine.segment(**ask)) for _ in range(6)]
    await asyncio.sleep(0.6)
    engine._scheduler.last_success = 0.0
    # Serve gives a check some seconds, and replaces a replica after the third without an answer.
    await asyncio.wait_for(engine.health(), 0.2)
    assert engine.stats()["completed"] == completed
    goes_on.clear()
    await asyncio.sleep(0.6)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(engine.health(), 0.2)
    goes_on.set()
    await asyncio.gather(*asked)


async def test_a_request_waits_for_no_check(
    engine: InferenceEngine, checks: Checks, ask: dict[str, Any]
) -> None:
    backend = EngineBackend(engine.config)
    backend._engine = engine
    # What a check would find out is for those who ask for one.
    checks.fault = EngineError("the picture shows nothing")
    transport = httpx.ASGITransport(build_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"object": ask["object"], "image_url": base64_text(ask["image"])}
        answer = await client.post("/v1/segment", json=body, timeout=30)
        assert (answer.status_code, checks.begun) == (200, 0)
        health = await client.get("/healthz")
        assert (health.status_code, checks.begun) == (503, 1)
        assert "the picture shows nothing" in health.json()["error"]
