"""Moondream's neural refiner computes what the public one does, and says what it lacks."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import CPU, DEVICES
from safetensors.torch import load_file, save_file

from kestrel.config import SHIPPED_MODELS, ConfigError, RefinerConfig
from kestrel.moondream.seg_head import SegHead, SegHeadConfig, load_seg_head
from kestrel.seg_refiner import SegmentRefiner
from kestrel.seg_refiner.seghead import SegHeadRefiner

FIXTURES = Path(__file__).parent / "fixtures" / "parity"
TINY = SegHeadConfig(enc_dim=64, dim=64)
"""For the vision tower of the md2 fixture."""
BOX = {"x_min": 0.2, "y_min": 0.2, "x_max": 0.8, "y_max": 0.8}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "seghead" / "expected.safetensors")


@pytest.fixture(scope="module")
def features(expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Final and early, as they were drawn for the reference."""
    generator = torch.Generator().manual_seed(11)
    final, early = (torch.randn(1, 729, 1152, generator=generator) for _ in range(2))
    drawn = torch.stack([final[0, 0, :8], early[0, -1, -8:]])
    assert torch.equal(drawn, expected["feature_check"])
    return final, early


def disc() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(378), torch.arange(378), indexing="ij")
    return ((x - 180) ** 2 + (y - 200) ** 2 < 110**2).float()[None, None]


@pytest.mark.parametrize("device", DEVICES)
def test_five_rounds_give_the_reference_s_masks_and_scores(features, expected, device, monkeypatch):
    # Convolutions on CUDA would else round their factors to 10 bits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head = load_seg_head(FIXTURES / "seghead" / "weights.safetensors", device, torch.float32)
    final, early = (given.to(device) for given in features)
    expected = {name: tensor.to(device) for name, tensor in expected.items()}
    mask, rounds, predict = disc().to(device), [], head.predict

    def watched(fused: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounds.append((mask, *predict(fused, mask)))
        return rounds[-1][1:]

    monkeypatch.setattr(head, "predict", watched)
    with torch.inference_mode():
        refined = head.refine(final, early, mask)
    assert len(rounds) == 5
    for i, (given, logits, scores) in enumerate(rounds):
        torch.testing.assert_close(given, mask)
        whole = F.interpolate(logits[None], size=(378, 378), mode="bilinear")
        if i == 0:
            torch.testing.assert_close(
                whole[0, :, ::7, ::7], expected["logits_first"], atol=1e-3, rtol=0
            )
            torch.testing.assert_close(scores, expected["iou_first"], atol=1e-3, rtol=0)
        torch.testing.assert_close(scores, expected["iou_each"][i], atol=1e-3, rtol=0)
        assert scores.argmax() == expected["best_each"][i]
        mask = torch.sigmoid(whole[:, scores.argmax()][None])
    torch.testing.assert_close(refined, mask)
    torch.testing.assert_close(refined[0, 0, ::3, ::3], expected["final"], atol=1e-3, rtol=0)


def tiny_head(file: Path, config: SegHeadConfig = TINY) -> Path:
    torch.manual_seed(3)
    tensors = {f"head.{name}": t for name, t in SegHead(config).state_dict().items()}
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> RefinerConfig:
    """A random head, and the md2 fixture for its vision tower."""
    folder = tmp_path_factory.mktemp("seghead")
    shutil.copytree(FIXTURES / "md2", folder / "md2")
    shutil.copy(SHIPPED_MODELS / "nano" / "tokenizer.json", folder / "md2")
    head = tiny_head(folder / "head.safetensors")
    return RefinerConfig(
        refiner="seghead",
        device="cpu",
        seghead_weights=str(head),
        seghead_vision=str(folder / "md2"),
        min_agreement=0.0,
    )


def picture() -> np.ndarray:
    image = np.full((90, 120, 3), 40, np.uint8)
    image[20:70, 30:90] = (200, 150, 60)
    return image


@pytest.mark.parametrize("device", DEVICES)
def test_the_refined_mask_has_the_picture_s_size_and_stays_in_the_grown_box(parts, device):
    mask = np.zeros((90, 120), np.uint8)
    mask[25:65, 35:85] = 1
    refined = SegHeadRefiner(replace(parts, device=device.type))(picture(), mask)
    assert refined.dtype == np.uint8 and refined.shape == mask.shape
    assert set(np.unique(refined)) <= {0, 1}
    outside = refined.copy()
    outside[15:75, 22:98] = 0
    assert not outside.any()
    assert not SegHeadRefiner(parts)(picture(), np.zeros_like(mask)).any()


def test_a_request_may_choose_it_among_the_loaded(parts):
    refiner = SegmentRefiner(parts)
    for name in (None, "seghead", "none", "guided"):
        result = refiner.refine_with_bitmaps(
            picture(), "M0 0H1V1H0Z", BOX, return_base64=True, refiner=name
        )
        assert result.reason in ("refined", "empty_refined", "rejected")
    with pytest.raises(ValueError, match=r"'hq-sam' is not loaded; loaded are seghead, none"):
        refiner.refine_with_bitmaps(picture(), "M0 0H1V1H0Z", BOX, refiner="hq-sam")


def test_a_pt_file_is_read_as_the_public_one(parts, tmp_path):
    tensors = load_file(parts.seghead_weights)
    file = tmp_path / "model.pt"
    torch.save({"head": {k.removeprefix("head."): t for k, t in tensors.items()}}, file)
    a = load_seg_head(file, CPU, torch.float32)
    b = load_seg_head(Path(parts.seghead_weights), CPU, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seghead_weights": None}, "hf download moondream/SegHeadRefiner"),
        ({"seghead_vision": None}, "seghead_vision"),
        ({"seghead_weights": "/nowhere/head.pt"}, "no file /nowhere/head.pt"),
        ({"seghead_weights": "/models/v@2/head.pt"}, "no file /models/v@2/head.pt"),
        ({"seghead_weights": "owner/name@main"}, "^seghead_weights: 'main' is no full commit"),
        ({"seghead_weights": f"owner/none@{'a' * 40}"}, "^seghead_weights: model.pt of owner/none"),
        ({"seghead_vision": "/nowhere"}, r"^seghead_vision\.path: there is no .* at /nowhere"),
        (
            {"seghead_vision": {"repo": "owner/none", "revision": "main"}},
            r"^seghead_vision\.revision: 'main' is no full commit",
        ),
        (
            {"seghead_vision": {"path": str(FIXTURES / "md2"), "tokenizer": "nowhere"}},
            r"^seghead_vision\.tokenizer: nowhere is neither",
        ),
        ({"seghead_vision": str(SHIPPED_MODELS / "nano")}, "seghead_vision"),
    ],
)
def test_a_missing_part_is_named_when_the_refiner_is_built(parts, change, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=said):
        SegmentRefiner(replace(parts, **change))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_head_s_parameters_are_no_views_of_its_file(parts, suffix, tmp_path):
    tensors = {k.removeprefix("head."): t for k, t in load_file(parts.seghead_weights).items()}
    file = tmp_path / f"model.{suffix}"
    torch.save({"head": tensors}, file) if suffix == "pt" else save_file(tensors, file)
    head = load_seg_head(file, CPU, torch.float32)
    # Written over in place, as a copy onto it would: a view, and only a view, sees that.
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(p, tensors[name]) for name, p in head.named_parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iou_token": torch.full((1, 64), torch.nan)}, r"iou_token holds NaN or infinity"),
        ({"image_proj.weight": torch.zeros(12, 64, 1, 1)}, "holds no mask refiner's head"),
        ({"image_proj.weight": torch.zeros(40, 64, 1, 1)}, "holds no mask refiner's head"),
        ({"image_proj.weight": [1]}, "holds no mask refiner's head"),
        ({"mask_tokens": torch.tensor(1.0)}, "holds no mask refiner's head"),
        ({3: torch.zeros(1)}, "holds no mask refiner's head"),
        (None, "has no key head"),
    ],
)
def test_a_file_of_another_head_is_a_traceback_or_is_served(parts, changes, said, tmp_path):
    tensors = {k.removeprefix("head."): t for k, t in load_file(parts.seghead_weights).items()}
    file = tmp_path / "model.pt"
    torch.save(tensors if changes is None else {"head": tensors | changes}, file)
    with pytest.raises(ConfigError, match=rf"^seghead_weights: {re.escape(str(file))} {said}"):
        load_seg_head(file, CPU, torch.float32)


def test_a_head_with_tensors_missing_or_left_over_is_refused(parts, tmp_path):
    tensors = load_file(parts.seghead_weights)
    tensors["head.iou_tokens"] = tensors.pop("head.iou_token")
    save_file(tensors, tmp_path / "renamed.safetensors")
    with pytest.raises(ConfigError, match=r"(?s)iou_token.*iou_tokens"):
        load_seg_head(tmp_path / "renamed.safetensors", CPU, torch.float32)
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match=r"broken\.pt"):
        load_seg_head(tmp_path / "broken.pt", CPU, torch.float32)
