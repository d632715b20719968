"""More than its capacity comes to a service, and it takes in what will be too late, or refuses what
would not."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted import ASK, WELL, Reader, ScriptedBackend, ingress_over

from kestrel.config import RuntimeConfig
from kestrel.deadlines import cancelled
from kestrel.errors import DeadlineExceeded, Full, Overloaded
from kestrel.server.room import Place, Room
from kestrel.server.routes import build_app

SIDE_BY_SIDE = 8


class Simulated:
    """A service that works on so many requests side by side, first come first served, and never
    on one whose deadline has passed. Time is simulated."""

    def __init__(self, held: int = 48, side_by_side: int = SIDE_BY_SIDE) -> None:
        """``side_by_side``: more than ``SIDE_BY_SIDE``, as of several model replicas."""
        config = RuntimeConfig(max_held_requests=held, max_batch_size=SIDE_BY_SIDE)
        self.now = 0.0
        self.room = Room(config, lambda: self.now)
        self.outcomes: Counter[str] = Counter()
        self._free = [0.0] * side_by_side
        """When each of those side by side is free."""
        self._ends: list[tuple[float, int, Place, BaseException | None]] = []
        self._asked = 0

    def until(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            self.now, _, place, failure = heapq.heappop(self._ends)
            self.outcomes["late" if failure else "right"] += 1
            with contextlib.suppress(DeadlineExceeded), place:
                if failure is not None:
                    raise failure
        self.now = now

    def ask(self, service_s: float, deadline_s: float) -> str:
        """What is said at once of a request that takes so long alone: "taken" or the refusal."""
        try:
            place = self.room.enter(deadline_s)
        except Full:
            self.outcomes["full"] += 1
            return "full"
        except Overloaded as error:
            self.outcomes["refused"] += 1
            return error.message
        place.begin()
        begins = max(self.now, heapq.heappop(self._free))
        late = begins + service_s > self.now + deadline_s
        ends = min(begins + service_s, self.now + deadline_s)
        heapq.heappush(self._free, max(begins, ends))
        self._asked += 1  # of those that end at once, the first first
        failure = DeadlineExceeded() if late else None
        heapq.heappush(self._ends, (ends, self._asked, place, failure))
        return "taken"

    def load(self, seconds: float, rate: float, services: Iterator[float], deadline_s: float):
        began = self.now
        for number in range(int(seconds * rate)):
            self.until(began + number / rate)
            self.ask(next(services), deadline_s)

    def loaded(self) -> None:
        """Three times what it can carry has come for a while, and some places are free again."""
        self.load(30, 15.0, times(1.6), 10.0)
        self.until(self.now + 4)


def times(*seconds: float) -> Iterator[float]:
    while True:
        yield from seconds


@pytest.mark.parametrize("deadline_s", [1.0, 5.0, 10.0, 60.0])
@pytest.mark.parametrize("services", [(1.6,), (0.8, 2.4), (0.2,)])
def test_what_is_let_in_misses_its_deadline(deadline_s: float, services: tuple[float, ...]) -> None:
    if deadline_s < max(services):
        pytest.skip("no request of these would be in time")
    service = Simulated()
    capacity = SIDE_BY_SIDE * len(services) / sum(services)
    service.load(30, 3 * capacity, times(*services), deadline_s)
    before = Counter(service.outcomes)
    service.load(30, 3 * capacity, times(*services), deadline_s)
    found = service.outcomes - before
    assert found["right"] >= 0.9 * capacity * 30, found
    assert found["late"] <= 0.05 * found["right"], found


def test_bursts_are_refused_after_a_quiet_time() -> None:
    """One request after another says nothing of how fast many are."""
    service = Simulated()
    for _ in range(50):
        assert service.ask(1.6, 10.0) == "taken"
        service.until(service.now + 2.0)
    assert [service.ask(1.6, 10.0) for _ in range(48)] == ["taken"] * 48
    service.until(service.now + 20)
    assert service.outcomes == {"right": 98}


def test_a_stall_is_held_against_the_service_for_ever() -> None:
    service = Simulated()
    for _ in range(48):
        service.ask(60.0, 20.0)
    service.until(service.now + 20)
    assert service.outcomes["late"] == 48
    service._free = [service.now] * SIDE_BY_SIDE
    service.load(20, 3.0, times(0.2), 5.0)
    assert service.outcomes["refused"] == 0
    for _ in range(40):
        service.ask(0.2, 5.0)
    service.until(service.now + 10)
    service.load(10, 100.0, times(0.2), 5.0)
    service.until(service.now + 10)
    assert service.outcomes["late"] == 48
    assert service.outcomes["right"] > 300


def test_the_refusal_says_why_and_when_to_come_back() -> None:
    service = Simulated()
    service.loaded()
    with pytest.raises(Overloaded) as refused:
        service.room.enter(0.5)
    assert not isinstance(refused.value, Full)
    said = re.search(r"\d+ requests .* up to ([0-9.]+) s, .* has 0\.5 s", refused.value.message)
    # Then as many are before it as it has time for.
    assert said and refused.value.retry_after_s == pytest.approx(float(said[1]) - 0.5, abs=0.06)
    assert 1 < refused.value.retry_after_s <= 60
    assert "X-Service-Full" not in refused.value.headers()
    with service.room.enter():  # without a deadline of its own
        pass
    with service.room.enter(60.0):
        pass


def test_those_who_leave_are_taken_for_answered() -> None:
    """Clients that break off at once would make the service look fast."""
    service = Simulated()
    service.loaded()
    for _ in range(100):
        with contextlib.suppress(ConnectionError), service.room.enter() as place:
            place.begin()
            raise ConnectionError
    with pytest.raises(Overloaded):
        service.room.enter(1.0)


@pytest.mark.parametrize("door", ["http", "handle"])
async def test_those_whose_bodies_are_read_at_once_are_all_let_in(door: str) -> None:
    backend = ScriptedBackend(max_batch_size=1)
    backend.script = [0.2, *WELL]
    ingress = ingress_over(backend)
    transport = httpx.ASGITransport(build_app(backend, room=ingress._backend.room))
    turn, complete = asyncio.Lock(), backend.complete

    async def in_turn(*args: Any) -> Any:
        async with turn:
            return await complete(*args)

    backend.complete = in_turn  # type: ignore[method-assign]

    async def ask(timeout_s: float) -> int:
        if door == "handle":
            try:
                await ingress.segment(object="disc", timeout_s=timeout_s)
            except Overloaded as error:
                return error.status
            return 200
        headers = {"X-Request-Timeout-Ms": str(int(1000 * timeout_s))}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.post("/v1/segment", json=ASK, headers=headers)).status_code

    assert set(await asyncio.gather(*(ask(30.0) for _ in range(10)))) == {200}
    found = Counter(await asyncio.gather(*(ask(1.2) for _ in range(20))))
    assert found[503] >= 10 and found[200] >= 2 and not found[504], found


@pytest.mark.parametrize(("door", "stream"), [("http", False), ("http", True), ("handle", True)])
async def test_an_answer_that_waits_for_its_reader_is_taken_for_work(
    door: str, stream: bool
) -> None:
    backend = ScriptedBackend()
    backend.script = list(WELL)
    ingress = ingress_over(backend)
    room = ingress._backend.room
    if door == "handle":
        events = ingress.stream(object="disc")
        while (await anext(events))["type"] != "final":
            pass
    else:
        reading = Reader(5 if stream else 1)  # all but the last event
        asking = reading.request(
            build_app(backend, room=room), "POST", "/v1/segment", ASK | {"stream": stream}
        )
        asked = asyncio.ensure_future(asking)
        while len(reading.sent) < reading.takes:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    assert (room.requests, room._stays.under_way) == (1, 0)
    if door == "handle":
        await events.aclose()
    else:
        await cancelled(asked)
    assert (room.requests, room._stays.under_way) == (0, 0)


@pytest.mark.parametrize("door", ["http", "handle"])
@pytest.mark.parametrize(
    ("error", "told"), [(Overloaded("lost"), 0), (KeyError(), 0), (DeadlineExceeded(), 1)]
)
async def test_a_stream_that_breaks_is_taken_for_an_answer(
    error: Exception, told: int, door: str
) -> None:
    """A service whose streams break at once would look fast."""
    backend = ScriptedBackend()
    backend.script = [*WELL, error]
    ingress = ingress_over(backend)
    room = ingress._backend.room
    if door == "handle":
        assert [event["type"] async for event in ingress.stream(object="disc")][-1] == "error"
    else:
        await Reader(100).request(
            build_app(backend, room=room), "POST", "/v1/segment", ASK | {"stream": True}
        )
    assert (room.requests, room._stays.under_way) == (0, 0)
    ended = room._stays._ended
    assert [each.took_s for each in ended] == [math.inf] * told


def test_who_sends_or_reads_slowly_is_taken_for_work() -> None:
    service = Simulated()
    service.load(30, 4.0, times(1.6), 10.0)
    service.until(service.now + 10)
    sending = [service.room.enter() for _ in range(20)]
    reading = [service.room.enter() for _ in range(20)]
    for place in reading:
        place.begin()
        place.done()
    assert service.room.requests == 40
    assert service.room._stays.under_way == 0
    assert service.ask(1.6, 2.0) == "taken"
    for place in (*sending, *reading):
        place.__exit__(None)


def test_requests_that_are_stuck_are_taken_for_a_queue() -> None:
    """As on one of several model replicas, while the others answer at once."""
    service = Simulated()
    stuck = [service.room.enter() for _ in range(2 * SIDE_BY_SIDE)]
    for place in stuck:
        place.begin()
    service.load(40, 1.0, times(0.5), 2.0)
    assert service.outcomes["refused"] == 0
    for place in stuck:
        place.__exit__(None)


def test_a_service_of_several_replicas_refuses_where_none_waits() -> None:
    service = Simulated(side_by_side=4 * SIDE_BY_SIDE)
    service.load(80, 4.0, times(5.0), 6.0)
    # A few at first, when no request had as many before it.
    assert service.outcomes["refused"] <= 10
