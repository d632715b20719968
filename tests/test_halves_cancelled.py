"""A request that is cancelled just as a half answers stays cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from kestrel.api import DeadlineExceeded
from kestrel.config import RuntimeConfig
from serve_graph import compose, halves
from serve_graph.compose import GraphBackend
from serve_graph.halves import Deadline
from serve_graph.hedge import Hedge


class Response:
    """What a handle's call gives; answered by the test."""

    def __init__(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self.answer.__await__()

    def cancel(self) -> None:
        self.cancelled = True


async def test_a_call_that_is_answered_as_its_request_is_cancelled() -> None:
    response = Response()
    request = asyncio.create_task(halves._finish(response, Deadline(30)))
    await asyncio.sleep(0.01)
    response.answer.set_result("the model's answer")
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.wait({request})
    # Else it would go on to a refinement that nobody waits for.
    assert request.cancelled() and response.cancelled


async def test_a_call_that_nobody_answers_is_late_and_cancelled() -> None:
    for seconds in (0.05, 0.0):
        response = Response()
        with pytest.raises(DeadlineExceeded):
            await halves._finish(response, Deadline(seconds))
        assert response.cancelled


class Handle:
    def options(self, **_: Any) -> Handle:
        return self


def backend() -> GraphBackend:
    handle: Any = Handle()
    return GraphBackend(RuntimeConfig(), 5.0, Hedge(None, 0), handle, handle)


async def test_the_model_that_comes_as_a_waiting_request_is_cancelled() -> None:
    graph = backend()
    request = asyncio.create_task(graph.serving())
    await asyncio.sleep(0.01)
    graph._model_there.set()
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.wait({request})
    assert request.cancelled()


async def test_a_request_waits_for_the_model_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compose, "STARTING_S", 0.05)
    graph = backend()
    assert await graph.serving() == "model still starting"
    graph._model_there.set()
    assert await graph.serving() is None
