"""Engines whose refinement hangs or whose thread ended: what they say, and how they are left."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from engines import CONFIG, Switch, until
from project import ROOT
from tiny_models import random_model

from kestrel.api import DeadlineExceeded, Overloaded
from kestrel.batch import Batch
from kestrel.config import ConfigError, RefinerConfig, RuntimeConfig
from kestrel.engine import EngineError, InferenceEngine
from kestrel.server.http import EngineBackend

pytest_plugins = ["engines"]

HANGS = threading.Event()
"""A refinement has begun, and hangs."""


@pytest.fixture
def hang(
    switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], threading.Event]]:
    """Called, it has every refinement wait until the test is over or sets what it gives; engines
    leave it sooner."""
    monkeypatch.setattr("kestrel.engine.LEAVE_AFTER_S", 1.0)
    release = threading.Event()
    HANGS.clear()

    def hanging(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        HANGS.set()
        assert release.wait(60)
        return mask

    def begin() -> threading.Event:
        switch.behave = hanging
        return release

    yield begin
    release.set()


async def started(**changes: Any) -> InferenceEngine:
    config = RuntimeConfig(
        max_batch_size=2, refiner=RefinerConfig(refiner="switch"), **{**CONFIG, **changes}
    )
    return await InferenceEngine.create(config)


async def left_in_refinement(engine: InferenceEngine, ask: dict[str, Any]) -> None:
    """One request whose refinement hangs, left by its client."""
    asked = asyncio.create_task(engine.segment(**ask))
    await until(HANGS.is_set)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_health_fails_while_a_refinement_is_stuck(ask, hang, switch):
    engine = await started(refiner_stuck_s=0.3)
    try:
        hang()
        await left_in_refinement(engine, ask)
        await asyncio.sleep(0.4)
        # The model half completed just now, which alone would be health enough.
        with pytest.raises(EngineError, match=r"a refinement has run for over 0\.3 s"):
            await engine.health()
        backend = EngineBackend(engine.config)
        backend._engine = engine
        for asked in (backend.ready, backend.serving):
            assert "a refinement has run for over" in str(await asked())
    finally:
        began = time.monotonic()
        await asyncio.wait_for(engine.shutdown(), 30)
        assert time.monotonic() - began < 10


async def test_a_refinement_counts_until_its_thread_ends(ask, hang, switch):
    engine = await started(max_queue=2, refiner_stuck_s=30)
    try:
        hang()
        await left_in_refinement(engine, ask)
        assert engine.stats()["refining"] == 1
        with pytest.raises(DeadlineExceeded):
            await engine.segment(**ask, timeout_s=1.0)
        # The second never got a thread, and is gone with its request.
        assert engine.stats()["refining"] == 1
        waiting = asyncio.create_task(engine.segment(**ask))
        await until(lambda: engine.stats()["refining"] == 2)
        with pytest.raises(Overloaded, match="the queue is full"):
            await engine.segment(**ask)
        waiting.cancel()
        await asyncio.wait([waiting])
    finally:
        await asyncio.wait_for(engine.shutdown(), 30)


@pytest.mark.parametrize("leave", ["the client is gone", "the deadline passes"])
async def test_a_refinement_that_nobody_waits_for_ends_with_its_stage(
    ask, hang, switch, monkeypatch, leave
):
    """Not with its last: cleaning, encoding and tracing a large mask takes seconds."""
    engine = await started(refiner_stuck_s=30)
    later = []
    for stage in ("clean.clean_mask", "trace.bitmap_to_path"):
        monkeypatch.setattr(f"kestrel.seg_refiner.{stage}", lambda *_, **__: later.append(1))
    try:
        release = hang()
        if leave == "the client is gone":
            await left_in_refinement(engine, ask)
        else:
            with pytest.raises(DeadlineExceeded):
                await engine.segment(**ask, timeout_s=1.0)
            assert HANGS.is_set()
        release.set()
        await until(lambda: engine.stats()["refining"] == 0)
        assert not later
        assert sum(engine._refiner.outcomes.values()) == 1  # that of the check at the start
    finally:
        await asyncio.wait_for(engine.shutdown(), 30)


async def test_a_refinement_that_waits_at_shutdown_is_cancelled_or_hangs(ask, hang, switch):
    engine = await started()
    stream = await engine.segment(**ask, stream=True)
    assert [update async for update in stream]
    hang()
    asked = [asyncio.create_task(engine.segment(**ask)) for _ in range(3)]
    try:
        await until(lambda: HANGS.is_set() and engine.stats()["refining"] == 3)
    finally:
        await asyncio.wait_for(engine.shutdown(), 30)
    # The third hangs in its thread, and is left to itself.
    await until(lambda: sum(task.done() for task in asked) == 2)
    for task in asked:
        if task.done():
            with pytest.raises(Overloaded, match="shut down"):
                await task
    with pytest.raises(Overloaded, match="shut down"):
        await asyncio.wait_for(stream.result(), 10)
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)


def test_seconds_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="refiner_stuck_s"):
        RuntimeConfig(refiner_stuck_s=0)


def test_a_process_ends_though_a_refinement_hangs():
    code = """
        import time
        from kestrel.refining import RefineThreads
        threads = RefineThreads(1, 30.0)
        threads.submit(time.sleep, 1000)
        threads.close(0.5)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


# An engine whose thread ended


def bare() -> InferenceEngine:
    model = random_model()
    model.fuse()
    return InferenceEngine(RuntimeConfig(refiner=None, **CONFIG), model)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the device: steps fail, and so does beginning afresh."""

    def fault(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Batch, "step", fault)
    monkeypatch.setattr(Batch, "reset", fault)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_whose_thread_ended_names_the_cause(poisoned):
    engine = bare()
    with pytest.raises(EngineError, match="RuntimeError"):
        await engine.segment(object="cat")
    await until(lambda: engine.failure is not None)
    for call in (lambda: engine.segment(object="cat"), engine.health):
        with pytest.raises(EngineError, match="the engine failed: RuntimeError") as caught:
            await call()
        assert "illegal memory access" in str(caught.value.__cause__)
        assert isinstance(caught.value, Overloaded)  # 503 over HTTP: another may serve it
    backend = EngineBackend(engine.config)
    backend._engine = engine
    for asked in (backend.ready, backend.serving):
        assert "the engine failed: RuntimeError" in str(await asked())
    await engine.shutdown()


async def test_an_engine_that_is_shut_down_has_not_failed():
    engine = bare()
    await engine.shutdown()
    assert engine.failure is None
    with pytest.raises(Overloaded, match="shut down"):
        await engine.segment(object="cat")


SERVER = """
import sys
from kestrel.batch import Batch
from kestrel.cli import main

step = Batch.step

def fault(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def failing(batch, chunks=()):
    if served:
        Batch.reset = fault
        fault()
    return step(batch, chunks)

served = []
Batch.step = failing
from kestrel.server.http import EngineBackend
complete = EngineBackend.complete

async def completing(*args, **named):
    served.append(1)
    return await complete(*args, **named)

EngineBackend.complete = completing
sys.exit(main(["serve", "--device", "cpu", "--port", sys.argv[1]]))
"""


@pytest.mark.timeout(300)
def test_the_one_process_server_ends_with_its_engine(tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        unused_port = listener.getsockname()[1]
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    url = f"http://127.0.0.1:{unused_port}"
    process = subprocess.Popen(
        [sys.executable, script, str(unused_port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        give_up = time.monotonic() + 200
        while True:
            assert process.poll() is None and time.monotonic() < give_up
            try:
                if httpx.get(f"{url}/healthz", timeout=30).status_code == 200:
                    break
            except httpx.ConnectError:
                time.sleep(0.2)
            time.sleep(0.1)
        answer = httpx.post(f"{url}/v1/segment", json={"object": "cat"}, timeout=30)
        assert answer.status_code == 500
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, said
    assert said.splitlines()[-1] == "kestrel: the engine failed: RuntimeError"
