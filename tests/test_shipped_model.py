"""The checkpoint in the repository: small, licensed, and it finds what it is asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from kestrel.config import SHIPPED_MODELS, RuntimeConfig
from kestrel.engine import InferenceEngine
from kestrel.overlay import decode_mask

NANO = SHIPPED_MODELS / "nano"
SAMPLES = NANO / "samples"
LISTED = json.loads((SAMPLES / "samples.json").read_text())
TOKENIZER = Tokenizer.from_file(str(NANO / "tokenizer.json"))
MEBIBYTE = 2**20


def truth(file: str) -> np.ndarray:
    return np.asarray(Image.open(SAMPLES / file).convert("L")) > 127


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[InferenceEngine]:
    async with await InferenceEngine.create(RuntimeConfig(torch_threads=1)) as created:
        yield created


async def coarse(engine: InferenceEngine, file: str, noun: str) -> np.ndarray | None:
    """The coarse mask of a sample; None where the model finds nothing."""
    result = await engine.segment(
        image=(SAMPLES / file).read_bytes(), object=noun, return_base64=True
    )
    encoded = result.output["segments"][0].get("coarse_mask_base64")
    return None if encoded is None else decode_mask(encoded)


@pytest.mark.asyncio(loop_scope="module")
async def test_another_object_of_the_scene_is_not_taken_for_the_one_asked_for(
    engine: InferenceEngine,
) -> None:
    right, shares = 0, []
    for asked in LISTED:
        mask = await coarse(engine, asked["file"], asked["noun"])
        mine = truth(asked["truth"])
        others = [
            truth(entry["truth"])
            for entry in LISTED
            if entry["file"] == asked["file"] and entry["noun"] != asked["noun"]
        ]
        share = 0.0 if mask is None else iou(mask, mine)
        shares.append(share)
        right += mask is not None and all(share > iou(mask, other) for other in others)
    assert right >= 0.9 * len(LISTED), shares
    assert np.mean(shares) > 0.6, shares


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_not_in_the_picture_is_not_found_everywhere(engine: InferenceEngine) -> None:
    shown = {entry["file"]: set[str]() for entry in LISTED}
    for entry in LISTED:
        shown[entry["file"]].add(entry["noun"])
    nouns = sorted(set().union(*shown.values()))
    absent = [(file, noun) for file, seen in shown.items() for noun in nouns if noun not in seen]
    asked = absent[:: max(1, len(absent) // 40)]
    found = [pair for pair in asked if await coarse(engine, *pair) is not None]
    assert len(found) <= 0.3 * len(asked), found


@settings(deadline=None)
@given(st.text(max_size=40))
def test_every_string_encodes_and_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    normalised = TOKENIZER.normalizer.normalize_str(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == normalised


def test_a_checkpoint_too_large_for_a_repository_is_not_shipped() -> None:
    assert (NANO / "model.safetensors").stat().st_size <= 20 * MEBIBYTE


def test_no_picture_ships_without_its_licence() -> None:
    listed = {entry[key] for entry in LISTED for key in ("file", "truth")}
    pictures = {path.name for path in SAMPLES.iterdir() if path.suffix in (".jpg", ".png")}
    assert pictures == listed
    terms = (SAMPLES / "LICENCES.md").read_text()
    styles = {entry["picture"].partition(":")[0] for entry in LISTED}
    assert all(f"| {style} |" in terms for style in styles)


def test_the_card_tells_what_the_model_learned_from() -> None:
    card = Path(NANO / "README.md").read_text()
    for word in ("Apache-2.0", "MIT", "CC-BY-4.0", "tuxpaint-stamps-default", "Limits", "steps"):
        assert word in card
