"""How much of requests one process holds at once, bounded by count and by bytes."""

from __future__ import annotations

from kestrel.api import Overloaded
from kestrel.config import RuntimeConfig
from kestrel.errors import Full


class Room:
    """The bounds ``max_held_requests`` and ``max_held_bytes``, and what is held now."""

    def __init__(self, config: RuntimeConfig) -> None:
        self._most_requests = config.max_held_requests
        self._most_bytes = config.max_held_bytes
        self.requests = 0
        self.bytes = 0

    def enter(self) -> Place:
        """A place for one request, to be left; Full when all are taken."""
        if self.requests >= self._most_requests:
            raise Full(f"the server is full ({self.requests} requests)")
        return Place(self)

    def _hold(self, more: int) -> None:
        if self.bytes + more > self._most_bytes:
            raise Overloaded(f"the server is full ({self.bytes} bytes)")
        self.bytes += more


class Place:
    """One request's part of a ``Room``; ``with room.enter() as place``."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._bytes = 0
        room.requests += 1

    def hold(self, size: int) -> None:
        """Hold ``size`` bytes in all; Overloaded when the room has no space for what is new."""
        if size > self._bytes:
            self._room._hold(size - self._bytes)
            self._bytes = size

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.requests -= 1
        self._room.bytes -= self._bytes
