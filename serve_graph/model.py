"""The model deployment: one engine per replica, no refinement."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kestrel import api
from kestrel.api import ModelDone
from kestrel.freed_memory import GivingBack, settle
from serve_graph import metrics, tracing
from serve_graph.args import model_settings
from serve_graph.grouped import grouped
from serve_graph.reconfigured import FormerSettings

if TYPE_CHECKING:
    from kestrel.api import ModelEvent, ModelResult, SegmentRequest
    from kestrel.config import RuntimeConfig

MESSAGES_APART_S = 0.05
"""Between two messages of a stream to the ingress, seconds. A small model says twenty commands in
that time, and a message costs the ingress as much as all else that it does for one."""
SHARE_WEIGHT = 0.02
"""Weight of one request in the running mean of how many go on to a refiner."""


class ModelDeployment:
    """Image and noun in, path and box out. Its replica is ready once it has segmented a picture."""

    async def __init__(self, config: RuntimeConfig) -> None:  # type: ignore[misc]
        # Imported here, so that the processes that only pass this class on never load torch.
        from kestrel.engine import InferenceEngine

        self._engine = await InferenceEngine.create(config)
        metrics.log_with_serve()
        self._former = FormerSettings()
        self._running = 0
        self._exported = {"steps": 0, "tokens": 0}
        # Kept, because asyncio itself holds its tasks weakly.
        self._watching = asyncio.create_task(self._watch())
        self._share = 1.0
        self._outcomes = {"completed": 0, "failed": 0, "cancelled": 0}
        GivingBack()
        settle()

    async def _watch(self) -> None:
        """Export what the engine counts, once a second."""
        while True:
            self._former.export()
            stats = self._engine.stats()
            metrics.level(metrics.MODEL_RUNNING, stats["running"])
            metrics.level(metrics.MODEL_WAITING, stats["waiting"])
            metrics.level(metrics.MODEL_SLOTS, stats["slots"])
            for key, spec in (("steps", metrics.MODEL_STEPS), ("tokens", metrics.MODEL_TOKENS)):
                metrics.count(spec, by=stats.get(key, 0) - self._exported[key])
                self._exported[key] = stats.get(key, 0)
            await asyncio.sleep(1.0)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this with the deployment's ``user_config``, and would stop every replica of a
        deployment without it. Nothing of a model changes in place."""
        with self._former.stay():
            model_settings(user_config)

    async def generate(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[list[ModelEvent], None]:
        """The model's events of one request, in groups; leaving the iteration frees its slot."""
        events = self._engine.generate(request, request_id=request_id, timeout_s=timeout_s)
        with self._counted(timeout_s) as ended:
            async with contextlib.aclosing(events):
                async for group in grouped(events, MESSAGES_APART_S):
                    if isinstance(group[-1], ModelDone):
                        ended(request, group[-1].result)
                    yield group

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> ModelResult:
        """The finished path and box of one request, as one message: no event is made for it."""
        # Masks come from the other half; without one, an engine would count them as missing.
        request = replace(request, return_base64=False)
        with self._counted(timeout_s) as ended:
            result, _ = await self._engine.complete(
                request, request_id=request_id, timeout_s=timeout_s
            )
            ended(request, result)
            return result

    @contextlib.contextmanager
    def _counted(self, timeout_s: float) -> Iterator[Callable[[SegmentRequest, ModelResult], None]]:
        """Count one request; what it gives is called with the result of one that completes."""
        outcome, failure = "cancelled", None
        deadline = time.monotonic() + timeout_s
        self._running += 1

        def ended(request: SegmentRequest, result: ModelResult) -> None:
            nonlocal outcome
            outcome = "completed"
            _observe_stages(result)
            handed = request.image is not None and result.refinable
            self._share += SHARE_WEIGHT * (handed - self._share)

        try:
            yield ended
        except Exception as error:
            outcome, failure = "failed", error
            raise
        finally:
            self._running -= 1
            self._outcomes[outcome] += 1
            left = asyncio.CancelledError() if outcome == "cancelled" else None
            metrics.count(metrics.MODEL_REQUESTS, outcome=api.outcome(failure or left, deadline))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler: the fields of ``serve_graph.lookahead.ModelLoad``."""
        stats = self._engine.stats()
        load = {key: stats[key] for key in ("waiting", "running", "slots", "seconds", "left_s")}
        return {**load, "share": self._share}

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
        if hasattr(self, "_watching"):
            self._watching.cancel()
        if hasattr(self, "_engine"):
            await self._engine.shutdown()


def _observe_stages(result: ModelResult) -> None:
    times = result.metrics
    prefill, decode = times.prefill_time_ms, times.decode_time_ms
    for stage, ms in {"first_token": times.ttft_ms, "prefill": prefill, "decode": decode}.items():
        metrics.observe(metrics.MODEL_STAGE_MS, ms, stage=stage)
    tracing.stages({"prepare": times.ttft_ms - prefill, "prefill": prefill, "decode": decode})
