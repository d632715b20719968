"""One computation by several threads, each with a stretch of its lines.

torch's own threads meet after every operator, which for the few lines of a small picture costs more
than they save. These meet only where lines look at each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor


class Share:
    """What one thread takes of a computation."""

    def __init__(self, part: slice, number: int, common: _Common) -> None:
        self.part = part
        """Its lines."""
        self.number = number
        """Its place among the shares, from 0."""
        self._common = common
        self._round = 0

    def gathered(self, own: Tensor, dim: int) -> Tensor:
        """What every share has, ``own`` of this one, joined along ``dim`` in order of their lines.

        Waits for the others, who have to call it as often.
        """
        # Two lists in turn: who writes the next one but one has met everybody who read this one.
        found = self._common.found[self._round % 2]
        self._round += 1
        found[self.number] = own
        self._common.meeting.wait()
        return torch.cat(found, dim=dim)


class _Common:
    """What the shares of one computation have in common."""

    def __init__(self, count: int) -> None:
        self.meeting = threading.Barrier(count)
        empty = torch.empty(0)
        self.found = [empty] * count, [empty] * count


class Team:
    """Threads that take shares of one computation at a time."""

    def __init__(self, helpers: int) -> None:
        """``helpers``: threads besides the caller's."""
        self._helpers = ThreadPoolExecutor(helpers, thread_name_prefix="share") if helpers else None
        # Shares wait for each other: those of two computations could hold each other's threads.
        self._one = threading.Lock()

    def by_shares(
        self, count: int, threads: int, work: Callable[[Share | None], Tensor]
    ) -> list[Tensor]:
        """What ``work`` makes of each of ``threads`` stretches of ``count`` lines, in their order,
        or of all of them (None) where one thread is to take them, or the others are taken or gone.

        Runs in inference mode, with one of torch's threads for each. Raises what the first that
        failed raised.
        """
        if threads < 2 or self._helpers is None or not self._one.acquire(blocking=False):
            return [_alone(work, None)]
        try:
            return self._by_shares(count, threads, work)
        finally:
            self._one.release()

    def _by_shares(
        self, count: int, threads: int, work: Callable[[Share | None], Tensor]
    ) -> list[Tensor]:
        assert self._helpers is not None
        common = _Common(threads)
        cuts = [count * n // threads for n in range(threads + 1)]

        def take(number: int) -> Tensor:
            share = Share(slice(cuts[number], cuts[number + 1]), number, common)
            try:
                return _alone(work, share)
            except BaseException:
                common.meeting.abort()  # nobody is to wait for it
                raise

        others: list[Future[Tensor]] = []
        try:
            for number in range(1, threads):
                others.append(self._helpers.submit(take, number))
        except RuntimeError:  # closed, the interpreter ends, or there may be no more threads
            common.meeting.abort()
            self.close()  # what could not be begun may lie in the line yet
            wait(others)
            return [_alone(work, None)]
        failed: list[BaseException] = []
        given: list[Tensor] = []
        for result in (lambda: take(0), *(other.result for other in others)):
            try:
                given.append(result())
            except BaseException as error:
                failed.append(error)
        if failed:
            # Those that waited for the one that failed were only told so.
            raise min(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return given

    def close(self) -> None:
        """Give no more work to the helpers; what is under way ends by itself. Idempotent."""
        if self._helpers is not None:
            self._helpers.shutdown(wait=False)


def _alone(work: Callable[[Share | None], Tensor], share: Share | None) -> Tensor:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return work(share)
