"""Tokens that become a wrong path, masks that nobody asked for, slots that are not given back."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import encoded, picture

from kestrel.api import (
    BboxEvent,
    DeadlineExceeded,
    InvalidRequest,
    ModelMetrics,
    ModelResult,
    Overloaded,
    PathDelta,
    PromptTooLong,
    SegmentRequest,
    SegmentSettings,
    segment_output,
)
from kestrel.batch import Batch
from kestrel.config import SHIPPED_MODELS, Limits, RefinerConfig, RuntimeConfig
from kestrel.engine import EngineResult, InferenceEngine
from kestrel.image import decode as decode_image
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.overlay import decode_mask
from kestrel.seg_refiner import backends, png, raster, trace
from kestrel.seg_refiner.guided import GuidedRefiner
from kestrel.skills.segment import Coord, Phase, SegmentDecode, Size, Token, build_prompt
from kestrel.svg import ARITY, parse_path, transform

NANO = SHIPPED_MODELS / "nano"
MODEL = MoondreamConfig.from_file(NANO / "config.json")
TOKENIZER = SegmentTokenizer.from_file(NANO / "tokenizer.json", MODEL.prompt)
PIECES = {
    TOKENIZER.decode_path_token(i): i
    for i in range(MODEL.text.vocab_size)
    if TOKENIZER.decode_path_token(i)
}
EOS = MODEL.prompt.eos_id
GRID = MODEL.prompt.path_grid
WHOLE: list[Token] = [Coord(0.5), Coord(0.5), Size(1.0, 1.0)]
MASKS = {"coarse_mask_base64", "refined_mask_base64"}
SEGMENT = {"object", "text", "svg_path", "bbox", "coarse_path", "coarse_bbox", "path_tokens",
           "token_ids", "points", "sizes"}  # fmt: skip

# The same examples on every run, however busy the machine is.
steady = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)


# Tokens to path and box


def decoded(
    tokens: list[Token], max_tokens: int = 10_000, limits: Limits | None = None
) -> tuple[SegmentDecode, list[BboxEvent | PathDelta]]:
    """The decode after ``tokens``, and the events that they gave."""
    decode = SegmentDecode(MODEL.prompt, TOKENIZER, max_tokens, limits or Limits())
    return decode, [event for event in map(decode.push, tokens) if event is not None]


def spelled(text: str) -> list[Token]:
    """Ids of path text whose parts are set apart by spaces."""
    return [PIECES[piece] for piece in text.split()]


def result_of(decode: SegmentDecode) -> dict[str, Any]:
    """The segment that the Python door would give, without refinement."""
    model = ModelResult(
        "id", decode.finish_reason, "dog", decode.path, decode.bbox, ModelMetrics(),
        decode.parse_error, decode.text, decode.token_ids, decode.path_tokens, decode.points,
        decode.sizes,
    )  # fmt: skip
    return segment_output(model, None, return_base64=True)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("M 480 0 L 960 960 Z", "M0.5 0L1 1Z"),
        ("M 0 0 L 960 0 480 960 Z", "M0 0L1 0L0.5 1Z"),
        ("M 0 0 960 0 480 960 z", "M0 0L1 0L0.5 1z"),
        ("m 96 96 192 0 - 96 192 z", "m0.1 0.1l0.2 0l-0.1 0.2z"),
        ("M 1 2 H 320 V 960 h - 1 v - 2 Z", "M0.00104 0.00208H0.33333V1h-0.00104v-0.00208Z"),
        ("M 0 0 C 96 0 192 96 192 192 S 0 0 96 96 Z", "M0 0C0.1 0 0.2 0.1 0.2 0.2S0 0 0.1 0.1Z"),
        ("M 0 0 Q 480 0 480 480 T 960 960", "M0 0Q0.5 0 0.5 0.5T1 1"),
        ("M 0 0 A 96 192 45 1 0 480 480 Z", "M0 0A0.1 0.2 45 1 0 0.5 0.5Z"),
        ("M 0 0 L - 0 0 Z", "M0 0L0 0Z"),
    ],
)
def test_the_path_is_what_was_spelled_in_parts_of_the_box(text: str, path: str) -> None:
    decode, _ = decoded([*WHOLE, *spelled(text), EOS])
    assert (decode.path, decode.parse_error, decode.finish_reason) == (path, None, "stop")
    assert decode.phase is Phase.DONE


def test_a_box_over_the_edge_is_cut_and_the_path_keeps_its_place() -> None:
    tokens = [Coord(0.0), Coord(0.75), Size(0.5, 1.0), *spelled("M 480 0 L 960 480 Z"), EOS]
    decode, events = decoded(tokens)
    assert decode.bbox == {"x_min": 0.0, "y_min": 0.25, "x_max": 0.25, "y_max": 1.0}
    assert events[0] == BboxEvent(decode.bbox)
    # The centre of the model's box is the left edge of the one that is left of it.
    assert decode.path == "M0 0L1 0.66667Z"
    assert (decode.points, decode.sizes) == ([(0.0, 0.75)], [(0.5, 1.0)])


def test_a_number_that_rounds_to_zero_is_written_without_a_sign() -> None:
    # In this box 420 falls on the edge of the image but for the last bit.
    decode, _ = decoded([Coord(1 / 32), Coord(0.5), Size(0.5, 1.0), *spelled("M 420 0 H 960"), EOS])
    assert decode.path == "M0 0H1"


def test_the_end_in_the_first_place_means_that_nothing_was_found() -> None:
    decode, events = decoded([EOS])
    assert (decode.path, decode.bbox, decode.parse_error, events) == ("", None, None, [])
    assert decode.finish_reason == "stop" and decode.output_tokens == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([30], "first two tokens"),
        ([Size(0.5, 0.5)], "first two tokens"),
        ([Coord(0.5), EOS], "first two tokens"),
        ([Coord(0.5), Coord(0.5), EOS], "third token"),
        ([Coord(0.5), Coord(0.5), Coord(0.5)], "third token"),
        ([*WHOLE, EOS], "a box and no path"),
        ([*WHOLE, Coord(0.5)], "within the path"),
        ([*WHOLE, *spelled("M 0 0 L 5"), EOS], "L has 1 of 2"),
        ([*WHOLE, *spelled("M 0 0 L 5 Z")], "L has 1 of 2"),
        ([*WHOLE, *spelled("M 0 0 L"), EOS], "L has 0 of 2"),
        ([*WHOLE, *spelled("L")], "begins with L"),
        ([*WHOLE, *spelled("5")], "number 5"),
        ([*WHOLE, *spelled("M 0 0 Z 5")], "number 5"),
        ([*WHOLE, *spelled("M - -")], "two minus signs"),
        ([*WHOLE, *spelled("M 0 0 L 5 5 -"), EOS], "minus sign without"),
        ([*WHOLE, *spelled("M 0 0 A 9 9 0 2 0 9 9")], "flag is 2"),
        ([*WHOLE, *spelled("M 0 0"), MODEL.text.vocab_size + 5], "no part of a path"),
    ],
)
def test_tokens_that_are_no_path_end_the_request_with_the_reason(
    tokens: list[Token], message: str
) -> None:
    decode, _ = decoded(tokens)
    assert decode.phase is Phase.DONE
    assert message in (decode.parse_error or "")
    assert result_of(decode)["svg_path"] == ""


def test_a_path_of_too_many_commands_is_no_path() -> None:
    text = "M 0 0" + " L 1 1" * 10
    decode, _ = decoded([*WHOLE, *spelled(text), EOS], limits=Limits(max_path_commands=5))
    assert "more than 5" in (decode.parse_error or "")
    assert decode.path == "M0 0" + "L0.00104 0.00104" * 4


unit = st.floats(0, 1)
coords = st.builds(Coord, unit)
sizes = st.builds(Size, unit, unit)
pieces = st.sampled_from(sorted(PIECES.values()))
any_token = (
    st.integers(-3, MODEL.text.vocab_size + 3)
    | pieces
    | st.sampled_from([*spelled("M L C Z z - 0 5"), EOS])
    | coords
    | sizes
)
boxes = st.tuples(coords, coords, sizes).map(list)
letters = st.sampled_from("MmLlHhVvCcSsQqTtZz")


@st.composite
def paths(draw: st.DrawFn) -> list[Token]:
    """Ids of a path in the grammar, without arcs, with implicit repeats and negative numbers."""
    tokens = spelled("M")
    letter = "M"
    for _ in range(draw(st.integers(1, 6))):
        for _ in range(ARITY[letter.upper()] * draw(st.integers(1, 2))):
            # A minus sign is a token of its own; the grid's upper end is the box's.
            value = draw(st.integers(-GRID if letter.islower() else 0, GRID))
            tokens += spelled(f"- {-value}" if value < 0 else str(value))
        letter = draw(letters)
        tokens.append(PIECES[letter])
    for _ in range(ARITY[letter.upper()]):
        tokens += spelled(str(draw(st.integers(0, GRID))))
    return tokens


def check_invariants(
    decode: SegmentDecode, events: list[BboxEvent | PathDelta], tokens: list[Token]
) -> None:
    """What holds for any tokens at all."""
    chunks = [event for event in events if isinstance(event, PathDelta)]
    assert "".join(event.chunk for event in chunks) == decode.path
    assert [event for event in events[:1] if isinstance(event, BboxEvent)] == (
        [BboxEvent(decode.bbox)] if decode.bbox is not None else []
    )
    assert all(isinstance(event, PathDelta) for event in events[1:])
    indices = [event.token_index for event in chunks]
    assert indices == sorted(set(indices)) and all(4 <= i <= len(tokens) for i in indices)
    assert 0 <= decode.output_tokens <= min(len(tokens), decode.max_tokens)
    if decode.bbox is not None:
        box = decode.bbox
        assert 0 <= box["x_min"] < box["x_max"] <= 1 and 0 <= box["y_min"] < box["y_max"] <= 1
    # Every chunk is a whole command, so what could be read is path data itself.
    assert bool(parse_path(decode.path).commands) == bool(decode.path)
    segment = result_of(decode)
    json.dumps(segment, allow_nan=False)
    if decode.parse_error is not None:
        assert decode.phase is Phase.DONE
        assert segment["parse_error"] == decode.parse_error and segment["svg_path"] == ""
        assert segment["coarse_path"] == decode.path and segment["coarse_bbox"] == decode.bbox
    elif decode.phase is Phase.DONE:
        assert "parse_error" not in segment and segment["svg_path"] == decode.path
        assert (decode.bbox is None) == (decode.path == "")


@steady
@given(st.lists(any_token, max_size=40), st.integers(1, 30))
def test_no_tokens_at_all_are_an_exception(tokens: list[Token], max_tokens: int) -> None:
    check_invariants(*decoded(tokens, max_tokens), tokens)


@steady
@given(boxes, st.lists(pieces | st.just(EOS), max_size=60), st.integers(1, 80))
def test_no_spelling_within_a_box_is_an_exception(
    box: list[Token], text: list[Token], max_tokens: int
) -> None:
    tokens = [*box, *spelled("M"), *text]
    check_invariants(*decoded(tokens, max_tokens), tokens)


@steady
@given(boxes, paths(), st.data())
def test_a_path_with_one_wrong_token_is_read_up_to_there(
    box: list[Token], text: list[Token], data: st.DataObject
) -> None:
    tokens = [*box, *text, EOS]
    place = data.draw(st.integers(0, len(tokens) - 1))
    wrong = [*tokens[:place], data.draw(any_token), *tokens[place + 1 :]]
    decode, events = decoded(wrong)
    check_invariants(decode, events, wrong)
    before, _ = decoded(wrong[:place])
    assert decode.path.startswith(before.path)


@steady
@given(boxes, paths(), st.integers(1, 60))
def test_a_path_that_is_cut_off_is_a_prefix_of_the_whole(
    box: list[Token], text: list[Token], max_tokens: int
) -> None:
    tokens = [*box, *text, EOS]
    whole, _ = decoded(tokens)
    assume(whole.parse_error is None and max_tokens < len(tokens))
    cut, events = decoded(tokens, max_tokens)
    check_invariants(cut, events, tokens)
    assert cut.finish_reason == "length" and cut.output_tokens == max_tokens
    assert cut.parse_error == f"cut off after {max_tokens} tokens"
    assert whole.path.startswith(cut.path)
    assert cut.token_ids == whole.token_ids[: max(0, max_tokens - 3)]
    assert cut.bbox == (whole.bbox if max_tokens >= 3 else None)


@steady
@given(boxes, paths())
def test_a_path_in_the_grammar_means_what_the_spelling_means(
    box: list[Token], text: list[Token]
) -> None:
    decode, events = decoded([*box, *text, EOS])
    assume(decode.bbox is not None)
    assert decode.bbox is not None
    check_invariants(decode, events, [*box, *text, EOS])
    assert (decode.parse_error, decode.finish_reason) == (None, "stop")
    (cx,), (cy,), (width, height) = box  # type: ignore[misc]
    meant = transform(
        parse_path(decode.text), width / GRID, height / GRID, cx - width / 2, cy - height / 2
    )
    x_min, y_min = decode.bbox["x_min"], decode.bbox["y_min"]
    given_width, given_height = decode.bbox["x_max"] - x_min, decode.bbox["y_max"] - y_min
    written = transform(parse_path(decode.path), given_width, given_height, x_min, y_min)
    assert [name for name, _ in written.commands] == [name for name, _ in meant.commands]
    # Half of the fifth digit of the box, for every command that another begins where it ends.
    slack = 0.5e-5 * (len(meant.commands) + 2) * 4
    for (_, found), (_, expected) in zip(written.commands, meant.commands, strict=True):
        assert found == pytest.approx(expected, abs=slack)


NUMBER = r"-?(?:0|[1-9]\d*)(?:\.\d{0,4}[1-9])?"
CHUNK = re.compile(rf"[A-Za-z](?:{NUMBER}(?: {NUMBER})*)?")


@steady
@given(boxes, paths())
def test_every_chunk_is_one_command_with_five_decimals_at_most(
    box: list[Token], text: list[Token]
) -> None:
    _, events = decoded([*box, *text, EOS])
    for event in events:
        if isinstance(event, PathDelta):
            assert CHUNK.fullmatch(event.chunk), event.chunk
            assert "-0" not in re.findall(rf"{NUMBER}", event.chunk)
            numbers = len(re.findall(NUMBER, event.chunk[1:]))
            assert numbers == ARITY[event.chunk[0].upper()]


def test_what_comes_after_the_end_changes_nothing() -> None:
    decode, _ = decoded([*WHOLE, *spelled("M 0 0 L 9 9 Z"), EOS])
    before = (decode.path, decode.output_tokens, list(decode.token_ids), decode.parse_error)
    for token in (EOS, PIECES["M"], Coord(0.5), Size(0.1, 0.1)):
        assert decode.push(token) is None
    after = (decode.path, decode.output_tokens, list(decode.token_ids), decode.parse_error)
    assert after == before


# The engine


class Switch:
    """A refiner backend: the guided filter until a test says otherwise."""

    def __init__(self) -> None:
        self.guided = GuidedRefiner(RefinerConfig())
        self.behave: Callable[[np.ndarray, np.ndarray], np.ndarray] = self.guided

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.behave(image, mask)


@pytest.fixture(scope="module")
def switched() -> Iterator[Switch]:
    made = Switch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "switch", lambda config: made)
        yield made


@pytest.fixture
def switch(switched: Switch) -> Iterator[Switch]:
    yield switched
    switched.behave = switched.guided


CONFIG: dict[str, Any] = {"device": "cpu", "torch_threads": 1}


@pytest.fixture(scope="module")
def engine(switched: Switch) -> Iterator[InferenceEngine]:
    """The shipped model with four slots; tests may use it from any event loop."""
    config = RuntimeConfig(max_batch_size=4, refiner=RefinerConfig(refiner="switch"), **CONFIG)
    made = asyncio.run(InferenceEngine.create(config))
    yield made
    asyncio.run(made.shutdown())


def sample(file: File) -> bytes:
    with Image.open(file) as image:
        return encoded(image.convert("RGB").resize((203, 157)), "PNG")


SAMPLES = [
    {"object": entry["noun"], "image": sample(NANO / "samples" / entry["file"])}
    for entry in json.loads((NANO / "samples" / "samples.json").read_text())
]


@pytest.fixture(scope="module")
def ask(engine: InferenceEngine) -> dict[str, Any]:
    """Arguments that the model answers with a path which is then refined."""

    async def first() -> dict[str, Any] | None:
        for arguments in SAMPLES:
            result = await engine.segment(**arguments, return_base64=True)
            if set(segment(result)) > MASKS:
                return arguments
        return None

    found = asyncio.run(first())
    assert found is not None, "the engine gives both masks for none of the samples"
    return found


def segment(result: EngineResult) -> dict[str, Any]:
    (only,) = result.output["segments"]
    return only


def comparable(result: EngineResult) -> dict[str, Any]:
    """What two runs of one request must agree in."""
    tokens = (result.metrics.input_tokens, result.metrics.output_tokens)
    return {**segment(result), "finish_reason": result.finish_reason, "tokens": tokens}


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


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 30)


# Masks


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
    monkeypatch.setattr(trace, "load_tracer", failing(trace.TracerMissing("no tracer here")))
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


# One batch


async def test_requests_of_one_batch_get_the_answers_they_get_alone(engine):
    asked = [SAMPLES[i % len(SAMPLES)] for i in range(0, 3 * len(SAMPLES), 3)][:10]
    asked = [{"object": "cat"}, asked[0], *asked]
    # Prompts of many lengths, the shortest first: none may see another's positions.
    refs = [[0.1, 0.1, 0.9, 0.9]] * 16
    asked = [
        {**arguments, "return_base64": True, "spatial_refs": refs[: 3 * (i % 4)]}
        if "image" in arguments
        else arguments
        for i, arguments in enumerate(asked)
    ]
    alone = [comparable(await engine.segment(**arguments)) for arguments in asked]
    steps = engine.stats()["steps"]
    together = await asyncio.gather(*[engine.segment(**arguments) for arguments in asked])
    tokens = sum(result.metrics.output_tokens for result in together)
    assert engine.stats()["steps"] - steps < tokens, "they did not decode together"
    assert [comparable(result) for result in together] == alone


async def test_a_request_that_draws_lots_is_not_swayed_by_its_neighbours(engine, ask):
    warm = {"temperature": 0.8, "top_p": 0.9}

    async def draw(name: str) -> dict[str, Any]:
        return comparable(await engine.segment(**ask, settings=warm, request_id=name))

    names = [f"draw-{i}" for i in range(6)]
    alone = [await draw(name) for name in names]
    assert await asyncio.gather(*map(draw, names)) == alone


async def test_longer_and_shorter_neighbours_come_and_go(engine, ask):
    async def cut(n: int) -> list[int]:
        return segment(await engine.segment(**ask, settings={"max_tokens": n}))["token_ids"]

    whole = segment(await engine.segment(**ask))["token_ids"]
    lengths = [4, 9, 5, 7, 4, 8, 6, 5]
    assert await asyncio.gather(*map(cut, lengths)) == [whole[: n - 3] for n in lengths]


# Slots


class Gate:
    """Holds the engine's thread before a step until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, step = Gate(), Batch.step

    def gated(batch: Batch, joining: Any) -> None:
        made.reached.set()
        assert made.opened.wait(30)
        step(batch, joining)

    monkeypatch.setattr(Batch, "step", gated)
    yield made
    made.opened.set()


@pytest.fixture
def counted(engine: InferenceEngine) -> Callable[[str], int]:
    before = engine.stats()
    return lambda key: engine.stats().get(key, 0) - before.get(key, 0)


@pytest.mark.parametrize("leave", ["cancel", "close", "drop", "deadline"])
async def test_leaving_a_running_request_frees_its_slot(engine, ask, gate, counted, leave):
    if leave == "cancel":
        task = asyncio.create_task(engine.segment(**ask))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif leave == "deadline":
        with pytest.raises(DeadlineExceeded):
            await engine.segment(**ask, timeout_s=0.2)
    else:
        stream = await engine.segment(**ask, stream=True)
        await gate.wait()
        if leave == "close":
            await stream.aclose()
            assert [update async for update in stream] == []
        del stream
    gate.opened.set()
    await until(lambda: counted("cancelled") + counted("late") == 1)
    await until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
    assert counted("completed") == 0
    whole = comparable(await engine.segment(**ask))
    assert whole["finish_reason"] == "stop"


async def test_requests_that_are_cancelled_by_the_dozen_leave_every_slot_free(
    engine, ask, gate, counted
):
    tasks = [asyncio.create_task(engine.segment(**ask)) for _ in range(12)]
    await gate.wait()
    assert engine.stats()["waiting"] + engine.stats()["running"] >= 8
    for task in tasks[:11]:
        task.cancel()
    await asyncio.wait(tasks[:11])
    gate.opened.set()
    assert (await tasks[11]).finish_reason == "stop"
    await until(lambda: counted("cancelled") == 11)
    # All slots still serve: as many requests again as there are slots, at once.
    results = await asyncio.gather(*[engine.segment(**ask) for _ in range(4)])
    assert len({json.dumps(segment(result)) for result in results}) == 1


async def test_a_request_that_is_cancelled_in_refinement_leaves_nothing_behind(engine, ask, switch):
    entered, release = threading.Event(), threading.Event()

    def slow(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        entered.set()
        assert release.wait(30)
        return mask

    switch.behave = slow
    task = asyncio.create_task(engine.segment(**ask))
    try:
        assert await asyncio.to_thread(entered.wait, 30)
        assert engine.stats()["refining"] == 1 and engine.stats()["running"] == 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.stats()["refining"] == 0
    finally:
        release.set()
    switch.behave = switch.guided
    assert segment(await engine.segment(**ask))["svg_path"]


async def test_a_picture_that_cannot_be_decoded_takes_no_slot_for_long(engine, ask):
    broken = ask["image"][: len(ask["image"]) // 2]
    with pytest.raises(InvalidRequest) as caught:
        await engine.segment(object="dog", image=broken)
    assert caught.value.field == "image"
    await until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
    assert (await engine.segment(**ask)).finish_reason == "stop"


async def test_a_noun_longer_than_the_context_is_refused_before_it_waits(engine, counted):
    with pytest.raises(PromptTooLong) as caught:
        # A reference costs up to three positions, a letter of no word up to four.
        await engine.segment(object="\U00013000" * 256, image=picture())
    assert caught.value.field == "object"
    assert counted("completed") == 0 and engine.stats()["waiting"] == 0


# Metrics


async def test_metrics_count_what_was_read_and_written(engine, ask):
    result = await engine.segment(**ask, spatial_refs=[[0.5, 0.5], [0.1, 0.1, 0.9, 0.9]])
    request = SegmentRequest(
        ask["object"], ask["image"], spatial_refs=[(0.5, 0.5), (0.1, 0.1, 0.9, 0.9)]
    )
    metrics = result.metrics
    prompt = build_prompt(request, MODEL, TOKENIZER)
    assert metrics.input_tokens == prompt.length
    assert prompt.length > MODEL.vision.n_patches
    found = segment(result)
    if found["bbox"] is not None and result.finish_reason == "stop" and "parse_error" not in found:
        assert metrics.output_tokens == len(found["token_ids"]) + 4  # centre, size, end
    times = (metrics.prefill_time_ms, metrics.decode_time_ms, metrics.ttft_ms)
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert metrics.ttft_ms >= metrics.prefill_time_ms > 0


async def test_the_default_of_settings_is_greedy(engine, ask):
    explicit = SegmentSettings(temperature=0.0, top_p=1.0, max_tokens=engine.max_context)
    one, other = [await engine.segment(**ask, settings=s) for s in (None, explicit)]
    assert comparable(one) == comparable(other)


# Shutdown


def own_threads() -> set[threading.Thread]:
    names = ("engine", "refine", "crop")
    return {thread for thread in threading.enumerate() if thread.name.startswith(names)}


async def test_shutdown_fails_what_runs_and_leaves_no_thread(engine, ask, gate):
    others = own_threads()
    gate.opened.set()
    second = await InferenceEngine.create(RuntimeConfig(max_batch_size=1, **CONFIG))
    assert own_threads() > others
    gate.opened.clear()
    gate.reached.clear()
    streams = [await second.segment(**ask, stream=True) for _ in range(3)]
    await gate.wait()
    ending = asyncio.create_task(second.shutdown())
    await until(lambda: second._scheduler._closing)
    with pytest.raises(Overloaded):
        await second.segment(**ask)
    gate.opened.set()
    await ending
    await second.shutdown()
    for stream in streams:
        with pytest.raises(Overloaded):
            await stream.result()
    await until(lambda: own_threads() <= others)
    assert (await engine.segment(**ask)).finish_reason == "stop"


def test_a_script_that_forgets_to_shut_down_still_ends_well() -> None:
    script = (
        "import asyncio\n"
        "from kestrel import InferenceEngine, RuntimeConfig\n"
        "async def main():\n"
        "    global engine\n"
        "    engine = await InferenceEngine.create(RuntimeConfig(device='cpu', torch_threads=1))\n"
        "    stream = await engine.segment(object='cat', stream=True)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr
