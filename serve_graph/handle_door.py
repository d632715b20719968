"""The door for Ray programs: a handle to the ingress, direct or through Ray Client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from kestrel.api import DeadlineExceeded, Overloaded, RequestError, ServiceFault
from kestrel.deadlines import within
from serve_graph import ray_connection
from serve_graph.environment import LOOPBACK
from serve_graph.left import Left
from serve_graph.patience import Patience
from serve_graph.ray_address import check_address
from serve_graph.ray_token import MODE, use_token

if TYPE_CHECKING:
    from ray.util.queue import Queue

# Both are read when Ray is imported. A driver on the loopback address of a local cluster needs the
# first; the second lets a program that shares the server's environment use handles from threads.
if os.environ.get("RAY_ADDRESS", "").startswith("127."):
    os.environ.update(LOOPBACK)
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")

T = TypeVar("T")


async def in_threads(
    items: Generator[T, None, None], leave: Callable[[], None]
) -> AsyncGenerator[T, None]:
    """What a generator that blocks gives, each item waited for in a thread. Left early, it is told
    so by ``leave``, and closed once it gives up the wait or the item has come."""
    loop, waiting = asyncio.get_running_loop(), None
    # Its own: those that the loop shares are few, and the program's too.
    thread = ThreadPoolExecutor(1, "segment_stream")
    try:
        while True:
            # Not a task, which a loop that ends cancels, thread or not.
            waiting = loop.run_in_executor(thread, next, items, None)
            # Left, the thread goes on. Not ``shield``, which from Python 3.14 on reports what those
            # who left did not hear.
            await asyncio.wait({waiting})
            item = waiting.result()
            if item is None:
                return
            yield item
    finally:
        # A generator that runs cannot be closed, and a thread cannot be cancelled.
        leave()
        try:
            if waiting is not None:
                await asyncio.wait({waiting})
                waiting.exception()  # heard
            await loop.run_in_executor(thread, items.close)
        finally:
            thread.shutdown(wait=False)


def timing(deadline: float) -> dict[str, Any]:
    """How long the service has for a call; and, as the way to it takes time that nobody knows
    there, when its caller leaves, by the clocks of both machines."""
    return {"timeout_s": Left(deadline), "due": time.time() + deadline - time.monotonic()}


async def _through_client(response: Any) -> Any:
    """The result of a call through Ray Client. Leaving this leaves Ray's own future alone: one that
    is cancelled stays with Ray Client, and its answer on the cluster, until that disconnects."""
    answer = (await response._to_object_ref()).future()
    loop, there = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(there.set)

    answer.add_done_callback(tell)
    await there.wait()
    return answer.result()


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

        def connect() -> None:
            check_address(address)
            try:
                use_token()
                ray.init(address or "auto", log_to_driver=False, logging_level=logging.WARNING)
            except (ValueError, RuntimeError, ConnectionError, RayError) as error:
                raise ConnectionError(
                    f"no Ray cluster at {address or 'auto'}: {error}; one that asks for Ray's "
                    f"token needs RAY_AUTH_MODE=token (it is {os.environ.get(MODE, 'not set')}) "
                    "and its token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
                ) from error

        ray_connection.join(connect)
        self._joined = True
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
        if self._through_queue:
            # Nor Serve's own gRPC, which a program with the variables of a node would use.
            self._handle = self._handle.options(_by_reference=True)

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

    async def acall(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self._plain_errors():
            until = time.monotonic() + self._timeout_s
            response = self._handle.segment.remote(**timing(until), **fields)
            try:
                waited_for = _through_client(response) if self._through_queue else response
                answer: dict[str, Any] = await within(until, waited_for)
                return answer
            except BaseException:
                response.cancel()
                raise

    async def aevents(self, fields: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        if self._through_queue:
            left = threading.Event()
            waited_for = in_threads(self._queued_events(fields, left), left.set)
            async with contextlib.aclosing(waited_for) as events:
                async for event in events:
                    yield event
            return
        patience = Patience(self._timeout_s)
        response = self._streamed(fields, patience.deadline)
        # Not ``anext(response)`` alone, whose wait nothing can end.
        try:
            with self._plain_errors():
                while True:
                    with patience.waiting() as until:
                        event = await within(until, response.__anext__())
                    yield event
        except StopAsyncIteration:
            return
        finally:
            response.cancel()

    def _streamed(self, fields: dict[str, Any], deadline: float) -> Any:
        handle = self._handle.options(stream=True)
        return handle.stream.remote(**timing(deadline), **fields)

    def _queued_events(
        self, fields: dict[str, Any], left: threading.Event
    ) -> Generator[dict[str, Any], None, None]:
        """The events of a stream, waited for until ``left`` is set."""
        from ray.util.queue import Queue

        patience, queue = Patience(self._timeout_s), Queue(actor_options={"num_cpus": 0})
        response = self._handle.stream_into.remote(queue, **timing(patience.deadline), **fields)
        try:
            with self._plain_errors():
                while not left.is_set():
                    with patience.waiting() as until:
                        event = self._queued(queue, response, until, left)
                    if isinstance(event, RequestError):
                        raise event
                    yield event
                    if event.get("completed") and event["type"] != "path_delta":
                        return
        finally:
            response.cancel()
            queue.shutdown(force=True)

    def _queued(self, queue: Queue, response: Any, until: float, left: threading.Event) -> Any:
        """The next item of the queue that ``response`` fills, waited for ``until`` then, or until
        a second after the stream is ``left``."""
        from ray.util.queue import Empty

        actor: Any = queue.actor
        while (seconds := until - time.monotonic()) > 0 and not left.is_set():
            try:
                # As ``queue.get`` does, but bounded also where the queue's actor does not start.
                return self._ray.get(actor.get.remote(min(1.0, seconds)), timeout=seconds)
            except Empty:
                # Still running: a timeout. An ingress that died cannot say so in the queue.
                with contextlib.suppress(*self._late):
                    response.result(timeout_s=0.0)
        raise DeadlineExceeded()

    async def leave_loop(self) -> None: ...

    def close(self) -> None:
        if self._joined:
            self._joined = False
            ray_connection.leave()
