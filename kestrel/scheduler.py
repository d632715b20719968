"""Continuous batching: requests join and leave the running batch between decode steps.

One thread owns the model. Requests wait in order of arrival while worker threads decode and crop
their images. Every turn feeds the running rows one token each and spends at most
``RuntimeConfig.prefill_tokens`` on those that join: crops, image prefixes, parts of prompts. So a
running request never waits for more than that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kestrel.api import (
    DeadlineExceeded,
    ModelDone,
    ModelEvent,
    ModelResult,
    Overloaded,
    image_size,
)
from kestrel.batch import Batch
from kestrel.config import RuntimeConfig
from kestrel.cores import give_way, idle_cores
from kestrel.job import EngineError, Job, engine_ended, engine_error
from kestrel.moondream.model import Moondream
from kestrel.ops.device import SMALL_MODEL
from kestrel.pictures import Picture, Pictures
from kestrel.skills.segment import Phase

log = logging.getLogger(__name__)

AHEAD = 8
"""Waiting requests whose images may be held decoded: bounds memory, not the queue."""


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
        self._deliver = deliver
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._entering: list[Job] = []
        """Admitted, in order: their prompts are not fed whole. Each has a slot, or will have."""
        self._closing = False
        self.failure: BaseException | None = None
        """What ended the thread, if it was not ``close``."""
        self._outbox: list[Delivery] = []
        self._patches = model.config.vision.n_patches
        self._seconds = 1.0
        self._measured = False
        """Whether ``_seconds`` is of requests. Until then it is a guess, or the self-check's, whose
        first-time work takes many times as long: nothing to refuse a request by."""
        self.counts: Counter[str] = Counter()
        self.last_success = 0.0
        """When a request last completed without an engine failure after it, monotonic seconds."""
        self.last_step = 0.0
        """When a step was last done, without such a failure after it."""
        self._threads = config.torch_threads or _threads_of(model)
        with torch.inference_mode():
            self._batch = Batch(
                model,
                config.max_batch_size,
                kv_bytes=config.kv_cache_bytes,
                kernels=config.kernels,
                kestrel_kernels=config.kestrel_kernels,
            )
        self._batch.run_on = True
        # Where the model has one core, others encode pictures beside its steps. More threads, or a
        # GPU, are better used one thing after the other.
        self._beside = beside = model.device.type == "cpu" and self._threads == 1
        self._pictures = Pictures(
            model.config.vision, config, self._wake, self._encode_beside if beside else None
        )
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    @property
    def longest(self) -> int:
        """Positions that a request may take: more than there is memory for could never run."""
        return min(self._batch.cache.positions, self._batch.cache.room)

    def submit(self, job: Job, *, backlog: int = 0, always: bool = False) -> None:
        """Queue a job.

        ``backlog``: requests that wait elsewhere and count against ``max_queue``. Raises
        ``Overloaded`` when the queue is full by count or bytes, or so long that the job's deadline
        would pass in it (not with ``always``, nor before one was measured), or when the scheduler
        is closed; ``EngineEnded`` when its thread is.
        """
        with self._wake:
            if self.failure is not None:
                raise engine_ended(self.failure)
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
        # Where there is less memory than slots, they wait for that.
        cache = self._batch.cache
        filled = sum(cache.cost(waiting.longest) for waiting in self._waiting) / cache.room
        seconds = self._seconds * max(queued / self._config.max_batch_size, filled)
        if queued >= self._config.max_queue:
            return f"the queue is full ({queued} requests wait)", seconds
        held = sum(image_size(waiting.request.image) for waiting in self._waiting)
        if held and held + image_size(job.request.image) > self._config.max_queue_bytes:
            return f"the queue is full ({held} bytes wait)", seconds
        if queued and self._measured and job.arrived + seconds > job.deadline:
            return "the queue is longer than the request's deadline", seconds
        return "", seconds

    @property
    def full(self) -> bool:
        """Whether a request that comes now would wait for others."""
        with self._wake:
            return bool(self._waiting) or len(self._admitted()) >= self._config.max_batch_size

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
        self._pictures.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Waiting and running requests, slots, the mean ``seconds`` of a request in its slot (that
        of the self-check until one completed), ``left_s``: how long the running ones are still
        expected to take on average; bytes of keys and values that are written, that are set aside
        for running requests, and that there are; bytes held for images; and counts of outcomes,
        steps, tokens and encoded images."""
        with self._wake:
            now = time.monotonic()
            rows, admitted, cache = self._batch.rows, self._admitted(), self._batch.cache
            left = [max(0.0, self._seconds - (now - job.admitted)) for job in admitted]
            return {
                "waiting": len(self._waiting),
                "running": len(admitted),
                "slots": self._config.max_batch_size,
                "seconds": self._seconds,
                "left_s": sum(left) / len(left) if left else self._seconds,
                "kv_bytes": sum(row.position for row in rows) * cache.position_bytes,
                "kv_reserved_bytes": sum(cache.cost(row.longest) for row in rows)
                * cache.position_bytes,
                "kv_room_bytes": cache.room * cache.position_bytes,
                "image_cache_bytes": self._pictures.kept_bytes,
                **self.counts,
            }

    def _prepare_ahead(self) -> None:
        """Have the images of the first that wait prepared."""
        room = AHEAD - sum(job.preparing for job in self._waiting)
        for job in self._waiting:
            if room <= 0 or self._closing:
                return
            if job.image is not None and not job.preparing:
                room -= 1
                job.preparing = True
                self._pictures.prepare(job)

    def _encode_beside(self, crops: np.ndarray, tiling: tuple[int, int]) -> Tensor:
        """A picture's prefix, made by the thread that cropped it, and others while their cores have
        nothing else to do."""
        idle = min(self._pictures.free_cores - bool(self._batch.rows), idle_cores())
        try:
            prefix = self._batch.encode(crops, tiling, 1 + max(0, idle))
        except Exception as error:
            raise _encoding_failed(error) from error
        with self._wake:
            self.counts["images"] += 1
        return prefix

    # The engine thread.

    def _main(self) -> None:
        give_way()
        # Set even to torch's own choice: a thread in which it is not set takes twice the time.
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as error:
            log.critical("the engine thread ended", exc_info=True)
            self.failure = error
        with self._wake:
            self._closing = True
            left = [*self._waiting, *self._admitted()]
            self._waiting.clear()
            self._entering = []
            self._batch.rows = []
        self._pictures.close()
        for job in left:
            failure = Overloaded("the engine is shutting down")
            self._fail(job, failure if self.failure is None else engine_error(self.failure))
        self._batch.close()
        self._flush()

    def _admitted(self) -> list[Job]:
        """Jobs that hold a slot or will."""
        rows = [row for row in self._batch.rows if isinstance(row, Job)]
        return rows + [job for job in self._entering if job.slot < 0]

    def _turn(self) -> bool:
        """One step, or a wait for something to do; False when closing."""
        with self._wake:
            if self._closing:
                return False
            now = time.monotonic()
            self._sweep(now)
            self._admit(now)
            self._prepare_ahead()
            if not (self._entering or self._batch.rows or self._outbox):
                soonest = min((job.deadline for job in self._waiting), default=None)
                self._wake.wait(None if soonest is None else max(0.0, soonest - now))
                return True
        self._step()
        self._flush()
        return True

    def _sweep(self, now: float) -> None:
        """Drop cancelled, late and broken jobs; admitted ones give their slots back."""
        for job in [*self._waiting, *self._admitted()]:
            error = job.error or (job.picture.error if job.picture is not None else None)
            if job.cancelled:
                self.counts["cancelled"] += 1
            elif job.deadline <= now:
                self._fail(job, DeadlineExceeded())
            elif error is not None:
                cause = error.__cause__ if isinstance(error, EngineError) else None
                self._fail(job, error if cause is None else engine_error(cause))
            else:
                continue
            if job.admitted:
                self._drop(job)
            else:
                self._waiting.remove(job)
                self._pictures.drop(job)

    def _drop(self, job: Job) -> None:
        if job in self._entering:
            self._entering.remove(job)
        if job.slot >= 0:
            self._batch.release(job)

    def _admit(self, now: float) -> None:
        """Promise the free slots to those that wait, in order; an image that is not decoded yet
        keeps nobody else waiting."""
        cache, admitted = self._batch.cache, self._admitted()
        free = self._config.max_batch_size - len(admitted)
        room = cache.room - sum(cache.cost(job.longest) for job in admitted)
        for job in list(self._waiting):
            if free == 0:
                break
            if job.ready:
                room -= cache.cost(job.longest)
                if room < 0:
                    break  # those behind it are not to overtake it
                free -= 1
                job.admitted = now
                self._waiting.remove(job)
                self._entering.append(job)

    def _chunks(self) -> list[tuple[Job, int]]:
        """Encode, and give slots, within the budget; what is then to be fed of whose prompt."""
        left = self._config.prefill_tokens
        chunks = []
        for job in list(self._entering):
            if job.slot < 0:
                picture = job.picture
                if picture is not None and picture.prefix is None:
                    left -= self._encode(picture, left)
                    if picture.error is not None:
                        continue  # the sweep drops all who ask about it
                    if picture.prefix is None:
                        break  # those behind it are not to overtake it
                self._batch.join(job, None if picture is None else picture.prefix)
                if picture is not None:
                    job.pixels, job.picture = picture.pixels, None
            if left <= 0:
                break
            chunks.append((job, min(left, job.unfed)))
            left -= chunks[-1][1]
        return chunks

    def _encode(self, picture: Picture, left: int) -> int:
        """Go on with a picture's crops and its prefix while they fit into ``left`` positions, a
        whole budget being enough for any one of them; gives the positions that it took."""
        whole = left == self._config.prefill_tokens
        spent = 0
        try:
            assert picture.crops is not None
            done = sum(map(len, picture.features))
            count = min(len(picture.crops) - done, max(left // self._patches, int(whole)))
            if count:
                picture.features.append(self._batch.features(picture.crops[done : done + count]))
                spent = count * self._patches
            encoded = done + count == len(picture.crops)
            if encoded and (spent + 1 + self._patches <= left or (whole and not spent)):
                picture.prefix = self._batch.prefix(torch.cat(picture.features), picture.tiling)
                picture.crops, picture.features = None, []
                spent += 1 + self._patches
                self.counts["images"] += 1
                self._pictures.keep(picture)
        except Exception as error:
            picture.error = _encoding_failed(error)
        return spent

    def _step(self) -> None:
        try:
            chunks = self._chunks()
            self._batch.two_threads = self._beside and self._pictures.free_cores > 1
            sampled = cast(list[Job], self._batch.step(chunks))
        except Exception as error:
            self._failed_step(error)
            return
        self.last_step = time.monotonic()
        if not sampled:
            return
        now = time.monotonic()
        self.counts["steps"] += max(len(job.given) for job in sampled)
        self.counts["tokens"] += sum(len(job.given) for job in sampled)
        entered = [job for job in self._entering if job.token is not None]
        for job in entered:
            self._entering.remove(job)
            job.metrics.prefill_time_ms = (now - job.admitted) * 1e3
            job.metrics.ttft_ms = (now - job.arrived) * 1e3
        for job in sampled:
            try:
                # What was sampled after an answer's end is nobody's.
                events = [job.decode.push(token) for token in job.given]
            except Exception as error:
                log.exception("request %s: its tokens could not be read", job.request_id)
                self._batch.release(job)
                self._fail(job, engine_error(error))
                continue
            if job.events:
                self._outbox += [(job, event) for event in events if event is not None]
            if job.decode.phase is Phase.DONE:
                self._finish(job, now)

    def _failed_step(self, error: Exception) -> None:
        """Fail all that is admitted with the cause, and begin afresh with those that wait."""
        admitted = self._admitted()
        log.exception("an engine step failed; its %d requests fail", len(admitted))
        self.last_success = self.last_step = 0.0
        for job in admitted:
            self._fail(job, engine_error(error))
        self._pictures.forget()
        with self._wake:
            self._entering = []
            self._batch.reset()

    def _finish(self, job: Job, now: float) -> None:
        self._batch.release(job)
        decode, metrics = job.decode, job.metrics
        metrics.input_tokens = job.prompt.length
        metrics.output_tokens = decode.output_tokens
        metrics.decode_time_ms = (now - job.admitted) * 1e3 - metrics.prefill_time_ms
        weight = 0.1 if self._measured else 1.0
        self._seconds += weight * (now - job.admitted - self._seconds)
        self._measured = self._measured or not job.watched
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


def _threads_of(model: Moondream) -> int:
    """Threads that torch's operators pay with: in a small model they mostly wait for each other."""
    small = sum(weights.numel() for weights in model.parameters()) < SMALL_MODEL
    return 1 if small and model.device.type == "cpu" else torch.get_num_threads()


def _encoding_failed(error: Exception) -> EngineError:
    """What the requests about a picture get that the model could not encode."""
    log.error("an image could not be encoded; its requests fail", exc_info=error)
    return engine_error(error)
