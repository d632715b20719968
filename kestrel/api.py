"""The segment contract: the types of a request, and all validation.

Every door (Python, HTTP, Ray handle) validates here, raises the errors of ``kestrel.errors``, gets
the events of ``kestrel.events`` (this module gives out both) and composes its answers in
``kestrel.answers``.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import pybase64

from kestrel.api_keys import ApiKey, find_key, parse_keys
from kestrel.byte_search import count_of
from kestrel.config import Limits
from kestrel.errors import (  # noqa: F401 (callers find the whole contract here)
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    RateLimited,
    RequestError,
    ServiceFault,
    TooLarge,
    Unauthorized,
    UnknownModel,
    error_from_response,
    outcome,
)
from kestrel.events import (  # noqa: F401
    Bbox,
    BboxEvent,
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    PathDelta,
)

if TYPE_CHECKING:
    import numpy as np

SpatialRef = tuple[float, ...]
"""A point (x, y) or a box (x_min, y_min, x_max, y_max), 0..1."""
MAX_CONTEXT = 32_768
"""Largest ``max_tokens`` that any model takes; a served model's own context bounds it further."""
MOST_VALUES = 65_536
"""Commas and opening brackets of a JSON body at most. Each value that they part becomes an object
of up to some hundred bytes, while the process does nothing else. Base64 holds none of them."""


@dataclass(frozen=True)
class SegmentSettings:
    """How the model samples and how long it may go on."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 768
    """Generated tokens, box and path together. The default is cut to what the model takes; another
    value that is over it is refused."""
    refiner: str | None = None
    """Refiner backend by name, one of those that are loaded; None: the configured one."""


@dataclass
class SegmentRequest:
    """A validated request. ``image`` is encoded bytes or uint8 [H, W, 3] RGB."""

    object: str
    image: bytes | np.ndarray | None = None
    stream: bool = False
    settings: SegmentSettings = field(default_factory=SegmentSettings)
    spatial_refs: list[SpatialRef] | None = None
    return_base64: bool = False


def image_size(image: bytes | np.ndarray | None) -> int:
    """Bytes that a request's image takes as it waits: of the file, or of the array."""
    if image is None:
        return 0
    return len(image) if isinstance(image, bytes) else image.nbytes


# Validation: one function a field, each names the field and the rule.


def _object(value: Any, limits: Limits) -> str:
    if not isinstance(value, str):
        raise InvalidRequest("object must be a string", "object")
    text = value.strip()
    if not text:
        raise InvalidRequest("object must not be empty", "object")
    if len(text) > limits.max_object_chars:
        raise InvalidRequest(
            f"object must be at most {limits.max_object_chars} characters, not {len(text)}",
            "object",
        )
    if "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidRequest("object must be text without NUL or lone surrogates", "object")
    return text


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {_kind(value)}", name)
    return value


def _kind(value: Any) -> str:
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{name} must be a number, not {_kind(value)}", name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be finite", name)
    return number


def _settings(value: Any, max_context: int, refiners: Sequence[str] | None) -> SegmentSettings:
    if value is None:
        value = {}
    known = tuple(f.name for f in fields(SegmentSettings))
    whole = isinstance(value, SegmentSettings)
    if whole:
        value = {name: getattr(value, name) for name in known}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"settings must be an object, not {_kind(value)}", "settings")
    for key in value:
        if key not in known:
            raise InvalidRequest(
                f"settings has no key {str(key)[:64]!r}; known keys are {', '.join(known)}",
                f"settings.{str(key)[:64]}",
            )
    temperature = _number(value.get("temperature", 0.0), "settings.temperature")
    if temperature < 0:
        raise InvalidRequest("settings.temperature must be at least 0", "settings.temperature")
    top_p = _number(value.get("top_p", 1.0), "settings.top_p")
    if not 0 < top_p <= 1:
        raise InvalidRequest("settings.top_p must be over 0 and at most 1", "settings.top_p")
    default = min(SegmentSettings.max_tokens, max_context)
    max_tokens = value.get("max_tokens", default)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise InvalidRequest("settings.max_tokens must be an integer", "settings.max_tokens")
    if whole and max_tokens == SegmentSettings.max_tokens:
        max_tokens = default  # an object has every field, given or not
    if not 1 <= max_tokens <= max_context:
        raise InvalidRequest(
            f"settings.max_tokens must be in 1..{max_context}", "settings.max_tokens"
        )
    return SegmentSettings(
        temperature, top_p, max_tokens, _refiner_name(value.get("refiner"), refiners)
    )


def _refiner_name(value: Any, refiners: Sequence[str] | None) -> str | None:
    name = "settings.refiner"
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {_kind(value)}", name)
    if refiners is not None and value not in refiners:
        loaded = f"loaded are {', '.join(refiners)}" if refiners else "no refiner is loaded"
        raise InvalidRequest(f"{name} {value[:64]!r} is not loaded here; {loaded}", name)
    return value


def _spatial_refs(value: Any, has_image: bool, limits: Limits) -> list[SpatialRef] | None:
    name = "spatial_refs"
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name} must be a list of points and boxes", name)
    if len(value) > limits.max_spatial_refs:
        raise InvalidRequest(
            f"{name} must have at most {limits.max_spatial_refs} entries, not {len(value)}", name
        )
    if value and not has_image:
        raise InvalidRequest(f"{name} needs an image", name)
    refs: list[SpatialRef] = []
    for i, ref in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(ref, (list, tuple)) or len(ref) not in (2, 4):
            raise InvalidRequest(f"{where} must be [x, y] or [x_min, y_min, x_max, y_max]", name)
        numbers = tuple(_ref_number(v, f"{where}[{j}]") for j, v in enumerate(ref))
        if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            raise InvalidRequest(f"{where} must be ordered: x_min < x_max and y_min < y_max", name)
        refs.append(numbers)
    return refs or None


def _ref_number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidRequest(f"{where} must be a number in 0..1", "spatial_refs")
    return float(value)


def validate_segment(
    *,
    object: Any,
    image: Any = None,
    spatial_refs: Any = None,
    stream: Any = False,
    return_base64: Any = False,
    settings: Any = None,
    limits: Limits | None = None,
    max_context: int | None = None,
    refiners: Sequence[str] | None = None,
    image_field: str = "image",
) -> SegmentRequest:
    """Check the arguments of the Python door and give the request; ``RequestError`` (a ValueError).

    The image's header is read (format, size, pixel limit); its pixels are not decoded.
    ``refiners``: those that ``settings.refiner`` may name; None where they are not known, and the
    server is to say. ``image_field`` is what the image is called in messages.
    """
    from kestrel.image import check_array, probe

    limits = limits or Limits()
    noun = _object(object, limits)
    want_masks = _flag(return_base64, "return_base64")
    want_stream = _flag(stream, "stream")
    checked = _settings(settings, min(max_context or MAX_CONTEXT, MAX_CONTEXT), refiners)
    refs = _spatial_refs(spatial_refs, image is not None, limits)
    if want_masks and image is None:
        raise InvalidRequest(
            f"return_base64 needs {image_field}: masks have the size of the image", "return_base64"
        )
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, bytes):
        probe(image, limits, image_field)
    elif image is not None:
        check_array(image, limits, image_field)
    return SegmentRequest(noun, image, want_stream, checked, refs, want_masks)


_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


def image_bytes(value: Any) -> bytes:
    """The bytes behind ``image_url``: raw base64 or a base64 data URL, ASCII white space allowed.

    Other URLs are refused: the server fetches nothing.
    """
    name = "image_url"
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string", name)
    text = value.strip()
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if scheme and scheme.group(1).lower() != "data":
        raise InvalidRequest(
            f"{name} must be base64 or a data:image/...;base64, URL; "
            f"{scheme.group(1).lower()}:// is not fetched by the server",
            name,
        )
    if scheme:
        match = _DATA_URL.match(text)
        if match is None:
            raise InvalidRequest(f"{name} must start with data:image/...;base64,", name)
        text = text[match.end() :]
    if any(c in text for c in " \t\r\n"):
        text = "".join(text.split())
    if not text:
        raise InvalidRequest(f"{name} must not be empty", name)
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{name} is not valid base64", name) from error


def _whole(digits: str) -> int | float:
    """An integer of JSON; the infinity where Python refuses its thousands of digits, as it reads
    1e999, so that the field that holds it is named."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object from a request body of no more than ``MOST_VALUES``; NaN and Infinity are no
    JSON."""
    # Bytes, so that UTF-16 and UTF-32 count alike.
    if len(body) > MOST_VALUES and count_of(body, b",[{") > MOST_VALUES:
        raise InvalidRequest(f"the body has over {MOST_VALUES} commas and opening brackets")

    def refuse(constant: str) -> float:
        raise InvalidRequest(f"the body is not JSON: {constant} is not a JSON number")

    try:
        payload = json.loads(body, parse_constant=refuse, parse_int=_whole)
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the body is not JSON") from error
    if not isinstance(payload, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_kind(payload)}")
    return payload


def validate_call(
    fields: Mapping[str, Any],
    *,
    limits: Limits,
    served_model: str,
    max_context: int | None = None,
    refiners: Sequence[str] | None = None,
    image_field: str = "image",
) -> SegmentRequest:
    """A call by the names of the contract's fields, of the handle door or of a JSON body, to a
    validated request. Unknown fields are ignored; ``image`` is as ``validate_segment`` takes it."""
    if "object" not in fields:
        raise InvalidRequest("object is required", "object")
    check_model(fields.get("model"), served_model)
    return validate_segment(
        object=fields["object"],
        image=fields.get("image"),
        spatial_refs=fields.get("spatial_refs"),
        stream=fields.get("stream", False),
        return_base64=fields.get("return_base64", False),
        settings=fields.get("settings"),
        limits=limits,
        max_context=max_context,
        refiners=refiners,
        image_field=image_field,
    )


def parse_segment_json(
    body: bytes,
    *,
    limits: Limits,
    served_model: str,
    max_context: int | None = None,
    refiners: Sequence[str] | None = None,
) -> SegmentRequest:
    """The HTTP door: a JSON body to a validated request; see ``validate_call``."""
    payload = parse_json(body)
    raw = payload.get("image_url")
    return validate_call(
        payload | {"image": None if raw is None else image_bytes(raw)},
        limits=limits,
        served_model=served_model,
        max_context=max_context,
        refiners=refiners,
        image_field="image_url",
    )


def check_model(name: Any, served: str) -> None:
    """``UnknownModel`` unless ``name`` is None or the served model."""
    if name is None:
        return
    if not isinstance(name, str):
        raise InvalidRequest("model must be a string", "model")
    if name != served:
        raise UnknownModel(f"model {name[:128]!r} is not served here; served: {served}", "model")


def check_auth(headers: Mapping[str, str], api_keys: Sequence[ApiKey | str]) -> ApiKey | None:
    """The key that the request carries; None when no key is configured. ``Unauthorized`` unless
    it carries one of those that are.

    ``headers`` looks names up without regard to case (Starlette's do).
    """
    keys = parse_keys(api_keys)
    if not keys:
        return None
    given = headers.get("x-moondream-auth") or ""
    kind, _, token = (headers.get("authorization") or "").partition(" ")
    if kind.lower() == "bearer":
        given = token.strip()
    key = find_key(given, keys)
    if key is None:
        raise Unauthorized()
    return key


TIMEOUT_HEADER = "X-Request-Timeout-Ms"


def timeout_from_headers(headers: Mapping[str, str], longest_s: float) -> float:
    """Seconds from ``TIMEOUT_HEADER``, at most ``longest_s``; that where it is absent."""
    name = TIMEOUT_HEADER
    value = headers.get(name.lower())
    if value is None:
        return longest_s
    digits = value.lstrip("0")
    if not digits.isascii() or not digits.isdigit():
        raise InvalidRequest(f"{name} must be a positive whole number of milliseconds", name)
    return min(longest_s, int(digits[:12]) / 1e3)


def timeout_of_call(value: Any, longest_s: float) -> float:
    """Seconds from the ``timeout_s`` of a call in Python or by handle, at most ``longest_s``; that
    for None. ``InvalidRequest`` unless it is a finite number over 0."""
    if value is None:
        return longest_s
    seconds = _number(value, "timeout_s")
    if seconds <= 0:
        raise InvalidRequest("timeout_s must be over 0 seconds", "timeout_s")
    return min(longest_s, seconds)
