"""The model must compute what the public reference computes, at every recorded point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from devices import CPU, DEVICES
from safetensors.torch import load_file, save_file
from tiny_models import random_model

from kestrel.config import ConfigError
from kestrel.moondream import moe
from kestrel.moondream.checkpoint import weight_files
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.crops import overlap_crops, select_tiling
from kestrel.moondream.model import Moondream
from kestrel.moondream.weights import load_weights

FIXTURES = Path(__file__).parent / "fixtures" / "parity"


def build(name: str, weights: Path, device: torch.device = CPU, dtype=torch.float32) -> Moondream:
    config = MoondreamConfig.from_file(FIXTURES / name / "config.json")
    with torch.device("meta"):
        model = Moondream(config)
    load_weights(model, weight_files(weights), device, dtype)
    model.text.reset_tables()
    model.fuse()
    return model.eval()


@pytest.fixture(scope="module")
def md3_weights(tmp_path_factory) -> dict[str, Path]:
    """The Moondream 3 checkpoint as files: engine names, Hugging Face names, and as ``.pt``."""
    folder = tmp_path_factory.mktemp("md3")
    engine = load_file(FIXTURES / "md3" / "engine-text-region.safetensors")
    names = json.loads((FIXTURES / "md3" / "hugging-face-names.json").read_text())
    vision = load_file(FIXTURES / "md2" / "model-00001-of-00003.safetensors")
    engine_name = {hf: own for own, hf in names.items()}
    engine |= {engine_name[name]: tensor for name, tensor in vision.items()}
    hugging_face = {
        names[k]: (v.T.contiguous() if k.endswith("features.weight") else v)
        for k, v in engine.items()
    }
    save_file(engine, folder / "engine.safetensors")
    save_file(hugging_face, folder / "hf.safetensors")
    torch.save(engine, folder / "engine.pt")
    return {
        "engine": folder / "engine.safetensors",
        "hf": folder / "hf.safetensors",
        "pt": folder / "engine.pt",
    }


def weights_of(case: str, md3_weights: dict[str, Path]) -> tuple[str, Path]:
    return ("md2", FIXTURES / "md2") if case == "md2" else ("md3", md3_weights[case])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["md2", "engine", "hf", "pt"])
@torch.inference_mode()
def test_hidden_states_and_logits_drift_from_the_reference(case, device, md3_weights):
    name, weights = weights_of(case, md3_weights)
    model = build(name, weights, device)
    expected = load_file(FIXTURES / name / "expected.safetensors", device=str(device))
    image = load_file(FIXTURES / "md2" / "expected.safetensors", device=str(device))[
        "image_embedding"
    ]
    bos = model.embed_tokens(torch.tensor([0], device=device))
    prompt = torch.cat([bos, image, model.embed_tokens(expected["prompt"])])[None]
    length = prompt.shape[1]
    # Slot 2 of 3, so that a slot mistaken for a row shows.
    cache, slots = model.new_cache(3), torch.tensor([2], device=device)
    lengths = torch.tensor([length], device=device)
    hidden = [model.prefill(prompt, lengths, 730, cache, slots)]
    for i, step in enumerate(expected["steps"]):
        position = torch.tensor([length + i], device=device)
        hidden.append(model.decode(model.embed_tokens(step[None]), position, cache, slots))
    got = torch.cat(hidden)
    torch.testing.assert_close(got, expected["hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.logits(got), expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["md2", "engine"])
@torch.inference_mode()
def test_bfloat16_chooses_other_tokens_than_the_reference(case, device, md3_weights):
    name, weights = weights_of(case, md3_weights)
    model = build(name, weights, device, torch.bfloat16)
    expected = load_file(FIXTURES / name / "expected.safetensors", device=str(device))
    pictured = load_file(FIXTURES / "md2" / "expected.safetensors", device=str(device))
    if case == "md2":
        image = model.vision.embed(pictured["crops_u8"], (2, 4))
    else:
        image = pictured["image_embedding"].bfloat16()
    bos = model.embed_tokens(torch.tensor([0], device=device))
    prompt = torch.cat([bos, image, model.embed_tokens(expected["prompt"])])[None]
    length = prompt.shape[1]
    cache, slots = model.new_cache(1), torch.tensor([0], device=device)
    hidden = model.prefill(prompt, torch.tensor([length], device=device), 730, cache, slots)
    assert model.coord_logits(hidden[0]).argmax() == expected["coord_logits"].argmax()
    sizes = model.size_logits(hidden[0]).argmax(-1)
    assert torch.equal(sizes, expected["size_logits"].argmax(-1))
    chosen = [model.logits(hidden).argmax()]
    for i, step in enumerate(expected["steps"]):
        position = torch.tensor([length + i], device=device)
        hidden = model.decode(model.embed_tokens(step[None]), position, cache, slots)
        chosen.append(model.logits(hidden).argmax())
    assert torch.equal(torch.stack(chosen), expected["logits"].argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["md2", "engine"])
@torch.inference_mode()
def test_region_heads_drift_from_the_reference(case, device, md3_weights):
    name, weights = weights_of(case, md3_weights)
    model = build(name, weights, device)
    expected = load_file(FIXTURES / name / "expected.safetensors", device=str(device))
    hidden = expected["hidden"][0]
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(model.coord_logits(hidden), expected["coord_logits"], **close)
    torch.testing.assert_close(model.size_logits(hidden), expected["size_logits"], **close)
    coord = model.encode_coord(expected["coord_in"][0])
    torch.testing.assert_close(coord, expected["coord_embedding"], **close)
    size = model.encode_size(expected["size_in"])
    torch.testing.assert_close(size, expected["size_embedding"], **close)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_vision_features_and_image_embedding_drift_from_the_reference(device):
    model = build("md2", FIXTURES / "md2", device)
    expected = load_file(FIXTURES / "md2" / "expected.safetensors", device=str(device))
    crops = expected["crops_u8"]
    features = model.vision.features(crops[:1])[0]
    torch.testing.assert_close(features, expected["features_global"], atol=1e-4, rtol=0)
    embedding = model.vision.embed(crops, (2, 4))
    torch.testing.assert_close(embedding, expected["image_embedding"], atol=1e-4, rtol=0)


def test_crops_differ_from_the_reference_crops():
    expected = load_file(FIXTURES / "md2" / "expected.safetensors")
    config = MoondreamConfig.from_file(FIXTURES / "md2" / "config.json").vision
    crops, tiling = overlap_crops(expected["image"].numpy(), config)
    assert tiling == (2, 4)
    got = torch.from_numpy(crops)[:, ::5, ::5].int()
    # Pillow releases may round a Lanczos tap differently by one.
    assert (got - expected["overlap_crops_every_5th"].int()).abs().max() <= 1


def test_crop_grids_differ_from_the_published_rule():
    margins = 2 * 4 * 14
    for size, grid in json.loads((FIXTURES / "tilings.json").read_text()).items():
        height, width = map(int, size.split("x"))
        got = select_tiling(height - margins, width - margins, 378 - margins, 12)
        assert list(got) == grid, size


@pytest.mark.parametrize("length", [3000, 20_000, 263_000])
def test_a_strip_is_cut_into_more_crops_than_the_most(length):
    margins = 2 * 4 * 14
    rows, columns = select_tiling(400 - margins, length - margins, 378 - margins, 12)
    assert rows == 1 and 1 < columns <= 12
    assert select_tiling(length - margins, 400 - margins, 378 - margins, 12) == (columns, 1)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_the_one_crop_shortcut_differs_from_encoding_both_crops(device):
    model = build("md2", FIXTURES / "md2", device)
    crop = torch.randint(0, 256, (1, 3, 378, 378), generator=torch.Generator().manual_seed(3))
    crop = crop.to(device, torch.uint8)
    once = model.vision.embed(crop, (1, 1))
    features = model.vision.features(crop)[0]
    torch.testing.assert_close(once, model.vision.project(features, features))


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_prompts_padded_into_one_batch_differ_from_single_ones(device, md3_weights):
    model = build("md3", md3_weights["engine"], device)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 1024, (n,), generator=generator).to(device) for n in (9, 4, 6)]
    padded = torch.zeros(3, 9, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    lengths = torch.tensor([9, 4, 6], device=device)
    cache, slots = model.new_cache(4), torch.tensor([3, 0, 2], device=device)
    hidden = model.prefill(model.embed_tokens(padded), lengths, 0, cache, slots)
    step = torch.tensor([7, 8, 9], device=device)
    after = model.decode(model.embed_tokens(step), lengths, cache, slots)
    for row, prompt in enumerate(prompts):
        alone, first = model.new_cache(1), torch.tensor([0], device=device)
        length = torch.tensor([len(prompt)], device=device)
        one = model.prefill(model.embed_tokens(prompt)[None], length, 0, alone, first)
        torch.testing.assert_close(hidden[row : row + 1], one, atol=1e-5, rtol=1e-5)
        one = model.decode(model.embed_tokens(step[row : row + 1]), length, alone, first)
        torch.testing.assert_close(after[row : row + 1], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["md2", "engine"])
@torch.inference_mode()
def test_serving_computes_other_than_the_plain_decoder(case, device, md3_weights):
    name, weights = weights_of(case, md3_weights)
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(2, 24, 128, generator=generator) * 0.3).to(device)
    close = {"atol": 2e-5, "rtol": 2e-5}
    for fused in (True, False):
        model = build(name, weights, device)
        if not fused:
            model._cached = None
        for prefix in (0, 9):
            plain = model.text(x, prefix)
            text, cache = model.cached, model.new_cache(3)
            slots = torch.tensor([2, 1], device=device)
            if prefix:
                for row, slot in enumerate(slots.tolist()):
                    cache.put(slot, text.prefix(x[row, :prefix]))
            # The rest in chunks of unequal lengths, then the last positions one by one.
            starts = torch.tensor([prefix, prefix], device=device)
            for end in (prefix + 1, 15, 20):
                start = int(starts[0])
                got = text.extend(x[:, start:end], starts, cache, slots, end)
                torch.testing.assert_close(got, plain[:, start:end], **close)
                starts = torch.tensor([end, end], device=device)
            for position in range(20, 24):
                at = torch.tensor([position, position], device=device)
                got = text.decode(x[:, position], at, cache, slots, position + 1)
                torch.testing.assert_close(got, plain[:, position], **close)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_gathered_and_visited_experts_disagree(device, md3_weights, monkeypatch):
    model = build("md3", md3_weights["engine"], device)
    mlp = model.text.blocks[1].mlp
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(device)
    monkeypatch.setattr("kestrel.moondream.moe.GATHER_LIMIT", 1_000)
    gathered = mlp(x)
    monkeypatch.setattr("kestrel.moondream.moe.GATHER_LIMIT", 0)
    torch.testing.assert_close(gathered, mlp(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_step_that_is_captured_waits_for_the_host(device, monkeypatch):
    """Counting who visits which expert reads numbers back, which no capture survives."""
    mlp = random_model().to(device).text.blocks[1].mlp
    x = torch.randn(moe.EVERY_LIMIT + 36, 32, generator=torch.Generator().manual_seed(1)).to(device)
    visited = mlp(x)
    monkeypatch.setattr(moe, "capturing", lambda device: True)
    monkeypatch.setattr(moe.MixtureOfExperts, "_visited", None)
    torch.testing.assert_close(mlp(x), visited, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_with_strays_and_gaps_loads_silently(tmp_path):
    tensors = load_file(FIXTURES / "md2" / "model-00003-of-00003.safetensors")
    tensors["model.region.stray.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        build("md2", tmp_path)
    assert "unexpected tensor model.region.stray.weight" in str(caught.value)
    assert "missing tensor" in str(caught.value)


def test_a_tensor_of_the_wrong_shape_is_not_named(tmp_path):
    tensors = {}
    for shard in sorted((FIXTURES / "md2").glob("model-*.safetensors")):
        tensors |= load_file(shard)
    tensors["model.text.wte"] = torch.zeros(3, 128)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.text\.wte has shape \[3, 128\]"):
        build("md2", tmp_path)
