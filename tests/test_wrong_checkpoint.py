"""A checkpoint that is not trained to segment must not serve empty paths with status 200."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import picture
from tiny_models import TINY_3, hugging_face_tensors, random_model, write_checkpoint

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.engine import EngineError

PROMPT = TINY_3.prompt


@pytest.fixture(scope="module")
def boxes_only(tmp_path_factory) -> Path:
    """A checkpoint that answers as the public preview does: a box, then the end."""
    model = random_model()
    model.text.lm_head.bias[PROMPT.coord_id] = 2e4
    model.text.lm_head.bias[PROMPT.eos_id] = 1e4
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / "preview", hugging_face_tensors(model)
    )


def config(folder: Path, **changes) -> RuntimeConfig:
    return RuntimeConfig(
        model={"path": str(folder)}, refiner=None, device="cpu", torch_threads=1, **changes
    )


async def test_a_checkpoint_without_paths_serves(boxes_only):
    with pytest.raises(EngineError) as caught:
        await InferenceEngine.create(config(boxes_only))
    message = str(caught.value)
    assert "preview gives a box and no path" in message
    assert str(boxes_only) in message and "not trained for segmentation" in message
    assert "allow_empty_paths: true" in message and "{repo, filename, revision}" in message


async def test_a_checkpoint_without_paths_does_not_serve_where_it_may(boxes_only, caplog):
    async with await InferenceEngine.create(config(boxes_only, allow_empty_paths=True)) as engine:
        await engine.health()
        result = await engine.segment(image=picture(), object="ball")
    segment = result.output["segments"][0]
    assert segment["svg_path"] == "" and segment["bbox"] is not None
    assert "a box and no path" in segment["parse_error"]
    assert "allow_empty_paths is set" in caplog.text


async def test_health_of_a_wrong_checkpoint_is_good(boxes_only):
    async with await InferenceEngine.create(config(boxes_only, allow_empty_paths=True)) as engine:
        engine.config = config(boxes_only)
        engine._scheduler.last_success = 0.0
        with pytest.raises(EngineError, match="not trained for segmentation"):
            await engine.health()


async def test_a_checkpoint_that_finds_nothing_is_refused_for_it(tmp_path, caplog):
    model = random_model()
    model.text.lm_head.bias[PROMPT.eos_id] = 1e4
    folder = write_checkpoint(tmp_path, hugging_face_tensors(model))
    async with await InferenceEngine.create(config(folder)) as engine:
        await engine.health()
    assert "finds no ball in the built-in picture" in caplog.text
