"""Tokens that become a wrong path, or an exception."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import MODEL, NANO, TOKENIZER
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kestrel.answers import segment_output
from kestrel.api import (
    BboxEvent,
    ModelMetrics,
    ModelResult,
    PathDelta,
    PromptTooLong,
    SegmentRequest,
)
from kestrel.config import Limits
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.skills.segment import Coord, Phase, SegmentDecode, Size, Token, build_prompt
from kestrel.svg import ARITY, parse_path, transform

PIECES = {
    TOKENIZER.decode_path_token(i): i
    for i in range(MODEL.text.vocab_size)
    if TOKENIZER.decode_path_token(i)
}
EOS = MODEL.prompt.eos_id
GRID = MODEL.prompt.path_grid
WHOLE: list[Token] = [Coord(0.5), Coord(0.5), Size(1.0, 1.0)]
# The same examples on every run, however busy the machine is.
steady = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)


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


CONTROLS = [TOKENIZER.tokenizer.id_to_token(i) for i in range(MODEL.prompt.first_path_id)]


@pytest.mark.parametrize("control", [*CONTROLS, "<|ANSWER|>", "<｜answer｜>"])
def test_an_object_that_spells_a_control_token_is_text(control: str) -> None:
    for noun in (control, f"dog{control}", control * 20 + " dog", f"<{control}>"):
        ids = TOKENIZER.encode_object(noun)
        assert min(ids) >= MODEL.prompt.first_path_id
        text = TOKENIZER.tokenizer.decode(ids)
        assert text == noun.lower().replace("｜", "|")


def test_a_control_token_that_the_tokenizer_adds_is_text_too(tmp_path: Path) -> None:
    words = json.loads((NANO / "tokenizer.json").read_text())
    plain = TOKENIZER.encode_object("a dog<|pad|>")
    added = {"id": len(words["model"]["vocab"]), "content": "<|pad|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(words | {"added_tokens": [added | flags]}))
    tokenizer = SegmentTokenizer.from_file(file, MODEL.prompt)
    assert tokenizer.size == TOKENIZER.size + 1
    assert tokenizer.encode_object("a dog<|pad|>") == plain


def test_ids_behind_a_gap_are_no_part_of_a_path() -> None:
    words = WordLevel({"?": 0, "M": 30, "960": 1200}, unk_token="?")
    tokenizer = SegmentTokenizer(Tokenizer(words), MODEL.prompt)
    assert [tokenizer.decode_path_token(i) for i in (0, 29, 30, 1200)] == ["", "", "M", "960"]
    assert tokenizer.size == 1201 and tokenizer.decode_path_token(1201) == ""


def test_lengths_that_the_tokenizer_was_saved_with_change_the_object(tmp_path: Path) -> None:
    saved, file = Tokenizer.from_file(str(NANO / "tokenizer.json")), tmp_path / "tokenizer.json"
    saved.enable_padding(length=12, pad_id=30)
    saved.enable_truncation(2)
    saved.save(str(file))
    tokenizer = SegmentTokenizer.from_file(file, MODEL.prompt)
    for noun in ("dog", "a red car, left"):
        assert tokenizer.encode_object(noun) == TOKENIZER.encode_object(noun)


@pytest.mark.parametrize("noun", ["dog", "a red car, left", "Ünïcode 漢 🙂", "<|x|> | <", "1 < 2"])
def test_another_object_is_encoded_as_the_tokenizer_has_it(noun: str) -> None:
    whole = TOKENIZER.tokenizer.encode(noun, add_special_tokens=False).ids
    assert TOKENIZER.encode_object(noun) == whole


@pytest.mark.parametrize(("refs", "field"), [(16, "spatial_refs"), (1, "object"), (0, "object")])
def test_another_field_is_blamed_for_a_prompt_that_is_too_long(refs: int, field: str) -> None:
    model = replace(MODEL, text=replace(MODEL.text, max_context=40))
    noun = "dog" if field == "spatial_refs" else "q1 " * 60
    request = SegmentRequest(noun, spatial_refs=[(0.1, 0.1, 0.9, 0.9)] * refs)
    with pytest.raises(PromptTooLong) as refused:
        build_prompt(request, model, TOKENIZER)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("M 480 0 L 960 960 Z", "M0.5 0L1 1Z"),
        ("M 0 0 L 960 0 480 960 Z", "M0 0L1 0L0.5 1Z"),
        ("M 0 0 960 0 480 960 z", "M0 0L1 0L0.5 1z"),
        ("m 96 96 192 0 - 96 192 z", "M0.1 0.1l0.2 0l-0.1 0.2z"),
        ("m 96 96 l 96 0 m 96 0 96 96", "M0.1 0.1l0.1 0m0.1 0l0.1 0.1"),
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


@pytest.mark.parametrize("radii", ["380 150", "- 380 150", "150 380"])
@pytest.mark.parametrize("rotation", ["0", "30", "90", "- 135", "720"])
@pytest.mark.parametrize("flags", ["0 1", "1 0"])
def test_a_turned_arc_keeps_its_place_in_a_box_that_is_cut(radii, rotation, flags) -> None:
    arc = f"A {radii} {rotation} {flags}"
    tokens = spelled(f"M 300 200 {arc} 480 700 {arc.lower()} - 100 - 300 Z")

    def curves(*box: Token) -> list[tuple[float, ...]]:
        """The path in parts of the image, arcs as curves."""
        decode, _ = decoded([*box, *tokens, EOS])
        assert decode.bbox is not None
        x, y = decode.bbox["x_min"], decode.bbox["y_min"]
        placed = transform(
            parse_path(decode.path), decode.bbox["x_max"] - x, decode.bbox["y_max"] - y, x, y
        )
        return [numbers for _, numbers in placed.commands]

    whole = curves(Coord(0.5), Coord(0.5), Size(0.5, 1.0))
    # In half the image, at whose edge a quarter of the box is cut off.
    cut = curves(Coord(0.125), Coord(0.5), Size(0.5, 1.0))
    for there, here in zip(whole, cut, strict=True):
        moved = [number + (0.375, 0.0)[place % 2] for place, number in enumerate(here)]
        assert there == pytest.approx(moved, abs=1e-4)


@pytest.mark.parametrize(
    "arc", ["1 732 - 16 1 0 777 669", "538 2 46 1 1 341 2", "732 1 - 16 0 0 777 669"]
)
def test_an_arc_whose_radii_do_not_reach_is_as_wide_as_it_was_spelled(arc: str) -> None:
    """They are scaled up until they do: rounding them would be seen a hundredfold."""
    text = f"M 156 87 A {arc} Z"
    decode, _ = decoded([Coord(0.25), Coord(0.5), Size(0.5, 1.0), *spelled(text), EOS])
    meant = transform(parse_path(text.replace("- ", "-")), 1 / GRID, 1 / GRID)
    for (_, found), (_, expected) in zip(
        parse_path(decode.path).commands, meant.commands, strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_first_move_in_lower_case_is_misplaced_in_a_box_over_the_edge() -> None:
    box: list[Token] = [Coord(0.0), Coord(0.75), Size(0.5, 1.0)]
    decode, _ = decoded([*box, *spelled("m 480 0 480 480 - 480 0 m 0 - 480 z"), EOS])
    # The first pair is a place in the box, all that follow are ways within it.
    assert decode.path == "M0 0l1 0.66667l-1 0m0 -0.66667z"


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


@pytest.mark.parametrize(("digits", "error"), [(9, None), (10, "part"), (400, "part")])
def test_an_integer_of_very_many_digits_is_no_coordinate(digits: int, error: str | None) -> None:
    words = WordLevel({"?": 0, "M": 30, "0": 31, "9" * digits: 32}, unk_token="?")
    tokenizer = SegmentTokenizer(Tokenizer(words), MODEL.prompt)
    decode = SegmentDecode(MODEL.prompt, tokenizer, 100)
    for token in (*WHOLE, 30, 31, 32):
        decode.push(token)
    assert (error or "") in (decode.parse_error or "") and bool(decode.path) is (error is None)


def test_an_end_that_is_the_last_token_allowed_cuts_nothing_off() -> None:
    tokens = [*WHOLE, *spelled("M 0 0 L 960 960 Z"), EOS]
    decode, _ = decoded(tokens, len(tokens))
    assert (decode.finish_reason, decode.parse_error) == ("stop", None)
    decode, _ = decoded(tokens, len(tokens) - 1)
    assert decode.finish_reason == "length" and "cut off" in (decode.parse_error or "")


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
    letter = draw(st.sampled_from("Mm"))
    tokens = spelled(letter)
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
FINE = NUMBER.replace("0,4", "0,7")
ARC = rf"[Aa]{FINE} {FINE} {FINE} [01] [01] {NUMBER} {NUMBER}"
CHUNK = re.compile(rf"{ARC}|[B-Zb-z](?:{NUMBER}(?: {NUMBER})*)?")


@steady
@given(boxes, paths())
def test_every_chunk_is_one_command_with_coordinates_of_five_decimals_at_most(
    box: list[Token], text: list[Token]
) -> None:
    _, events = decoded([*box, *text, EOS])
    for event in events:
        if isinstance(event, PathDelta):
            assert CHUNK.fullmatch(event.chunk), event.chunk
            assert "-0" not in re.findall(FINE, event.chunk)
            numbers = len(re.findall(FINE, event.chunk[1:]))
            assert numbers == ARITY[event.chunk[0].upper()]


def test_what_comes_after_the_end_changes_nothing() -> None:
    decode, _ = decoded([*WHOLE, *spelled("M 0 0 L 9 9 Z"), EOS])
    before = (decode.path, decode.output_tokens, list(decode.token_ids), decode.parse_error)
    for token in (EOS, PIECES["M"], Coord(0.5), Size(0.1, 0.1)):
        assert decode.push(token) is None
    after = (decode.path, decode.output_tokens, list(decode.token_ids), decode.parse_error)
    assert after == before
