"""SAM-HQ as a refiner: a tiny random model, saved and loaded from disk."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import DEVICES
from PIL import Image

from kestrel.config import ConfigError, RefinerConfig
from kestrel.seg_refiner import SegmentRefiner
from kestrel.seg_refiner.hq_sam import DEVIATION, MEAN, HqSamRefiner

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: pip install 'kestrel-segment-serve[hq-sam]'",
)
BOX = {"x_min": 0.2, "y_min": 0.2, "x_max": 0.8, "y_max": 0.8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A random SAM-HQ of two layers for pictures of 64 x 64, as ``save_pretrained`` writes it."""
    from transformers import SamHQConfig, SamHQModel

    torch.manual_seed(1)
    config = SamHQConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "mlp_dim": 64,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
            "vit_dim": 32,
        },
    )
    folder = tmp_path_factory.mktemp("sam")
    SamHQModel(config).save_pretrained(folder)
    return folder


def config(saved: Path) -> RefinerConfig:
    return RefinerConfig(refiner="hq-sam", device="cpu", hq_sam_model=str(saved), min_agreement=0.0)


def picture(height: int = 90, width: int = 120) -> np.ndarray:
    image = np.full((height, width, 3), 40, np.uint8)
    image[20:70, 30:90] = (200, 150, 60)
    return image


@needs_transformers
@pytest.mark.parametrize("device", DEVICES)
def test_the_refined_mask_has_the_picture_s_size_and_stays_in_the_grown_box(saved, device):
    refine = HqSamRefiner(replace(config(saved), device=device.type))
    mask = np.zeros((90, 120), np.uint8)
    mask[25:65, 35:85] = 1
    refined = refine(picture(), mask)
    assert refined.dtype == np.uint8 and refined.shape == mask.shape
    assert set(np.unique(refined)) <= {0, 1}
    refined[15:75, 22:98] = 0
    assert not refined.any()
    assert not refine(picture(), np.zeros_like(mask)).any()


def watched(refine):
    """What the model is given from now on, by name."""
    seen, model = {}, refine._model

    def spy(**inputs):
        seen.update(inputs)
        return model(**inputs)

    refine._model = spy
    return seen


@needs_transformers
def test_box_and_mask_reach_the_model_in_its_own_pixels(saved):
    refine = HqSamRefiner(config(saved))
    seen = watched(refine)
    mask = np.zeros((200, 400), np.uint8)
    mask[40:120, 100:260] = 1  # grown by a quarter: columns 60 to 300, rows 20 to 140
    refine(picture(200, 400), mask)
    scale = 64 / 240
    assert seen["pixel_values"].shape == (1, 3, 64, 64)
    box = torch.tensor([[[40, 20, 200, 100]]]) * scale
    torch.testing.assert_close(seen["input_boxes"], box, atol=1e-4, rtol=0)
    prompt = seen["input_masks"][0, 0]
    assert prompt.shape == (16, 16)
    assert prompt[4, 8] == 10 and prompt[4, 0] == -10 and prompt[12, 8] == -10
    # Below the picture there is nothing.
    assert not seen["pixel_values"][0, :, 33:].any()


@needs_transformers
def test_a_small_crop_is_enlarged_without_steps_as_sam_s_own_processor_does(saved):
    refine = HqSamRefiner(config(saved))
    seen = watched(refine)
    image = np.zeros((8, 8, 3), np.uint8)
    image[:] = np.arange(0, 240, 30, np.uint8)[:, None]
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = mask[0] = 1
    refine(image, mask)
    pixels = seen["pixel_values"][0].numpy().transpose(1, 2, 0) * DEVIATION + MEAN
    bilinear = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(pixels - np.asarray(bilinear)).max() <= 1
    # The mask's edge lies between two of the prompt's pixels.
    row = seen["input_masks"][0, 0, 8]
    assert (row[:7] == 10).all() and (row[9:] == -10).all() and 0 < row[7] < 10 and -10 < row[8] < 0


@needs_transformers
@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 2)])
def test_odd_crops_come_back_in_their_own_size(saved, size):
    mask = np.ones(size, np.uint8)
    assert HqSamRefiner(config(saved))(np.zeros((*size, 3), np.uint8), mask).shape == size


@needs_transformers
def test_a_deployment_may_run_it_and_others_beside_it(saved):
    refiner = SegmentRefiner(config(saved))
    refiner.self_check()
    for name in ("hq-sam", "none"):
        result = refiner.refine_with_bitmaps(picture(), "M0 0H1V1H0Z", BOX, refiner=name)
        assert result.reason in ("refined", "empty_refined", "rejected")


@needs_transformers
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "hq_sam_model"),
        ("/nowhere", "no folder /nowhere"),
        ("/models/v@2", "no folder /models/v@2"),
        ("owner/name@main", r"^hq_sam_model: 'main' is no full .*: pin the 40-digit commit"),
    ],
)
def test_a_missing_model_is_named_when_the_refiner_is_built(saved, model, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=said):
        SegmentRefiner(replace(config(saved), hq_sam_model=model))


def test_without_transformers_the_refiner_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'kestrel-segment-serve\[hq-sam\]'"):
        SegmentRefiner(RefinerConfig(refiner="hq-sam", hq_sam_model="/nowhere"))
