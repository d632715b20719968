"""A second call for one that a replica leaves unanswered; the first answer is taken.

A replica that hangs holds its requests until health checks have replaced it, which takes longer
than most requests have. Ray Serve picks a replica once per call and then waits for it: a retry
after silence is not among its features.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from serve_graph import metrics

T = TypeVar("T")


class Hedge:
    """Asks again, each time ``silence_s`` seconds have passed without an answer.

    At most ``most`` second calls are out at once for all requests together: enough for what one
    hung replica holds. A pool that is merely slow is not loaded twice. ``silence_s`` None: never.
    """

    def __init__(self, silence_s: float | None, most: int) -> None:
        self._silence_s = silence_s
        self._room = most

    async def first(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        left: Callable[[], float],
        gone: tuple[type[Exception], ...],
    ) -> T:
        """The first answer of ``call``, which may be made several times at once.

        ``left``: seconds until the caller's patience ends, or raises. ``gone``: errors that say
        nothing of the request, for which another call that is out is waited for. The other calls
        are cancelled on every way out.
        """
        out = {asyncio.create_task(call())}
        again: list[asyncio.Task[T]] = []
        try:
            while True:
                wait_s = left() if self._silence_s is None else min(left(), self._silence_s)
                done, out = await asyncio.wait(
                    out, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
                )
                # Of those that end together, one that has an answer first.
                for ended in sorted(done, key=lambda one: isinstance(one.exception(), gone)):
                    if not (out and isinstance(ended.exception(), gone)):
                        return ended.result()
                if not done and self._silence_s is not None and left() and self._room > 0:
                    self._room -= 1
                    metrics.count(metrics.HEDGED_REFINEMENTS)
                    again.append(asyncio.create_task(call()))
                    out.add(again[-1])
        finally:
            self._room += len(again)
            for unneeded in out:
                unneeded.cancel()
