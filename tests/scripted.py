"""A backend behind the HTTP transport whose model and refiner do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest
from serving import base64_text, picture

from kestrel.api import (
    BboxEvent,
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    PathDelta,
    SegmentRequest,
)
from kestrel.config import Limits, RuntimeConfig
from kestrel.server.compose import Refinement, compose_events
from kestrel.server.room import Room
from kestrel.server.routes import build_app

BOX = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
LIMITS = Limits(max_body_bytes=20_000, max_image_pixels=10_000)
ASK = {"object": "disc", "image_url": base64_text(picture())}


class ScriptedBackend:
    """A backend whose model and refiner do what the test says.

    ``script`` lists the model's steps: an event to give, an exception to raise, a number of
    seconds to think, or what is to be set before it goes on. ``held`` counts the requests that
    hold a slot or a refinement.
    """

    max_context: int | None = 512

    def __init__(self, **config: Any) -> None:
        self.config = RuntimeConfig(limits=LIMITS, **config)
        self.script: list[ModelEvent | Exception | float | threading.Event] = []
        self.refinement: Refinement | Exception | float = None
        self.not_ready: str | None = None
        self.held = 0
        self.begun = 0
        self.asked: list[SegmentRequest] = []
        self.timeouts: list[float] = []
        self.ended_by: list[str] = []

    async def ready(self) -> str | None:
        return self.not_ready

    async def serving(self) -> str | None:
        return self.not_ready

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> tuple[ModelResult, Refinement]:
        self.timeouts.append(timeout_s)
        async with contextlib.aclosing(self._generate(request, request_id)) as events:
            done = [event.result async for event in events if isinstance(event, ModelDone)]
        if not done:
            raise RuntimeError("the model ended without a result")
        return done[0], await self._refine(done[0])

    def events(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        self.timeouts.append(timeout_s)
        return compose_events(
            self._generate(request, request_id),
            self._refine,
            request_id=request_id,
            timeout_s=timeout_s,
            return_base64=request.return_base64,
        )

    async def _generate(
        self, request: SegmentRequest, request_id: str
    ) -> AsyncGenerator[ModelEvent, None]:
        self.asked.append(request)
        with self._holding():
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.01)
                else:
                    yield step
            metrics = ModelMetrics(input_tokens=9, output_tokens=3)
            path = "".join(s.chunk for s in self.script if isinstance(s, PathDelta))
            result = ModelResult(request_id, "stop", request.object, path, BOX, metrics)
            yield ModelDone(result)

    async def _refine(self, model: ModelResult) -> Refinement:
        with self._holding():
            if isinstance(self.refinement, Exception):
                raise self.refinement
            if isinstance(self.refinement, float):
                await asyncio.sleep(self.refinement)
                return None
            return self.refinement

    def _holding(self) -> _Holding:
        return _Holding(self)


class _Holding:
    def __init__(self, backend: ScriptedBackend) -> None:
        self.backend = backend

    def __enter__(self) -> None:
        self.backend.held += 1
        self.backend.begun += 1

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.backend.held -= 1
        self.backend.ended_by.append(kind.__name__ if kind else "end")


WELL: list[ModelEvent | Exception | float | threading.Event] = [
    BboxEvent(BOX),
    PathDelta("M0 0", 5),
    PathDelta("L1 0L1 1Z", 9),
]


class Reader:
    """A connection whose client takes ``takes`` messages of the answer and then no more."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.sent: list[Any] = []

    async def request(self, app: Any, method: str, path: str, body: dict[str, Any]) -> None:
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive() -> Any:
            for message in messages:
                return message
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if len(self.sent) == self.takes:
                await asyncio.Event().wait()
            self.sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": []}
        await asyncio.wait_for(app(scope, receive, send), 5)


def ingress_over(backend: ScriptedBackend) -> Any:
    """The methods that a handle calls, over ``backend``."""
    from serve_graph.ingress import IngressDeployment

    ingress: Any = IngressDeployment.__new__(IngressDeployment)
    ingress._backend = backend
    ingress._backend.room = Room(backend.config)
    return ingress


@pytest.fixture
def backend() -> ScriptedBackend:
    made = ScriptedBackend(request_timeout_s=5.0)
    made.script = list(WELL)
    return made


@pytest.fixture
async def client(backend: ScriptedBackend) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_app(backend), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


def refused(response: httpx.Response, status: int, field: str | None = None) -> str:
    """The message of a refusal in the contract's shape."""
    body = response.json()
    assert response.status_code == status, body
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert body.get("field") == field
    assert set(body) == ({"error", "field"} if field else {"error"})
    assert isinstance(body["error"], str) and body["error"]
    return str(body["error"])
