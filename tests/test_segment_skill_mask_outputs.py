"""Masks that nobody asked for, masks and paths that are not what the contract says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import MASKS, SEGMENT, comparable, segment
from serving import picture

from kestrel.answers import segment_output
from kestrel.api import BboxEvent, ModelMetrics, ModelResult, SegmentRequest
from kestrel.image import decode as decode_image
from kestrel.overlay import decode_mask
from kestrel.seg_refiner import png, raster, trace, tracers
from kestrel.svg import parse_path

pytest_plugins = ["engines"]


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the masks that are encoded from now on."""
    shapes: list[tuple[int, ...]] = []
    encode = png._encode_mask_png_base64

    def counted(mask: np.ndarray) -> str:
        shapes.append(mask.shape)
        return encode(mask)

    monkeypatch.setattr(png, "_encode_mask_png_base64", counted)
    return shapes


async def test_masks_are_made_for_those_who_ask_only(engine, ask, encodings):
    plain = segment(await engine.segment(**ask))
    assert set(plain) == SEGMENT and encodings == []
    asked = segment(await engine.segment(**ask, return_base64=True))
    assert set(asked) == SEGMENT | MASKS and len(encodings) == 2
    assert {key: asked[key] for key in SEGMENT} == plain
    for key in MASKS:
        assert decode_mask(asked[key]).shape == (157, 203)


async def test_a_stream_gives_the_plain_answer_and_its_updates_spell_the_coarse_path(engine, ask):
    stream = await engine.segment(**ask, stream=True, return_base64=True)
    updates = [update async for update in stream]
    result = await stream.result()
    assert comparable(result) == comparable(await engine.segment(**ask, return_base64=True))
    found = segment(result)
    assert updates[0] == BboxEvent(found["coarse_bbox"])
    assert "".join(update.chunk for update in updates[1:]) == found["coarse_path"]
    assert not any(hasattr(update, key) for update in updates for key in MASKS)


async def test_an_array_gives_what_its_file_gives(engine, ask):
    pixels = decode_image(ask["image"])
    as_array = await engine.segment(object=ask["object"], image=pixels, return_base64=True)
    assert comparable(as_array) == comparable(await engine.segment(**ask, return_base64=True))


async def test_the_refined_path_stays_within_its_box(engine, ask):
    found = segment(await engine.segment(**ask))
    box = found["bbox"]
    assert 0 <= box["x_min"] < box["x_max"] <= 1 and 0 <= box["y_min"] < box["y_max"] <= 1
    commands = parse_path(found["svg_path"]).commands
    assert commands and all(0 <= value <= 1 for _, values in commands for value in values)


@pytest.mark.parametrize("stream", [False, True])
async def test_masks_without_an_image_are_a_value_error(engine, stream):
    with pytest.raises(ValueError, match="return_base64 needs image"):
        await engine.segment(object="dog", return_base64=True, stream=stream)


async def test_a_noun_without_an_image_is_answered_without_masks(engine, encodings):
    result = await engine.segment(object="cat")
    assert not MASKS & set(segment(result))
    assert encodings == []


async def test_an_answer_that_is_not_refined_says_so_once_in_the_log(engine, ask, caplog):
    with caplog.at_level("INFO", logger="kestrel.engine"):
        await engine.segment(**ask, settings={"max_tokens": 5}, request_id="cut-short")
        await engine.segment(object="cat", request_id="no-picture")
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if "not refined" in r.message]
    assert lines == [
        ("WARNING", "request cut-short: not refined (no_path): cut off after 5 tokens"),
        ("INFO", "request no-picture: not refined (no_image)"),
    ]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 9])
async def test_a_cut_answer_is_the_beginning_of_the_whole(engine, ask, encodings, max_tokens):
    whole = segment(await engine.segment(**ask))
    assert len(whole["token_ids"]) > 9 - 3
    result = await engine.segment(**ask, return_base64=True, settings={"max_tokens": max_tokens})
    cut = segment(result)
    assert (result.finish_reason, result.metrics.output_tokens) == ("length", max_tokens)
    assert cut["parse_error"] == f"cut off after {max_tokens} tokens"
    assert cut["svg_path"] == "" and whole["coarse_path"].startswith(cut["coarse_path"])
    assert cut["token_ids"] == whole["token_ids"][: max(0, max_tokens - 3)]
    assert cut["bbox"] == cut["coarse_bbox"] == (whole["coarse_bbox"] if max_tokens > 2 else None)
    assert not MASKS & set(cut) and encodings == []


async def test_a_model_that_raves_gives_an_answer_and_never_an_exception(engine, ask):
    """At this temperature every token is about as likely as any other."""
    wild = {"temperature": 50.0, "max_tokens": 40}
    results = await asyncio.gather(
        *[
            engine.segment(**ask, return_base64=True, settings=wild, request_id=f"wild-{i}")
            for i in range(24)
        ]
    )
    errors = 0
    for result in results:
        found = segment(result)
        json.dumps(found)
        if "parse_error" in found:
            errors += 1
            assert found["svg_path"] == "" and not MASKS & set(found)
        elif found["coarse_bbox"] is None:
            assert found["token_ids"] == [] and found["svg_path"] == ""
    assert errors


# What is returned when


def pair(found: dict[str, Any]) -> tuple[Any, Any]:
    return found["svg_path"], found["bbox"]


async def refined_again(engine, ask, caplog) -> tuple[dict[str, Any], str]:
    """The segment with masks, and the reason that was counted for it; it must be logged once."""
    caplog.clear()
    before = engine.stats()["refinements"]
    found = segment(await engine.segment(**ask, return_base64=True))
    after = engine.stats()["refinements"]
    (reason,) = [key for key in after if after[key] != before.get(key, 0)]
    assert after[reason] == before.get(reason, 0) + 1
    if reason != "refined":
        assert [f"({reason})" in record.getMessage() for record in caplog.records] == [True]
    return found, reason


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


async def test_masks_that_an_engine_without_a_refiner_is_asked_for_are_counted_as_missing(
    engine, ask, monkeypatch, caplog
):
    monkeypatch.setattr(engine, "config", replace(engine.config, refiner=None))
    monkeypatch.setattr(engine, "_refiner", None)
    found, reason = await refined_again(engine, ask, caplog)
    assert reason == "unavailable" and not MASKS & set(found)
    # Its path is the model's by its configuration, and nobody misses the masks of a health check.
    before = engine.stats()["refinements"]
    caplog.clear()
    await engine.segment(**ask)
    await engine._check()
    assert engine.stats()["refinements"] == before and not caplog.records


async def test_a_refiner_that_raises_leaves_the_models_path_and_the_coarse_mask(
    engine, ask, switch, caplog
):
    whole, reason = await refined_again(engine, ask, caplog)
    assert reason == "refined"
    switch.behave = failing(ZeroDivisionError("no luck"))
    found, reason = await refined_again(engine, ask, caplog)
    assert reason == "refine_failed"
    assert caplog.records[0].exc_info and "ZeroDivisionError" in caplog.text
    assert pair(found) == (found["coarse_path"], found["coarse_bbox"])
    assert MASKS & set(found) == {"coarse_mask_base64"}
    assert found["coarse_mask_base64"] == whole["coarse_mask_base64"]


@pytest.mark.parametrize(
    ("behave", "expected"),
    [
        (lambda image, mask: np.zeros_like(mask), "empty_refined"),
        (lambda image, mask: mask[1:], "refine_failed"),
        (lambda image, mask: mask.astype(np.float32), "refine_failed"),
        (lambda image, mask: mask * np.uint8(255), "refine_failed"),
        (lambda image, mask: mask + mask, "refine_failed"),
        (lambda image, mask: 1 - mask, "rejected"),
    ],
)
async def test_a_refined_mask_that_is_none_is_left_out(
    engine, ask, switch, caplog, behave, expected
):
    switch.behave = behave
    found, reason = await refined_again(engine, ask, caplog)
    assert reason == expected
    assert pair(found) == (found["coarse_path"], found["coarse_bbox"])
    assert MASKS & set(found) == {"coarse_mask_base64"}


async def test_a_missing_tracer_costs_the_path_and_no_mask(engine, ask, caplog, monkeypatch):
    monkeypatch.setattr(trace, "load_tracer", failing(tracers.TracerMissing("no tracer here")))
    found, reason = await refined_again(engine, ask, caplog)
    assert reason == "trace_failed" and "no tracer here" in caplog.text
    assert pair(found) == (found["coarse_path"], found["coarse_bbox"])
    assert set(found) == SEGMENT | MASKS


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("no canvas"), "raster_failed"),
        (raster.RasterizerMissing("nothing that paints"), "unavailable"),
    ],
)
async def test_without_a_raster_there_is_no_mask_and_the_path_is_the_models(
    engine, ask, caplog, monkeypatch, error, expected
):
    monkeypatch.setattr(raster, "load_rasterizer", failing(error))
    found, reason = await refined_again(engine, ask, caplog)
    assert reason == expected and str(error) in caplog.text
    assert pair(found) == (found["coarse_path"], found["coarse_bbox"])
    assert not MASKS & set(found)


BOX = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}


@pytest.mark.parametrize(
    ("path", "bbox", "error", "reason", "masks"),
    [
        ("M0 0L1 1L0 0Z", BOX, None, "empty_coarse", {"coarse_mask_base64"}),
        ("M0 0Z", BOX, None, "no_path", set()),
        ("", None, None, "no_path", set()),
        ("M0 0L1 1", BOX, "cut off after 9 tokens", "no_path", set()),
    ],
)
async def test_a_path_that_draws_nothing_is_given_as_it_is(
    engine, path, bbox, error, reason, masks
):
    request = SegmentRequest("dog", picture(), return_base64=True)
    model = ModelResult("id", "stop", "dog", path, bbox, ModelMetrics(), error)
    refined = await engine.refine(request, model)
    assert refined.reason == reason
    found = segment_output(model, refined, return_base64=True)
    assert pair(found) == ("" if error else path, bbox)
    assert MASKS & set(found) == masks
    if masks:
        assert not decode_mask(found["coarse_mask_base64"]).any()
