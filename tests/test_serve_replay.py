"""A stream whose model replica dies goes on from another, each event once, or ends in an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from kestrel.api import (
    BboxEvent,
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    Overloaded,
    PathDelta,
    SegmentRequest,
)
from serve_graph import halves
from serve_graph.halves import ATTEMPTS, Deadline, ModelHalf

BOX = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.9, "y_max": 0.9}
TOLD: list[ModelEvent] = [
    BboxEvent(BOX),
    PathDelta("M0 0", 5),
    PathDelta("L1 0", 8),
    PathDelta("Z", 9),
    ModelDone(ModelResult("id", "stop", "dog", "M0 0L1 0Z", BOX, ModelMetrics())),
]


class Call:
    """What a handle's streaming call gives: some events, in groups of ``together``, then the death
    of its replica."""

    def __init__(
        self,
        events: list[ModelEvent],
        dies: bool = False,
        error: Exception | None = None,
        together: int = 1,
    ) -> None:
        self._together = together
        self._events = self._told(events, ReplicaUnavailableError("killed") if dies else error)
        self.cancelled = False

    async def _told(
        self, events: list[ModelEvent], error: Exception | None
    ) -> AsyncIterator[list[ModelEvent]]:
        for at in range(0, len(events), self._together):
            yield events[at : at + self._together]
        if error is not None:
            raise error

    async def __anext__(self) -> list[ModelEvent]:
        return await self._events.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Hands out one call after the other."""

    def __init__(self, *calls: Call) -> None:
        self.calls, self.made = list(calls), 0

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *_: Any) -> Call:
        self.made += 1
        return self.calls[self.made - 1]


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(halves.metrics, "count", lambda *_, **__: None)


async def heard(*calls: Call) -> list[ModelEvent]:
    half = ModelHalf(Handle(*calls))  # type: ignore[arg-type]
    events: list[ModelEvent] = []
    try:
        async for event in half.events(SegmentRequest("dog"), "id", Deadline(5.0)):
            events.append(event)
    except Overloaded as error:
        events.append(error)  # type: ignore[arg-type]
    return events


@pytest.mark.parametrize("cut", range(len(TOLD)))
async def test_what_was_sent_before_the_death_is_not_sent_again(cut: int) -> None:
    assert await heard(Call(TOLD[:cut], dies=True), Call(TOLD, dies=False)) == TOLD


async def test_two_deaths_in_a_row_are_survived_wherever_they_come() -> None:
    for first, second, together in product(range(len(TOLD)), range(len(TOLD)), (1, 2, 5)):
        calls = Call(TOLD[:first], True), Call(TOLD[:second], True), Call(TOLD, together=together)
        assert await heard(*calls) == TOLD


@pytest.mark.parametrize("other", [TOLD[:1] + TOLD[2:], [TOLD[0], PathDelta("M9 9", 5), *TOLD[2:]]])
async def test_a_replica_that_says_it_otherwise_ends_the_stream(other: list[ModelEvent]) -> None:
    *events, error = await heard(Call(TOLD[:3], dies=True), second := Call(other, dies=False))
    assert events == TOLD[:3]
    assert isinstance(error, Overloaded)
    assert second.cancelled


async def test_a_full_queue_refuses_the_new_and_waits_for_the_lost() -> None:
    full = BackPressureError(num_queued_requests=4, max_queued_requests=4)
    (error,) = await heard(Call([], error=full), Call(TOLD))
    assert isinstance(error, Overloaded)
    calls = Call(TOLD[:2], dies=True), Call([], error=full), Call([], error=full), Call(TOLD)
    assert await heard(*calls) == TOLD


async def test_a_request_that_kills_whoever_takes_it_ends() -> None:
    calls = [Call(TOLD[:2], dies=True) for _ in range(ATTEMPTS)]
    *events, error = await heard(*calls)
    assert events == TOLD[:2]
    assert isinstance(error, Overloaded)
