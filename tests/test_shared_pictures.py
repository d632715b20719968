"""Answers that depend on who asked about the picture before, or on what is done with it after."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest
from engines import CONFIG, NANO, comparable
from PIL import Image
from serving import encoded

from kestrel import pictures
from kestrel.config import RefinerConfig, RuntimeConfig
from kestrel.engine import InferenceEngine
from kestrel.seg_refiner.boundary import BoundaryRefiner
from kestrel.seg_refiner.guided import GuidedRefiner

pytest_plugins = ["engines"]

ENTRY = next(e for e in json.loads((NANO / "samples" / "samples.json").read_text()))


def array(file: str) -> np.ndarray:
    with Image.open(NANO / "samples" / file) as image:
        return np.array(image.convert("RGB").resize((300, 300)))


@pytest.fixture
def asked() -> dict[str, object]:
    return {"object": ENTRY["noun"], "return_base64": True}


async def test_an_array_written_into_after_its_request_spoils_others_about_the_same(
    asked, monkeypatch
):
    right, other = array(ENTRY["file"]), np.zeros((300, 300, 3), np.uint8)
    runtime = RuntimeConfig(**CONFIG)
    async with await InferenceEngine.create(runtime) as engine:
        expected = comparable(await engine.segment(image=right.copy(), **asked))
    assert expected["svg_path"]
    mine, named = right.copy(), pictures.digest

    def named_and_overwritten(image: np.ndarray) -> bytes:
        key = named(image)
        mine[:] = other
        return key

    async with await InferenceEngine.create(runtime) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(pictures, "digest", named_and_overwritten)
            await engine.segment(image=mine, **asked)
        assert not mine.any()
        assert comparable(await engine.segment(image=right.copy(), **asked)) == expected


async def test_a_picture_that_memory_did_not_hold_fails_again_when_there_is_enough(
    asked, monkeypatch
):
    image = encoded(Image.fromarray(array(ENTRY["file"])))
    async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(pictures, "decode_image", lambda *_, **__: np.empty(2**60, np.uint8))
            with pytest.raises(MemoryError) as failed:
                await engine.segment(image=image, **asked)
        # Whoever keeps the error keeps what failed.
        assert (await engine.segment(image=image, **asked)).output["segments"][0]["svg_path"]
        assert failed.value is not None


async def test_a_request_is_refined_on_the_array_of_another_one(asked, switch):
    right, second_turn = array(ENTRY["file"]), threading.Event()
    # Nothing is remembered of a picture that nobody asks about.
    runtime = RuntimeConfig(**CONFIG, refiner=RefinerConfig(refiner="switch"), image_cache_bytes=0)
    async with await InferenceEngine.create(runtime) as engine:
        expected = comparable(await engine.segment(image=right.copy(), **asked))
        turns = iter([True])

        def in_turn(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
            assert next(turns, False) or second_turn.wait(60)
            return switch.guided(image, mask)

        switch.behave = in_turn
        arrays = [right.copy(), right.copy()]
        tasks = {asyncio.create_task(engine.segment(image=a, **asked)): a for a in arrays}
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            tasks[task][:] = 0
        second_turn.set()
        assert [comparable(await task) for task in (*done, *rest)] == [expected] * 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
async def test_a_long_picture_is_answered_otherwise_when_it_is_known(kind, asked):
    with Image.open(NANO / "samples" / "key.jpg") as image:
        picture = encoded(image.convert("RGB").resize((880, 4000)), kind)
    asked = {**asked, "object": "key", "image": picture}
    async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
        answers = [comparable(await engine.segment(**asked)) for _ in range(2)]
    assert answers[0]["svg_path"] and answers[0] == answers[1]


@pytest.mark.parametrize("backend", [BoundaryRefiner, GuidedRefiner])
def test_a_picture_that_is_held_is_one_that_would_be_decoded_smaller(backend):
    refiner, side = backend(RefinerConfig()), pictures.KEEP_SIDE
    for box in ((side, side), (side, side * 7 // 10), (side, 700), (700, side)):
        for picture in ((side, side), box):
            assert refiner.reduction(box, picture) == 1
    assert BoundaryRefiner(RefinerConfig()).reduction((side + 1, 900), (side + 1, 2000)) == 2
