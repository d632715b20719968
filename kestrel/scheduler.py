"""Continuous batching: requests join and leave the running batch between decode steps.

One thread owns the model. Requests wait in order of arrival, their images are decoded and cropped
in worker threads; at every step those that are ready join as slots allow, at most one new image
being encoded, so that running requests never wait for more than one.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kestrel.api import (
    DeadlineExceeded,
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    Overloaded,
    SegmentRequest,
    image_size,
)
from kestrel.batch import Batch, Row
from kestrel.config import RuntimeConfig
from kestrel.image import decode as decode_image
from kestrel.moondream.crops import overlap_crops
from kestrel.moondream.model import Moondream
from kestrel.skills.segment import Phase

log = logging.getLogger(__name__)

PREFILL_ROWS = 4
"""Requests that may join in one step: bounds how long the running ones wait for a prefill."""
CROP_THREADS = 2
"""Images that are decoded and cropped at once."""
AHEAD = 8
"""Waiting requests whose images may be held decoded: bounds memory, not the queue."""
KEEP_PIXELS = 8_000_000
"""Larger pictures are not held for the refiner, which then decodes them again."""
REMEMBERED_IMAGES = 32
"""Image embeddings kept by content, for further nouns about the same image."""


class EngineError(RuntimeError):
    """The engine failed, not the request; ``__cause__`` says how."""


class Stage(Enum):
    """How far the image of a waiting request is."""

    NEW = 0
    PREPARING = 1
    READY = 2


@dataclass(eq=False)
class Job(Row):
    """A row with its way through the scheduler. Times are of ``time.monotonic``, seconds."""

    request_id: str
    request: SegmentRequest
    deadline: float
    mailbox: Any = None
    """Where the answer goes; the scheduler only passes it on to ``deliver``."""
    events: bool = True
    """Whether anybody wants the events before the last."""
    arrived: float = field(default_factory=time.monotonic)
    stage: Stage = Stage.NEW
    cancelled: bool = False
    error: BaseException | None = None
    key: bytes = b""
    """Digest of the image."""
    crops: tuple[np.ndarray, tuple[int, int]] | None = None
    picture: np.ndarray | None = None
    """The decoded image, held for the refiner; None: to be decoded again."""
    admitted: float = 0.0
    metrics: ModelMetrics = field(default_factory=ModelMetrics)


Delivery = tuple[Job, "ModelEvent | BaseException"]


class Scheduler:
    """Owns the engine thread.

    ``deliver`` is called on that thread after every step with what the step gave, an exception
    being a job's last word as ``ModelDone`` is; it must not block.
    """

    def __init__(
        self,
        model: Moondream,
        config: RuntimeConfig,
        deliver: Callable[[list[Delivery]], None],
    ) -> None:
        self._config = config
        self._vision = model.config.vision
        self._deliver = deliver
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closing = False
        self._outbox: list[Delivery] = []
        self._embeddings: OrderedDict[bytes, Tensor] = OrderedDict()
        self._croppers = ThreadPoolExecutor(CROP_THREADS, thread_name_prefix="crop")
        self._seconds = 1.0
        self.counts: Counter[str] = Counter()
        self.last_success = 0.0
        """When a request last completed without an engine failure after it, monotonic seconds."""
        self._keep_picture = config.refiner is not None
        with torch.inference_mode():
            self._batch = Batch(model, config.max_batch_size)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, job: Job, *, backlog: int = 0, always: bool = False) -> None:
        """Queue a job.

        ``backlog``: requests that wait elsewhere and count against ``max_queue``. Raises
        ``Overloaded`` when the queue is full by count or bytes, or so long that the job's deadline
        would pass in it (not with ``always``), or when the scheduler is closed.
        """
        with self._wake:
            if self._closing:
                raise Overloaded("the engine is shut down")
            reason, seconds = self._refusal(job, len(self._waiting) + backlog)
            if reason and not always:
                self.counts["refused"] += 1
                raise Overloaded(reason, retry_after_s=min(max(1.0, seconds), 60.0))
            self._waiting.append(job)
            self._prepare_ahead()
            self._wake.notify()

    def _refusal(self, job: Job, queued: int) -> tuple[str, float]:
        """Why the job may not join ``queued`` others, empty when it may; seconds that they take."""
        seconds = self._seconds * queued / self._config.max_batch_size
        if queued >= self._config.max_queue:
            return f"the queue is full ({queued} requests wait)", seconds
        held = sum(image_size(waiting.request.image) for waiting in self._waiting)
        if held and held + image_size(job.request.image) > self._config.max_queue_bytes:
            return f"the queue is full ({held} bytes wait)", seconds
        if queued and job.arrived + seconds > job.deadline:
            return "the queue is longer than the request's deadline", seconds
        return "", seconds

    def cancel(self, job: Job) -> None:
        """Drop a job at the next step; nothing more is delivered for it."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Fail what is left with ``Overloaded``, end and join the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._croppers.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Waiting and running requests, slots, the mean ``seconds`` of a request in its slot,
        ``left_s``: how long the running ones are still expected to take on average; and counts of
        outcomes, steps and tokens."""
        with self._wake:
            now = time.monotonic()
            left = [max(0.0, self._seconds - (now - job.admitted)) for job in self._jobs()]
            return {
                "waiting": len(self._waiting),
                "running": len(self._batch.rows),
                "slots": self._config.max_batch_size,
                "seconds": self._seconds,
                "left_s": sum(left) / len(left) if left else self._seconds,
                **self.counts,
            }

    # Image preparation: started under the lock, run in worker threads.

    def _prepare_ahead(self) -> None:
        room = AHEAD - sum(job.stage is not Stage.NEW for job in self._waiting)
        for job in self._waiting:
            if job.stage is Stage.NEW:
                if job.request.image is None:
                    job.stage = Stage.READY
                    continue
                if room <= 0 or self._closing:
                    return
                room -= 1
                job.stage = Stage.PREPARING
                self._croppers.submit(self._prepare, job)

    def _prepare(self, job: Job) -> None:
        try:
            image = job.request.image
            assert image is not None
            if not job.cancelled:
                job.key = digest(image)
                with self._wake:
                    job.image = self._remembered(job.key)
                if job.image is None:
                    picture = decode_image(image, self._config.limits)
                    job.crops = overlap_crops(picture, self._vision)
                    if self._keep_picture and picture.shape[0] * picture.shape[1] <= KEEP_PIXELS:
                        job.picture = picture
        except BaseException as error:  # a worker thread has nobody else to tell
            job.error = error
        with self._wake:
            job.stage = Stage.READY
            self._wake.notify()

    def _remembered(self, key: bytes) -> Tensor | None:
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key]
        return None

    # The engine thread.

    def _main(self) -> None:
        if self._config.torch_threads is not None:
            torch.set_num_threads(self._config.torch_threads)
        reason: BaseException | None = None
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as error:
            log.critical("the engine thread ended", exc_info=True)
            reason = error
        with self._wake:
            self._closing = True
            left = [*self._waiting, *self._jobs()]
            self._waiting.clear()
            self._batch.rows = []
        for job in left:
            failure = Overloaded("the engine is shutting down")
            self._fail(job, failure if reason is None else engine_error(reason))
        self._flush()

    def _jobs(self) -> list[Job]:
        return [row for row in self._batch.rows if isinstance(row, Job)]

    def _turn(self) -> bool:
        """One step, or a wait for something to do; False when closing."""
        with self._wake:
            if self._closing:
                return False
            now = time.monotonic()
            self._sweep(now)
            joining = self._take(now)
            self._prepare_ahead()
            if not (joining or self._batch.rows or self._outbox):
                soonest = min((job.deadline for job in self._waiting), default=None)
                self._wake.wait(None if soonest is None else max(0.0, soonest - now))
                return True
        self._step([job for job in joining if self._encoded(job)])
        self._flush()
        return True

    def _sweep(self, now: float) -> None:
        """Drop cancelled, late and broken jobs; running ones give their slots back."""
        for job in [*self._waiting, *self._jobs()]:
            if job.cancelled:
                self.counts["cancelled"] += 1
            elif job.deadline <= now:
                self._fail(job, DeadlineExceeded())
            elif job.error is not None:
                self._fail(job, job.error)
            else:
                continue
            if job.slot >= 0:
                self._batch.release(job)
            else:
                self._waiting.remove(job)

    def _take(self, now: float) -> list[Job]:
        """Waiting jobs that join this step, in order, at most one image among them to encode."""
        taken: list[Job] = []
        new_image: bytes | None = None
        for job in self._waiting:
            if len(taken) == min(PREFILL_ROWS, self._batch.free):
                break
            if job.stage is not Stage.READY:
                continue
            if job.request.image is not None and job.image is None:
                job.image = self._remembered(job.key)
                if job.image is None:
                    if new_image not in (None, job.key):
                        continue
                    new_image = job.key
            job.admitted = now
            taken.append(job)
        for job in taken:
            self._waiting.remove(job)
        return taken

    def _encoded(self, job: Job) -> bool:
        """Give the job its image's embeddings; a failure is the job's own."""
        if job.request.image is None or job.image is not None:
            return True
        job.image = self._embeddings.get(job.key)
        if job.image is None:
            assert job.crops is not None
            try:
                job.image = self._batch.encode(*job.crops)
            except Exception as error:
                log.exception("request %s: its image could not be encoded", job.request_id)
                self._fail(job, engine_error(error))
                return False
            with self._wake:
                self._embeddings[job.key] = job.image
                if len(self._embeddings) > REMEMBERED_IMAGES:
                    self._embeddings.popitem(last=False)
        job.crops = None
        return True

    def _step(self, joining: list[Job]) -> None:
        if not (joining or self._batch.rows):
            return
        try:
            self._batch.step(joining)
        except Exception as error:
            self._failed_step(joining, error)
            return
        now = time.monotonic()
        for job in joining:
            job.metrics.prefill_time_ms = (now - job.admitted) * 1e3
            job.metrics.ttft_ms = (now - job.arrived) * 1e3
        self.counts["steps"] += 1
        self.counts["tokens"] += len(self._batch.rows)
        for job in self._jobs():
            event = job.decode.push(job.token)
            if event is not None and job.events:
                self._outbox.append((job, event))
            if job.decode.phase is Phase.DONE:
                self._finish(job, now)

    def _failed_step(self, joining: list[Job], error: Exception) -> None:
        """Fail all in flight with the cause, and begin afresh with those that wait."""
        log.exception("an engine step failed; its %d requests fail", len(self._batch.rows))
        self.last_success = 0.0
        for job in dict.fromkeys([*self._jobs(), *joining]):
            self._fail(job, engine_error(error))
        with self._wake:
            self._embeddings.clear()
            self._batch.reset()

    def _finish(self, job: Job, now: float) -> None:
        self._batch.release(job)
        decode, metrics = job.decode, job.metrics
        metrics.input_tokens = job.prompt.length
        metrics.output_tokens = decode.output_tokens
        metrics.decode_time_ms = (now - job.admitted) * 1e3 - metrics.prefill_time_ms
        self._seconds += 0.1 * (now - job.admitted - self._seconds)
        self.counts["completed"] += 1
        self.last_success = now
        result = ModelResult(
            request_id=job.request_id,
            finish_reason=decode.finish_reason,
            object=job.request.object,
            path=decode.path,
            bbox=decode.bbox,
            metrics=metrics,
            parse_error=decode.parse_error,
            text=decode.text,
            token_ids=decode.token_ids,
            path_tokens=decode.path_tokens,
            points=decode.points,
            sizes=decode.sizes,
        )
        self._outbox.append((job, ModelDone(result)))

    def _fail(self, job: Job, error: BaseException) -> None:
        self.counts["late" if isinstance(error, DeadlineExceeded) else "failed"] += 1
        self._outbox.append((job, error))

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)


def engine_error(cause: BaseException) -> EngineError:
    """An ``EngineError`` for one job; shared by several, it would collect all their frames."""
    error = EngineError(f"the engine failed: {type(cause).__name__}")
    error.__cause__ = cause
    return error


def digest(image: bytes | np.ndarray) -> bytes:
    """Names an image by its content."""
    shape = b"" if isinstance(image, bytes) else str(image.shape).encode()
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).data
    return hashlib.blake2b(content, digest_size=16, salt=shape[:16]).digest()
