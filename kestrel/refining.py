"""The engine's refiner: made where its libraries are, and called in a worker thread."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from kestrel.api import ModelResult, Overloaded, SegmentRequest
from kestrel.busy import Busy
from kestrel.config import RuntimeConfig
from kestrel.cores import give_way
from kestrel.job import EngineError
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

if TYPE_CHECKING:
    import numpy as np

    from kestrel.seg_refiner import SegmentRefiner

log = logging.getLogger(__name__)


def make_refiner(config: RuntimeConfig) -> SegmentRefiner | None:
    """The configured refiner; None without one or without its libraries. ``ConfigError`` for an
    unknown backend."""
    if config.refiner is None:
        return None
    try:
        from kestrel.seg_refiner import SegmentRefiner
    except ImportError:
        log.warning("the refiner's libraries are missing, paths stay coarse", exc_info=True)
        return None
    return SegmentRefiner(config.refiner.served_with(config), limits=config.limits)


def refined_by(
    refiner: SegmentRefiner,
    image: bytes | np.ndarray,
    model: ModelResult,
    request: SegmentRequest,
    unwanted: Callable[[], bool],
) -> SegmentRefineBitmapsResult:
    """Refine in a worker thread; the refiner logs what it could not do. It is left where it is once
    ``unwanted`` says that nobody waits for it."""
    from kestrel.seg_refiner.refiner import ASKING, UNWANTED, Unwanted

    refine: Any = (
        refiner.refine_encoded if isinstance(image, bytes) else refiner.refine_with_bitmaps
    )
    asking, left = ASKING.set(model.request_id), UNWANTED.set(unwanted)
    try:
        return refine(
            image,
            model.path,
            model.bbox,
            return_base64=request.return_base64,
            refiner=request.settings.refiner,
        )
    except Unwanted:
        return SegmentRefineBitmapsResult()  # for nobody
    except Exception:
        log.exception("request %s: refinement failed", model.request_id)
        return SegmentRefineBitmapsResult(reason="refine_failed")
    finally:
        ASKING.reset(asking)
        UNWANTED.reset(left)


def _closed() -> Overloaded:
    return Overloaded("the engine is shut down")


class RefineThreads:
    """Threads for refinements, any of which may hang in native code.

    Nothing stops such a thread; it is a daemon, so that the process can still end.
    """

    def __init__(self, threads: int, stuck_s: float) -> None:
        """``stuck_s``: a refinement that runs for longer is stuck, seconds."""
        self._stuck_s = stuck_s
        self._busy = Busy()
        # Reentrant: the garbage collector may end these threads in one that holds it.
        self._lock = threading.RLock()
        self._open: set[Future[Any]] = set()
        self._closed = False
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._tasks = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"refine_{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def count(self) -> int:
        """Refinements that wait or run, each until its thread has ended it, wanted or not."""
        with self._lock:
            return len(self._open)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call it in one of the threads; cancelled before that, it is never called. ``Overloaded``
        once they are closed."""
        future: Future[Any] = Future()
        future.add_done_callback(self._ended)
        with self._lock:
            if self._closed:
                raise _closed()
            self._open.add(future)
            # Within the lock: behind the threads' end mark nobody would take it.
            self._tasks.put((future, lambda: function(*arguments)))
        return future

    def check(self) -> None:
        """``EngineError`` while a refinement is stuck."""
        if self._busy.longest_s() > self._stuck_s:
            raise EngineError(f"a refinement has run for over {self._stuck_s:g} s")

    def end(self) -> None:
        """Fail what waits with ``Overloaded``; each thread ends with what it runs. Idempotent."""
        with self._lock:
            self._closed = True
        self._fail_waiting()
        for _ in self._threads:
            self._tasks.put(None)

    def close(self, wait_s: float) -> None:
        """``end``, and wait ``wait_s`` seconds at most for what runs. Idempotent."""
        self.end()
        with self._lock:
            running = list(self._open)
        began = time.monotonic()
        stuck = wait(running, wait_s).not_done
        if stuck:
            log.warning("%d refinements still run after %g s and are left", len(stuck), wait_s)
            return
        for thread in self._threads:
            thread.join(max(0.0, began + wait_s - time.monotonic()))

    def _fail_waiting(self) -> None:
        # What is taken from the line here no thread takes.
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None and task[0].set_running_or_notify_cancel():
                    # Not cancelled: whoever waits for it would take that for his own.
                    task[0].set_exception(_closed())

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._open.discard(future)

    def _work(self) -> None:
        give_way()
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._busy.one():
                    made = call()
            except BaseException as error:  # whoever waits for it is told
                future.set_exception(error)
            else:
                future.set_result(made)
            # Not to hold a picture until the next one comes.
            del future, call, task
