"""The model deployment: one engine per replica, no refinement."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kestrel.api import ModelEvent, ModelResult, SegmentRequest
    from kestrel.config import RuntimeConfig


class ModelDeployment:
    """Image and noun in, path and box out. Its replica is ready once it has segmented a picture."""

    async def __init__(self, config: RuntimeConfig) -> None:  # type: ignore[misc]
        # Imported here, so that the processes that only pass this class on never load torch.
        from kestrel.engine import InferenceEngine

        self._engine = await InferenceEngine.create(config)
        await self._engine.warmup()
        self._running = 0
        self._outcomes = {"completed": 0, "failed": 0, "cancelled": 0}

    async def generate(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[ModelEvent, None]:
        """The model's events of one request; leaving the iteration frees its slot."""
        from kestrel.api import ModelDone

        outcome = "cancelled"
        self._running += 1
        events = self._engine.generate(request, request_id=request_id, timeout_s=timeout_s)
        try:
            async for event in events:
                if isinstance(event, ModelDone):
                    outcome = "completed"
                yield event
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._running -= 1
            self._outcomes[outcome] += 1
            await events.aclose()

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> ModelResult:
        """The finished path and box of one request, as one message."""
        from kestrel.api import ModelDone

        events = self.generate(request, request_id, timeout_s)
        try:
            async for event in events:
                if isinstance(event, ModelDone):
                    return event.result
        finally:
            await events.aclose()
        raise RuntimeError("the engine ended a request without a result")

    async def health(self) -> int:
        """Positions of the model. A replica exists only after it has segmented a picture."""
        return self._engine.max_context

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self._engine.health()

    def stats(self) -> dict[str, Any]:
        """Requests that run now, how the others ended, and the engine's own numbers."""
        return {
            "pid": os.getpid(),
            "running": self._running,
            **self._outcomes,
            "engine": self._engine.stats(),
            "torch": "torch" in sys.modules,
        }

    async def __del__(self) -> None:
        # Serve awaits this when it takes the replica down.
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
