"""Whether a pool still answers, told by its requests and asked for only where they fail."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator

from kestrel.api import DeadlineExceeded, Overloaded, RequestError, outcome
from serve_graph.halves import Deadline

logger = logging.getLogger("ray.serve")

SILENT_S = 30.0
"""How long a pool answers nothing, after a request has failed on it, before it counts as away; over
what a full pool needs for the next of its requests, as it then has no room for a question either.
"""
ASK_AFTER_S = 1.0
"""How long after that failure it is asked itself: a pool that is only full answers others first."""


class Pulse:
    """``away`` once requests have failed and nothing has been answered since for ``SILENT_S``.

    ``ask`` returns when the pool answers. It is what brings back a pool that gets no requests,
    because the load balancer has heard that it is away.
    """

    def __init__(self, ask: Callable[[], Awaitable[object]]) -> None:
        self._ask = ask
        self._silent_since: float | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        """Whether the pool has answered nothing for long."""
        since = self._silent_since
        return since is not None and time.monotonic() - since > SILENT_S

    def answered(self) -> None:
        """The pool has answered anything at all."""
        self._silent_since = None

    @contextlib.contextmanager
    def call(self, deadline: Deadline) -> Iterator[None]:
        """Around a call: one without an answer is a failure, one that its client left is none."""
        try:
            yield
        except (DeadlineExceeded, Overloaded):
            self._failed()
            raise
        except RequestError:
            self.answered()
            raise
        except asyncio.CancelledError as error:
            if outcome(error, deadline.at) == "late":
                self._failed()
            raise

    def _failed(self) -> None:
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        await asyncio.sleep(ASK_AFTER_S)
        while self._silent_since is not None:
            try:
                await self._ask()
                self.answered()
            except Exception as error:
                logger.warning("the pool does not answer: %r", error)
                await asyncio.sleep(ASK_AFTER_S)
