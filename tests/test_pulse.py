"""The graph says that its model pool is away when it dies later, and when it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from kestrel.api import (
    BboxEvent,
    DeadlineExceeded,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    Overloaded,
    SegmentRequest,
)
from kestrel.config import RuntimeConfig
from kestrel.deadlines import within
from serve_graph import pulse
from serve_graph.compose import GraphBackend
from serve_graph.hedge import Hedge

ASK = SegmentRequest("dog")
DONE = ModelResult("id", "stop", "dog", "", None, ModelMetrics())


class Model:
    """A pool that answers, or fails as the test says."""

    def __init__(self) -> None:
        self.failure: Exception | float | None = None
        self.asked = 0

    async def _there(self) -> None:
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            await asyncio.sleep(self.failure)

    async def health(self) -> int:
        self.asked += 1
        await self._there()
        return 512

    async def complete(self, *_: Any) -> ModelResult:
        await self._there()
        return DONE

    async def events(self, *_: Any) -> AsyncGenerator[ModelEvent, None]:
        await self._there()
        yield BboxEvent({"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1})
        await asyncio.sleep(30)


class Handle:
    def options(self, **_: Any) -> Handle:
        return self


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> GraphBackend:
    monkeypatch.setattr(pulse, "SILENT_S", 0.3)
    monkeypatch.setattr(pulse, "ASK_AFTER_S", 0.02)
    handle: Any = Handle()
    made = GraphBackend(RuntimeConfig(), 5.0, Hedge(None, 0), handle, handle)
    made._starting = []
    made._model = Model()  # type: ignore[assignment]
    return made


async def until_ready(graph: GraphBackend, ready: bool) -> None:
    end = time.monotonic() + 5
    while (await graph.ready() is None) != ready:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def fails(graph: GraphBackend, stream: bool) -> None:
    """A request as the door makes it, with the door's own deadline around it."""
    with pytest.raises((Overloaded, DeadlineExceeded)):
        if stream:
            async for _ in graph.events(ASK, "id", 0.05):
                pass
        else:
            await within(time.monotonic() + 0.05, graph.complete(ASK, "id", 0.05))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [Overloaded("lost"), 30.0])
async def test_a_pool_that_dies_is_told_and_that_it_is_back(graph, failure, stream) -> None:
    graph._model.failure = failure
    await fails(graph, stream)
    assert await graph.ready() is None  # one failure is none of the pool's
    await until_ready(graph, False)
    assert await graph.ready() == "model pool does not answer"
    # Tried for all that, since only /healthz is read by the load balancer.
    graph._model_there.set()
    assert await graph.serving() is None
    if isinstance(failure, float):
        graph._model_pulse._asking.cancel()  # it would take as long as a health check
        graph._model.failure = None
        await graph.complete(ASK, "id", 5.0)
    graph._model.failure = None
    await until_ready(graph, True)


async def test_a_pool_that_answers_when_asked_is_there_although_requests_fail(graph) -> None:
    graph._model.failure = Overloaded("full")
    await fails(graph, False)
    graph._model.failure = None
    await asyncio.sleep(0.4)
    assert await graph.ready() is None and graph._model.asked == 1


async def test_a_stream_that_has_begun_is_an_answer(graph) -> None:
    graph._model.failure = Overloaded("full")
    await fails(graph, False)
    events = graph.events(ASK, "id", 5.0)
    graph._model.failure = None
    assert (await anext(events))["type"] == "bbox"
    assert graph._model_pulse._silent_since is None
    await events.aclose()


async def test_a_client_that_leaves_says_nothing_of_the_pool(graph) -> None:
    graph._model.failure = 30.0
    request = asyncio.create_task(graph.complete(ASK, "id", 5.0))
    await asyncio.sleep(0.02)
    request.cancel()
    await asyncio.wait({request})
    assert graph._model_pulse._silent_since is None
