"""A checkpoint that is not trained to segment must not serve empty paths with status 200."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from serving import picture
from tiny_models import TINY_3, hugging_face_tensors, random_model, write_checkpoint
from tokenizers import Tokenizer

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.api import InvalidRequest, TooLarge
from kestrel.engine import EngineError
from kestrel.image import probe
from kestrel.self_check import SIDE, check_request

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


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A checkpoint whose every path is ``M 100 100 100`` and so on until it is cut off."""
    model = random_model()
    texts = [model.tokenizer.decode_path_token(i) for i in range(TINY_3.text.vocab_size)]
    for block in model.text.blocks:  # what comes next depends on the last token alone
        for part in (block.attn.proj, block.mlp.fc2):
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else [part]:
                parameter.zero_()
    axes = torch.eye(TINY_3.text.dim) * 20
    size, move, number, answer = axes[:4]
    model.text.post_ln.weight.fill_(1)
    model.text.post_ln.bias.zero_()
    model.text.wte.zero_()
    model.text.wte[texts.index("M")] = move
    model.text.wte[texts.index("100")] = number
    model.text.wte[PROMPT.answer_id] = answer
    model.region.size_encoder.weight.zero_()
    model.region.size_encoder.bias.copy_(size)
    head = model.text.lm_head
    head.weight.zero_()
    head.bias.zero_()
    head.weight[PROMPT.coord_id] = answer
    head.weight[texts.index("M")] = size
    head.weight[texts.index("100")] = move + number
    for decoder, bins in (
        (model.region.coord_decoder, [32]),
        (model.region.size_decoder, [40, 104]),
    ):
        decoder.weight.zero_()
        decoder.bias.zero_()
        decoder.bias[bins] = 1.0
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / "endless", hugging_face_tensors(model)
    )


async def test_a_checkpoint_whose_paths_never_end_serves(endless, caplog):
    with pytest.raises(EngineError) as caught:
        await InferenceEngine.create(config(endless))
    message = str(caught.value)
    assert "a box and a path that is not whole" in message and "cut off after" in message
    assert "allow_empty_paths: true" in message and "max_context" in message
    async with await InferenceEngine.create(config(endless, allow_empty_paths=True)) as engine:
        segment = (await engine.segment(image=picture(), object="ball")).output["segments"][0]
    assert segment["svg_path"] == "" and "cut off after" in segment["parse_error"]
    assert "allow_empty_paths is set" in caplog.text


@pytest.mark.parametrize("bound", ["max_path_chars", "max_path_commands"])
async def test_a_bound_on_paths_is_blamed_on_the_checkpoint(bound):
    bounded = RuntimeConfig(device="cpu", refiner=None, limits={bound: 5})
    said = r"or limits\.max_path_chars or max_path_commands is too low .*\. Raise those; or serve"
    with pytest.raises(EngineError, match=said):
        await InferenceEngine.create(bounded)


@pytest.mark.parametrize(
    "torn",
    ["text.blocks.0.attn.proj.bias", "text.lm_head.weight", "region.size_decoder.bias",
     "region.coord_decoder.weight", "vision.patch_emb.bias"],
)  # fmt: skip
async def test_weights_that_are_not_finite_serve(endless, tmp_path, torn):
    tensors = load_file(endless / "model.safetensors")
    tensors[f"model.{torn}"].view(-1)[-1] = torch.nan
    folder = write_checkpoint(tmp_path / "torn", tensors)
    with pytest.raises(EngineError) as caught:
        await InferenceEngine.create(config(folder, allow_empty_paths=True))
    assert "not finite in float32" in str(caught.value) and str(folder) in str(caught.value)


async def test_activations_beyond_float16_serve(tmp_path):
    model = random_model()
    model.text.blocks[0].mlp.fc1.weight.mul_(30)
    model.text.blocks[0].mlp.fc2.weight.mul_(1e4)
    folder = write_checkpoint(tmp_path, hugging_face_tensors(model))
    with pytest.raises(EngineError, match=r"not finite in float16.*dtype: bfloat16 or float32"):
        await InferenceEngine.create(config(folder, dtype="float16", allow_empty_paths=True))


async def test_a_noun_beyond_the_vocabulary_fails_everybody(boxes_only, tmp_path):
    folder = write_checkpoint(tmp_path, load_file(boxes_only / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|later|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    async with await InferenceEngine.create(config(folder, allow_empty_paths=True)) as engine:
        answered, refused = await asyncio.gather(
            engine.segment(object="ball"),
            engine.segment(object="a <|later|> ball"),
            return_exceptions=True,
        )
    assert isinstance(refused, InvalidRequest) and refused.field == "object"
    assert "vocabulary" in refused.message and not isinstance(answered, BaseException)


@pytest.mark.parametrize(
    "samples",
    ['{"images": []}', "[]", "{", "[3]", '[{"file": "none.png", "noun": "dog"}]',
     '[{"file": 3, "noun": "dog"}]', '[{"file": "samples.json", "noun": "dog"}]',
     '[{"file": "cut.png", "noun": "dog"}]', '[{"file": "a.png", "noun": 3}]', b"\xff"],
)  # fmt: skip
def test_samples_of_something_else_stop_the_engine(tmp_path, caplog, samples):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.png").write_bytes(picture())
    (tmp_path / "samples" / "cut.png").write_bytes(picture()[:200])
    text = samples if isinstance(samples, bytes) else samples.encode()
    (tmp_path / "samples" / "samples.json").write_bytes(text)
    assert check_request(tmp_path) == check_request(None)
    assert str(tmp_path / "samples" / "samples.json") in caplog.text


@pytest.mark.parametrize("pixels", [500_000, 1])
async def test_a_bound_on_pixels_keeps_out_the_built_in_picture(pixels):
    bounded = RuntimeConfig(device="cpu", torch_threads=1, limits={"max_image_pixels": pixels})
    async with await InferenceEngine.create(bounded) as engine:
        assert engine.finds or pixels == 1
        with pytest.raises(TooLarge):
            await engine.segment(image=picture(1000, 600), object="ball")


@pytest.mark.parametrize("most", [60_000, 7, 1])
def test_the_built_in_picture_is_larger_than_requests_may_be(tmp_path, most):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.json").write_text('[{"file": "a.png", "noun": "disc"}]')
    for width, height in ((640, 480), (70_000, 1), (2, 50_000)):
        (tmp_path / "samples" / "a.png").write_bytes(picture(width, height))
        check_request.cache_clear()
        for folder in (tmp_path, None):
            image = check_request(folder, most).image
            assert isinstance(image, bytes)
            header = probe(image)
            assert header.width * header.height <= most
    assert probe(check_request(None).image).width == SIDE


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
