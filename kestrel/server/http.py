"""The one-process server: the HTTP door over an engine in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from kestrel.api import ModelResult, Overloaded, SegmentRequest
from kestrel.config import RuntimeConfig
from kestrel.freed_memory import GivingBack, settle
from kestrel.job import EngineEnded, EngineError, engine_ended
from kestrel.server.compose import Refinement, compose_events
from kestrel.server.routes import build_app

if TYPE_CHECKING:
    from kestrel.engine import InferenceEngine

log = logging.getLogger(__name__)

WATCH_S = 1.0
"""Seconds between two looks at whether the engine still has its thread."""


class EngineBackend:
    """``kestrel.server.routes.Backend`` over an engine that starts while the server listens."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.failure: Exception | None = None
        """Why the engine could not be created."""
        self._engine: InferenceEngine | None = None

    async def start(self) -> None:
        """Create the engine; a failure is kept in ``failure`` and logged."""
        from kestrel.engine import InferenceEngine

        try:
            self._engine = await InferenceEngine.create(self.config)
        except Exception as error:
            self.failure = error
            log.exception("the engine could not be created")

    async def stop(self) -> None:
        """Shut the engine down, if there is one."""
        if self._engine is not None:
            await self._engine.shutdown()
            self._engine = None

    @property
    def max_context(self) -> int | None:
        """The model's context; None until it is loaded."""
        return self._engine.max_context if self._engine is not None else None

    async def ready(self) -> str | None:
        """None, or why no request can be served."""
        reason = await self.serving()
        if reason is None:
            try:
                await self._running().health()
            except Exception as error:
                return _unwell(error)
        return reason

    async def serving(self) -> str | None:
        """None, or what is known to be wrong. The look at a built-in picture is for ``ready``: a
        request would wait for it, and its deadline would pass."""
        if self.failure is not None:
            return "the model could not be loaded"
        if self._engine is None:
            return "the model is being loaded"
        try:
            self._engine.check_failure()
        except EngineError as error:
            return _unwell(error)
        return None

    async def ended(self) -> EngineEnded:
        """Waits until the engine's thread has ended by a failure, and gives that."""
        while self._engine is None or self._engine.failure is None:
            await asyncio.sleep(WATCH_S)
        return engine_ended(self._engine.failure)

    def _running(self) -> InferenceEngine:
        if self._engine is None:
            raise Overloaded("the model is not loaded", retry_after_s=2.0)
        return self._engine

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> tuple[ModelResult, Refinement]:
        """The model's path and what refinement made of it."""
        return await self._running().complete(request, request_id=request_id, timeout_s=timeout_s)

    def events(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """SSE payloads: see ``compose_events``."""
        events, refine = self._running().halves(request, request_id=request_id, timeout_s=timeout_s)
        return compose_events(
            events,
            refine,
            request_id=request_id,
            timeout_s=timeout_s,
            return_base64=request.return_base64,
        )


def _unwell(error: Exception) -> str:
    log.error("the engine is not well", exc_info=error)
    return f"the engine is not well: {error}"


def create_app(
    runtime_cfg: RuntimeConfig | None = None,
    *,
    on_failure: Callable[[Exception], None] | None = None,
) -> Starlette:
    """The ASGI application. It answers 503 until its engine is ready.

    ``on_failure`` is called when the engine cannot be created, and with ``EngineEnded`` when it
    failed for good; without it the application goes on answering 503, and its log says why.
    """
    backend = EngineBackend(runtime_cfg or RuntimeConfig())

    async def start() -> None:
        await backend.start()
        settle()
        if on_failure is not None:
            on_failure(backend.failure or await backend.ended())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(start())
        giving_back = GivingBack()
        try:
            yield
        finally:
            giving_back.stop()
            if not starting.done():
                starting.cancel()
            await asyncio.wait({starting})
            await backend.stop()

    return build_app(backend, lifespan=lifespan)
