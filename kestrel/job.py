"""A request on its way through the scheduler, and how the engine's own failures reach it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kestrel.api import ModelMetrics, Overloaded, SegmentRequest
from kestrel.batch import Row
from kestrel.pictures import Picture


class EngineError(RuntimeError):
    """The engine failed, not the request; ``__cause__`` says how."""


class EngineEnded(Overloaded, EngineError):
    """The engine's thread ended by a failure, ``__cause__``: only a new engine serves again. Over
    HTTP a 503: another replica, or the process that is started in place of this one, may serve."""


@dataclass(eq=False)
class Job(Row):
    """A row with its way through the scheduler. Times are of ``time.monotonic``, seconds."""

    request_id: str
    request: SegmentRequest
    deadline: float
    mailbox: Any = None
    """Where the answer goes; the scheduler only passes it on to ``deliver``."""
    events: bool = True
    """Whether anybody wants the events before the last."""
    arrived: float = field(default_factory=time.monotonic)
    preparing: bool = False
    """Whether its image was given to the worker threads."""
    picture: Picture | None = None
    """Until it has a slot, which then holds what is needed of it."""
    pixels: np.ndarray | None = None
    """The decoded image, uint8 [H, W, 3], held for the refiner; None: to be decoded again."""
    cancelled: bool = False
    error: BaseException | None = None
    admitted: float = 0.0
    metrics: ModelMetrics = field(default_factory=ModelMetrics)

    @property
    def image(self) -> bytes | np.ndarray | None:
        return self.request.image

    @property
    def ready(self) -> bool:
        """Whether the model could take it."""
        if self.request.image is None:
            return True
        return self.picture is not None and self.picture.prepared


def engine_error(cause: BaseException) -> EngineError:
    """An ``EngineError`` for one job; shared by several, it would collect all their frames."""
    error = EngineError(f"the engine failed: {type(cause).__name__}")
    error.__cause__ = cause
    return error


def engine_ended(cause: BaseException) -> EngineEnded:
    """An ``EngineEnded`` for one caller."""
    error = EngineEnded(str(engine_error(cause)), retry_after_s=5.0)
    error.__cause__ = cause
    return error
