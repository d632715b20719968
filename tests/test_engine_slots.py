"""Requests that their neighbours sway, slots that are not given back, threads that stay."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from engines import CONFIG, MODEL, SAMPLES, TOKENIZER, comparable, segment, until
from serving import picture

from kestrel import pictures
from kestrel.api import (
    BboxEvent,
    DeadlineExceeded,
    InvalidRequest,
    ModelMetrics,
    ModelResult,
    Overloaded,
    PromptTooLong,
    SegmentRequest,
    SegmentSettings,
)
from kestrel.batch import Batch
from kestrel.config import RuntimeConfig
from kestrel.engine import InferenceEngine
from kestrel.moondream.stacked import StackedLayers
from kestrel.skills.segment import build_prompt
from kestrel.streaming import Mailbox

pytest_plugins = ["engines"]


class Running:
    """How many calls of a method run at once, at most."""

    most = now = 0


def counting(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Running:
    method, running, lock = getattr(owner, name), Running(), threading.Lock()

    def counted(*args: Any, **options: Any) -> Any:
        with lock:
            running.now += 1
            running.most = max(running.most, running.now)
        try:
            return method(*args, **options)
        finally:
            with lock:
                running.now -= 1

    monkeypatch.setattr(owner, name, counted)
    return running


# One batch


async def test_requests_of_one_batch_get_the_answers_they_get_alone(engine):
    asked = [SAMPLES[i % len(SAMPLES)] for i in range(0, 3 * len(SAMPLES), 3)][:10]
    asked = [{"object": "cat"}, asked[0], *asked]
    # Prompts of many lengths, the shortest first: none may see another's positions.
    refs = [[0.1, 0.1, 0.9, 0.9]] * 16
    asked = [
        {**arguments, "return_base64": True, "spatial_refs": refs[: 3 * (i % 4)]}
        if "image" in arguments
        else arguments
        for i, arguments in enumerate(asked)
    ]
    alone = [comparable(await engine.segment(**arguments)) for arguments in asked]
    steps = engine.stats()["steps"]
    together = await asyncio.gather(*[engine.segment(**arguments) for arguments in asked])
    tokens = sum(result.metrics.output_tokens for result in together)
    assert engine.stats()["steps"] - steps < tokens, "they did not decode together"
    assert [comparable(result) for result in together] == alone


async def test_pictures_that_are_encoded_at_once_spoil_each_other(monkeypatch):
    monkeypatch.setattr("kestrel.pictures.usable_cores", lambda: 4)
    encoding = counting(monkeypatch, Batch, "encode")
    runtime = RuntimeConfig(**{**CONFIG, "image_cache_bytes": 0, "torch_threads": 1})
    asked = list({arguments["image"]: arguments for arguments in SAMPLES}.values())
    async with await InferenceEngine.create(runtime) as engine:
        alone = [comparable(await engine.segment(**arguments)) for arguments in asked]
        assert encoding.most == 1
        before = engine.stats()["images"]
        for _ in range(3):
            together = await asyncio.gather(*[engine.segment(**a) for a in asked])
            assert [comparable(result) for result in together] == alone
        assert encoding.most > 1
        assert engine.stats()["images"] - before == 3 * len(asked)


async def test_rows_that_two_threads_share_are_answered_otherwise(monkeypatch, ask):
    monkeypatch.setattr("kestrel.pictures.usable_cores", lambda: 2)
    stepping = counting(monkeypatch, StackedLayers, "__call__")
    refs = [[0.1, 0.1, 0.9, 0.9]] * 16
    asked = [{**ask, "spatial_refs": refs[: 5 * (i % 3)]} for i in range(8)]
    async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
        alone = [comparable(await engine.segment(**arguments)) for arguments in asked]
        stepping.most = 0
        for _ in range(3):
            together = await asyncio.gather(*[engine.segment(**a) for a in asked])
            assert [comparable(result) for result in together] == alone
    assert stepping.most == 2


async def test_a_thread_takes_rows_from_those_that_encode_pictures(monkeypatch, ask):
    monkeypatch.setattr("kestrel.pictures.usable_cores", lambda: 2)
    begun, go_on = threading.Event(), threading.Event()
    encode = Batch.encode

    def held(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return encode(*arguments)

    async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
        pictures = engine._scheduler._pictures
        assert pictures.free_cores == 2
        monkeypatch.setattr(Batch, "encode", held)
        asking = asyncio.create_task(engine.segment(**ask))
        assert await asyncio.to_thread(begun.wait, 30)
        assert pictures.free_cores == 1
        go_on.set()
        await asking
        with pytest.raises(InvalidRequest):
            await engine.segment(image=ask["image"][:500], object="cat")
        assert pictures.free_cores == 2


async def test_a_request_that_draws_lots_is_not_swayed_by_its_neighbours(engine, ask):
    warm = {"temperature": 0.8, "top_p": 0.9}

    async def draw(name: str) -> dict[str, Any]:
        return comparable(await engine.segment(**ask, settings=warm, request_id=name))

    names = [f"draw-{i}" for i in range(6)]
    alone = [await draw(name) for name in names]
    assert await asyncio.gather(*map(draw, names)) == alone


async def test_longer_and_shorter_neighbours_come_and_go(engine, ask):
    async def cut(n: int) -> list[int]:
        return segment(await engine.segment(**ask, settings={"max_tokens": n}))["token_ids"]

    whole = segment(await engine.segment(**ask))["token_ids"]
    lengths = [4, 9, 5, 7, 4, 8, 6, 5]
    assert await asyncio.gather(*map(cut, lengths)) == [whole[: n - 3] for n in lengths]


# Slots


class Gate:
    """Holds the engine's thread before a step until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, step = Gate(), Batch.step

    def gated(batch: Batch, chunks: Any = ()) -> Any:
        made.reached.set()
        assert made.opened.wait(30)
        return step(batch, chunks)

    monkeypatch.setattr(Batch, "step", gated)
    yield made
    made.opened.set()


@pytest.fixture
def counted(engine: InferenceEngine) -> Callable[[str], int]:
    before = engine.stats()
    return lambda key: engine.stats().get(key, 0) - before.get(key, 0)


@pytest.mark.parametrize("leave", ["cancel", "close", "drop", "deadline"])
async def test_leaving_a_running_request_frees_its_slot(engine, ask, gate, counted, leave):
    if leave == "cancel":
        task = asyncio.create_task(engine.segment(**ask))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif leave == "deadline":
        with pytest.raises(DeadlineExceeded):
            await engine.segment(**ask, timeout_s=0.2)
    else:
        stream = await engine.segment(**ask, stream=True)
        await gate.wait()
        if leave == "close":
            await stream.aclose()
            assert [update async for update in stream] == []
        del stream
    gate.opened.set()
    await until(lambda: counted("cancelled") + counted("late") == 1)
    await until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
    assert counted("completed") == 0
    whole = comparable(await engine.segment(**ask))
    assert whole["finish_reason"] == "stop"


async def read(events: AsyncGenerator[Any, None]) -> None:
    async for _ in events:
        pass


@pytest.mark.parametrize("leave", ["cancel", "close", "drop", "halves"])
async def test_a_request_that_is_left_is_kept_until_its_deadline(
    engine, ask, gate, counted, monkeypatch, leave
):
    mailboxes: list[Mailbox] = []

    class Kept(Mailbox):
        def __init__(self, deadline_s: float) -> None:
            super().__init__(deadline_s)
            mailboxes.append(self)

    monkeypatch.setattr("kestrel.engine.Mailbox", Kept)
    if leave in ("close", "drop"):
        stream = await engine.segment(**ask, stream=True)
        await gate.wait()
        if leave == "close":
            await stream.aclose()
        del stream
    else:
        request = SegmentRequest(**ask)
        asking = engine.complete(request) if leave == "cancel" else read(engine.generate(request))
        task = asyncio.create_task(asking)
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.opened.set()
    await until(lambda: counted("cancelled") == 1)
    (mailbox,) = mailboxes
    # The event loop holds a timer, and by it all of the request, until it is over.
    await until(mailbox._timer.cancelled)


async def test_a_stream_that_is_closed_goes_on(engine, ask):
    stream = await engine.segment(**ask, stream=True)
    await until(lambda: stream._mailbox.closed)
    assert isinstance(await anext(stream), BboxEvent)
    await stream.aclose()
    assert [update async for update in stream] == []
    assert comparable(await stream.result()) == comparable(await engine.segment(**ask))


async def test_requests_that_are_cancelled_by_the_dozen_leave_every_slot_free(
    engine, ask, gate, counted
):
    tasks = [asyncio.create_task(engine.segment(**ask)) for _ in range(12)]
    await gate.wait()
    assert engine.stats()["waiting"] + engine.stats()["running"] >= 8
    for task in tasks[:11]:
        task.cancel()
    await asyncio.wait(tasks[:11])
    gate.opened.set()
    assert (await tasks[11]).finish_reason == "stop"
    await until(lambda: counted("cancelled") == 11)
    # All slots still serve: as many requests again as there are slots, at once.
    results = await asyncio.gather(*[engine.segment(**ask) for _ in range(4)])
    assert len({json.dumps(segment(result)) for result in results}) == 1


async def test_a_request_that_is_cancelled_in_refinement_leaves_nothing_behind(engine, ask, switch):
    entered, release = threading.Event(), threading.Event()

    def slow(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        entered.set()
        assert release.wait(30)
        return mask

    switch.behave = slow
    task = asyncio.create_task(engine.segment(**ask))
    try:
        assert await asyncio.to_thread(entered.wait, 30)
        assert engine.stats()["refining"] == 1 and engine.stats()["running"] == 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.stats()["refining"] == 1, "its thread is still busy"
    finally:
        release.set()
    await until(lambda: engine.stats()["refining"] == 0)
    switch.behave = switch.guided
    assert segment(await engine.segment(**ask))["svg_path"]


async def test_pictures_that_wait_decoded_for_the_refiner_outgrow_their_budget(
    engine, ask, switch, monkeypatch
):
    made: list[weakref.ref[np.ndarray]] = []
    decode, release = pictures.decode_image, threading.Event()

    def watched(*image: Any, **smaller: int) -> np.ndarray:
        pixels = decode(*image, **smaller)
        made.append(weakref.ref(pixels))
        return pixels

    def slow(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        assert release.wait(60)
        return switch.guided(image, mask)

    def held() -> int:
        return sum(pixels() is not None for pixels in made)

    alone = comparable(await engine.segment(**ask))
    monkeypatch.setattr(pictures, "decode_image", watched)
    monkeypatch.setattr(pictures, "HELD_BYTES", int(2.5 * decode(ask["image"]).nbytes))
    switch.behave = slow
    for start in (0, 5):
        # Bytes after a picture's end make it another one to the engine.
        asked = [{**ask, "image": ask["image"] + bytes([start + n])} for n in range(5)]
        tasks = [asyncio.create_task(engine.segment(**arguments)) for arguments in asked]
        try:
            await until(lambda: engine.stats()["refining"] == 5)
            await until(lambda: held() <= 2)
            assert held() == 2, "what was held before still counts"
        finally:
            release.set()
        assert [comparable(result) for result in await asyncio.gather(*tasks)] == [alone] * 5
        await until(lambda: held() == 0)
        release.clear()


async def test_a_picture_whose_refinement_is_late_is_freed_when_its_thread_ends(
    engine, ask, switch
):
    entered, release = threading.Event(), threading.Event()

    def slow(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        entered.set()
        assert release.wait(30)
        return mask

    pixels = pictures.decode_image(ask["image"])
    freed = weakref.ref(pixels)
    request = SegmentRequest("dog", ask["image"])
    box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
    model = ModelResult("id", "stop", "dog", "M0 0L1 0L1 1L0 1Z", box, ModelMetrics())
    switch.behave = slow
    gc.disable()
    try:
        with pytest.raises(DeadlineExceeded) as late:
            await engine.refine(request, model, picture=pixels, timeout_s=0.2)
        del pixels
        assert await asyncio.to_thread(entered.wait, 30)
        release.set()
        await until(lambda: engine.stats()["refining"] == 0)
        await until(lambda: freed() is None)
        assert late.value.status == 504  # what it raised is kept here, and holds no picture
    finally:
        release.set()
        gc.enable()
    switch.behave = switch.guided


@pytest.mark.parametrize("turns", range(3))
async def test_a_call_that_is_cancelled_as_its_refinement_ends_is_cancelled(
    engine, ask, monkeypatch, turns
):
    submit, loop = engine._refining.submit, asyncio.get_running_loop()

    def cancelled_later(left: int) -> None:
        loop.call_soon(cancelled_later, left - 1) if left else task.cancel()

    def watched(*call: Any) -> Any:
        work = submit(*call)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(cancelled_later, turns))
        return work

    monkeypatch.setattr(engine._refining, "submit", watched)
    task = asyncio.create_task(engine.segment(**ask))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_rejected_refinement_is_logged_without_its_request(engine, ask, switch, caplog):
    switch.behave = lambda image, mask: np.eye(*mask.shape, dtype=np.uint8)
    result = await engine.segment(**ask, request_id="the-one")
    assert segment(result)["svg_path"] == segment(result)["coarse_path"]
    assert "request the-one: not refined (rejected)" in caplog.text


async def test_a_picture_that_cannot_be_decoded_takes_no_slot_for_long(engine, ask):
    broken = ask["image"][: len(ask["image"]) // 2]
    with pytest.raises(InvalidRequest) as caught:
        await engine.segment(object="dog", image=broken)
    assert caught.value.field == "image"
    await until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
    assert (await engine.segment(**ask)).finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seconds", ["5", [1], True, math.nan, math.inf, 0, -1])
async def test_a_deadline_that_is_none_is_refused_by_name(engine, ask, seconds, stream):
    with pytest.raises(InvalidRequest, match="timeout_s must be") as caught:
        await engine.segment(**ask, timeout_s=seconds, stream=stream)
    assert caught.value.field == "timeout_s"


async def test_a_noun_longer_than_the_context_is_refused_before_it_waits(engine, counted):
    with pytest.raises(PromptTooLong) as caught:
        # A reference costs up to three positions, a letter of no word up to four.
        await engine.segment(object="\U00013000" * 256, image=picture())
    assert caught.value.field == "object"
    assert counted("completed") == 0 and engine.stats()["waiting"] == 0


# Metrics


async def test_metrics_count_what_was_read_and_written(engine, ask):
    result = await engine.segment(**ask, spatial_refs=[[0.5, 0.5], [0.1, 0.1, 0.9, 0.9]])
    request = SegmentRequest(
        ask["object"], ask["image"], spatial_refs=[(0.5, 0.5), (0.1, 0.1, 0.9, 0.9)]
    )
    metrics = result.metrics
    prompt = build_prompt(request, MODEL, TOKENIZER)
    assert metrics.input_tokens == prompt.length
    assert prompt.length > MODEL.vision.n_patches
    found = segment(result)
    assert found["bbox"] is not None and result.finish_reason == "stop"
    assert metrics.output_tokens == len(found["token_ids"]) + 4  # centre, size, end
    times = (metrics.prefill_time_ms, metrics.decode_time_ms, metrics.ttft_ms)
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert metrics.ttft_ms > metrics.prefill_time_ms > 0, "it waited for its picture"


async def test_a_request_of_one_token_is_over_when_it_is_read(engine, ask):
    metrics = (await engine.segment(**ask, settings={"max_tokens": 1})).metrics
    assert (metrics.output_tokens, metrics.decode_time_ms) == (1, 0.0)


async def test_the_default_of_settings_is_greedy(engine, ask):
    explicit = SegmentSettings(temperature=0.0, top_p=1.0, max_tokens=engine.max_context)
    one, other = [await engine.segment(**ask, settings=s) for s in (None, explicit)]
    assert comparable(one) == comparable(other)


# Shutdown


def own_threads() -> set[threading.Thread]:
    names = ("engine", "refine", "crop")
    return {thread for thread in threading.enumerate() if thread.name.startswith(names)}


async def test_shutdown_fails_what_runs_and_leaves_no_thread(engine, ask, gate):
    others = own_threads()
    gate.opened.set()
    second = await InferenceEngine.create(RuntimeConfig(max_batch_size=1, **CONFIG))
    assert own_threads() > others
    gate.opened.clear()
    gate.reached.clear()
    streams = [await second.segment(**ask, stream=True) for _ in range(3)]
    await gate.wait()
    ending = asyncio.create_task(second.shutdown())
    await until(lambda: second._scheduler._closing)
    with pytest.raises(Overloaded):
        await second.segment(**ask)
    gate.opened.set()
    await ending
    await second.shutdown()
    for stream in streams:
        with pytest.raises(Overloaded):
            await stream.result()
    await until(lambda: own_threads() <= others)
    assert (await engine.segment(**ask)).finish_reason == "stop"


async def test_an_engine_that_is_dropped_leaves_no_thread(engine):
    others = own_threads()
    second = await InferenceEngine.create(RuntimeConfig(max_batch_size=1, **CONFIG))
    assert own_threads() > others
    del second

    def gone() -> bool:
        gc.collect()
        return own_threads() <= others

    await until(gone)


def test_a_script_that_forgets_to_shut_down_still_ends_well() -> None:
    script = (
        "import asyncio\n"
        "from kestrel import InferenceEngine, RuntimeConfig\n"
        "async def main():\n"
        "    global engine\n"
        "    engine = await InferenceEngine.create(RuntimeConfig(device='cpu', torch_threads=1))\n"
        "    stream = await engine.segment(object='cat', stream=True)\n"
        "asyncio.run(main())\n"
        "import sys\n"
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n", "a start imports torch's compiler, which takes seconds"
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr
