"""Requests that end while a half is waited for: cancelled just as it answers, or late."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Generator
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from kestrel.api import (
    DeadlineExceeded,
    ModelMetrics,
    ModelResult,
    Overloaded,
    SegmentRequest,
)
from kestrel.config import RuntimeConfig
from serve_graph import compose, halves
from serve_graph.compose import GraphBackend
from serve_graph.halves import Deadline, RefinerHalf, RefinerUnavailable
from serve_graph.hedge import Hedge
from serve_graph.ingress import IngressDeployment


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


class Silent:
    """A half that answers nothing."""

    def options(self, **_: Any) -> Silent:
        return self

    def remote(self, *_: Any) -> Response:
        return Response()


@pytest.mark.parametrize(
    ("timeout_s", "deadline_s", "error"),
    [
        (0.05, 600.0, RefinerUnavailable),
        (600.0, 0.05, DeadlineExceeded),
        (0.05, 0.05, DeadlineExceeded),
    ],
)
async def test_a_refiner_that_is_silent_takes_all_of_a_request_s_time_or_is_done_without(
    timeout_s: float, deadline_s: float, error: type[Exception]
) -> None:
    silent: Any = Silent()
    half = RefinerHalf(silent, timeout_s, Hedge(None, 0))
    box = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    model = ModelResult("id", "stop", "dog", "M0 0L1 0L1 1Z", box, ModelMetrics())
    asking = half.refine(SegmentRequest("dog", b"an image"), model, Deadline(deadline_s))
    with pytest.raises(error):
        await asyncio.wait_for(asking, 60)


def sent(value: Any) -> Any:
    """What a replica gets of what its handle was called with, when it is sent to it now."""
    return pickle.loads(pickle.dumps(value))


class FullPool:
    """A half that takes a request after 0.3 s, in which its replicas are full, and refuses it."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def options(self, **_: Any) -> FullPool:
        return self

    def remote(self, request: Any, request_id: str, seconds: Any) -> Any:
        async def taken() -> Any:
            await asyncio.sleep(0.3)
            self.told.append(sent(seconds))
            raise Overloaded("the queue is longer than the request's deadline")

        class Taken(Response):
            def __await__(self) -> Generator[Any, None, Any]:
                return taken().__await__()

            def __anext__(self) -> Any:
                return taken()

        return Taken()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_that_waited_for_a_replica_gets_that_time_again(streamed: bool) -> None:
    """The replica would take what cannot be done in time, and keep a slot busy with it."""
    pool: Any = FullPool()
    half = halves.ModelHalf(pool)
    request: Any = None
    with pytest.raises(Overloaded):
        if streamed:
            async for _ in half.events(request, "id", Deadline(2.0)):
                pass
        else:
            await half.complete(request, "id", Deadline(2.0))
    (seconds,) = pool.told
    assert 0 < seconds < 1.75


class Handle:
    """A half that refuses all, and keeps how many seconds it was given for each."""

    def __init__(self) -> None:
        self.given: list[float] = []

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, request: Any, request_id: str, seconds: float) -> Any:
        self.given.append(sent(seconds))
        raise Overloaded("busy")


def backend(handle: Any = None) -> GraphBackend:
    handle = handle or Handle()
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


async def called(graph: GraphBackend, method: str, timeout_s: float) -> None:
    """One call by handle of the ingress, to its end."""
    ingress = IngressDeployment.__new__(IngressDeployment)
    ingress._backend = graph
    if method == "segment":
        await ingress.segment(object="dog", timeout_s=timeout_s)
    else:
        async for _ in ingress.stream(object="dog", timeout_s=timeout_s):
            pass


@pytest.mark.parametrize("method", ["segment", "stream"])
async def test_a_call_by_handle_waits_for_the_model_until_its_deadline(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "STARTING_S", 10.0)
    handle = Handle()
    with pytest.raises(DeadlineExceeded):
        await called(backend(handle), method, 0.2)
    assert not handle.given


@pytest.mark.parametrize("method", ["segment", "stream"])
async def test_what_a_call_by_handle_waited_for_the_model_is_not_given_to_it_again(
    method: str,
) -> None:
    handle = Handle()
    graph = backend(handle)
    asyncio.get_running_loop().call_later(0.5, graph._model_there.set)
    with pytest.raises(Overloaded, match="busy"):
        await called(graph, method, 50.0)
    (seconds,) = handle.given
    assert 0 < seconds < 49.8
