"""The door for Ray programs: a handle to the ingress, direct or through Ray Client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from kestrel.api import DeadlineExceeded, Overloaded, RequestError, ServiceFault
from kestrel.deadlines import within
from serve_graph.environment import LOOPBACK
from serve_graph.ray_token import MODE, use_token

if TYPE_CHECKING:
    from ray.util.queue import Queue

# Both are read when Ray is imported. A driver on the loopback address of a local cluster needs the
# first; the second lets a program that shares the server's environment use handles from threads.
if os.environ.get("RAY_ADDRESS", "").startswith("127."):
    os.environ.update(LOOPBACK)
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")

T = TypeVar("T")

LATE_S = 1.0
"""How long an event is waited for when the deadline is over, seconds: the ingress says so in an
event of its own, and what came in time takes a moment to be fetched."""


async def in_threads(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """What a generator that blocks gives, each item waited for in a thread. Left early, it is
    closed once the item that it is at has come."""
    waiting: asyncio.Future[T | None] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(asyncio.to_thread(next, items, None))
            item = await asyncio.shield(waiting)
            if item is None:
                return
            yield item
    finally:
        # A generator that runs cannot be closed, and a thread cannot be cancelled.
        if waiting is not None and not waiting.done():
            await asyncio.wait({waiting})
        await asyncio.to_thread(items.close)


@contextlib.contextmanager
def own_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop for this thread to wait in; what still waits in it at the end is cancelled."""
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


class Patience:
    """How long the events of a stream are waited for."""

    def __init__(self, seconds: float) -> None:
        """``seconds``: the deadline of the request, from now."""
        self._deadline = time.monotonic() + seconds

    def until(self) -> float:
        """Up to when the next event is waited for, by ``time.monotonic()``."""
        return max(self._deadline, time.monotonic()) + LATE_S


class HandleDoor:
    """Calls the ingress deployment's methods; the same composing happens as for HTTP. Calls are
    the contract's fields."""

    def __init__(self, address: str | None, *, app: str, timeout_s: float) -> None:
        if address and address.startswith(("127.", "localhost:")):
            os.environ.update(LOOPBACK)
        import ray
        from ray import serve
        from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        self._connected_here = not ray.is_initialized()
        if self._connected_here:
            try:
                use_token()
                ray.init(address or "auto", log_to_driver=False, logging_level=logging.WARNING)
            except (ValueError, RuntimeError, ConnectionError, RayError) as error:
                raise ConnectionError(
                    f"no Ray cluster at {address or 'auto'}: {error}; one that asks for Ray's "
                    f"token needs RAY_AUTH_MODE=token (it is {os.environ.get(MODE, 'not set')}) "
                    "and its token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
                ) from error
        self._ray = ray
        self._timeout_s = timeout_s
        self._task_error = RayTaskError
        self._late = (GetTimeoutError, TimeoutError, asyncio.TimeoutError)
        self._busy = BackPressureError
        self._lost = (RayActorError,)
        try:
            self._handle = serve.get_app_handle(app)
        except RayServeException as error:
            self.close()
            raise ConnectionError(f"no Serve application {app!r}: {error}") from error
        # Ray Client carries no streaming calls: events then come through a Ray queue.
        self._through_queue = bool(ray.util.client.ray.is_connected())

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Ray's wrapping comes off: callers see the errors of the contract."""
        try:
            yield
        except self._late:
            raise DeadlineExceeded() from None
        except self._busy as error:
            raise Overloaded(str(error), retry_after_s=1.0) from None
        except self._lost as error:
            raise Overloaded("the ingress replica was lost", retry_after_s=1.0) from error
        except self._task_error as error:
            if isinstance(error.cause, RequestError):
                raise error.cause from None
            raise ServiceFault("internal error") from error

    def call(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self._plain_errors():
            response = self._handle.segment.remote(timeout_s=self._timeout_s, **fields)
            try:
                answer: dict[str, Any] = response.result(timeout_s=self._timeout_s)
                return answer
            except BaseException:
                response.cancel()
                raise

    async def acall(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self._plain_errors():
            response = self._handle.segment.remote(timeout_s=self._timeout_s, **fields)
            try:
                answer: dict[str, Any] = await asyncio.wait_for(response, self._timeout_s)
                return answer
            except BaseException:
                response.cancel()
                raise

    def events(self, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._through_queue:
            yield from self._queued_events(fields)
            return
        patience, response = Patience(self._timeout_s), self._streamed(fields)
        # Not ``next(response)``, whose wait nothing can end.
        with own_loop() as loop:
            try:
                with self._plain_errors():
                    while True:
                        awaited = within(patience.until(), response.__anext__())
                        yield loop.run_until_complete(awaited)
            except StopAsyncIteration:
                return
            finally:
                response.cancel()

    async def aevents(self, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if self._through_queue:
            async with contextlib.aclosing(in_threads(self._queued_events(fields))) as events:
                async for event in events:
                    yield event
            return
        patience, response = Patience(self._timeout_s), self._streamed(fields)
        try:
            with self._plain_errors():
                while True:
                    yield await within(patience.until(), response.__anext__())
        except StopAsyncIteration:
            return
        finally:
            response.cancel()

    def _streamed(self, fields: dict[str, Any]) -> Any:
        handle = self._handle.options(stream=True)
        return handle.stream.remote(timeout_s=self._timeout_s, **fields)

    def _queued_events(self, fields: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        from ray.util.queue import Queue

        patience, queue = Patience(self._timeout_s), Queue(actor_options={"num_cpus": 0})
        response = self._handle.stream_into.remote(queue, timeout_s=self._timeout_s, **fields)
        try:
            with self._plain_errors():
                while True:
                    event = self._queued(queue, response, patience.until())
                    if isinstance(event, RequestError):
                        raise event
                    yield event
                    if event.get("completed") and event["type"] != "path_delta":
                        return
        finally:
            response.cancel()
            queue.shutdown(force=True)

    def _queued(self, queue: Queue, response: Any, until: float) -> Any:
        """The next item of the queue that ``response`` fills, waited for ``until`` then."""
        from ray.util.queue import Empty

        actor: Any = queue.actor
        while (left := until - time.monotonic()) > 0:
            try:
                # As ``queue.get`` does, but bounded also where the queue's actor does not start.
                return self._ray.get(actor.get.remote(min(1.0, left)), timeout=left)
            except Empty:
                # Still running: a timeout. An ingress that died cannot say so in the queue.
                with contextlib.suppress(*self._late):
                    response.result(timeout_s=0.0)
        raise DeadlineExceeded()

    def close(self) -> None:
        if self._connected_here:
            self._ray.shutdown()

    async def aclose(self) -> None:
        self.close()
