"""The engine: a model, its scheduler and a refiner behind a few async methods."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from kestrel.answers import segment_output
from kestrel.api import (
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    PromptTooLong,
    SegmentRequest,
    timeout_of_call,
    validate_segment,
)
from kestrel.config import RuntimeConfig
from kestrel.deadlines import within
from kestrel.job import EngineError, Job, engine_ended
from kestrel.moondream.checkpoint import Checkpoint, locate
from kestrel.moondream.model import Moondream, load
from kestrel.ops.device import (
    resolve_device,
    resolve_dtype,
    resolve_image_dtype,
    resolve_kv_dtype,
)
from kestrel.refining import RefineThreads, make_refiner, refined_by
from kestrel.scheduler import Scheduler
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.self_check import check_outcome, check_request, not_finite
from kestrel.skills.segment import SegmentDecode, build_prompt
from kestrel.streaming import Mailbox, SegmentStream, deliver

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EngineError", "EngineResult", "InferenceEngine", "SegmentStream"]

log = logging.getLogger(__name__)

Refinement = SegmentRefineBitmapsResult | None
"""None where the engine has no refiner, and no masks are asked for."""
Outcome = tuple[ModelResult, Refinement]
"""The model half and what refinement made of it."""

HEALTHY_FOR_S = 10.0
"""A request that completed this recently proves as much as a health check of its own."""
LEAVE_AFTER_S = 10.0
"""How long ``shutdown`` waits for refinements that run."""


@dataclass(slots=True)
class EngineResult:
    """A finished request of the Python door."""

    request_id: str
    finish_reason: str
    """``stop`` or ``length``."""
    output: dict[str, Any]
    """``{"segments": [segment]}``, the segment as ``kestrel.answers.segment_output`` gives it."""
    metrics: ModelMetrics


def load_configured(config: RuntimeConfig) -> tuple[Moondream, Checkpoint]:
    """The model of a configuration, as it has it run, and its checkpoint. Raises ``ConfigError``
    for a device that is not there, and as :func:`kestrel.moondream.model.load` does."""
    device = resolve_device(config.device)
    checkpoint = locate(config.located)
    dtype = resolve_dtype(config.dtype, device)
    stored = checkpoint.stored()
    images = resolve_image_dtype(config.image_dtype, device, dtype, *stored)
    kept = resolve_kv_dtype(config.kv_dtype, images, device, dtype, *stored)
    model = load(
        checkpoint,
        device,
        dtype,
        config.max_context,
        half_images=images != dtype,
        half_kv=kept != dtype,
    )
    return model, checkpoint


class InferenceEngine:
    """Serves one model. Usable from any event loop, from several at once, and as ``async with``."""

    finds: bool | None = None
    """Whether the last look at the built-in picture found what is in it; None before the first."""
    _checking: asyncio.Task[None] | None = None

    def __init__(
        self, config: RuntimeConfig, model: Moondream, samples: Path | None = None
    ) -> None:
        """``samples``: the checkpoint's folder, whose first sample is the built-in picture."""
        self.config = config
        self._samples = samples
        self._model = model
        self._refiner = make_refiner(config)
        self._reasons: Counter[str] = Counter()
        # It may find too little memory, and then no threads are there to be left behind.
        self._scheduler = Scheduler(model, config, deliver)
        self._refining = RefineThreads(config.refiner_threads, config.refiner_stuck_s)
        # An engine that is dropped, or alive at exit, must leave no thread, least of all in the
        # model.
        self._finalizer = weakref.finalize(self, _dropped, self._scheduler, self._refining)

    @classmethod
    async def create(cls, config: RuntimeConfig | None = None) -> InferenceEngine:
        """Load the checkpoint and segment a built-in picture with it.

        Raises ``ConfigError`` for a checkpoint that is not there or does not fit, ``EngineError``
        for one that does not segment (see ``RuntimeConfig.allow_empty_paths``) or computes no
        numbers. One that finds nothing in the picture is served; ``finds`` tells.
        """
        config = config or RuntimeConfig()

        def build() -> InferenceEngine:
            model, checkpoint = load_configured(config)
            return cls(config, model, checkpoint.folder)

        engine = await asyncio.to_thread(build)
        try:
            await engine._check()  # and the first caller does not pay for first-time work
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    async def __aenter__(self) -> InferenceEngine:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.shutdown()

    @property
    def max_context(self) -> int:
        """Positions that prompt and answer share."""
        return self._scheduler.longest

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, as a fault of the device does; only a new engine, on CUDA
        a new process, serves again."""
        return self._scheduler.failure

    # The Python door.

    @overload
    async def segment(
        self,
        *,
        object: str,
        image: Any = ...,
        spatial_refs: Any = ...,
        return_base64: bool = ...,
        stream: Literal[False] = ...,
        settings: Any = ...,
        request_id: str | None = ...,
        timeout_s: float | None = ...,
    ) -> EngineResult: ...

    @overload
    async def segment(
        self,
        *,
        object: str,
        image: Any = ...,
        spatial_refs: Any = ...,
        return_base64: bool = ...,
        stream: Literal[True],
        settings: Any = ...,
        request_id: str | None = ...,
        timeout_s: float | None = ...,
    ) -> SegmentStream: ...

    async def segment(
        self,
        *,
        object: str,
        image: Any = None,
        spatial_refs: Any = None,
        return_base64: bool = False,
        stream: bool = False,
        settings: Any = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> EngineResult | SegmentStream:
        """Segment ``object`` in ``image`` (encoded bytes, or uint8 [H, W, 3] RGB; unchanged until
        the result is there).

        ``spatial_refs``: points ``[x, y]`` and boxes ``[x_min, y_min, x_max, y_max]`` in 0..1.
        ``settings``: mapping or ``SegmentSettings``. ``timeout_s``: deadline, over 0 seconds and
        at most ``request_timeout_s`` of the configuration. With ``stream`` it gives a
        ``SegmentStream`` as soon as the request is queued.

        Raises ``kestrel.api.RequestError`` (a ValueError), ``EngineError`` when the engine failed.
        """
        request = validate_segment(
            object=object,
            image=image,
            spatial_refs=spatial_refs,
            stream=stream,
            return_base64=return_base64,
            settings=settings,
            limits=self.config.limits,
            max_context=self.max_context,
            refiners=self.config.refiners,
        )
        timeout_s = timeout_of_call(timeout_s, self.config.request_timeout_s)
        if request.stream:
            return await self.stream(request, request_id=request_id, timeout_s=timeout_s)
        job = self._submit(request, request_id, timeout_s, events=False)
        return self._result(job, *await self._outcome(job))

    # What the servers use.

    async def complete(
        self,
        request: SegmentRequest,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Both halves of a validated request, for ``kestrel.answers.segment_response``."""
        return await self._outcome(self._submit(request, request_id, timeout_s, events=False))

    async def stream(
        self,
        request: SegmentRequest,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> SegmentStream:
        """The updates of a validated request.

        ``Overloaded`` and ``PromptTooLong`` are raised here, an undecodable image by the first
        update.
        """
        job = self._submit(request, request_id, timeout_s, events=True)
        return SegmentStream(self, self._scheduler, job)

    def generate(
        self,
        request: SegmentRequest,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[ModelEvent, None]:
        """The model half of a validated request: box, path commands, ``ModelDone``."""
        return self.halves(request, request_id=request_id, timeout_s=timeout_s)[0]

    def halves(
        self,
        request: SegmentRequest,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> tuple[
        AsyncGenerator[ModelEvent, None], Callable[[ModelResult], Coroutine[Any, Any, Refinement]]
    ]:
        """What ``generate`` gives, and the second half for its result, without decoding the image
        again. Nothing is queued before the first event is asked for."""
        jobs: list[Job] = []

        async def events() -> AsyncGenerator[ModelEvent, None]:
            job = self._submit(request, request_id, timeout_s, events=True)
            jobs.append(job)
            mailbox: Mailbox = job.mailbox
            try:
                while (event := await mailbox.event()) is not None:
                    yield event
                yield ModelDone(await mailbox.result())
            finally:
                if not mailbox.closed:
                    self._leave(job)

        async def refine(model: ModelResult) -> Refinement:
            return await self._refine(jobs[0], model)

        return events(), refine

    async def refine(
        self,
        request: SegmentRequest,
        model: ModelResult,
        *,
        picture: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> Refinement:
        """The second half of a request that ``generate`` finished.

        ``picture``: the decoded image where the caller has it, uint8 [H, W, 3]. Raises
        ``DeadlineExceeded`` after ``timeout_s``, ``Overloaded`` when the engine is shut down before
        a thread takes it. ``complete``, ``stream`` and ``halves`` do this themselves, without
        decoding the image again unless it is large or many are held.
        """
        if self.config.refiner is None and not request.return_base64:
            return None
        if request.image is None or not model.refinable:
            return self._unrefined(model, "no_image" if request.image is None else "no_path")
        if self._refiner is None:
            return self._unrefined(model, "unavailable")
        image = request.image if picture is None else picture
        unwanted = threading.Event()
        work = self._refining.submit(
            refined_by, self._refiner, image, model, request, unwanted.is_set
        )
        # The refinement's alone from here on: what this call raises holds what it holds.
        del image, picture
        seconds = self.config.request_timeout_s if timeout_s is None else timeout_s
        try:
            refined: SegmentRefineBitmapsResult = await within(
                time.monotonic() + seconds, asyncio.wrap_future(work)
            )
        finally:
            # A thread that has it goes on to the end of the stage that it is in.
            unwanted.set()
        self._reasons[refined.reason] += 1
        return refined

    def _unrefined(self, model: ModelResult, reason: str) -> SegmentRefineBitmapsResult:
        """The model's own path is the answer; ``reason`` is counted and logged."""
        self._reasons[reason] += 1
        # A noun that is not in the picture is a right answer, nothing to be warned of.
        expected = reason != "unavailable" and model.parse_error is None
        detail = f": {model.parse_error}" if model.parse_error else ""
        log.log(
            logging.INFO if expected else logging.WARNING,
            "request %s: not refined (%s)%s",
            model.request_id,
            reason,
            detail,
        )
        return SegmentRefineBitmapsResult(reason=reason)

    def check_failure(self) -> None:
        """Raises ``EngineError`` that says what is known to be wrong: the engine's thread ended, or
        a refinement has run for over ``refiner_stuck_s``."""
        if self.failure is not None:
            raise engine_ended(self.failure)
        self._refining.check()

    async def health(self) -> None:
        """Returns when a built-in picture was segmented, or a request completed just now, or the
        model goes on with so many that another would wait for them.

        Raises what ``check_failure`` does, ``EngineError`` that says what is wrong with the
        picture's answer, or ``RequestError``.
        """
        self.check_failure()
        scheduler, since = self._scheduler, time.monotonic() - HEALTHY_FOR_S
        if scheduler.last_success < since and not (scheduler.full and scheduler.last_step >= since):
            # Shared: a check is let in past the bounds of the queue, and anybody may ask for one.
            check = self._checking
            if check is None or check.done() or check.get_loop() != asyncio.get_running_loop():
                check = self._checking = asyncio.create_task(self._check())
                # Where all who asked have left, nobody hears how it ended; the next one asks anew.
                check.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            # Not ``shield``, which from Python 3.14 on reports what those who left did not hear.
            await asyncio.wait({check})
            check.result()

    async def _check(self) -> None:
        request = check_request(self._samples, self.config.limits.max_image_pixels)
        if self.config.refiner is None:
            # It makes no masks, which is nothing that a check finds out.
            request = replace(request, return_base64=False)
        job = self._submit(request, "health", None, events=False, always=True)
        outcome = await self._outcome(job)
        if not job.finite:
            raise not_finite(self.config, self._model.dtype)
        self.finds = check_outcome(*outcome, self.config)

    def stats(self) -> dict[str, Any]:
        """Requests that wait, run and are being refined; outcomes, steps and tokens so far."""
        return {
            **self._scheduler.stats(),
            "refining": self._refining.count,
            "refinements": dict(self._reasons),
        }

    async def shutdown(self) -> None:
        """Fail what waits and what the model runs with ``Overloaded``, join the threads. A
        refinement that runs may end; after ``LEAVE_AFTER_S`` it is left to itself. Idempotent."""
        await asyncio.to_thread(self._scheduler.close)
        await asyncio.to_thread(self._refining.close, LEAVE_AFTER_S)
        self._finalizer.detach()

    # One request's way.

    def _submit(
        self,
        request: SegmentRequest,
        request_id: str | None,
        timeout_s: float | None,
        *,
        events: bool,
        always: bool = False,
    ) -> Job:
        """``always``: the self-check, which no full queue keeps out."""
        prompt = build_prompt(request, self._model.config, self._model.tokenizer)
        longest = self.config.request_timeout_s
        seconds = longest if timeout_s is None else min(timeout_s, longest)
        request_id = request_id or uuid.uuid4().hex
        room = min(request.settings.max_tokens, self.max_context - prompt.length)
        if room < 1:
            raise PromptTooLong(
                f"the prompt takes {prompt.length} positions, and there is memory for "
                f"{self.max_context} of a request with its answer (runtime.kv_cache_bytes)"
            )
        job = Job(
            prompt,
            SegmentDecode(
                self._model.config.prompt, self._model.tokenizer, room, self.config.limits
            ),
            request.settings,
            # The same request on another replica draws the same.
            random.Random(request_id),
            request_id=request_id,
            request=request,
            deadline=time.monotonic() + seconds,
            mailbox=Mailbox(seconds),
            events=events,
            watched=always,
        )
        try:
            self._scheduler.submit(job, backlog=self._refining.count, always=always)
        except BaseException as error:
            job.mailbox.put(error)
            raise
        return job

    async def _outcome(self, job: Job) -> Outcome:
        try:
            model = await job.mailbox.result()
        except BaseException:
            # A deadline that the mailbox kept, or a caller that is gone.
            self._leave(job)
            raise
        return model, await self._refine(job, model)

    def _leave(self, job: Job) -> None:
        """Nobody waits for the model half any more. On the event loop of the request."""
        self._scheduler.cancel(job)
        job.mailbox.leave()

    async def _refine(self, job: Job, model: ModelResult) -> Refinement:
        try:
            left = job.deadline - time.monotonic()
            return await self.refine(job.request, model, picture=job.pixels, timeout_s=left)
        finally:
            job.pixels = None

    def _result(self, job: Job, model: ModelResult, refined: Refinement) -> EngineResult:
        segment = segment_output(model, refined, return_base64=job.request.return_base64)
        return EngineResult(
            model.request_id, model.finish_reason, {"segments": [segment]}, model.metrics
        )


def _dropped(scheduler: Scheduler, refining: RefineThreads) -> None:
    """Ends the threads of an engine that nobody has shut down."""
    scheduler.close()
    refining.end()
