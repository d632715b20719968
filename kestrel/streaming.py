"""From the engine thread to the event loop: mailboxes, and the stream that a caller reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from kestrel.api import (
    BboxEvent,
    DeadlineExceeded,
    ModelDone,
    ModelEvent,
    ModelResult,
    PathDelta,
)
from kestrel.job import Job
from kestrel.scheduler import Delivery, Scheduler

if TYPE_CHECKING:
    from kestrel.engine import EngineResult, InferenceEngine, Outcome


class StreamClosed(RuntimeError):
    """A result was asked of a stream that its reader closed before."""


class Mailbox:
    """What the engine thread has for one request. Used on its event loop only."""

    def __init__(self, deadline_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: deque[ModelEvent] = deque()
        self._last: ModelResult | BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []
        # The scheduler keeps deadlines too, but looks at them between steps only.
        self._timer = self.loop.call_later(deadline_s, self.put, DeadlineExceeded())

    def put(self, item: ModelEvent | BaseException) -> None:
        """Take an event, or the request's last word; what comes after that is ignored."""
        if self._last is not None:
            return
        if isinstance(item, ModelDone):
            self._last = item.result
        elif isinstance(item, BaseException):
            self._last = item
        else:
            self._events.append(item)
        if self._last is not None:
            self._timer.cancel()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def forget(self) -> None:
        """Drop the events that nobody has taken."""
        self._events.clear()

    def leave(self) -> None:
        """Nobody will look any more: its timer no longer keeps it until the deadline."""
        self._timer.cancel()

    @property
    def closed(self) -> bool:
        """Whether the last word has come."""
        return self._last is not None

    async def _change(self) -> None:
        waiter = self.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    async def event(self) -> ModelEvent | None:
        """The next event, None after the last; raises what the request failed with."""
        while not self._events:
            if isinstance(self._last, BaseException):
                raise self._last
            if self._last is not None:
                return None
            await self._change()
        return self._events.popleft()

    async def result(self) -> ModelResult:
        """The model's result, events or not; raises what the request failed with."""
        while self._last is None:
            await self._change()
        if isinstance(self._last, BaseException):
            raise self._last
        return self._last


def deliver(items: list[Delivery]) -> None:
    """Put what a step gave into the mailboxes, one call per event loop. From the engine thread."""
    loops: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for item in items:
        loops.setdefault(item[0].mailbox.loop, []).append(item)
    for loop, batch in loops.items():
        try:
            loop.call_soon_threadsafe(_put_all, batch)
        except RuntimeError:  # the loop is closed: nobody waits any more
            for job, _ in batch:
                job.cancelled = True


def _put_all(items: list[Delivery]) -> None:
    for job, item in items:
        job.mailbox.put(item)


class SegmentStream:
    """One request's updates as they come: ``async for update in stream``, ``await
    stream.result()``.

    Updates are ``BboxEvent`` and ``PathDelta``. Leaving it (``aclose``, ``async with``, or merely
    dropping it) frees the model's slot.
    """

    def __init__(self, engine: InferenceEngine, scheduler: Scheduler, job: Job) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._job = job
        self._mailbox: Mailbox = job.mailbox
        self._lock = asyncio.Lock()
        self._outcome: Outcome | None = None

    @property
    def request_id(self) -> str:
        """Names the request in answers, logs and errors."""
        return self._job.request_id

    def __aiter__(self) -> SegmentStream:
        return self

    async def __anext__(self) -> BboxEvent | PathDelta:
        try:
            event = await self._mailbox.event()
        except StreamClosed:
            event = None
        if event is None:
            raise StopAsyncIteration
        assert not isinstance(event, ModelDone)
        return event

    async def outcome(self) -> Outcome:
        """The model's result and its refinement, for the functions of ``kestrel.answers``.

        The updates need not be read first. Raises ``RequestError``, ``EngineError`` or
        ``StreamClosed``; cancelling the call cancels the refinement.
        """
        async with self._lock:
            if self._outcome is None:
                model = await self._mailbox.result()
                self._outcome = (model, await self._engine._refine(self._job, model))
        return self._outcome

    async def result(self) -> EngineResult:
        """The finished request, refined; see ``outcome``."""
        model, refined = await self.outcome()
        return self._engine._result(self._job, model, refined)

    async def aclose(self) -> None:
        """End the request if the model runs it: ``result`` then raises ``StreamClosed``. The
        iteration ends, updates that were not read are dropped. Idempotent."""
        self._mailbox.forget()
        if not self._mailbox.closed:
            self._scheduler.cancel(self._job)
            self._mailbox.put(StreamClosed("the stream was closed before its result"))

    async def __aenter__(self) -> SegmentStream:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # May run on any thread and after the loop's end.
        if not self._mailbox.closed:
            self._scheduler.cancel(self._job)
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its timers with it
                self._mailbox.loop.call_soon_threadsafe(self._mailbox.leave)
