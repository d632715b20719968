"""How much of requests one process holds at once, bounded by count, by bytes and by their time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from kestrel.answers import ErrorEvent
from kestrel.api import Overloaded
from kestrel.config import RuntimeConfig
from kestrel.errors import DeadlineExceeded, Full
from kestrel.server.stays import Stay, Stays


class Room:
    """The bounds ``max_held_requests`` and ``max_held_bytes``, and what is held now."""

    def __init__(self, config: RuntimeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds that pass."""
        self._most_requests = config.max_held_requests
        self._most_bytes = config.max_held_bytes
        self._stays = Stays(config.max_batch_size, clock)
        self.requests = 0
        self.bytes = 0

    def enter(self, left_s: float = math.inf) -> Place:
        """A place for one request, to be left; Full when all are taken, Overloaded where its
        deadline, in ``left_s`` seconds, is nearer than its answer, DeadlineExceeded where it has
        passed."""
        if self.requests >= self._most_requests:
            raise Full(f"the server is full ({self.requests} requests)")
        self._expect(left_s)
        return Place(self)

    def _expect(self, left_s: float) -> None:
        if left_s <= 0:
            raise DeadlineExceeded()
        expected_s = self._stays.expected_s()
        if expected_s > left_s:
            raise Overloaded(
                f"{self._stays.under_way} requests are before it: its answer would take up to "
                f"{expected_s:.1f} s, and the request has {left_s:.1f} s",
                retry_after_s=min(expected_s - left_s, 60.0),
            )

    def _hold(self, more: int) -> None:
        if self.bytes + more > self._most_bytes:
            raise Overloaded(f"the server is full ({self.bytes} bytes)")
        self.bytes += more


class Place:
    """One request's part of a ``Room``; ``with room.enter() as place``."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._bytes = 0
        self._stay: Stay | None = None
        room.requests += 1

    def hold(self, size: int) -> None:
        """Hold ``size`` bytes in all; Overloaded when the room has no space for what is new."""
        if size > self._bytes:
            self._room._hold(size - self._bytes)
            self._bytes = size

    def begin(self, left_s: float = math.inf) -> None:
        """All of the request is here: from now on its answer is waited for. Overloaded where it
        would come too late, behind those that began while this one's body was read,
        DeadlineExceeded where that took all of its time."""
        self._room._expect(left_s)
        self._stay = self._room._stays.begin()

    def done(self, *, late: bool = False) -> None:
        """The answer is there, to be sent for as long as its client takes; ``late``: it is not.
        Idempotent."""
        if self._stay is not None:
            self._room._stays.end(self._stay, late=late)
        self._stay = None

    def heard(self, event: Mapping[str, object]) -> None:
        """An event of the answer is there, to be sent; its last one says how the request ended."""
        if not isinstance(event, ErrorEvent):
            if event["type"] == "final":
                self.done()
        elif event.outcome == "late":
            self.done(late=True)
        else:
            self._failed()

    def _failed(self) -> None:
        if self._stay is not None:
            self._room._stays.forget()
        self._stay = None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._room.requests -= 1
        self._room.bytes -= self._bytes
        if kind is None or issubclass(kind, DeadlineExceeded):
            self.done(late=kind is not None)
        else:
            self._failed()
