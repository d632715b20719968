"""On a GPU: answers that differ from the CPU's, captured steps from others, memory that stays."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES, GPU
from engines import NANO, SAMPLES, comparable, segment, until
from tiny_models import TINY_3, hugging_face_tensors, random_model, write_checkpoint

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.api import DeadlineExceeded, Overloaded
from kestrel.batch import Batch
from kestrel.config import RefinerConfig
from kestrel.engine import EngineError
from kestrel.moondream.model import load
from kestrel.moondream.steps import DecodeSteps

on_gpu = pytest.mark.parametrize("device", [GPU])
every = pytest.mark.parametrize("device", DEVICES)
PICTURES = SAMPLES[::3]


def config(device: torch.device, **changes: Any) -> RuntimeConfig:
    chosen = {"device": device.type, "dtype": "float32", "refiner": None, "torch_threads": 1}
    return RuntimeConfig(**{**chosen, "max_batch_size": 8, **changes})


async def answers(runtime: RuntimeConfig, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of one request after the other."""
    async with await InferenceEngine.create(runtime) as engine:
        return [comparable(await engine.segment(**one)) for one in asked]


# Numbers


@on_gpu
async def test_the_shipped_model_answers_otherwise_than_on_a_cpu(device):
    asked = [*PICTURES, {"object": "cat"}, {**PICTURES[0], "spatial_refs": [[0.1, 0.2, 0.9, 0.8]]}]
    expected = await answers(config(torch.device("cpu")), asked)
    found = await answers(config(device), asked)
    for here, there in zip(found, expected, strict=True):
        assert here["token_ids"] == there["token_ids"], here["object"]
        # 2 to a power and products with it: each device rounds them in its own way.
        assert here["bbox"] == pytest.approx(there["bbox"], abs=1e-6)
        assert here["tokens"] == there["tokens"]


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_the_bits_find_another_object(device, dtype):
    expected = await answers(config(torch.device("cpu")), PICTURES)
    found = await answers(config(device, dtype=dtype), PICTURES)
    for here, there in zip(found, expected, strict=True):
        assert (here["bbox"] is None) == (there["bbox"] is None)
        if there["bbox"] is not None:
            off = [abs(here["bbox"][edge] - there["bbox"][edge]) for edge in there["bbox"]]
            assert max(off) < 0.05, here["object"]
            assert here["svg_path"] and "parse_error" not in here


@every
@pytest.mark.parametrize("slots", [1, 3, 5, 8])
@torch.inference_mode()
def test_a_captured_step_computes_other_than_one_that_is_called(device, slots):
    model = load(NANO, device, torch.float32)
    text, dim = model.cached, model.config.text.dim
    paged, called = text.new_pages(slots), text.new_pages(slots)
    steps = DecodeSteps(text, paged, flashinfer=False)
    chance = torch.Generator().manual_seed(slots)
    for row in range(slots):
        prefix = text.prefix(torch.randn(3 + row, dim, generator=chance).to(device))
        for kv in (paged, called):
            kv.reserve(row, 300)
            kv.put(row, prefix)
    filled = [3 + row for row in range(slots)]
    for rows in range(slots, 0, -1):
        if rows < slots:
            filled.pop()
            for kv in (paged, called):
                kv.free(rows)
        for _ in range(3):
            x, at = torch.randn(rows, dim, generator=chance), torch.tensor(filled, device=device)
            x = x.to(device)
            expected = text.decode(x, at, called, None, max(filled) + 1)
            got = steps(x, filled).clone()
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            # The same again: a replay leaves nothing behind that the next one reads.
            assert torch.equal(steps(x, filled), got)
            filled = [position + 1 for position in filled]


# Requests that come and go


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts that gives a box and then a token without meaning, for ever."""
    model = random_model()
    model.text.lm_head.bias[TINY_3.prompt.coord_id] = 1e4
    model.text.lm_head.bias[10] = 1e4
    return write_checkpoint(tmp_path_factory.mktemp("models") / "t", hugging_face_tensors(model))


@every
async def test_requests_that_join_and_leave_sway_the_others(device, endless):
    runtime = config(device, model_path=str(endless), allow_empty_paths=True, max_batch_size=6)
    asked = [{"object": f"ball {n}", "settings": {"max_tokens": 6 + 11 * n}} for n in range(12)]
    alone = await answers(runtime, asked)
    async with await InferenceEngine.create(runtime) as engine:
        tasks = []
        for one in asked:
            tasks.append(asyncio.create_task(engine.segment(**one)))
            await asyncio.sleep(0.004)
        leaving = [
            asyncio.create_task(engine.segment(object="cat", settings={"max_tokens": 200}))
            for _ in range(5)
        ]
        await asyncio.sleep(0.02)
        for task in leaving[::2]:
            task.cancel()
        with pytest.raises((DeadlineExceeded, Overloaded)):
            await engine.segment(object="dog", timeout_s=0.001)
        assert [comparable(await task) for task in tasks] == alone
        await asyncio.wait(leaving)
        await until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
        stats = engine.stats()
        assert (stats["kv_bytes"], stats["kv_reserved_bytes"]) == (0, 0)


@every
async def test_a_failed_step_takes_more_than_its_requests(device, endless, monkeypatch):
    runtime = config(device, model_path=str(endless), allow_empty_paths=True)
    ask = {"object": "ball", "settings": {"max_tokens": 30}}
    step, failing = Batch.step, []

    def faulty(batch: Batch, chunks: Any = ()) -> Any:
        sampled = step(batch, chunks)
        if failing and batch.rows and batch.rows[0].position > 12:
            failing.clear()
            raise RuntimeError("CUDA out of memory")
        return sampled

    monkeypatch.setattr(Batch, "step", faulty)
    async with await InferenceEngine.create(runtime) as engine:
        expected = comparable(await engine.segment(**ask))
        failing.append(True)
        outcomes = await asyncio.gather(
            *(engine.segment(**ask) for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(outcome, EngineError) for outcome in outcomes)
        again = await asyncio.gather(*(engine.segment(**ask) for _ in range(8)))
        assert [comparable(result) for result in again] == [expected] * 8


@every
async def test_a_picture_is_encoded_for_every_noun(device):
    async with await InferenceEngine.create(config(device)) as engine:
        ask = PICTURES[0]
        first = comparable(await engine.segment(**ask))
        images = engine.stats()["images"]
        nouns = ["cat", "key", ask["object"]]
        results = await asyncio.gather(*(engine.segment(**{**ask, "object": n}) for n in nouns))
        assert engine.stats()["images"] == images
        assert comparable(results[-1]) == first


# Memory


def held() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@on_gpu
async def test_an_engine_that_is_shut_down_keeps_memory(device):
    runtime = config(device, max_batch_size=4)
    levels = []
    for _ in range(3):
        engine = await InferenceEngine.create(runtime)
        await asyncio.gather(*(engine.segment(**one) for one in PICTURES[:4]))
        await engine.shutdown()
        del engine
        levels.append(held())
    # What libraries keep for themselves is there after the first.
    assert levels[2] <= levels[1] + 2**20, levels


@on_gpu
async def test_an_engine_at_work_takes_ever_more_memory(device):
    async with await InferenceEngine.create(config(device, image_cache_bytes=0)) as engine:

        async def rounds(count: int) -> int:
            for _ in range(count):
                await asyncio.gather(*(engine.segment(**one) for one in PICTURES))
            return held()

        levels = [await rounds(2), await rounds(2), await rounds(4)]
        assert levels[2] <= levels[0] + 2**20, levels


@on_gpu
def test_a_load_takes_more_memory_than_the_model(device, tmp_path):
    sizes = replace(TINY_3.text, dim=512, ff_dim=4096, n_heads=8, n_kv_heads=8, moe=None)
    config = replace(
        TINY_3,
        text=replace(sizes, n_layers=12),
        vision=replace(TINY_3.vision, proj_out_dim=512),
        region=replace(TINY_3.region, dim=512),
    )
    folder = write_checkpoint(tmp_path / "t", hugging_face_tensors(random_model(config)), config)
    before = held()
    torch.cuda.reset_peak_memory_stats()
    model = load(folder, device, torch.bfloat16)
    peak, size = torch.cuda.max_memory_allocated() - before, held() - before
    assert all(p.is_cuda and p.dtype == torch.bfloat16 for p in model.parameters())
    assert peak < 1.25 * size, (peak, size)


# Refiners


@on_gpu
async def test_a_refiner_on_the_gpu_disturbs_the_model(device, tmp_path):
    """The neural refiner runs on a thread of its own, on the same GPU, while steps are replayed."""
    from test_refiner_seghead import FIXTURES, tiny_head

    head = tiny_head(tmp_path / "head.safetensors")
    tokenizer = NANO / "tokenizer.json"
    vision = tmp_path / "md2"
    vision.mkdir()
    for file in [*(FIXTURES / "md2").iterdir(), tokenizer]:
        (vision / file.name).symlink_to(file)
    refiner = RefinerConfig(
        refiner="seghead",
        device="cuda",
        seghead_weights=str(head),
        seghead_vision=str(vision),
        min_agreement=0.0,
    )
    async with await InferenceEngine.create(config(device, refiner=refiner)) as engine:
        alone = [segment(await engine.segment(**one)) for one in PICTURES]
        together = await asyncio.gather(*(engine.segment(**one) for one in PICTURES * 2))
        tokens = [one["token_ids"] for one in alone] * 2
        assert [segment(result)["token_ids"] for result in together] == tokens
