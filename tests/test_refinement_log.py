"""A refiner replica's line of a path that it does not refine names the request and comes once; what
is left undone, for nobody waits, has none."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("ray.serve")

from ray import serve
from ray.serve._private.logging_utils import ServeContextFilter

from kestrel.config import Limits, RefinerConfig
from kestrel.seg_refiner.backends import BACKENDS
from serve_graph.refiner import RefinerDeployment


class Lines(logging.Handler):
    """Keeps what Serve's own filter makes of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.addFilter(ServeContextFilter())

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def serve_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    lines = Lines()
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [lines])
    library = logging.getLogger("kestrel")
    # What a replica changes for its whole process.
    before = library.handlers, library.level, library.propagate
    yield lines
    library.handlers, library.propagate = before[0], before[2]
    library.setLevel(before[1])


def test_a_call_that_is_cancelled_ends_with_the_stage_that_it_is_in(
    serve_log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with its last: cleaning, encoding and tracing a large mask takes seconds."""
    began, release, later = threading.Event(), threading.Event(), []

    def slow(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        began.set()
        assert release.wait(60)
        return mask

    async def leave(replica: RefinerDeployment) -> None:
        picture, box = np.zeros((32, 32, 3), np.uint8), dict.fromkeys(("x_min", "y_min"), 0.0)
        box |= dict.fromkeys(("x_max", "y_max"), 1.0)
        call = asyncio.create_task(replica.refine(picture, "M0 0H1V1H0Z", box, True, "slow"))
        await asyncio.to_thread(began.wait, 60)
        call.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await call

    release.set()
    monkeypatch.setitem(BACKENDS, "slow", lambda config: slow)
    replica = RefinerDeployment(RefinerConfig(selectable=("slow",)), Limits(), 1, 30.0)
    began.clear()
    release.clear()
    for stage in ("clean.clean_mask", "trace.bitmap_to_path"):
        monkeypatch.setattr(f"kestrel.seg_refiner.{stage}", lambda *_, **__: later.append(1))
    asyncio.run(leave(replica))
    assert not later
    assert not replica.stats()["outcomes"]
    # What it took until then is no measure of a refinement.
    assert replica.record_autoscaling_stats() == {}
    assert not [record for record in serve_log.records if record.levelno >= logging.WARNING]


def test_a_path_that_is_not_refined_is_logged_once_with_its_request(serve_log: Lines) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    box = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}

    async def ask(replica: RefinerDeployment) -> str:
        context = serve.context._RequestContext(request_id="the-request")
        serve.context._serve_request_context.set(context)
        return (await replica.refine(image, "no path", box, False)).reason

    replica = RefinerDeployment(RefinerConfig(), Limits(), 1, 30.0)
    assert asyncio.run(ask(replica)) == "no_path"
    (line,) = [record for record in serve_log.records if "not refined" in record.getMessage()]
    assert line.getMessage().startswith("not refined (no_path): ")
    assert line.request_id == "the-request"  # type: ignore[attr-defined]
