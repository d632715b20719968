"""Images are encoded, or keys and values kept, in another number format than the configuration and
the processor call for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.config import SHIPPED_MODELS, ConfigError
from kestrel.moondream.checkpoint import local_checkpoint
from kestrel.ops import device as devices
from kestrel.ops.device import SMALL_MODEL, resolve_image_dtype, resolve_kv_dtype

NANO = SHIPPED_MODELS / "nano"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, WHOLE = torch.bfloat16, torch.float32
FEW, MANY = SMALL_MODEL - 1, SMALL_MODEL


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "stored", "parameters", "units", "given"),
    [
        ("auto", CPU, WHOLE, {HALF}, FEW, True, HALF),
        ("auto", CPU, WHOLE, {HALF}, FEW, False, WHOLE),
        ("auto", CPU, WHOLE, {HALF}, MANY, True, WHOLE),
        ("auto", CPU, WHOLE, {WHOLE}, FEW, True, WHOLE),
        ("auto", CPU, WHOLE, {HALF, WHOLE}, FEW, True, WHOLE),
        ("auto", CPU, WHOLE, {HALF, torch.float8_e4m3fn}, FEW, True, WHOLE),
        ("auto", CPU, WHOLE, {HALF, None}, FEW, True, WHOLE),
        ("auto", CUDA, WHOLE, {HALF}, FEW, True, WHOLE),
        ("auto", CPU, torch.float16, {HALF}, FEW, True, torch.float16),
        ("bfloat16", CPU, WHOLE, {WHOLE}, MANY, False, HALF),
        ("bfloat16", CUDA, WHOLE, {HALF}, FEW, True, WHOLE),
        ("bfloat16", CPU, torch.float16, {HALF}, FEW, True, torch.float16),
        (None, CPU, WHOLE, {HALF}, FEW, True, WHOLE),
        (None, CUDA, HALF, {HALF}, FEW, True, HALF),
    ],
)
def test_another_type_than_asked(
    monkeypatch, asked, device, dtype, stored, parameters, units, given
):
    monkeypatch.setattr(devices, "has_bfloat16_products", lambda: units)
    assert resolve_image_dtype(asked, device, dtype, stored, parameters) == given


@pytest.mark.parametrize(
    ("asked", "images", "device", "dtype", "stored", "parameters", "given"),
    [
        ("auto", WHOLE, CPU, WHOLE, {HALF}, FEW, HALF),
        ("auto", HALF, CPU, WHOLE, {WHOLE}, MANY, HALF),
        ("auto", WHOLE, CPU, WHOLE, {HALF}, MANY, WHOLE),
        ("auto", WHOLE, CPU, WHOLE, {HALF, WHOLE}, FEW, WHOLE),
        ("auto", WHOLE, CUDA, WHOLE, {HALF}, FEW, WHOLE),
        ("auto", HALF, CUDA, HALF, {HALF}, FEW, HALF),
        ("bfloat16", WHOLE, CPU, WHOLE, {WHOLE}, MANY, HALF),
        ("bfloat16", WHOLE, CUDA, WHOLE, {HALF}, FEW, WHOLE),
        ("bfloat16", torch.float16, CPU, torch.float16, {HALF}, FEW, torch.float16),
        (None, HALF, CPU, WHOLE, {HALF}, FEW, WHOLE),
    ],
)
def test_keys_and_values_are_of_another_type_than_asked(
    asked, images, device, dtype, stored, parameters, given
):
    assert resolve_kv_dtype(asked, images, device, dtype, stored, parameters) == given


@pytest.mark.parametrize(("asked", "nbytes"), [("auto", 2), ("bfloat16", 2), (None, 4)])
@pytest.mark.parametrize("images", ["bfloat16", None])
async def test_an_engine_keeps_keys_and_values_of_another_type(images, asked, nbytes):
    runtime = RuntimeConfig(device="cpu", refiner=None, image_dtype=images, kv_dtype=asked)
    async with await InferenceEngine.create(runtime) as engine:
        cache = engine._scheduler._batch.cache
        text = engine._scheduler._batch.model.config.text
        numbers = 2 * text.n_layers * text.n_kv_heads * text.head_dim
        assert cache.position_bytes == numbers * nbytes


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="nothing else tells the flags")
def test_another_processor_is_seen_than_there_is():
    told = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(told.group(1).split()) if told else set()
    assert devices.has_bfloat16_products() == bool(flags & {"amx_bf16", "avx512_bf16"})


@pytest.mark.parametrize(
    ("missing", "amx", "vectors", "given"),
    [
        ((), False, False, False),
        ((), True, False, True),
        ((), False, True, True),
        (("_is_avx512_bf16_supported",), True, False, True),
        (("_is_amx_tile_supported",), False, True, True),
        (("_is_amx_tile_supported", "_is_avx512_bf16_supported"), True, True, False),
    ],
)
def test_a_torch_tells_otherwise_of_the_processor(monkeypatch, missing, amx, vectors, given):
    told = {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": vectors}
    for name, answer in told.items():
        if name in missing:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert devices.has_bfloat16_products() == given


def test_a_checkpoint_tells_other_types_and_sizes_than_it_has(tmp_path):
    kinds, count = local_checkpoint(NANO).stored()
    weights = load_file(NANO / "model.safetensors")
    assert kinds == {HALF}
    assert count == sum(tensor.numel() for tensor in weights.values()) < SMALL_MODEL
    first = next(iter(weights))
    weights[first] = weights[first].float()
    save_file(weights, str(tmp_path / "model.safetensors"))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    assert local_checkpoint(tmp_path).stored() == ({HALF, WHOLE}, count)


async def paths(image_dtype: str | None) -> list[str | None]:
    """What the shipped model says of six of its samples."""
    entries = json.loads((NANO / "samples" / "samples.json").read_text())[:6]
    config = RuntimeConfig(refiner=None, image_dtype=image_dtype)
    async with await InferenceEngine.create(config) as engine:
        answers = [
            await engine.segment(
                image=(NANO / "samples" / entry["file"]).read_bytes(), object=entry["noun"]
            )
            for entry in entries
        ]
    return [answer.output["segments"][0]["coarse_path"] for answer in answers]


async def test_the_shipped_model_takes_another_type_than_its_processor_has(monkeypatch):
    half, whole = await paths("bfloat16"), await paths(None)
    assert half != whole
    for units, expected in ((True, half), (False, whole)):
        monkeypatch.setattr(devices, "has_bfloat16_products", lambda units=units: units)
        assert await paths("auto") == expected


@pytest.mark.parametrize("key", ["image_dtype", "kv_dtype"])
def test_an_unknown_type_is_taken(key):
    with pytest.raises(ConfigError, match=f"{key} must be auto, bfloat16 or null"):
        RuntimeConfig(**{key: "float16"})
