"""Decode steps that are compiled compute something else than torch's operators, or a machine that
cannot compile them does not serve."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINY_2, TINY_3, random_model

from kestrel.batch import Batch
from kestrel.config import SHIPPED_MODELS
from kestrel.moondream import cached, stacked
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.model import Moondream, load
from kestrel.ops import rows

NANO = SHIPPED_MODELS / "nano"
CPU = torch.device("cpu")


def grouped(config: MoondreamConfig) -> MoondreamConfig:
    """Half as many heads of keys and values."""
    text = dataclasses.replace(config.text, n_kv_heads=config.text.n_heads // 2)
    return dataclasses.replace(config, text=text)


def wide(config: MoondreamConfig) -> MoondreamConfig:
    """Heads that vectors take, and some dimensions besides."""
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, dim=96),
        vision=dataclasses.replace(config.vision, proj_out_dim=96),
        region=dataclasses.replace(config.region, dim=96),
    )


CONFIGS = {"md2": TINY_2, "md3": TINY_3, "grouped": grouped(TINY_2), "wide": wide(TINY_2)}


def answers(model: Moondream, *, scale: float = 1.0) -> torch.Tensor:
    """Hidden states of three slots, not in order, each of another length, over some steps."""
    text, chance = model.cached, torch.Generator().manual_seed(5)
    dim = model.config.text.dim
    cache, lengths = model.new_cache(4), [3, 21, 40]
    slots = torch.tensor([3, 0, 2])
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        cache.put(slot, text.prefix(scale * torch.randn(length, dim, generator=chance)))
    out = []
    for step in range(6):
        x = scale * torch.randn(3, dim, generator=chance)
        at = torch.tensor(lengths) + step
        out.append(text.decode(x, at, cache, slots, int(at.max()) + 1))
    return torch.stack(out)


def compiles(model: Moondream) -> bool:
    return model.cached.compiles(model.new_cache(4), 3, 46)


def both(monkeypatch: pytest.MonkeyPatch, config: MoondreamConfig) -> list[Moondream]:
    """The same model with compiled steps and without."""
    models = [random_model(config), random_model(config)]
    models[0].fuse()
    with monkeypatch.context() as patched:
        patched.setattr(cached, "compiled", lambda build: None)
        models[1].fuse()
    assert compiles(models[0]) and not compiles(models[1])
    return models


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_compiled_steps_give_other_numbers(monkeypatch, name):
    compiled, plain = (answers(model) for model in both(monkeypatch, CONFIGS[name]))
    scale = float(plain.std())
    assert scale > 0.1
    torch.testing.assert_close(compiled, plain, atol=1e-5 * max(1.0, scale), rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_compiled_prefix_holds_other_numbers(monkeypatch, name):
    compiled, plain = (model.cached for model in both(monkeypatch, CONFIGS[name]))
    assert compiled._prefix_rows is not None and plain._prefix_rows is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = torch.randn(37, compiled.config.dim, generator=torch.Generator().manual_seed(6))
    expected = plain.prefix(x)
    scale = float(expected.std())
    torch.testing.assert_close(compiled.prefix(x), expected, atol=1e-5 * max(1, scale), rtol=1e-5)


@torch.inference_mode()
def test_images_in_bfloat16_are_far_from_those_in_float32():
    plain = load(NANO, CPU, torch.float32)
    half = load(NANO, CPU, torch.float32, half_images=True, half_kv=True)
    assert half.vision.pos_emb.dtype == torch.bfloat16 and half.dtype == torch.float32
    side = plain.config.vision.crop_size
    crops = np.random.default_rng(2).integers(0, 256, (1, side, side, 3), np.uint8)
    batches = [Batch(model, 1) for model in (plain, half)]
    found = [batch.prefix(batch.features(crops), (1, 1)) for batch in batches]
    for batch in batches:
        batch.close()
    assert [prefix.dtype for prefix in found] == [torch.float32, torch.bfloat16]
    assert 0 < float((found[1].float() - found[0]).std() / found[0].std()) < 0.02


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_cache_in_bfloat16_holds_other_numbers(monkeypatch, name):
    config = CONFIGS[name]
    plain, half, in_parts = (random_model(config) for _ in range(3))
    plain.fuse()
    half.fuse(half_images=True, half_kv=True)
    monkeypatch.setattr(stacked, "SMALL", 0)
    in_parts.fuse(half_images=True, half_kv=True)
    assert (half.cached.stacked is None) == (plain.cached.stacked is None)
    assert in_parts.cached.stacked is None and compiles(in_parts)
    caches = [model.new_cache(4) for model in (plain, half, in_parts)]
    assert [cache.kv.dtype for cache in caches] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert caches[1].position_bytes * 2 == caches[0].position_bytes
    chance = torch.Generator().manual_seed(7)
    dim, lengths, slots = config.text.dim, [3, 21, 40], torch.tensor([3, 0, 2])
    kept = [0.5 * torch.randn(caches[0].kv[:, :, 0, :n].shape, generator=chance) for n in lengths]
    for cache in caches:
        for slot, prefix in zip(slots.tolist(), kept, strict=True):
            cache.put(slot, prefix)
    for step in range(4):
        x = torch.randn(3, dim, generator=chance)
        at = torch.tensor(lengths) + step
        hidden = [
            model.cached.decode(x, at, cache, slots, int(at.max()) + 1)
            for model, cache in zip((plain, half, in_parts), caches, strict=True)
        ]
        scale = float(hidden[0].std())
        assert 0 < float((hidden[1] - hidden[0]).std()) < 0.02 * scale
        torch.testing.assert_close(hidden[1], hidden[2], atol=1e-2 * scale, rtol=1e-2)
        # What is stored is what torch would round to.
        for slot, position in zip(slots.tolist(), at.tolist(), strict=True):
            first = [cache.kv[0, :, slot, position] for cache in caches]
            torch.testing.assert_close(first[1], first[0].bfloat16(), atol=0, rtol=2**-7)


def test_rounding_to_bfloat16_differs_from_torchs():
    numba = pytest.importorskip("numba")
    from kestrel.ops.lanes import load_one, store_one

    @numba.njit
    def through(numbers, bits, back):
        for i in range(len(numbers)):
            store_one(bits, i, numbers[i])
            back[i] = load_one(bits, i)

    chance = np.random.default_rng(1)
    numbers = chance.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    ties = (np.arange(1000, dtype=np.uint32) * 2**16 + 2**15).view(np.float32)
    numbers = np.concatenate([numbers, ties, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3e38])])
    bits, back = np.empty(len(numbers), np.uint16), np.empty(len(numbers), np.float32)
    through(numbers, bits, back)
    expected = torch.from_numpy(numbers).bfloat16()
    torch.testing.assert_close(
        torch.from_numpy(back), expected.float(), atol=0, rtol=0, equal_nan=True
    )


def test_vectors_hold_other_bits_than_single_numbers():
    numba = pytest.importorskip("numba")
    from kestrel.ops.compiled import _copy, _exp, _gelu, _gelus, _softmax
    from kestrel.ops.lanes import store_one

    @numba.njit(error_model="numpy")
    def by_vectors(numbers, halves, gelus, shares):
        _copy(numbers, halves, len(numbers))
        _gelus(numbers, 0, gelus, 0, len(numbers))
        shares[:] = numbers
        _softmax(shares)

    @numba.njit(error_model="numpy")
    def one_by_one(numbers, halves, gelus, shares):
        top = numbers.max()
        for i in range(len(numbers)):
            store_one(halves, i, numbers[i])
            gelus[i] = _gelu(numbers[i])
            shares[i] = _exp(numbers[i] - top)

    spread = np.random.default_rng(3).normal(0, 30, 4001).astype(np.float32)
    # No whole number of vectors, halfway between two of bfloat16, and numbers out of range.
    odd = np.float32([0, -0.0, 1.00390625, 1.01171875, 87, 88, 89, 1e30, -87, -88, -1e30])
    numbers = np.concatenate([spread, odd])
    found, expected = (
        [np.zeros(len(numbers), kind) for kind in (np.uint16, np.float32, np.float32)]
        for _ in range(2)
    )
    by_vectors(numbers, *found)
    one_by_one(numbers, *expected)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2] / expected[2].sum(), rtol=1e-5)
    nothing = np.full(33, np.nan, np.float32)
    by_vectors(nothing, found[0][:33], found[1][:33], found[2][:33])
    assert (found[0][:33] == 0x7FC0).all() and np.isnan(found[1][:33]).all()


@pytest.mark.parametrize("exact", [True, False], ids=["bfloat16", "float32"])
@torch.inference_mode()
def test_a_small_model_steps_otherwise_in_one_call(monkeypatch, exact):
    models = [random_model(TINY_2), random_model(TINY_2)]
    for model in models if exact else []:
        for weights in model.parameters():
            weights.copy_(weights.bfloat16())
    models[0].fuse()
    monkeypatch.setattr(stacked, "SMALL", 0)
    models[1].fuse()
    assert [model.cached.stacked is None for model in models] == [False, True]
    hidden = [answers(model) for model in models]
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)
    logits = [model.logits(hidden[0].flatten(0, 1)) for model in models]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_row_depends_on_those_beside_it():
    text = load(NANO, CPU, torch.float32).cached
    assert text.stacked is not None
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(11, text.config.dim, generator=chance).numpy()
    kv = torch.randn(text.new_cache(11).kv.shape, generator=chance)
    at, slots = torch.arange(150, 161).numpy(), torch.arange(11).numpy()
    alone = [text.stacked(x[[n]], at[[n]], kv.clone(), slots[[n]]) for n in range(11)]
    for count in range(2, 12):
        together = text.stacked(x[:count].copy(), at[:count], kv.clone(), slots[:count])
        logits = text.stacked.logits(together)
        for n in range(count):
            assert (together[n] == alone[n][0]).all()
            assert (logits[n] == text.stacked.logits(alone[n])[0]).all()


KEPT = """
import hashlib
import numpy as np
import torch
from kestrel.config import SHIPPED_MODELS
from kestrel.moondream.model import load
with torch.inference_mode():
    text = load(SHIPPED_MODELS / "nano", torch.device("cpu"), torch.float32).cached
    chance = torch.Generator().manual_seed(8)
    cache = text.new_cache(3)
    kept = [text.prefix(torch.randn(50 + n, text.config.dim, generator=chance)) for n in range(3)]
    for n, prefix in enumerate(kept):
        cache.put(n, prefix)
    at = torch.tensor([50, 51, 52])
    x = torch.randn(3, text.config.dim, generator=chance)
    hidden = text.decode(x, at, cache, torch.arange(3), 53)
    given = text.stacked.run_on(
        np.array([30, 40, 900]), at.numpy(), cache.kv, np.arange(3), 5,
        barred=np.array([5, 6]), last=-1,
    )
    parts = [*kept, hidden, text.logits(hidden), torch.from_numpy(given), cache.kv]
    print([hashlib.sha256(part.numpy().tobytes()).hexdigest()[:8] for part in parts])
"""


def test_the_process_that_compiles_computes_otherwise_than_those_that_load(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    told = [
        subprocess.run(
            [sys.executable, "-c", KEPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))
    assert told[0] == told[1]


@torch.inference_mode()
def test_large_numbers_overflow_when_compiled(monkeypatch):
    compiled, plain = (answers(model, scale=1e4) for model in both(monkeypatch, TINY_3))
    assert compiled.isfinite().all()
    torch.testing.assert_close(compiled, plain, atol=1e-1, rtol=1e-5)


@torch.inference_mode()
def test_the_shipped_model_steps_otherwise_when_compiled(monkeypatch):
    compiled = load(NANO, CPU, torch.float32)
    monkeypatch.setattr(cached, "compiled", lambda build: None)
    plain = load(NANO, CPU, torch.float32)
    assert not compiles(plain)
    torch.testing.assert_close(answers(compiled), answers(plain), atol=1e-4, rtol=1e-4)


def test_several_threads_wait_for_one(monkeypatch):
    monkeypatch.setattr(stacked, "SMALL", 0)
    text = load(NANO, CPU, torch.float32).cached
    slots, pages = text.new_cache(16), text.new_pages(16)
    for threads, large in ((1, True), (2, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert text.compiles(slots, 16, 130)
        assert text.compiles(slots, 16, 500) is large
        assert not text.compiles(pages, 1, 100)


def test_other_types_are_read_as_float32():
    assert not compiles(load(NANO, CPU, torch.bfloat16))


def test_a_machine_without_numba_does_not_serve(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "kestrel.ops.compiled", raising=False)
    rows._warn.cache_clear()
    model = load(NANO, CPU, torch.float32)
    with torch.inference_mode():
        assert answers(model).isfinite().all()
    assert "pip install numba" in caplog.text


def test_a_machine_that_keeps_no_compiled_code_does_not_serve():
    """A package that cannot be written to, run by somebody without a home."""
    code = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"  # no place will do
        "from kestrel.ops.rows import compiled\n"
        "assert compiled(lambda made: made.head('float32')) is not None\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
