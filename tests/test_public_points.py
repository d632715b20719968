"""The model computes something else than the public implementations: odd pictures, no picture,
points and boxes, long prompts, all in one batch of unequal lengths."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from devices import DEVICES
from safetensors.torch import load_file
from seeded import ANSWER, CASES, MD2, MODELS, PICTURES, POINTS, picture, seeded_model
from torch import Tensor

from kestrel.api import SegmentSettings
from kestrel.batch import Batch, Row
from kestrel.moondream.crops import overlap_crops
from kestrel.moondream.model import Moondream
from kestrel.skills.segment import Coord, SegmentDecode, Size

CLOSE = {"atol": 1e-4, "rtol": 0.0}
CLEAR = 0.1
"""A lead, in spreads of the logits, that the roundings of bfloat16 do not take back."""


@pytest.fixture(scope="module")
def points() -> dict[str, Tensor]:
    return load_file(POINTS)


@cache
def crops_of(name: str):
    return overlap_crops(picture(name), MD2.vision)


def ready(name: str, device: torch.device, dtype: torch.dtype) -> Moondream:
    model = seeded_model(MODELS[name]).to(device=device, dtype=dtype)
    model.text.reset_tables()
    model.fuse()
    return model


@cache
def features_of(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All models see alike."""
    crops, tiling = crops_of(name)
    model = ready("md2", device, dtype)
    return Batch(model, 1, kernels="torch").features(crops[:1] if tiling == (1, 1) else crops)


class Watched(Batch):
    """A batch that keeps every row's hidden states and feeds it ``ANSWER``."""

    def __init__(self, model: Moondream, slots: int, kv_bytes: int | None) -> None:
        super().__init__(model, slots, kv_bytes=kv_bytes, kernels="torch")
        self.seen: dict[int, list[Tensor]] = {}

    def _sample(self, rows: list[Row], hidden: Tensor) -> None:
        for row, state in zip(rows, hidden, strict=True):
            states = self.seen.setdefault(id(row), [])
            row.token = ANSWER[len(states)] if len(states) < len(ANSWER) else 0
            states.append(state.clone())


def answers(model: Moondream, kv_bytes: int | None = None) -> dict[str, Tensor]:
    """Of each case the hidden states after its prompt and after each token of ``ANSWER``.

    Requests join one step after the other, prompts come in parts, and who is done makes room.
    """
    batch = Watched(model, len(CASES), kv_bytes)
    device, dtype = model.device, model.dtype
    rows, waiting = {}, list(CASES)
    while waiting or batch.rows:
        if waiting:
            name = waiting.pop(0)
            case, special = CASES[name], model.config.prompt
            decode = SegmentDecode(special, model.tokenizer, len(ANSWER))
            prompt = case.prompt(model)
            rows[name] = Row(prompt, decode, SegmentSettings(), random.Random(0))
            prefix = None
            if case.picture is not None:
                features = features_of(case.picture, device, dtype)
                prefix = batch.prefix(features, crops_of(case.picture)[1])
            batch.join(rows[name], prefix)
        batch.step([(row, 1 + row.unfed // 2) for row in batch.rows if row.unfed])
        for row in list(batch.rows):
            if len(batch.seen.get(id(row), [])) > len(ANSWER):
                batch.release(row)
    return {name: torch.stack(batch.seen[id(row)]) for name, row in rows.items()}


def heads(model: Moondream, hidden: Tensor) -> dict[str, Tensor]:
    return {
        "token": model.logits(hidden),
        "coord": model.coord_logits(hidden),
        "size": model.size_logits(hidden).flatten(1),
    }


@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures_are_cut_otherwise(name, points):
    crops, tiling = crops_of(name)
    assert points[f"{name}.tiling"].tolist() == list(tiling)
    got = torch.from_numpy(crops)
    if tiling == (1, 1):  # one crop then stands for both
        assert torch.equal(got[0], got[1])
    assert torch.equal(got.long().sum((1, 2, 3)), points[f"{name}.sums"])
    assert torch.equal(got.flatten()[:: 4001 * len(got) + 2], points[f"{name}.pixels"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PICTURES)
@torch.inference_mode()
def test_odd_pictures_are_seen_otherwise(name, device, points):
    features = features_of(name, device, torch.float32)
    model = ready("md2", device, torch.float32)
    got = model.vision.join(features, crops_of(name)[1])[::61, ::9].cpu()
    torch.testing.assert_close(got, points[f"{name}.embedding"], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_requests_become_other_tokens(name, points):
    model = seeded_model(MODELS[name])
    special = model.config.prompt
    places = {Coord: special.coord_id, Size: special.size_id}
    for case, asked in CASES.items():
        tokens = asked.prompt(model).tokens
        ids = [places.get(type(token), token) for token in tokens]
        assert ids == points[f"{name}.{case}.prompt"].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [("md2", None), ("grouped", None), ("md3", None), ("grouped", 2**26), ("md3", 2**26)],
    ids=str,
)
@torch.inference_mode()
def test_a_batch_of_unequal_requests_drifts_from_the_public_model(name, kv_bytes, device, points):
    """With ``kv_bytes``, keys and values lie in pages and steps are of fixed sizes, as on CUDA."""
    model = ready(name, device, torch.float32)
    for case, hidden in answers(model, kv_bytes).items():
        key = f"{name}.{case}"
        torch.testing.assert_close(hidden[:, ::9].cpu(), points[f"{key}.hidden"], **CLOSE)
        found = heads(model, hidden)
        for head, step in (("token", 67), ("coord", 79), ("size", 131)):
            got = found[head].cpu()
            torch.testing.assert_close(got[:, ::step], points[f"{key}.{head}"], **CLOSE)
            best = got.unflatten(1, (points[f"{key}.{head}.best"].shape[1], -1)).argmax(-1)
            assert torch.equal(best.short(), points[f"{key}.{head}.best"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_bfloat16_chooses_otherwise_in_such_a_batch(name, device, points):
    model = ready(name, device, torch.bfloat16)
    clear = asked = 0
    for case, hidden in answers(model).items():
        for head, logits in heads(model, hidden).items():
            best = points[f"{name}.{case}.{head}.best"]
            lead = points[f"{name}.{case}.{head}.lead"] > CLEAR
            got = logits.unflatten(1, (best.shape[1], -1)).argmax(-1).cpu().short()
            assert torch.equal(got[lead], best[lead]), (case, head)
            clear, asked = clear + int(lead.sum()), asked + lead.numel()
    assert clear > asked / 2
