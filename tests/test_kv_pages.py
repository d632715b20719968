"""Paged keys and values, steps of fixed size and fast kernels compute something else than slots and
torch; pages that are lost, shared or promised twice."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import CPU, DEVICES, GPU
from serving import picture
from tiny_models import TINY_2, TINY_3, hugging_face_tensors, random_model, write_checkpoint

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.api import PromptTooLong
from kestrel.batch import Batch
from kestrel.config import ConfigError
from kestrel.moondream.kv import PAGE, PagedKV
from kestrel.moondream.model import Moondream
from kestrel.moondream.steps import DecodeSteps
from kestrel.ops import fast
from kestrel.ops.attention import attend
from kestrel.ops.sampling import sample

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def ready(config=TINY_3, device: torch.device = CPU) -> Moondream:
    model = random_model(config).to(device)
    model.text.reset_tables()
    model.fuse()
    return model


# Pages


def cache(slots: int, pages: int, positions: int = 10 * PAGE) -> PagedKV:
    return PagedKV(torch.zeros(1, pages + 1, 2, PAGE, 1, 4), slots, positions)


def test_pages_are_lost_or_held_by_two():
    chance = random.Random(3)
    kv = cache(slots=6, pages=17)
    held: dict[int, int] = {}
    for _ in range(2000):
        used = sum(kv.cost(n) for n in held.values())
        slot, positions = chance.randrange(6), chance.randrange(1, 10 * PAGE)
        if slot in held and chance.random() < 0.5:
            kv.free(slot)
            del held[slot]
        elif slot in held and len(held) < 6:
            empty = next(s for s in range(6) if s not in held)
            kv.move(slot, empty, 1)
            held[empty] = held.pop(slot)
        elif slot not in held and kv.cost(positions) <= kv.room - used:
            kv.reserve(slot, positions)
            held[slot] = positions
        pages = [page for own in kv.held for page in own]
        assert len(pages) == len(set(pages)) and 0 not in pages
        for slot, positions in held.items():
            assert len(kv.held[slot]) * PAGE == kv.cost(positions) >= positions
            assert kv.table[slot, : len(kv.held[slot])].tolist() == kv.held[slot]
        free = [s for s in range(6) if s not in held]
        assert not kv.table[free].any()
    kv.clear()
    assert len(kv._free) == 17


def test_a_moved_slot_reads_what_it_did_not_write():
    kv = cache(slots=2, pages=8)
    kv.reserve(1, 40)
    prefix = torch.arange(2.0 * 20 * 4).view(1, 2, 20, 1, 4)
    kv.put(1, prefix)
    kv.move(1, 0, 20)
    assert kv.held[1] == []
    read = kv.reader(slice(1), 20)(0)
    assert torch.equal(read[:, 0].transpose(1, 2), prefix[0])


def test_what_is_written_beyond_a_requests_pages_lands_in_anothers():
    kv = cache(slots=2, pages=4)
    kv.reserve(0, PAGE)
    kv.reserve(1, PAGE)
    before = kv.kv[:, 1:].clone()
    outside = torch.tensor([PAGE, 3 * PAGE, 10 * PAGE - 1])
    kv.writer(torch.tensor([0, 1, 0]), outside)(0, torch.ones(3, 2, 4))
    assert torch.equal(kv.kv[:, 1:], before) and kv.kv[:, 0].any()


# The same numbers


@torch.inference_mode()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [TINY_2, TINY_3], ids=["md2", "md3"])
def test_pages_and_fixed_steps_compute_other_than_slots(config, device):
    model = ready(config, device)
    text, dim = model.cached, config.text.dim
    chance = torch.Generator().manual_seed(4)
    rows, slots = 5, 6
    prefixes = torch.randn(rows, 19, dim, generator=chance).to(device)
    slotted, paged = text.new_cache(slots), text.new_pages(slots)
    steps = DecodeSteps(text, paged, flashinfer=False)
    for row, x in enumerate(prefixes):
        prefix = text.prefix(x)
        paged.reserve(row, 200)
        slotted.put(row, prefix)
        paged.put(row, prefix)
    with pytest.raises(ValueError, match="before any slot"):
        DecodeSteps(text, paged, flashinfer=False)
    # Prompts of unequal length as one padded batch, then tokens.
    counts = [1, 7, 4, 9, 2]
    x = torch.randn(rows, max(counts), dim, generator=chance).to(device)
    starts, which = torch.full((rows,), 19, device=device), torch.arange(rows, device=device)
    outs = [text.extend(x, starts, kv, which, 28) for kv in (slotted, paged)]
    for row, count in enumerate(counts):
        torch.testing.assert_close(outs[1][row, :count], outs[0][row, :count], **CLOSE)
    filled = [19 + count for count in counts]
    for step in range(12):
        count = rows - step // 4
        if count < len(filled):
            paged.free(count)
            filled.pop()
        x = torch.randn(count, dim, generator=chance).to(device)
        places = torch.tensor(filled, device=device)
        expected = text.decode(x, places, slotted, None, max(filled) + 1)
        got = steps(x, filled)
        torch.testing.assert_close(got, expected, **CLOSE)
        filled = [position + 1 for position in filled]


@torch.inference_mode()
@pytest.mark.parametrize("device", DEVICES)
def test_every_expert_on_every_token_computes_other_than_those_chosen(device, monkeypatch):
    mlp = ready(device=device).text.blocks[1].mlp
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(device)
    scores, chosen = mlp.router(x).topk(mlp.per_token, dim=-1)
    weights = scores.softmax(dim=-1)
    every = mlp._every(x, chosen, weights)
    torch.testing.assert_close(every, mlp._visited(x, chosen, weights), **CLOSE)
    torch.testing.assert_close(every, mlp._gathered(x, chosen, weights), **CLOSE)


# FlashInfer


def test_rows_are_given_the_wrong_pages():
    held = [[7, 3, 9], [4], [5, 6]]
    assert fast.page_lists(held, [2 * PAGE + 1, PAGE, 3], 4, PAGE) == (
        [0, 3, 4, 5, 6],
        [7, 3, 9, 4, 5, 0],
        [1, PAGE, 3, 1],
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float32, 64, "needs CUDA"), (torch.bfloat16, 64, "needs CUDA")],
)
def test_flashinfer_is_taken_where_it_cannot_run(dtype, head_dim, reason):
    like, heads = torch.zeros(1, dtype=dtype), (2, 2, head_dim)
    assert fast.wanted("auto", like, heads, PAGE) is False
    assert fast.wanted("torch", like, heads, PAGE) is False
    with pytest.raises(ConfigError, match=reason):
        fast.wanted("flashinfer", like, heads, PAGE)


def flashinfer() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return pytest.importorskip("flashinfer")


@pytest.mark.gpu
@torch.inference_mode()
def test_flashinfer_attends_other_than_torch():
    flashinfer()
    device, heads = torch.device("cuda"), (8, 8, 64)
    kv = torch.randn(40, 2, PAGE, 8, 64, device=device, dtype=torch.bfloat16)
    chance = random.Random(0)
    decode = fast.PagedDecode(4, 10, PAGE, heads, kv)
    for _ in range(3):
        lengths = [chance.randrange(1, 10 * PAGE) for _ in range(3)]
        held = [chance.sample(range(1, 40), 10) for _ in lengths]
        decode.plan(held, lengths)
        q = torch.randn(4, 8, 64, device=device, dtype=torch.bfloat16)
        got = decode(kv, q)
        for row, (pages, length) in enumerate(zip(held, lengths, strict=True)):
            k, v = kv[pages].transpose(0, 1).flatten(1, 2)[:, None, :length].transpose(2, 3)
            expected = attend(q[row][None, :, None], k, v)[0, :, 0]
            torch.testing.assert_close(got[row], expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@torch.inference_mode()
def test_flashinfer_draws_other_tokens_than_torch():
    flashinfer()
    logits = torch.randn(64, 1664, generator=torch.Generator().manual_seed(2)).cuda() * 3
    temperatures = [0.0, 0.5, 1.0, 2.0] * 16
    top_ps = [0.3, 0.9, 1.0, 0.6, 0.3, 0.0, 1e-7, 1e-3] * 8
    draws = [random.Random(n).random() for n in range(64)]
    by_torch = sample(logits, temperatures, top_ps, draws)
    by_flashinfer = sample(logits, temperatures, top_ps, draws, fast.nucleus)
    assert torch.equal(by_torch, by_flashinfer)


@pytest.mark.gpu
@torch.inference_mode()
def test_captured_steps_with_flashinfer_compute_other_than_slots():
    flashinfer()
    from dataclasses import replace

    wide = replace(TINY_2.text, dim=128)
    config = replace(
        TINY_2,
        text=wide,
        vision=replace(TINY_2.vision, proj_out_dim=128),
        region=replace(TINY_2.region, dim=128),
    )
    exact = ready(config, torch.device("cuda"))
    model = random_model(config).to(torch.device("cuda"), torch.bfloat16)
    model.text.reset_tables()
    model.fuse()
    texts = (exact.cached, model.cached)
    caches = [text.new_cache(4) for text in texts]
    paged = model.cached.new_pages(4)
    steps = DecodeSteps(model.cached, paged, flashinfer=True)
    for row in range(4):
        x = torch.randn(5 + row, 128, generator=torch.Generator().manual_seed(row)).cuda()
        for text, kv in zip(texts, caches, strict=True):
            kv.put(row, text.prefix(x.to(text.text.wte.dtype)))
        paged.reserve(row, 100)
        paged.put(row, model.cached.prefix(x.bfloat16()))
    chance = torch.Generator().manual_seed(9)
    for step in range(60):
        rows = 4 - step // 15
        if step in (15, 30, 45):
            paged.free(rows)
        filled = [5 + row + step for row in range(rows)]
        x, at = torch.randn(rows, 128, generator=chance).cuda(), torch.tensor(filled).cuda()
        wanted, torchs = (
            text.decode(x.to(text.text.wte.dtype), at, kv, None, max(filled) + 1).float()
            for text, kv in zip(texts, caches, strict=True)
        )
        got = steps(x.bfloat16(), filled).float()
        error = (got - wanted).norm() / wanted.norm()
        assert error < 2 * (torchs - wanted).norm() / wanted.norm() + 1e-3


# The engine


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A checkpoint that gives a box and then a token without meaning, for ever."""
    model = random_model()
    model.text.lm_head.bias[TINY_3.prompt.coord_id] = 1e4
    model.text.lm_head.bias[10] = 1e4
    return write_checkpoint(tmp_path_factory.mktemp("models") / "t", hugging_face_tensors(model))


def config(endless: Path, **changes: Any) -> RuntimeConfig:
    return RuntimeConfig(
        model={"path": str(endless)},  # type: ignore[arg-type]
        torch_threads=1,
        refiner=None,
        allow_empty_paths=True,
        **{"device": "cpu", **changes},
    )


async def test_a_request_that_cannot_fit_takes_others_with_it(endless):
    each = ready().cached.new_cache(1).position_bytes
    few = config(endless, max_batch_size=4, kv_cache_bytes=each * PAGE * 3)
    async with await InferenceEngine.create(few) as engine:
        assert engine.stats()["kv_room_bytes"] == 3 * PAGE * each
        assert engine.max_context == 3 * PAGE

        async def ask(tokens: int, **more: Any) -> Any:
            return await engine.segment(object="ball", settings={"max_tokens": tokens}, **more)

        long = {"image": picture(30, 30), "spatial_refs": [[0.1, 0.1, 0.9, 0.9]] * 16}
        outcomes = await asyncio.gather(
            ask(20), ask(1, **long), ask(21), ask(48), ask(22), return_exceptions=True
        )
        refused = outcomes.pop(1)
        assert isinstance(refused, PromptTooLong) and refused.status == 422
        assert "runtime.kv_cache_bytes" in refused.message
        # A prompt of six: the longest answer that there is memory for has 42.
        assert [r.metrics.output_tokens for r in outcomes] == [20, 21, 42, 22]
        stats = engine.stats()
        assert (stats["kv_bytes"], stats["kv_reserved_bytes"], stats["running"]) == (0, 0, 0)


async def test_memory_is_promised_twice(endless, monkeypatch):
    each = ready().cached.new_cache(1).position_bytes
    seen: list[tuple[int, int]] = []
    step = Batch.step

    def watched(batch: Batch, chunks: Any = ()) -> Any:
        taken = sum(batch.cache.cost(row.longest) for row in batch.rows)
        seen.append((len(batch.rows), taken))
        return step(batch, chunks)

    monkeypatch.setattr(Batch, "step", watched)
    few = config(endless, max_batch_size=8, kv_cache_bytes=each * PAGE * 9 + 1)
    async with await InferenceEngine.create(few) as engine:
        room = engine._scheduler._batch.cache.room
        seen.clear()
        asked = [
            asyncio.create_task(engine.segment(object="ball", settings={"max_tokens": 44 + n}))
            for n in range(8)
        ]
        results = await asyncio.gather(*asked)
        assert [r.metrics.output_tokens for r in results] == [44 + n for n in range(8)]
        assert max(taken for _, taken in seen) <= room
        assert max(count for count, _ in seen) == 2, "50 positions and more are four pages of nine"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU.marks)])
async def test_paged_answers_differ_from_those_of_slots(endless, device):
    asked = [{"object": "ball", "settings": {"max_tokens": 5 + 9 * n}} for n in range(7)]
    answers = []
    for changes in ({}, {"kv_cache_bytes": 2**30, "device": device, "dtype": "float32"}):
        async with await InferenceEngine.create(config(endless, **changes)) as engine:
            results = await asyncio.gather(*(engine.segment(**a) for a in asked))
            answers.append([r.output["segments"][0] for r in results])
    for slotted, paged in zip(*answers, strict=True):
        # A GPU rounds a power of two in its own way.
        for box in ("bbox", "coarse_bbox"):
            assert paged.pop(box) == pytest.approx(slotted.pop(box), abs=1e-6)
        sizes = [torch.tensor(answer.pop("sizes")) for answer in (paged, slotted)]
        torch.testing.assert_close(*sizes, atol=1e-6, rtol=0)
        assert paged == slotted
