"""Requests that stall, starve, fail or fool each other in one engine."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import encoded, picture
from tiny_models import TINY_3, hugging_face_tensors, random_model, write_checkpoint

from kestrel import InferenceEngine, RuntimeConfig, pictures, scheduler
from kestrel.api import DeadlineExceeded, InvalidRequest, SegmentSettings, validate_segment
from kestrel.batch import Batch, Row
from kestrel.engine import EngineError, EngineResult
from kestrel.skills.segment import Coord, Phase, Prompt, SegmentDecode, Size, Token

PROMPT = TINY_3.prompt
SILENT = 10
"""A token that is no path text: a request that gives only it ends at its ``max_tokens``."""
LONG = [[0.1, 0.1, 0.9, 0.9]] * 16
"""Spatial references that make a prompt long: 48 positions."""


@pytest.fixture(scope="module")
def tireless(tmp_path_factory) -> Path:
    """A checkpoint that gives a box and then a token without meaning, for ever."""
    model = random_model()
    model.text.lm_head.bias[PROMPT.coord_id] = 1e4
    model.text.lm_head.bias[SILENT] = 1e4
    return write_checkpoint(tmp_path_factory.mktemp("models") / "t", hugging_face_tensors(model))


@pytest.fixture
async def start(tireless):
    """Engines by their configuration."""
    started: list[InferenceEngine] = []

    async def begin(**changes: Any) -> InferenceEngine:
        config = RuntimeConfig(
            model={"path": str(tireless)},  # type: ignore[arg-type]
            **{
                "device": "cpu",
                "torch_threads": 1,
                "refiner": None,
                "allow_empty_paths": True,
                **changes,
            },
        )
        started.append(await InferenceEngine.create(config))
        return started[-1]

    yield begin
    for engine in started:
        await engine.shutdown()


def ask(engine: InferenceEngine, tokens: int, **arguments: Any) -> asyncio.Task[EngineResult]:
    settings = {"max_tokens": tokens}
    return asyncio.create_task(engine.segment(object="ball", settings=settings, **arguments))


class Watch:
    """What every step was given and whom it served; may hold the engine before a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[list[Row], list[tuple[Row, int]], list[Row]]] = []
        self.crops: list[int] = []
        """Crops that were encoded, by the number of the step that followed."""
        self.encoded_before: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Event()
        step, features = Batch.step, Batch.features

        def watched(batch: Batch, chunks: Any = ()) -> list[Row]:
            if not self.open.is_set():
                self.held.set()
                assert self.open.wait(30)
            decoding = [row for row in batch.rows if row.token is not None]
            sampled = step(batch, chunks)
            self.steps.append((decoding, list(chunks), list(sampled)))
            return sampled

        def counted(batch: Batch, crops: np.ndarray, *share: Any) -> torch.Tensor:
            self.crops.append(len(crops))
            self.encoded_before.append(len(self.steps))
            return features(batch, crops, *share)

        monkeypatch.setattr(Batch, "step", watched)
        monkeypatch.setattr(Batch, "features", counted)

    async def hold(self) -> None:
        """Returns when the engine stands before a step."""
        self.held.clear()
        self.open.clear()
        assert await asyncio.to_thread(self.held.wait, 30)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    return Watch(monkeypatch)


async def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        await asyncio.sleep(0.005)


# Bounded stalls


async def test_a_long_prompt_stalls_those_that_decode(start, watch):
    engine = await start(prefill_tokens=8)
    running = ask(engine, 120)
    await until(lambda: engine.stats()["running"] == 1 and len(watch.steps) > 12)
    before = len(watch.steps)
    await asyncio.gather(
        *(ask(engine, 4, image=picture(30, 30), spatial_refs=LONG) for _ in range(2))
    )
    during = watch.steps[before:]
    assert sum(count for _, chunks, _ in during for _, count in chunks) > 100
    assert all(sum(count for _, count in chunks) <= 8 for _, chunks, _ in during)
    # Every step fed every running row, those with chunks included.
    assert all(set(decoding) <= set(sampled) for decoding, _, sampled in during)
    assert (await running).metrics.output_tokens == 120


async def test_a_large_picture_stalls_those_that_decode(start, watch):
    engine = await start(prefill_tokens=4, torch_threads=2)
    running = ask(engine, 100)
    await until(lambda: engine.stats()["running"] == 1 and len(watch.steps) > 12)
    watch.crops.clear()
    watch.encoded_before.clear()
    await ask(engine, 4, image=picture(112, 112))
    assert watch.crops == [1, 1, 1, 1, 1], "four patches are one crop of five"
    assert len(set(watch.encoded_before)) == 5, "two crops before one step"
    await running


async def test_a_picture_that_is_encoded_stalls_those_that_decode(start, watch, monkeypatch):
    engine = await start()
    features, go_on = Batch.features, threading.Event()

    def slow(batch: Batch, crops: np.ndarray, *share: Any) -> torch.Tensor:
        assert go_on.wait(30)
        return features(batch, crops, *share)

    monkeypatch.setattr(Batch, "features", slow)
    joining = ask(engine, 4, image=picture(112, 112))
    try:
        assert (await ask(engine, 30)).metrics.output_tokens == 30
        assert not joining.done()
    finally:
        go_on.set()
    assert (await joining).metrics.output_tokens == 4


@pytest.mark.parametrize(
    ("threads", "small", "thread"),
    [(None, True, "crop"), (None, False, "engine"), (1, False, "crop"), (2, True, "engine")],
)
async def test_a_small_model_waits_for_several_threads(start, monkeypatch, threads, small, thread):
    monkeypatch.setattr(scheduler, "SMALL_MODEL", 10**9 if small else 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    names: list[str] = []
    features = Batch.features

    def named(batch: Batch, crops: np.ndarray, *share: Any) -> torch.Tensor:
        names.append(threading.current_thread().name)
        return features(batch, crops, *share)

    monkeypatch.setattr(Batch, "features", named)
    engine = await start(torch_threads=threads)
    await ask(engine, 4, image=picture(50, 50))
    assert names and all(name.startswith(thread) for name in names)


# Order


async def test_requests_are_served_in_another_order_than_they_came(start, watch):
    engine = await start(max_batch_size=2)
    first = ask(engine, 30)
    await watch.hold()
    tasks = [ask(engine, 4 + n % 3) for n in range(12)]
    await until(lambda: engine.stats()["waiting"] >= 11)
    entered: list[Row] = []
    watch.steps.clear()
    watch.open.set()
    results = await asyncio.gather(*tasks)
    for _, chunks, _ in watch.steps:
        entered += [row for row, _ in chunks if row not in entered]
    assert [row.request_id for row in entered][-12:] == [r.request_id for r in results]
    await first


async def test_a_slow_picture_keeps_others_waiting_or_starves(start, watch, monkeypatch):
    engine = await start(max_batch_size=1)
    slow, decode = threading.Event(), pictures.decode_image

    def decoded(*image: Any, **smaller: int) -> np.ndarray:
        assert slow.wait(30)
        return decode(*image, **smaller)

    monkeypatch.setattr(pictures, "decode_image", decoded)
    pictured = ask(engine, 4, image=picture(30, 30))
    await until(lambda: engine.stats()["waiting"] == 1)
    assert (await ask(engine, 4)).metrics.output_tokens == 4
    running = ask(engine, 60)
    await watch.hold()
    later = [ask(engine, 4) for _ in range(3)]
    await until(lambda: engine.stats()["waiting"] == 4)
    slow.set()
    await until(lambda: engine._scheduler._waiting[0].ready)
    watch.open.set()
    done = [await task for task in asyncio.as_completed([pictured, *later])]
    assert done[0].request_id == (await pictured).request_id
    await running


@pytest.mark.parametrize("how", ["plain", "stream", "generate"])
async def test_a_late_request_leaves_its_picture_in_the_line(start, monkeypatch, how):
    monkeypatch.setattr(pictures, "CROP_THREADS", 1)
    engine = await start()
    go_on, decode = threading.Event(), pictures.decode_image
    decodes: list[int] = []

    def slow(*image: Any, **smaller: int) -> np.ndarray:
        decodes.append(1)
        assert go_on.wait(60)
        return decode(*image, **smaller)

    monkeypatch.setattr(pictures, "decode_image", slow)
    images: list[weakref.ref[np.ndarray]] = []

    def held() -> int:
        gc.collect()
        return sum(image() is not None for image in images)

    async def late(number: int) -> None:
        image = np.full((30, 30, 3), number, np.uint8)
        images.append(weakref.ref(image))
        request = validate_segment(object="ball", image=image, max_context=engine.max_context)
        with pytest.raises(DeadlineExceeded):
            if how == "plain":
                await engine.complete(request, timeout_s=0.2)
            elif how == "stream":
                await (await engine.stream(request, timeout_s=0.2)).outcome()
            else:
                await anext(engine.generate(request, timeout_s=0.2))

    try:
        await asyncio.gather(*(late(number) for number in range(20)))
        await until(lambda: engine.stats()["waiting"] == 0)
        # The one that a thread had begun with; of the others their last words may be under way.
        await until(lambda: held() <= 1)
        live = ask(engine, 4, image=picture(30, 30))
    finally:
        go_on.set()
    assert (await live).metrics.output_tokens == 4
    assert len(decodes) <= 2


# One image, many questions


@pytest.mark.parametrize("threads", [1, 2])
async def test_one_picture_is_decoded_or_encoded_for_every_question(
    start, watch, monkeypatch, threads
):
    engine = await start(torch_threads=threads)
    decodes: list[int] = []
    decode = pictures.decode_image
    monkeypatch.setattr(
        pictures, "decode_image", lambda *i, **smaller: decodes.append(1) or decode(*i, **smaller)
    )
    before = engine.stats()["images"]
    results = await asyncio.gather(*(ask(engine, 4, image=picture(50, 40)) for _ in range(6)))
    assert (engine.stats()["images"] - before, len(decodes)) == (1, 1)
    assert len({str(r.output) for r in results}) == 1
    again = await ask(engine, 4, image=picture(50, 40))
    assert (engine.stats()["images"] - before, len(decodes)) == (1, 1)
    assert again.output == results[0].output


@pytest.mark.parametrize("room", [0, 1, 2, 3])
async def test_the_image_cache_outgrows_its_budget_or_forgets_the_wrong_one(start, watch, room):
    probe = await start()
    each = probe.stats()["image_cache_bytes"]
    assert each > 0, "the picture of the self-check is kept"
    engine = await start(image_cache_bytes=room * each + each // 2)
    first, second, third = (picture(40 + n, 40) for n in range(3))
    seen = engine.stats()["images"]

    async def encodes(image: bytes) -> int:
        nonlocal seen
        await ask(engine, 4, image=image)
        assert engine.stats()["image_cache_bytes"] <= room * each
        new, seen = engine.stats()["images"] - seen, engine.stats()["images"]
        return new

    asked = [first, second, first, third, first, second]
    got = [await encodes(image) for image in asked]
    expected = {0: [1] * 6, 1: [1] * 6, 2: [1, 1, 0, 1, 0, 1], 3: [1, 1, 0, 1, 0, 0]}
    assert got == expected[room]


async def test_a_broken_picture_fails_one_of_those_who_ask_and_hangs_the_rest(start, watch):
    engine = await start()
    broken = picture()[:200]
    outcomes = await asyncio.gather(
        *(ask(engine, 4, image=broken) for _ in range(3)), ask(engine, 9), return_exceptions=True
    )
    assert all(isinstance(o, InvalidRequest) and o.field == "image" for o in outcomes[:3])
    assert outcomes[3].metrics.output_tokens == 9


# Failures


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_picture_that_cannot_be_encoded_takes_others_down(
    start, watch, monkeypatch, threads
):
    engine = await start(torch_threads=threads)
    features = Batch.features

    def failing(batch: Batch, crops: np.ndarray, *share: Any) -> torch.Tensor:
        if crops.min() == 255:
            raise MemoryError("no room for white")
        return features(batch, crops, *share)

    monkeypatch.setattr(Batch, "features", failing)
    white = encoded(Image.new("RGB", (40, 40), (255, 255, 255)))
    outcomes = await asyncio.gather(
        ask(engine, 40),
        ask(engine, 4, image=white),
        ask(engine, 4, image=white),
        ask(engine, 4, image=picture(44, 44)),
        return_exceptions=True,
    )
    assert [getattr(o, "finish_reason", None) for o in outcomes] == ["length", None, None, "length"]
    for failed in outcomes[1:3]:
        assert isinstance(failed, EngineError) and isinstance(failed.__cause__, MemoryError)
    assert engine.stats()["running"] == 0


async def test_tokens_of_one_request_that_cannot_be_read_take_others_down(
    start, watch, monkeypatch
):
    engine = await start()
    push = SegmentDecode.push

    def failing(decode: SegmentDecode, token: Token) -> Any:
        if decode.max_tokens == 7 and decode.output_tokens == 4:
            raise KeyError("lost")
        return push(decode, token)

    monkeypatch.setattr(SegmentDecode, "push", failing)
    outcomes = await asyncio.gather(*(ask(engine, n) for n in (6, 7, 8)), return_exceptions=True)
    assert [isinstance(o, EngineError) for o in outcomes] == [False, True, False]
    await until(lambda: engine.stats()["running"] == 0)


async def test_a_failed_step_leaves_the_engine_broken(start, watch, monkeypatch):
    engine = await start(max_batch_size=3)
    arguments = {"image": picture(60, 44), "spatial_refs": LONG}
    whole = await ask(engine, 20, **arguments)
    running = [ask(engine, 100) for _ in range(2)]
    await watch.hold()
    waiting = [ask(engine, 5) for _ in range(4)]
    step, failures = Batch.step, [RuntimeError("CUDA error: an illegal memory access")]

    def failing(batch: Batch, chunks: Any = ()) -> list[Row]:
        if failures:
            raise failures.pop()
        return step(batch, chunks)

    monkeypatch.setattr(Batch, "step", failing)
    await until(lambda: engine.stats()["waiting"] >= 3)
    watch.open.set()
    outcomes = await asyncio.gather(*running, *waiting, return_exceptions=True)
    failed = [o for o in outcomes if isinstance(o, BaseException)]
    assert failed and all(
        isinstance(o, EngineError) and "illegal memory" in str(o.__cause__) for o in failed
    )
    assert [o for o in outcomes if not isinstance(o, BaseException)], "those that waited are served"
    again = await ask(engine, 20, **arguments)
    assert again.output == whole.output
    assert engine.stats()["running"] == 0
    await engine.health()


@pytest.mark.parametrize("when", ["entering", "running"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_slot_is_free_later_than_one_step_after_its_request_left(start, watch, when, how):
    engine = await start(max_batch_size=1, prefill_tokens=4)
    prompt = {"image": picture(30, 30), "spatial_refs": LONG} if when == "entering" else {}
    timeout = 1.0 if how == "deadline" else None
    leaving = ask(engine, 150, **prompt, timeout_s=timeout)
    await until(lambda: engine.stats()["running"] == 1)
    await watch.hold()
    next_in_line = ask(engine, 4)
    await until(lambda: engine.stats()["waiting"] == 1)
    if how == "cancel":
        leaving.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancel" else DeadlineExceeded):
        await leaving
    watch.steps.clear()
    watch.open.set()
    result = await next_in_line
    # The step that was under way, then the next request's prompt of six in two chunks.
    rows = [{row for row, _ in chunks} | set(decoding) for decoding, chunks, _ in watch.steps[:2]]
    assert {row.request_id for row in rows[1]} == {result.request_id}


# Batched and single


def rows(count: int, seed: int) -> list[Row]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        tokens: list[Token] = [chance.randrange(20, 1500) for _ in range(chance.randrange(2, 40))]
        tokens.insert(1, Coord(chance.random()))
        tokens.insert(2, Size(chance.random(), chance.random()))
        warm = number % 3 == 2
        row = Row(
            Prompt(tokens, len(tokens) + 1),
            SegmentDecode(PROMPT, random_model().tokenizer, 10**6) if not made else made[0].decode,
            SegmentSettings(temperature=0.7 if warm else 0.0, top_p=0.9),
            random.Random(number),
        )
        row.decode.phase = Phase.TEXT
        made.append(row)
    return made


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_neighbours_that_come_and_go_change_what_a_request_is_told(seed):
    model = random_model(seed=seed)
    model.fuse()
    chance = random.Random(seed)
    prefixes = [None, *(model.cached.prefix(torch.randn(5, 32)) for _ in range(2))]
    wanted = [chance.randrange(3, 25) for _ in range(14)]

    def run(batch: Batch, asked: list[Row], chunk: Callable[[Row], int]) -> list[list[Token]]:
        given: dict[int, list[Token]] = {id(row): [] for row in asked}
        waiting = list(asked)
        while waiting or batch.rows:
            while waiting and batch.free:
                batch.join(waiting[0], prefixes[asked_index[id(waiting[0])] % 3])
                waiting.pop(0)
            chunks = [(row, min(chunk(row), row.unfed)) for row in batch.rows if row.unfed]
            for row in batch.step([c for c in chunks if c[1]]):
                given[id(row)].append(row.token)
                if len(given[id(row)]) == wanted[asked_index[id(row)]]:
                    batch.release(row)
        return [given[id(row)] for row in asked]

    asked = rows(14, seed)
    asked_index = {id(row): n for n, row in enumerate(asked)}
    together = run(Batch(model, 5), asked, lambda row: chance.randrange(0, 9))
    asked = rows(14, seed)
    asked_index = {id(row): n for n, row in enumerate(asked)}
    alone = run(Batch(model, 1), asked, lambda row: 10**6)
    assert together == alone
    assert [len(tokens) for tokens in alone] == wanted
