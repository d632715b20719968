"""The refiner deployment: the CPU half in a process without torch."""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kestrel import api
from kestrel.busy import Busy
from kestrel.cores import give_way
from kestrel.freed_memory import GivingBack, settle
from serve_graph import metrics, tracing
from serve_graph.args import refiner_settings
from serve_graph.reconfigured import FormerSettings

if TYPE_CHECKING:
    import numpy as np

    from kestrel.config import Limits, RefinerConfig
    from kestrel.seg_refiner.result import SegmentRefineBitmapsResult


class RefinerDeployment:
    """Image and rough path in; refined path and, when asked for, two masks out.

    Its replica is ready once it has refined a built-in picture; it fails to start, and says what
    is missing, where it cannot.
    """

    def __init__(
        self,
        config: RefinerConfig,
        limits: Limits,
        threads: int,
        stuck_s: float,
        at_once: float = 1.0,
    ) -> None:
        """``at_once``: refinements that run without slowing each other down (``RefinerPool``)."""
        from kestrel.seg_refiner import SegmentRefiner
        from kestrel.seg_refiner.libraries import one_thread_each

        # Requests and replicas run beside each other; threads of a library would only compete.
        one_thread_each()
        self._built, self._limits = config, limits
        # What Serve gives first is mostly an empty user_config: nothing is built anew for it.
        self._current, self._former = refiner_settings(config, {}), FormerSettings()
        self._refiner = SegmentRefiner(self._current, limits=limits)
        self._refiner.self_check()
        self._threads = ThreadPoolExecutor(threads, "refine", initializer=give_way)
        self._room = threads
        self._stuck_s = stuck_s
        self._busy = Busy(at_once)
        metrics.log_with_serve()
        self._counts = {"running": 0, "answered": 0, "cancelled": 0, "encoded": 0}
        GivingBack()
        settle()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this with the deployment's ``user_config``: keys of ``RefinerConfig`` that
        replace those of ``args.refiner``. What is being refined ends as it began."""
        with self._former.stay():
            await self._change(user_config)

    async def _change(self, user_config: dict[str, Any]) -> None:
        from kestrel.seg_refiner import SegmentRefiner

        config = refiner_settings(self._built, user_config)
        if config == self._current:
            return

        def made() -> SegmentRefiner:
            refiner = SegmentRefiner(config, limits=self._limits)
            refiner.self_check()
            return refiner

        # Loading a network takes seconds, in which requests and health checks are to be answered.
        self._refiner, self._current = await asyncio.to_thread(made), config
        settle()

    async def refine(
        self,
        image: bytes | np.ndarray,
        path: str,
        bbox: dict[str, float] | None,
        return_base64: bool,
        refiner: str | None = None,
        timeout_s: float | None = None,
    ) -> SegmentRefineBitmapsResult:
        """Refine one path over its image; decoding happens here and only here, once.

        ``refiner``: a loaded backend by name; None: the configured one. ``timeout_s``: for how long
        its caller waits, who cancels it then; for the count of those.
        """
        from kestrel.seg_refiner.refiner import UNWANTED, Unwanted
        from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        refine: Any = (
            self._refiner.refine_encoded
            if isinstance(image, bytes)
            else self._refiner.refine_with_bitmaps
        )

        unwanted = threading.Event()

        def timed() -> SegmentRefineBitmapsResult:
            UNWANTED.set(unwanted.is_set)
            try:
                with self._busy.one():
                    return refine(image, path, bbox, return_base64=return_base64, refiner=refiner)
            except Unwanted:
                return SegmentRefineBitmapsResult()  # for nobody

        self._held(1)
        failure: BaseException | None = None
        # OpenCV, Skia and zlib release the GIL; the thread keeps the replica answering. Serve's log
        # takes the request id from the context, which the thread would not have by itself.
        work = self._threads.submit(contextvars.copy_context().run, timed)
        done = asyncio.wrap_future(work)
        try:
            result = await asyncio.shield(done)
        except BaseException as error:
            failure = error
            if isinstance(error, asyncio.CancelledError):
                self._counts["cancelled"] += 1
                # A thread goes on to the end of the stage that it is in, and until then the request
                # counts for Serve, which would else send new ones to a busy replica.
                unwanted.set()
                if not work.cancel():
                    await asyncio.wait([done])
            raise
        finally:
            self._held(-1)
            metrics.count(metrics.REFINER_REQUESTS, outcome=api.outcome(failure, deadline))
        for stage, ms in result.timings_ms.items():
            metrics.observe(metrics.REFINER_STAGE_MS, ms, stage=stage)
        tracing.stages(result.timings_ms)
        self._counts["answered"] += 1
        self._counts["encoded"] += "encode" in result.timings_ms
        return result

    def _held(self, more: int) -> None:
        self._counts["running"] += more
        running = self._counts["running"]
        metrics.level(metrics.REFINER_RUNNING, min(running, self._room))
        metrics.level(metrics.REFINER_WAITING, max(0, running - self._room))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler: ``busy_s`` of ``serve_graph.lookahead.RefinerLoad``."""
        return {} if self._busy.mean_s is None else {"busy_s": self._busy.mean_s}

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises: a thread that hangs never comes back."""
        # Called every few seconds, within which Ray forgets gauges.
        self._former.export()
        self._held(0)
        if self._busy.longest_s() > self._stuck_s:
            raise RuntimeError(f"a refinement has run for over {self._stuck_s:g} s")

    async def health(self) -> None:
        """Returns: a replica exists only after it has refined a picture."""

    def stats(self) -> dict[str, Any]:
        """What this process did: answers that encoded masks, outcomes by reason, torch loaded."""
        return {
            "pid": os.getpid(),
            **self._counts,
            "outcomes": dict(self._refiner.outcomes),
            "torch": "torch" in sys.modules,
        }
