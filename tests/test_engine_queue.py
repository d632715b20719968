"""The engine's queue is bounded by count, by bytes and by what its requests have time for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from serving import picture

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.api import Overloaded
from kestrel.batch import Batch

PICTURE = picture(1200, 900)


@pytest.fixture
async def engine() -> AsyncIterator[InferenceEngine]:
    config = RuntimeConfig(
        max_batch_size=1, max_queue_bytes=int(2.5 * len(PICTURE)), refiner=None, torch_threads=1
    )
    async with await InferenceEngine.create(config) as made:
        yield made


async def ask(engine: InferenceEngine, image: bytes | None, timeout_s: float = 60.0) -> str:
    try:
        await engine.segment(object="butterfly", image=image, timeout_s=timeout_s)
    except Overloaded as error:
        assert error.retry_after_s is not None and 1 <= error.retry_after_s <= 60
        return error.message
    return "answered"


async def test_images_that_wait_are_bounded_together_by_bytes(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_asked, step = threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda *args: all_asked.wait(30) and step(*args))
    asked = [asyncio.create_task(ask(engine, PICTURE)) for _ in range(8)]
    await asyncio.sleep(0)
    all_asked.set()
    said = await asyncio.gather(*asked)
    assert said.count("answered") in (2, 3)
    assert all("bytes wait" in message for message in said if message != "answered")
    # What holds no image is not kept out by those that do.
    (*_, last) = await asyncio.gather(*(ask(engine, PICTURE) for _ in range(2)), ask(engine, None))
    assert last == "answered"


async def test_a_request_that_would_be_late_in_the_queue_is_told_so_at_once(
    engine: InferenceEngine,
) -> None:
    assert await ask(engine, None) == "answered"
    engine._scheduler._seconds = 10.0  # what requests have taken of late
    waiting = [asyncio.create_task(ask(engine, None)) for _ in range(3)]
    await asyncio.sleep(0)
    assert "longer than the request's deadline" in await ask(engine, None, timeout_s=5.0)
    engine._scheduler._seconds = 1e3
    assert "longer than the request's deadline" in await ask(engine, None, timeout_s=5.0)
    assert await asyncio.gather(*waiting) == ["answered"] * 3


async def test_requests_that_wait_for_memory_are_taken_for_such_as_run_at_once() -> None:
    # Memory for two requests of a whole context would be over 7 MB.
    config = RuntimeConfig(max_batch_size=8, kv_cache_bytes=4_500_000, device="cpu", refiner=None)
    async with await InferenceEngine.create(config) as engine:
        assert await ask(engine, None) == "answered"
        engine._scheduler._seconds = 10.0
        waiting = [asyncio.create_task(ask(engine, None)) for _ in range(3)]
        await asyncio.sleep(0)
        assert "longer than the request's deadline" in await ask(engine, None, timeout_s=5.0)
        assert await asyncio.gather(*waiting) == ["answered"] * 3


async def test_requests_are_refused_before_any_was_measured(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, step = threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda *args: go_on.wait(60) and step(*args))
    engine._scheduler._seconds = 10.0  # of the self-check, with its first-time work
    asked = [asyncio.create_task(ask(engine, None, timeout_s=50.0)) for _ in range(40)]
    try:
        await asyncio.sleep(0)
        assert engine.stats().get("refused", 0) == 0
        for task in asked[1:]:
            task.cancel()
    finally:
        go_on.set()
    assert await asked[0] == "answered"


async def test_what_running_requests_will_still_take_is_told(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, step = threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda *args: go_on.wait(60) and step(*args))
    engine._scheduler._seconds = 1e3
    assert engine.stats()["left_s"] == 1e3
    asked = asyncio.create_task(ask(engine, None))
    try:
        while not engine.stats()["running"]:
            await asyncio.sleep(0.01)
        assert 900 < engine.stats()["left_s"] < 1e3
        engine._scheduler._seconds = 1e-9  # it has run for longer than they do
        assert engine.stats()["left_s"] == 0
    finally:
        go_on.set()
    assert await asked == "answered"


async def test_the_first_measured_request_is_drowned_in_a_guess(engine: InferenceEngine) -> None:
    engine._scheduler._seconds = 1e6
    assert await ask(engine, None) == "answered"
    assert engine.stats()["seconds"] < 60.0
    engine._scheduler._seconds = 1e6
    assert await ask(engine, None) == "answered"
    assert engine.stats()["seconds"] > 8e5
