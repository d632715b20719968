"""A flag or a setting that is taken for something else than was asked, at either door."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serving import base64_text, picture

from kestrel.api import (
    MAX_CONTEXT,
    InvalidRequest,
    RequestError,
    SegmentRequest,
    SegmentSettings,
    UnknownModel,
    image_size,
    parse_segment_json,
    validate_segment,
)
from kestrel.config import Limits, RuntimeConfig
from kestrel.openapi import openapi_document

CONTEXT = 1000
PICTURE = picture(7, 5)
PICTURE_TEXT = base64_text(PICTURE)
FLAGS = ("stream", "return_base64")
NO_BOOLEANS = ["true", "false", "", "yes", 1, 0, 1.0, 0.0, -1, None, [], [True], {}, {"a": True}]

# The same examples on every run, however busy the machine is.
steady = settings(
    derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, CONTEXT, CONTEXT + 1, 2**63, -(10**400), 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(0, 1)
    | st.text(max_size=20)
    | st.sampled_from(["true", "null", "dog", "nano", "\0", "\ud800", " ", PICTURE_TEXT])
)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["temperature", "top_p", "max_tokens"]) | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def parse(fields: dict[str, Any]) -> SegmentRequest:
    return parse_segment_json(
        json.dumps(fields).encode(),
        limits=Limits(),
        served_model="nano",
        max_context=CONTEXT,
    )


def ask(**fields: Any) -> dict[str, Any]:
    return {"object": "dog", "image_url": PICTURE_TEXT, **fields}


def refused(fields: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(fields)
    assert caught.value.status == 400
    return caught.value


# Defaults


def test_a_request_of_a_noun_alone_asks_for_no_stream_and_no_masks() -> None:
    request = parse({"object": "dog"})
    assert request.stream is False and request.return_base64 is False
    assert request.image is None and request.spatial_refs is None
    assert request.settings == SegmentSettings(temperature=0.0, top_p=1.0, max_tokens=768)


def test_both_doors_have_the_same_defaults() -> None:
    assert parse({"object": "dog"}) == validate_segment(object="dog", max_context=CONTEXT)


@pytest.mark.parametrize("name", ["image_url", "spatial_refs", "settings", "model"])
def test_null_is_the_same_as_absent_where_there_is_no_default_value(name: str) -> None:
    assert parse({"object": "dog", name: None}) == parse({"object": "dog"})


def test_default_max_tokens_fits_a_model_with_a_small_context() -> None:
    request = validate_segment(object="dog", max_context=512)
    assert request.settings.max_tokens == 512


@pytest.mark.parametrize("context", [None, 2 * MAX_CONTEXT])
def test_max_tokens_has_a_bound_whatever_the_model_takes(context: int | None) -> None:
    def taken(tokens: int) -> int:
        settings = {"max_tokens": tokens}
        return validate_segment(
            object="dog", settings=settings, max_context=context
        ).settings.max_tokens

    assert taken(MAX_CONTEXT) == MAX_CONTEXT
    with pytest.raises(InvalidRequest, match=f"1..{MAX_CONTEXT}"):
        taken(MAX_CONTEXT + 1)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_file_is_taken_in_whatever_holds_its_bytes(kind: type) -> None:
    image = validate_segment(object="dog", image=kind(PICTURE)).image
    assert isinstance(image, bytes) and image == PICTURE


def test_an_image_counts_by_the_bytes_that_hold_it() -> None:
    assert image_size(PICTURE) == len(PICTURE)
    assert image_size(np.zeros((7, 5, 3), np.uint8)) == 7 * 5 * 3
    assert image_size(None) == 0


# The flags


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", [True, False])
def test_a_json_boolean_is_what_the_request_then_says(flag: str, value: bool) -> None:
    request = parse(ask(**{flag: value}))
    assert getattr(request, flag) is value
    other = FLAGS[1 - FLAGS.index(flag)]
    assert getattr(request, other) is False


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", NO_BOOLEANS, ids=repr)
def test_what_looks_like_a_boolean_is_none(flag: str, value: Any) -> None:
    assert refused(ask(**{flag: value})).field == flag
    with pytest.raises(ValueError, match=f"{flag} must be true or false"):
        validate_segment(object="dog", image=PICTURE, **{flag: value})


@pytest.mark.parametrize("flag", FLAGS)
def test_a_numpy_boolean_is_no_boolean(flag: str) -> None:
    with pytest.raises(InvalidRequest, match="bool") as caught:
        validate_segment(object="dog", image=PICTURE, **{flag: np.bool_(True)})
    assert caught.value.field == flag


@pytest.mark.parametrize("flag", ["Stream", "returnBase64", "return-base64", "return_base64 "])
def test_a_misspelt_flag_is_an_unknown_field_and_asks_for_nothing(flag: str) -> None:
    assert parse(ask(**{flag: True})) == parse(ask())


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_within_the_settings_is_refused_there(flag: str) -> None:
    error = refused(ask(settings={flag: True}))
    assert error.field == f"settings.{flag}"
    assert "temperature, top_p, max_tokens" in error.message


# Combinations


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("image", [{}, {"image_url": None}])
def test_masks_without_an_image_are_refused(image: dict[str, Any], stream: bool) -> None:
    error = refused({"object": "dog", "return_base64": True, "stream": stream} | image)
    assert error.field == "return_base64" and "image_url" in error.message
    with pytest.raises(ValueError, match="return_base64 needs image"):
        validate_segment(object="dog", return_base64=True, stream=stream)


def test_a_wrong_flag_is_named_even_where_the_image_is_missing() -> None:
    assert "true or false" in refused({"object": "dog", "return_base64": "true"}).message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("return_base64", [False, True])
def test_every_combination_of_flags_is_taken_with_an_image(
    stream: bool, return_base64: bool
) -> None:
    request = parse(ask(stream=stream, return_base64=return_base64))
    assert (request.stream, request.return_base64) == (stream, return_base64)
    assert request.image == PICTURE


def test_references_need_an_image_and_their_absence_does_not() -> None:
    assert refused({"object": "dog", "spatial_refs": [[0.5, 0.5]]}).field == "spatial_refs"
    assert parse({"object": "dog", "spatial_refs": []}).spatial_refs is None


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.7),
        ("temperature", 1e308),
        ("top_p", 1),
        ("top_p", 5e-324),
        ("max_tokens", 1),
        ("max_tokens", CONTEXT),
    ],
)
def test_settings_are_taken_up_to_their_bounds(name: str, value: float) -> None:
    assert getattr(parse(ask(settings={name: value})).settings, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1e-9),
        ("temperature", 10**400),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", -0.5),
        ("top_p", 1.0000001),
        ("top_p", False),
        ("top_p", [1]),
        ("max_tokens", 0),
        ("max_tokens", CONTEXT + 1),
        ("max_tokens", 5.0),
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("max_tokens", None),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    assert refused(ask(settings={name: value})).field == f"settings.{name}"


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_setting_that_is_not_finite_is_refused_at_the_python_door(
    name: str, value: float
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_segment(object="dog", settings={name: value})
    assert caught.value.field == f"settings.{name}"


@pytest.mark.parametrize("value", [[], "greedy", 0, True, [["temperature", 1]]])
def test_settings_that_are_no_object_are_refused(value: Any) -> None:
    assert refused(ask(settings=value)).field == "settings"


def test_one_setting_leaves_the_others_at_their_defaults() -> None:
    request = parse(ask(settings={"temperature": 0.5}))
    assert request.settings == SegmentSettings(temperature=0.5, top_p=1.0, max_tokens=768)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("context", [512, CONTEXT])
def test_settings_as_an_object_are_refused_where_a_mapping_is_taken(
    temperature: float, context: int
) -> None:
    def taken(settings: Any) -> SegmentRequest:
        return validate_segment(object="dog", settings=settings, max_context=context)

    whole = SegmentSettings(temperature=temperature)
    assert taken(whole) == taken({"temperature": temperature})
    with pytest.raises(InvalidRequest) as caught:
        taken(SegmentSettings(max_tokens=context + 1))
    assert caught.value.field == "settings.max_tokens"


# Any value in any field


def names_the_field(error: RequestError, name: str) -> bool:
    field = error.field or ""
    return field == name or field.startswith(f"{name}.")


@pytest.mark.parametrize(
    "name", ["object", "image_url", "stream", "return_base64", "settings", "spatial_refs"]
)
def test_any_value_of_a_field_is_taken_or_refused_by_its_name(name: str) -> None:
    @steady
    @given(json_values)
    def check(value: Any) -> None:
        try:
            request = parse(ask(**{name: value}))
        except InvalidRequest as error:
            assert names_the_field(error, name), (error.field, error.message)
            return
        assert isinstance(request, SegmentRequest)
        if name in FLAGS:
            assert getattr(request, name) is value

    check()


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens"])
def test_any_value_of_a_setting_is_taken_or_refused_by_its_name(name: str) -> None:
    @steady
    @given(json_values)
    def check(value: Any) -> None:
        try:
            request = parse(ask(settings={name: value}))
        except InvalidRequest as error:
            assert error.field == f"settings.{name}"
            return
        assert getattr(request.settings, name) == value

    check()


@steady
@given(json_values)
@example("nano")
def test_any_model_is_the_served_one_or_refused_by_its_name(value: Any) -> None:
    try:
        parse(ask(model=value))
    except (InvalidRequest, UnknownModel) as error:
        assert error.field == "model" and value not in ("nano", None)
        return
    assert value in ("nano", None)


@steady
@given(st.lists(json_values, max_size=17))
def test_any_list_of_references_is_taken_as_given_or_refused(value: list[Any]) -> None:
    try:
        request = parse(ask(spatial_refs=value))
    except InvalidRequest as error:
        assert error.field == "spatial_refs"
        return
    assert [list(ref) for ref in request.spatial_refs or []] == value


unit = st.floats(0, 1)


@steady
@given(st.lists(st.tuples(unit, unit) | st.tuples(unit, unit, unit, unit), max_size=16))
def test_references_of_the_right_shape_are_refused_for_their_order_alone(
    value: list[tuple[float, ...]],
) -> None:
    ordered = all(len(ref) == 2 or (ref[0] < ref[2] and ref[1] < ref[3]) for ref in value)
    try:
        request = parse(ask(spatial_refs=value))
    except InvalidRequest as error:
        assert not ordered and "ordered" in error.message
        return
    assert ordered and (request.spatial_refs or []) == value


every_field = st.fixed_dictionaries(
    {},
    optional={
        "object": json_values | st.just("dog"),
        "image_url": json_values | st.just(PICTURE_TEXT),
        "stream": json_values | st.booleans(),
        "return_base64": json_values | st.booleans(),
        "settings": json_values,
        "spatial_refs": json_values,
        "model": json_values | st.just("nano"),
        "extra": json_values,
    },
)


@steady
@given(every_field)
def test_wrong_fields_together_are_one_refusal_that_names_one_of_them(
    fields: dict[str, Any],
) -> None:
    try:
        parse(fields)
    except (InvalidRequest, UnknownModel) as error:
        named = (error.field or "").split(".")[0]
        # A missing noun, and an image that a flag or a reference needs, are named too.
        assert named in fields or named == "object"
        assert named != "extra"


VALIDATOR = jsonschema.Draft202012Validator(
    {
        "$ref": "#/components/schemas/SegmentRequest",
        "components": openapi_document(RuntimeConfig())["components"],
    }
)


@steady
@given(every_field.map(lambda fields: ask(**fields)))
def test_what_is_taken_is_what_the_published_schema_allows(fields: dict[str, Any]) -> None:
    try:
        parse(fields)
    except RequestError:
        return
    assert VALIDATOR.is_valid(fields), fields


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", NO_BOOLEANS, ids=repr)
def test_the_published_schema_refuses_what_is_no_boolean(flag: str, value: Any) -> None:
    assert VALIDATOR.is_valid(ask())
    assert not VALIDATOR.is_valid(ask(**{flag: value}))


# Any Python value

python_values = (
    json_values
    | st.floats()
    | st.complex_numbers()
    | st.decimals()
    | st.binary(max_size=40)
    | st.sets(st.integers(), max_size=3)
    | st.builds(object)
    | st.sampled_from(
        [
            np.float32(0.5),
            np.float64(0.5),
            np.int64(3),
            np.bool_(False),
            np.zeros((2, 3, 3), np.uint8),
            np.zeros((2, 3, 3), np.float64),
            np.zeros((2, 2)),
            np.array(None, object),
            bytearray(PICTURE),
            memoryview(PICTURE),
            {1: 2},
            {None: None},
            SegmentSettings(temperature="warm"),  # type: ignore[arg-type]
            SegmentSettings(max_tokens=None),  # type: ignore[arg-type]
            int,
            Ellipsis,
        ]
    )
)


@pytest.mark.parametrize(
    "name", ["object", "image", "stream", "return_base64", "settings", "spatial_refs"]
)
def test_any_python_value_is_taken_or_refused_by_its_name(name: str) -> None:
    @steady
    @given(python_values)
    def check(value: Any) -> None:
        arguments = {"object": "dog", "image": PICTURE, name: value}
        try:
            request = validate_segment(**arguments, max_context=CONTEXT)
        except InvalidRequest as error:
            assert names_the_field(error, name), (error.field, error.message)
            return
        assert isinstance(request.stream, bool) and isinstance(request.return_base64, bool)
        assert request.image is None or isinstance(request.image, (bytes, np.ndarray))
        assert isinstance(request.settings.temperature, float)

    check()
