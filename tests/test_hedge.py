"""A second call for one that is silent: which answer is taken, what is cancelled, how many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

pytest.importorskip("ray.serve")

from serve_graph.hedge import Hedge

SOON_S = 0.01


class Gone(Exception):
    """Says nothing of the request."""


class Calls:
    """Calls that are answered in turn by what ``answers`` says; None: never."""

    def __init__(self, *answers: Callable[[], Awaitable[str]] | None) -> None:
        self.answers = list(answers)
        self.made = self.cancelled = 0

    async def __call__(self) -> str:
        answer = self.answers[self.made]
        self.made += 1
        try:
            if answer is None:
                await asyncio.Event().wait()
                raise AssertionError
            return await answer()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def says(text: str) -> Callable[[], Awaitable[str]]:
    async def answer() -> str:
        return text

    return answer


def fails(error: Exception) -> Callable[[], Awaitable[str]]:
    async def answer() -> str:
        raise error

    return answer


def forever() -> float:
    return 60.0


async def ask(hedge: Hedge, calls: Calls, left: Callable[[], float] = forever) -> str:
    return await hedge.first(calls, left, (Gone,))


async def test_a_silent_call_is_made_again_and_cancelled_when_another_has_answered() -> None:
    calls = Calls(None, says("second"))
    assert await ask(Hedge(SOON_S, 1), calls) == "second"
    await asyncio.sleep(0)
    assert (calls.made, calls.cancelled) == (2, 1)


async def test_a_call_that_answers_is_made_once() -> None:
    calls = Calls(says("first"), says("second"))
    assert await ask(Hedge(60.0, 1), calls) == "first"
    assert calls.made == 1


async def test_a_silent_second_call_is_followed_by_a_third() -> None:
    hedge = Hedge(SOON_S, 2)
    for _ in range(2):  # the second request has as many of them as the first
        calls = Calls(None, None, says("third"))
        assert await asyncio.wait_for(ask(hedge, calls), 30) == "third"
        await asyncio.sleep(0)
        assert calls.cancelled == 2


async def test_a_second_replica_that_is_gone_leaves_the_first_call_to_answer() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def late() -> str:
        return await answer

    async def lost() -> str:
        asyncio.get_running_loop().call_soon(answer.set_result, "first")
        raise Gone

    assert await ask(Hedge(SOON_S, 1), Calls(late, lost)) == "first"


async def test_an_answer_is_taken_before_the_losses_that_come_at_the_same_time() -> None:
    come = asyncio.Event()

    async def lost() -> str:
        await come.wait()
        raise Gone

    async def answered() -> str:
        await come.wait()
        return "answer"

    calls = Calls(*[lost] * 7, answered, *[lost] * 7)
    asking = asyncio.create_task(ask(Hedge(SOON_S, 14), calls))
    while calls.made < 15:
        await asyncio.sleep(SOON_S)
    come.set()
    assert await asking == "answer"


async def test_the_last_call_s_error_is_the_caller_s() -> None:
    with pytest.raises(Gone):
        await ask(Hedge(SOON_S, 1), Calls(fails(Gone())))


async def test_what_is_wrong_with_the_request_is_said_at_once() -> None:
    calls = Calls(None, fails(ValueError("no picture")))
    with pytest.raises(ValueError, match="no picture"):
        await ask(Hedge(SOON_S, 1), calls)
    await asyncio.sleep(0)
    assert calls.cancelled == 1


async def test_all_requests_together_have_so_many_second_calls_and_no_more() -> None:
    hedge = Hedge(SOON_S, 2)
    silent = [Calls(None, None) for _ in range(5)]
    asking = [asyncio.create_task(ask(hedge, calls)) for calls in silent]
    while sum(calls.made for calls in silent) < 7:
        await asyncio.sleep(SOON_S)
    await asyncio.sleep(10 * SOON_S)
    assert sum(calls.made for calls in silent) == 7
    for one in asking:
        one.cancel()
    await asyncio.wait(asking)
    # What they held is free again.
    calls = Calls(None, says("second"))
    assert await ask(hedge, calls) == "second"
    assert sum(calls.cancelled for calls in silent) == 7


async def test_without_a_bound_a_silent_call_is_waited_for_until_patience_ends() -> None:
    calls = Calls(None)
    patience = iter([SOON_S, 0.0])

    def left() -> float:
        if not (rest := next(patience)):
            raise TimeoutError
        return rest

    with pytest.raises(TimeoutError):
        await ask(Hedge(None, 1), calls, left)
    await asyncio.sleep(0)
    assert (calls.made, calls.cancelled) == (1, 1)
