"""Several steps in one call answer otherwise than one at a time, or run past an answer's end."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from engines import CONFIG, MODEL, SAMPLES, TOKENIZER, comparable

from kestrel import batch as batches
from kestrel.api import SegmentRequest
from kestrel.batch import Batch
from kestrel.config import SHIPPED_MODELS, RuntimeConfig
from kestrel.engine import InferenceEngine
from kestrel.moondream.model import load
from kestrel.moondream.stacked import StackedLayers
from kestrel.skills.segment import build_prompt

NANO = SHIPPED_MODELS / "nano"


@torch.inference_mode()
def test_steps_of_one_call_give_other_numbers_than_those_of_several():
    text = load(NANO, torch.device("cpu"), torch.float32).cached
    stacked = text.stacked
    assert stacked is not None
    chance = torch.Generator().manual_seed(4)
    kv = 0.5 * torch.randn(text.new_cache(7).kv.shape, generator=chance)
    at, slots, fed = np.arange(150, 155), np.array([4, 0, 6, 1, 3]), np.array([30, 40, 900, 77, 21])
    one_by_one, at_once = kv.clone(), kv.clone()
    expected, tokens = [], fed
    for step in range(6):
        hidden = stacked(stacked.embed(tokens), at + step, one_by_one, slots)
        logits = stacked.logits(hidden)
        logits[:, [5, 6]] = -np.inf
        tokens = logits.argmax(-1)
        expected.append(tokens)
    barred = np.array([5, 6])
    given = stacked.run_on(fed, at, at_once, slots, 6, barred=barred, last=-1)
    assert (given == np.array(expected)).all()
    assert torch.equal(one_by_one, at_once)
    # Whatever is likeliest may be barred, or the last one.
    first = int(given[0, 2])
    others = stacked.run_on(fed, at, kv.clone(), slots, 6, barred=np.array([first]), last=-1)
    assert first not in others and len(others) == 6
    ended = stacked.run_on(fed, at, kv.clone(), slots, 6, barred=barred, last=int(given[3, 1]))
    stop = 1 + next(n for n, row in enumerate(given) if int(given[3, 1]) in row)
    assert (ended == given[:stop]).all()


class Calls:
    """Steps of every call, as they are counted by what they give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.rows: list[int] = []
        run_on = StackedLayers.run_on

        def counted(*args, **options):
            given = run_on(*args, **options)
            self.steps.append(len(given))
            self.rows.append(given.shape[1])
            return given

        monkeypatch.setattr(StackedLayers, "run_on", counted)


async def answers(asked, **config) -> list:
    async with await InferenceEngine.create(RuntimeConfig(**CONFIG, **config)) as engine:
        alone = [comparable(await engine.segment(**arguments)) for arguments in asked]
        together = await asyncio.gather(*[engine.segment(**arguments) for arguments in asked])
        stats = engine.stats()
        told = [result.metrics.output_tokens for result in together]
        return [alone, [comparable(result) for result in together], told, stats["tokens"]]


@pytest.mark.parametrize("cores", [1, 2])
async def test_several_steps_at_once_answer_otherwise(monkeypatch, cores):
    monkeypatch.setattr("kestrel.pictures.usable_cores", lambda: cores)
    asked = [
        {**arguments, "settings": {"max_tokens": 5 + 3 * n}} if n % 3 == 0 else arguments
        for n, arguments in enumerate(SAMPLES[:12])
    ]
    calls = Calls(monkeypatch)
    found = await answers(asked)
    assert max(calls.steps) == batches.AHEAD and max(calls.rows) > 1
    with monkeypatch.context() as patched:
        patched.setattr(batches, "AHEAD", 1)
        taken = len(calls.steps)
        expected = await answers(asked)
        assert len(calls.steps) == taken
    assert found[:3] == expected[:3]
    assert found[0] == found[1]


async def test_answers_that_the_context_ends_run_over_its_end_into_their_neighbours(monkeypatch):
    prompts = [build_prompt(SegmentRequest(**asked), MODEL, TOKENIZER) for asked in SAMPLES[:6]]
    # Of no length that whole calls would come to.
    context = max(prompt.length for prompt in prompts) + 3 * batches.AHEAD + 1
    short = {"max_context": context, "allow_empty_paths": True}  # too short for whole answers
    calls = Calls(monkeypatch)
    found = await answers(SAMPLES[:6], **short)
    assert max(calls.steps) == batches.AHEAD
    monkeypatch.setattr(batches, "AHEAD", 1)
    assert (await answers(SAMPLES[:6], **short))[:3] == found[:3]
    assert found[0] == found[1] and found[2] == [context - p.length for p in prompts]


async def test_a_draw_or_a_neighbours_box_lets_a_path_run_on(monkeypatch):
    phases: list[bool] = []
    step = Batch.step

    def watched(batch: Batch, chunks=()):
        before = [row for row in batch.rows if row.token is not None]
        plain = not chunks and all(
            batch._takes_likeliest_text(row) and isinstance(row.token, int) for row in before
        )
        sampled = step(batch, chunks)
        if not plain:
            assert all(len(row.given) == 1 for row in sampled)
        phases.append(plain)
        return sampled

    monkeypatch.setattr(Batch, "step", watched)
    warm = {"temperature": 0.5, "top_p": 0.9}
    asked = [
        {**arguments, "settings": warm if n % 4 == 0 else None}
        for n, arguments in enumerate(SAMPLES[:8])
    ]
    async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
        await asyncio.gather(*[engine.segment(**arguments) for arguments in asked])
        await engine.segment(**SAMPLES[1])
    assert set(phases) == {True, False}


async def test_a_stream_that_runs_on_loses_or_repeats_a_piece():
    async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
        whole = await engine.segment(**SAMPLES[0])
        stream = await engine.segment(**SAMPLES[0], stream=True)
        updates = [update async for update in stream]
        result = await stream.result()
    assert comparable(result) == comparable(whole)
    pieces = [update.chunk for update in updates if getattr(update, "chunk", None)]
    assert len(pieces) > 10
    assert "".join(pieces) == whole.output["segments"][0]["coarse_path"]
