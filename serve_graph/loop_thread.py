"""An event loop for callers that cannot await."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Loop = asyncio.AbstractEventLoop

CLOSED = "the client was closed"


class LoopThread:
    """Awaits for callers of any thread, also of one that runs an event loop itself, as a notebook
    does. Its loop has a thread of its own, which starts with the first call."""

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """``last`` is awaited in the loop at its end."""
        self._last = last
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._loop: Loop | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """``work``'s result; the work is cancelled when its caller is interrupted."""
        future = self._begin(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ConnectionError(CLOSED) from None
        finally:
            future.cancel()

    def each(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """What ``items`` gives, taken as it comes once the first is asked for; closed with this
        iterator."""
        taken: queue.SimpleQueue[T | None] = queue.SimpleQueue()

        async def take() -> None:
            async with contextlib.aclosing(items):
                async for item in items:
                    taken.put(item)

        taking = self._begin(take())
        taking.add_done_callback(lambda _: taken.put(None))
        try:
            while (item := taken.get()) is not None:
                yield item
            taking.result()
        except concurrent.futures.CancelledError:
            raise ConnectionError(CLOSED) from None
        finally:
            taking.cancel()

    def close(self) -> None:
        """Cancel what is under way and end the thread; a later call is refused."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is None or not thread.is_alive() or self._loop is None:
                return
            self._finalizer()
        thread.join()

    def _begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._closed:
                work.close()
                raise ConnectionError(CLOSED)
            # In a process that was forked it is not alive.
            if self._thread is None or not self._thread.is_alive():
                started: concurrent.futures.Future[Loop] = concurrent.futures.Future()
                self._thread = threading.Thread(
                    target=_serve, args=(started, self._last), name="segment_client", daemon=True
                )
                self._thread.start()
                self._loop = loop = started.result()
                # A client that is dropped leaves no thread.
                self._finalizer = weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
                self._finalizer.atexit = False
            assert self._loop is not None
            return asyncio.run_coroutine_threadsafe(work, self._loop)


def _serve(
    started: concurrent.futures.Future[Loop], last: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """The thread's work until its loop is stopped."""
    loop = asyncio.new_event_loop()
    started.set_result(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(last())
    finally:
        loop.close()
