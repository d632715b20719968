"""The two halves put together: what stands behind both doors of the graph."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kestrel.api import DeadlineExceeded, ModelEvent, ModelResult, Overloaded, SegmentRequest
from kestrel.config import RuntimeConfig
from kestrel.deadlines import within
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.server.compose import compose_events
from kestrel.server.room import Room
from serve_graph import metrics
from serve_graph.halves import Deadline, ModelHalf, RefinerHalf, RefinerUnavailable
from serve_graph.hedge import Hedge
from serve_graph.pulse import Pulse

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

STOPPING = "the server is about to stop"
"""The answer of a graph that drains; with the number of requests left at ``/healthz``."""

STARTING_S = 45.0
"""How long a request waits for the first word of the model pool, seconds: an ingress replica that
an update has just started must not refuse what the model's new replica will soon take."""


class GraphBackend:
    """Model pool, then refiner pool, for each request: a ``kestrel.server.routes.Backend``."""

    def __init__(
        self,
        config: RuntimeConfig,
        refine_timeout_s: float,
        hedge: Hedge,
        model: DeploymentHandle,
        refiner: DeploymentHandle,
    ) -> None:
        self.config = config
        self._built = (config, refine_timeout_s)
        self.max_context: int | None = None
        """Positions of the model; None until a model replica has answered."""
        self.room = Room(config)
        """What both doors hold."""
        self.draining = False
        """Whether new requests are refused because the graph is about to be stopped."""
        self._starting = ["model", "refiner"]
        self._model_there = asyncio.Event()
        self._model = ModelHalf(model)
        self._model_pulse = Pulse(lambda: self._model.health())
        self._refiner = RefinerHalf(refiner, refine_timeout_s, hedge)

    async def wait_for_halves(self) -> None:
        """Returns once a replica of each half has answered. A replica of either exists only after
        it has segmented a built-in picture."""
        while self._starting:
            try:
                if "model" in self._starting:
                    self.max_context = await self._model.health()
                    self._starting.remove("model")
                    self._model_there.set()
                await self._refiner.health()
                self._starting.remove("refiner")
            except Exception as error:
                logger.info("waiting for %s: %r", " and ".join(self._starting), error)
                await asyncio.sleep(0.5)

    def change(self, refine_timeout_s: float | None, api_keys: list[Any] | None) -> None:
        """Take other settings for the requests to come; None: what the graph was built with."""
        self._refiner.timeout_s = refine_timeout_s or self._built[1]
        self.config = self._built[0]
        if api_keys is not None:
            self.config = replace(self.config, api_keys=tuple(api_keys))

    async def ready(self) -> str | None:
        """None once both halves have answered, else which are still starting; and where the model
        pool has since ceased to answer, that."""
        if self.draining:
            return f"{STOPPING}, {self.room.requests} requests left"
        if self._starting:
            return f"{' and '.join(self._starting)} still starting"
        # Not the refiners: without them paths are the model's own, which is better than nothing.
        return "model pool does not answer" if self._model_pulse.away else None

    async def serving(self) -> str | None:
        """None once the model pool has answered: without refiners, paths are the model's own."""
        if self.draining:
            return STOPPING
        if self._model_there.is_set():
            return None
        try:
            await within(time.monotonic() + STARTING_S, self._model_there.wait())
        except DeadlineExceeded:
            return "model still starting"
        return None

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> tuple[ModelResult, SegmentRefineBitmapsResult]:
        """The model's result and what refinement made of it; raises RequestError."""
        deadline = Deadline(timeout_s)
        with self._model_pulse.call(deadline):
            model = await self._model.complete(request, request_id, deadline)
        self._model_pulse.answered()
        return model, await self._refined(request, model, deadline)

    def events(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The contract's events; RequestError before the first one only."""
        deadline = Deadline(timeout_s)
        return compose_events(
            self._model_events(request, request_id, deadline),
            lambda model: self._refined(request, model, deadline),
            request_id=request_id,
            timeout_s=timeout_s,
            return_base64=request.return_base64,
        )

    async def _model_events(
        self, request: SegmentRequest, request_id: str, deadline: Deadline
    ) -> AsyncGenerator[ModelEvent, None]:
        async with contextlib.aclosing(self._model.events(request, request_id, deadline)) as events:
            with self._model_pulse.call(deadline):
                async for event in events:
                    self._model_pulse.answered()
                    yield event

    async def _refined(
        self, request: SegmentRequest, model: ModelResult, deadline: Deadline
    ) -> SegmentRefineBitmapsResult:
        if request.image is None or not model.refinable:
            reason = "no_image" if request.image is None else "no_path"
            # Other reasons stand in the log of the refiner, which knows more of them.
            logger.info("request %s: not refined (%s)", model.request_id, reason)
            refined = SegmentRefineBitmapsResult(reason=reason)
        else:
            try:
                refined = await self._refiner.refine(request, model, deadline)
            except RefinerUnavailable as error:
                metrics.count(metrics.REFINEMENTS, reason="unavailable")
                logger.warning("request %s: refiner unavailable: %s", model.request_id, error)
                if request.return_base64:
                    raise Overloaded("the refiner is unavailable", retry_after_s=2.0) from error
                return SegmentRefineBitmapsResult(reason="unavailable")
        metrics.count(metrics.REFINEMENTS, reason=refined.reason)
        return refined
