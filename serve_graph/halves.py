"""Calls to the two halves: deadlines, queue-full answers, a second try when a replica dies, or
when a refiner is silent."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from kestrel.api import (
    DeadlineExceeded,
    ModelDone,
    ModelEvent,
    ModelResult,
    Overloaded,
    RequestError,
    SegmentRequest,
)
from kestrel.deadlines import within
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from serve_graph import metrics
from serve_graph.hedge import Hedge
from serve_graph.left import Left

logger = logging.getLogger("ray.serve")

LOST = (RayActorError, ReplicaUnavailableError, AioRpcError)
"""The replica died or left while it held the request, or the connection to it broke. Both halves
are pure, so it may run again."""

ATTEMPTS = 5
"""Tries of a request on replicas that are lost; bounded, so that a request that kills whoever takes
it does not take them all."""

RETRY_PAUSE_S = 0.1
"""Before the second try, seconds, and twice as long each time after: the router needs a moment to
learn of a death and would pick the same replica again."""

HEALTH_TIMEOUT_S = 10.0
"""How long a half may take to say that it is there, seconds."""

UNAVAILABLE = (*LOST, BackPressureError, DeploymentUnavailableError)
"""No replica took the request, or those that did are gone."""

PLAIN_PICKLE: dict[str, Any] = {
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
"""Serve's default, cloudpickle, is for classes and functions that only one side knows."""


class RefinerUnavailable(Exception):
    """No replica could refine this path in time; the model's own path is still good."""


def _lost_again(half: str, request_id: str, error: Exception, lost: int) -> int:
    """Replicas that the request has lost, ``error`` included, ``lost`` before it; 0: the error is
    not of that kind, or the last that is taken, and goes to the caller."""
    if isinstance(error, LOST):
        metrics.count(metrics.LOST_REPLICAS, half=half)
        logger.warning("request %s: %s replica lost", request_id, half)
        return lost + 1 if lost + 1 < ATTEMPTS else 0
    # It was let in before its replica died, and waits for its turn among those that came since.
    return lost if isinstance(error, BackPressureError) else 0


async def _pause(lost: int, deadline: Deadline) -> None:
    """Wait after the ``lost``-th loss, not past the deadline."""
    await asyncio.sleep(min(RETRY_PAUSE_S * 2 ** (lost - 1), deadline.left()))


class Deadline:
    """A moment on this process's monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds
        """When it is over, by ``time.monotonic()``."""

    def left(self) -> float:
        """Seconds that are left; DeadlineExceeded when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded()
        return left

    def travelling(self) -> Left:
        """``left``, for a replica: it is told what is left when it gets the request, which waits
        here for as long as all replicas are full. DeadlineExceeded as there."""
        self.left()
        return Left(self.at)


async def _finish(response: Any, deadline: Deadline) -> Any:
    """The result of a handle call; on every other way out the call is cancelled."""
    try:
        return await within(deadline.at, response)
    except BaseException:
        response.cancel()
        raise


def _refusal(error: Exception) -> Exception:
    """What the caller gets for an error of a half: the contract's errors stay what they were."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("every model replica is busy and the queue is full", retry_after_s=1.0)
    if isinstance(error, (*LOST, DeploymentUnavailableError)):
        return Overloaded("no model replica could finish the request", retry_after_s=2.0)
    return error


class ModelHalf:
    """The model pool as two calls."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._complete = handle.options(method_name="complete", **PLAIN_PICKLE)
        self._generate = handle.options(method_name="generate", stream=True, **PLAIN_PICKLE)
        self._health = handle.options(method_name="health")

    async def health(self) -> int:
        """The model's context in positions, once a replica has answered."""
        context: int = await _finish(self._health.remote(), Deadline(HEALTH_TIMEOUT_S))
        return context

    async def complete(
        self, request: SegmentRequest, request_id: str, deadline: Deadline
    ) -> ModelResult:
        """The finished path; RequestError when it is refused, late or lost."""
        lost = 0
        while True:
            response = self._complete.remote(request, request_id, deadline.travelling())
            try:
                return await _finish(response, deadline)
            except Exception as error:
                lost = _lost_again("model", request_id, error, lost)
                if not lost:
                    raise _refusal(error) from error
                await _pause(lost, deadline)

    async def events(
        self, request: SegmentRequest, request_id: str, deadline: Deadline
    ) -> AsyncGenerator[ModelEvent, None]:
        """The model's events as they come, each once.

        When the replica is lost, another one begins again: the request id seeds its draws, so it
        says the same, and what was sent is skipped. Where it says anything else (another batch may
        round another way), the request ends with the error of a lost replica.
        """
        sent: list[ModelEvent] = []
        lost = 0
        while True:
            told = 0
            response: Any = self._generate.remote(request, request_id, deadline.travelling())
            finished = False
            try:
                while True:
                    try:
                        group = await within(deadline.at, response.__anext__())
                    except StopAsyncIteration:
                        return
                    finished = isinstance(group[-1], ModelDone)
                    for event in group:
                        told += 1
                        if told > len(sent):
                            sent.append(event)
                            yield event
                        elif event != sent[told - 1]:
                            raise Overloaded(
                                "the model replica was lost, and another tells otherwise"
                            )
            except Exception as error:
                lost = _lost_again("model", request_id, error, lost)
                if not lost:
                    raise _refusal(error) from error
            finally:
                # Reached on every way out, a client that went away included: frees the slot.
                if not finished:
                    response.cancel()
            await _pause(lost, deadline)


class RefinerHalf:
    """The refiner pool as one call."""

    def __init__(self, handle: DeploymentHandle, timeout_s: float, hedge: Hedge) -> None:
        self._refine = handle.options(method_name="refine", **PLAIN_PICKLE)
        self._health = handle.options(method_name="health")
        self._hedge = hedge
        self.timeout_s = timeout_s
        """Seconds that a request waits for its refinement."""

    async def health(self) -> None:
        """Returns once a replica has answered."""
        await _finish(self._health.remote(), Deadline(HEALTH_TIMEOUT_S))

    async def refine(
        self, request: SegmentRequest, model: ModelResult, deadline: Deadline
    ) -> SegmentRefineBitmapsResult:
        """Refined path and masks; RefinerUnavailable after five lost replicas, a full queue or
        ``refine_timeout_s``, DeadlineExceeded when the request's own time is up first.

        Another replica is asked too when none has answered for ``refine_silence_s``.
        """
        left = deadline.left()
        patience = Deadline(min(self.timeout_s, left))
        try:
            return await self._hedge.first(
                lambda: self._answer(request, model, patience), patience.left, UNAVAILABLE
            )
        except DeadlineExceeded:
            # Not asked of the clock: timers of uvloop are up to a millisecond early.
            if left <= self.timeout_s:
                raise
            raise RefinerUnavailable(f"no answer in {self.timeout_s:g} s") from None
        except UNAVAILABLE as error:
            raise RefinerUnavailable(str(error)) from error
        except RayTaskError as error:
            if isinstance(error.cause, RequestError):
                raise error.cause from None
            raise

    async def _answer(
        self, request: SegmentRequest, model: ModelResult, patience: Deadline
    ) -> SegmentRefineBitmapsResult:
        """One replica's answer, or another's where that one is lost."""
        lost = 0
        while True:
            response = self._refine.remote(
                request.image,
                model.path,
                model.bbox,
                request.return_base64,
                request.settings.refiner,
                patience.travelling(),
            )
            try:
                return await _finish(response, patience)
            except Exception as error:
                lost = _lost_again("refiner", model.request_id, error, lost)
                if not lost:
                    raise
                await _pause(lost, patience)
