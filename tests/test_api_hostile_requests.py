"""No request of a wrong shape gets past validation, and none ends in anything but a refusal."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kestrel.api import (
    MOST_VALUES,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    RequestError,
    SegmentRequest,
    SegmentSettings,
    ServiceFault,
    TooLarge,
    Unauthorized,
    UnknownModel,
    check_auth,
    image_bytes,
    parse_segment_json,
    timeout_from_headers,
    validate_segment,
)
from kestrel.config import Limits

LIMITS = Limits()
MAX_CONTEXT = 900
KNOWN = ("object", "image_url", "stream", "return_base64", "settings", "spatial_refs", "model")

buffer = io.BytesIO()
Image.new("RGB", (6, 4), "teal").save(buffer, "PNG")
PICTURE = buffer.getvalue()
PICTURE_TEXT = base64.b64encode(PICTURE).decode()

# The same examples on every run, however busy the machine is.
steady = settings(
    derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def parse(body: bytes | dict[str, Any]) -> SegmentRequest:
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    return parse_segment_json(body, limits=LIMITS, served_model="nano", max_context=MAX_CONTEXT)


def refused(body: bytes | dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body)
    return caught.value


@steady
@given(st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused(body: bytes) -> None:
    assert refused(body).status == 400


@steady
@given(st.dictionaries(st.sampled_from(KNOWN), json_values))
def test_wrongly_typed_fields_never_get_through(fields: dict[str, Any]) -> None:
    try:
        request = parse({"object": "dog", "image_url": PICTURE_TEXT} | fields)
    except RequestError as error:
        assert error.status in (400, 404)
        assert error.message
        return
    assert request.object and request.object == request.object.strip()
    assert isinstance(request.stream, bool)
    assert isinstance(request.return_base64, bool)
    assert type(request.settings.max_tokens) is int
    assert 1 <= request.settings.max_tokens <= MAX_CONTEXT
    assert math.isfinite(request.settings.temperature) and request.settings.temperature >= 0
    assert 0 < request.settings.top_p <= 1
    for ref in request.spatial_refs or []:
        assert len(ref) in (2, 4) and all(0 <= value <= 1 for value in ref)


@steady
@given(st.dictionaries(st.text().filter(lambda key: key not in KNOWN), json_values, max_size=5))
def test_unknown_top_level_fields_change_nothing(extra: dict[str, Any]) -> None:
    assert parse({"object": "dog"} | extra) == parse({"object": "dog"})


@steady
@given(
    st.text(alphabet=st.characters(codec="ascii"), min_size=1).filter(
        lambda key: key not in ("temperature", "top_p", "max_tokens")
    )
)
def test_unknown_setting_is_refused_by_name(key: str) -> None:
    error = refused({"object": "dog", "settings": {key: 1}})
    assert error.status == 400 and (error.field or "").startswith("settings.")


@pytest.mark.parametrize("flag", ["stream", "return_base64"])
@pytest.mark.parametrize("value", ["true", "false", 1, 0, 1.0, None, [], {}])
def test_flag_that_is_no_json_boolean_is_refused(flag: str, value: Any) -> None:
    assert refused({"object": "dog", "image_url": PICTURE_TEXT, flag: value}).field == flag


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("where", ["temperature", "top_p", "max_tokens"])
def test_number_that_is_not_finite_is_refused(constant: str, where: str) -> None:
    body = f'{{"object": "dog", "settings": {{"{where}": {constant}}}}}'
    assert refused(body.encode()).status == 400


@pytest.mark.parametrize("value", [True, 1.0, "1", 0, -1, MAX_CONTEXT + 1, 10**30])
def test_max_tokens_is_a_whole_number_within_the_context(value: Any) -> None:
    error = refused({"object": "dog", "settings": {"max_tokens": value}})
    assert error.field == "settings.max_tokens"


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"object":' + b'{"a":' * 200_000])
def test_deep_nesting_is_a_refusal_and_not_a_crash(body: bytes) -> None:
    assert refused(body).status == 400


def no_json(*_: Any, **__: Any) -> None:
    raise AssertionError("it is parsed")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("part", ["[],", "{},", '"a",', "1.5,", "[", '{"a":'])
def test_a_body_of_many_values_is_refused_before_it_is_parsed(
    part: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = ('{"object":"dog","a":[' + part * (MOST_VALUES + 1) + "0]}").encode(encoding)
    monkeypatch.setattr(json, "loads", no_json)
    with pytest.raises(InvalidRequest, match=f"over {MOST_VALUES} commas and opening brackets"):
        parse(body)


def test_a_body_of_as_many_values_as_there_may_be_is_parsed() -> None:
    body = '{"object":"dog","a":[' + "0," * (MOST_VALUES - 3) + "0]}"
    assert sum(map(body.count, ",[{")) == MOST_VALUES
    assert parse(body.encode()).object == "dog"


def test_a_large_body_of_few_values_is_parsed() -> None:
    refs = [[0.1, 0.2, 0.3, 0.4]] * LIMITS.max_spatial_refs
    known = {"object": "a dog, a cat", "image_url": f"data:image/png;base64,{PICTURE_TEXT}"}
    more = {"a": "b" * 5_000_000, "c": [{"d": [i]} for i in range(MOST_VALUES // 4)]}
    body = json.dumps(known | {"spatial_refs": refs} | more).encode()
    assert parse(body).spatial_refs == [tuple(ref) for ref in refs]


@pytest.mark.parametrize("sign", [b"", b"-"])
@pytest.mark.parametrize("setting", ["temperature", "top_p", "max_tokens"])
def test_number_with_thousands_of_digits_is_a_refusal_that_names_its_field(setting, sign) -> None:
    number = sign + b"9" * 10_000
    body = b'{"object": "dog", "settings": {"%s": %s}}' % (setting.encode(), number)
    error = refused(body)
    assert (error.status, error.field) == (400, f"settings.{setting}")
    # It is JSON, and fields that are not known are ignored.
    assert parse(b'{"object": "dog", "x": %s}' % number).object == "dog"


@pytest.mark.parametrize("noun", ["", " \t\n", "a\0b", "\ud800", "x" * 257, 5, None, ["dog"]])
def test_object_that_is_no_noun_is_refused(noun: Any) -> None:
    assert refused({"object": noun}).field == "object"


def test_object_is_trimmed_before_it_is_counted() -> None:
    assert parse({"object": f"  {'x' * 256}\n"}).object == "x" * 256


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "HTTPS://example.com", "file:///etc/passwd", "ftp://x"]
)
def test_url_is_refused_and_the_message_says_that_nothing_is_fetched(url: str) -> None:
    error = refused({"object": "dog", "image_url": url})
    assert (error.status, error.field) == (400, "image_url")
    assert "not fetched" in error.message


@pytest.mark.parametrize(
    "value",
    ["", " ", "A", "AAAA====", "AAAA=", "A*AA", "é", "\ud800", "-_-_", "data:",
     "data:image/png,AAAA", "data:text/html;base64,AAAA", 5, [], {}],
)  # fmt: skip
def test_image_url_that_is_no_base64_image_is_refused(value: Any) -> None:
    assert refused({"object": "dog", "image_url": value}).field == "image_url"


@steady
@given(st.binary(min_size=1), st.integers(1, 76))
def test_wrapped_base64_gives_the_same_bytes(content: bytes, width: int) -> None:
    text = base64.b64encode(content).decode()
    wrapped = "\r\n".join(text[i : i + width] for i in range(0, len(text), width))
    for form in (text, wrapped, f" {text}\n", f"data:image/png;base64,{wrapped}"):
        assert image_bytes(form) == content


@pytest.mark.parametrize("start", ["DATA:image/png;base64,", "data:Image/PNG;Base64,"])
def test_a_data_url_may_be_written_in_capitals(start: str) -> None:
    assert image_bytes(start + PICTURE_TEXT) == PICTURE


def test_content_decides_and_not_the_mime_type() -> None:
    assert parse({"object": "dog", "image_url": "data:image/jpeg;base64," + PICTURE_TEXT})
    svg = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
    assert refused({"object": "dog", "image_url": "data:image/png;base64," + svg}).status == 400


@pytest.mark.parametrize("ref", [
    [0.5], [0.5] * 3, [0.5] * 5, [-0.1, 0.5], [0.5, 1.1], [True, 0.5], ["0.5", 0.5], {}, "ab", None,
    [0.6, 0.1, 0.5, 0.9], [0.1, 0.9, 0.5, 0.2], [0.5, 0.1, 0.5, 0.9],
])  # fmt: skip
def test_spatial_ref_that_is_no_point_or_ordered_box_is_refused(ref: Any) -> None:
    body = {"object": "dog", "image_url": PICTURE_TEXT, "spatial_refs": [ref]}
    assert refused(body).field == "spatial_refs"


def test_spatial_refs_are_sixteen_at_most_and_need_an_image() -> None:
    body = {"object": "dog", "image_url": PICTURE_TEXT, "spatial_refs": [[0.5, 0.5]] * 16}
    assert len(parse(body).spatial_refs or []) == 16
    assert refused(body | {"spatial_refs": [[0.5, 0.5]] * 17}).field == "spatial_refs"
    assert refused(body | {"image_url": None}).field == "spatial_refs"


def test_unknown_model_is_a_404_that_lists_what_is_served() -> None:
    error = refused({"object": "dog", "model": "gpt"})
    assert (error.status, error.field) == (404, "model")
    assert "nano" in error.message


def test_python_door_refuses_with_a_value_error() -> None:
    with pytest.raises(ValueError, match="return_base64 needs image"):
        validate_segment(object="dog", return_base64=True)
    with pytest.raises(ValueError, match="max_tokens"):
        validate_segment(object="dog", settings=SegmentSettings(max_tokens=0))


@pytest.mark.parametrize("error", [
    InvalidRequest("m", "f"), Unauthorized(), UnknownModel("m", "model"), TooLarge("m"),
    PromptTooLong("m"), Overloaded("m", retry_after_s=2.5), DeadlineExceeded(), ServiceFault("m"),
])  # fmt: skip
def test_errors_survive_the_way_between_processes(error: RequestError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.body(), again.status, again.headers()) == (
        error.body(),
        error.status,
        error.headers(),
    )


@pytest.mark.parametrize("value", ["0", "0" * 20, "-1", "1.5", "", " ", "1e3", "²", "abc"])
def test_deadline_header_that_is_no_positive_number_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest):
        timeout_from_headers({"x-request-timeout-ms": value}, 60.0)


def test_deadline_header_shortens_and_never_lengthens() -> None:
    assert timeout_from_headers({}, 60.0) == 60.0
    assert timeout_from_headers({"x-request-timeout-ms": "1500"}, 60.0) == 1.5
    assert timeout_from_headers({"x-request-timeout-ms": "9" * 4000}, 60.0) == 60.0


@pytest.mark.parametrize("zeros", [1, 12, 5000])
def test_deadline_header_may_begin_with_zeros(zeros: int) -> None:
    assert timeout_from_headers({"x-request-timeout-ms": "0" * zeros + "250"}, 60.0) == 0.25


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer k"}, {"authorization": "Basic key-b"},
     {"authorization": "key-b"}, {"x-moondream-auth": ""}, {"x-moondream-auth": "key-bb"}],
)  # fmt: skip
def test_wrong_or_missing_key_is_a_401(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized):
        check_auth(headers, ("key-a", "key-b"))


def test_any_configured_key_opens_either_header() -> None:
    for headers in (
        {"authorization": "bearer key-b"},
        {"authorization": "Bearer  key-b "},
        {"x-moondream-auth": "key-a"},
    ):
        check_auth(headers, ("key-a", "key-b"))
    check_auth({}, ())
