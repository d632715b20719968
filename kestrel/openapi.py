"""The OpenAPI 3.1 document of the HTTP door."""

from __future__ import annotations

from typing import Any

from kestrel.api import (
    MAX_CONTEXT,
    MOST_VALUES,
    TIMEOUT_HEADER,
    SegmentSettings,
)
from kestrel.config import RuntimeConfig
from kestrel.image import FORMATS
from kestrel.request_ids import ID_PATTERN, ID_RULE

Schema = dict[str, Any]


def openapi_document(config: RuntimeConfig, root_path: str = "") -> Schema:
    """The document for one server: its model name, limits and longest deadline are in it.

    ``root_path`` is the prefix of its paths, as ``/seg``.
    """
    from kestrel import __version__

    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Segmentation",
            "version": __version__,
            "description": "An image and a noun in; an SVG path, its box and two masks out.",
        },
        # Without it generated clients call the root of the host.
        "servers": [{"url": root_path or "/"}],
        "paths": {
            "/v1/segment": {"post": _segment_operation(config)},
            "/v1/models": {"get": _models_operation(config)},
            "/healthz": {"get": _health_operation()},
        },
        "components": {
            "schemas": _schemas(config),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "moondream": {"type": "apiKey", "in": "header", "name": "X-Moondream-Auth"},
            },
        },
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _security(config: RuntimeConfig) -> list[Schema]:
    return [{"bearer": []}, {"moondream": []}] if config.api_keys else []


_REQUEST_ID = {
    "X-Request-Id": {
        "description": "Names the request in logs; the request's own `X-Request-Id` where it "
        "has one.",
        "schema": {"type": "string"},
    }
}
_OWN_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": f"Names the request in logs and in its answer: {ID_RULE}.",
    "schema": {"type": "string", "pattern": f"^{ID_PATTERN}$"},
}


_UNFIT_ID = "`X-Request-Id` is against its rule."
_UNAUTHORIZED = "An API key is configured and the request's is not it."


def _error(
    description: str, *, retry: bool = False, challenge: bool = False, body: str = "Error"
) -> Schema:
    headers: Schema = dict(_REQUEST_ID)
    if challenge:
        headers["WWW-Authenticate"] = {
            "description": "How to bring a key.",
            "schema": {"type": "string", "const": "Bearer"},
        }
    if retry:
        headers["Retry-After"] = {
            "description": "Seconds after which to come back.",
            "schema": {"type": "integer", "minimum": 1},
        }
    return {"description": description, "headers": headers, "content": _json(body)}


def _segment_operation(config: RuntimeConfig) -> Schema:
    limits = config.limits
    return {
        "operationId": "segment",
        "summary": "Segment the named object",
        "security": _security(config),
        "parameters": [
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "required": False,
                "description": "Deadline of this request, milliseconds from its arrival; "
                f"at most {config.request_timeout_s * 1e3:g}, which is the default.",
                "schema": {"type": "integer", "minimum": 1},
            },
            _OWN_ID,
        ],
        "requestBody": {"required": True, "content": _json("SegmentRequest")},
        "responses": {
            "200": {
                "description": "The path and its box. Server-sent events when `stream` is true: "
                "one `bbox`, then `path_delta`s, then exactly one `final` or `error`; the last "
                "alone where nothing was found.",
                "headers": _REQUEST_ID
                | {
                    "X-Refinement": {
                        "description": "Plain answers only: the refiner could not be reached, "
                        "and the path is the model's own.",
                        "schema": {"type": "string", "enum": ["unavailable"]},
                    },
                    "Server-Timing": {
                        "description": "Plain answers only: where the time went, milliseconds: "
                        "`prepare` (wait and picture), `prefill`, `decode`, and `refine` where "
                        "the path was refined.",
                        "schema": {"type": "string"},
                    },
                },
                "content": _json("SegmentResponse")
                | {"text/event-stream": {"schema": _ref("SegmentEvent")}},
            },
            "400": _error(
                f"The body is no JSON object, it has over {MOST_VALUES} commas and opening "
                "brackets, a field is wrong, the image is broken, or a header "
                f"(`X-Request-Id`, `{TIMEOUT_HEADER}`) is against its rule."
            ),
            "401": _error(_UNAUTHORIZED, challenge=True),
            "404": _error("The named model is not served here."),
            "413": _error(
                f"The body is over {limits.max_body_bytes} bytes, or the image over "
                f"{limits.max_image_pixels} pixels."
            ),
            "422": _error("The prompt does not fit the model's context."),
            "429": _error("The rate of the API key is used up.", retry=True),
            "500": _error("A fault of the server.", body="Fault"),
            "503": _error(
                "The queue is full, the server is still starting, or masks are asked for and the "
                "refiner cannot be reached.",
                retry=True,
            ),
            "504": _error("The deadline passed; the work is cancelled."),
        },
    }


def _models_operation(config: RuntimeConfig) -> Schema:
    return {
        "operationId": "models",
        "summary": "The served model",
        "security": _security(config),
        "parameters": [_OWN_ID],
        "responses": {
            "200": {
                "description": "A list of one.",
                "headers": _REQUEST_ID,
                "content": _json("ModelList"),
            },
            "400": _error(_UNFIT_ID),
            "401": _error(_UNAUTHORIZED, challenge=True),
        },
    }


def _health_operation() -> Schema:
    return {
        "operationId": "health",
        "summary": "Whether requests can be served",
        "parameters": [_OWN_ID],
        "responses": {
            "200": {
                "description": "Ready.",
                "headers": _REQUEST_ID,
                "content": _json("Health"),
            },
            "400": _error(_UNFIT_ID),
            "503": _error("Still starting, or broken.", retry=True),
        },
    }


def _schemas(config: RuntimeConfig) -> Schema:
    return {
        "SegmentRequest": _request_schema(config),
        "Settings": _settings_schema(config),
        "SpatialRef": _spatial_ref_schema(),
        "Bbox": _bbox_schema(),
        "Metrics": _metrics_schema(),
        "SegmentResponse": _response_schema(),
        **_event_schemas(),
        "Error": _object(
            {"error": {"type": "string"}, "field": {"type": "string"}}, required=["error"]
        ),
        "Fault": _object({"error": {"type": "string"}, "request_id": {"type": "string"}}),
        "Health": _object({"status": {"const": "ok"}}),
        "ModelList": _object(
            {
                "object": {"const": "list"},
                "data": {
                    "type": "array",
                    "items": _object(
                        {
                            "id": {"const": config.model},
                            "object": {"const": "model"},
                            "owned_by": {"type": "string"},
                            "max_context": {
                                "type": "integer",
                                "description": "Positions that a prompt, its image and the answer "
                                "share; not there while the model is loaded.",
                            },
                        },
                        required=["id", "object", "owned_by"],
                    ),
                },
            }
        ),
    }


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    """An object schema; every property is required unless ``required`` names those that are."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }


def _request_schema(config: RuntimeConfig) -> Schema:
    limits = config.limits
    properties = {
        "object": {
            "type": "string",
            "minLength": 1,
            "description": "The noun. Surrounding white space is dropped; what is left has "
            f"1 to {limits.max_object_chars} characters.",
        },
        "image_url": {
            "type": ["string", "null"],
            "description": f"The image ({', '.join(FORMATS)}) as base64 or as a "
            f"`data:image/...;base64,` URL, at most {limits.max_image_pixels} pixels. Other URLs "
            "are refused: the server fetches nothing.",
        },
        "spatial_refs": {
            "type": ["array", "null"],
            "maxItems": limits.max_spatial_refs,
            "items": _ref("SpatialRef"),
            "description": "Points on the object and boxes around it. They need an image.",
        },
        "stream": {"type": "boolean", "default": False},
        "return_base64": {
            "type": "boolean",
            "default": False,
            "description": "Whether to give the two masks. They need an image.",
        },
        "settings": {"anyOf": [_ref("Settings"), {"type": "null"}]},
        "model": {"enum": [config.model, None]},
    }
    schema = _object(properties, required=["object"])
    schema["description"] = "Unknown fields are ignored."
    return schema


def _settings_schema(config: RuntimeConfig) -> Schema:
    defaults, longest = SegmentSettings(), min(MAX_CONTEXT, config.max_context)
    properties = {
        "temperature": {
            "type": "number",
            "minimum": 0,
            "default": defaults.temperature,
            "description": "0 is greedy.",
        },
        "top_p": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "default": defaults.top_p,
        },
        "max_tokens": {
            "type": "integer",
            "minimum": 1,
            "maximum": longest,
            "default": min(defaults.max_tokens, longest),
            "description": "Of the answer, box and path together. At most the model's context (see "
            "`/v1/models`), which is also the default where it is smaller. An answer that is cut "
            "off by it has no path.",
        },
        "refiner": {
            "enum": [*config.refiners, None],
            "description": "Mask refinement by name; null: the first.",
        },
    }
    return _object(properties, required=[]) | {"additionalProperties": False}


def _spatial_ref_schema() -> Schema:
    unit = {"type": "number", "minimum": 0, "maximum": 1}
    shapes = (("[x, y]", 2), ("[x_min, y_min, x_max, y_max], ordered", 4))
    return {
        "description": "A point or a box, normalised to the image.",
        "oneOf": [
            {"type": "array", "items": unit, "minItems": n, "maxItems": n, "description": text}
            for text, n in shapes
        ],
    }


def _bbox_schema() -> Schema:
    unit = {"type": "number", "minimum": 0, "maximum": 1}
    return _object(dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), unit)) | {
        "description": "Normalised to the image."
    }


def _metrics_schema() -> Schema:
    count, time_ms = {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0}
    return _object(
        {
            "input_tokens": count | {"description": "Positions of the prompt, image included."},
            "output_tokens": count | {"description": "Generated tokens, box and path together."},
            "prefill_time_ms": time_ms,
            "decode_time_ms": time_ms,
            "ttft_ms": time_ms | {"description": "From the request to its first token."},
        }
    )


def _response_schema() -> Schema:
    mask = {
        "type": "string",
        "contentEncoding": "base64",
        "contentMediaType": "image/png",
        "description": "8-bit single-channel PNG of the image's size, every pixel 0 or 255. "
        "Not there when there is no such mask, or `return_base64` was false.",
    }
    return _object(
        {
            "request_id": {"type": "string"},
            "finish_reason": {"type": "string", "enum": ["stop", "length"]},
            "path": {
                "type": "string",
                "description": "SVG path data in 0..1 coordinates relative to `bbox`: refined "
                "where refinement succeeded, else the model's.",
            },
            "bbox": {
                "anyOf": [_ref("Bbox"), {"type": "null"}],
                "description": "null where nothing was found; `path` is empty then.",
            },
            "metrics": _ref("Metrics"),
            "parse_error": {
                "type": "string",
                "description": "There when the model's tokens were no SVG path, or were cut off "
                "(`finish_reason` is `length`) before it was whole: `path` is empty then.",
            },
            "coarse_mask_base64": mask,
            "refined_mask_base64": mask,
        },
        required=["request_id", "finish_reason", "path", "bbox", "metrics"],
    )


def _event_schemas() -> Schema:
    kinds = {"bbox": "BboxEvent", "path_delta": "PathDeltaEvent"}
    kinds |= {"final": "FinalEvent", "error": "ErrorEvent"}
    text, done = {"type": "string"}, {"const": True}
    head = {"type": {"const": "final"}, "chunk": {"const": ""}, "completed": done}
    return {
        "SegmentEvent": {
            "description": "The JSON behind `data: ` of one server-sent event.",
            "oneOf": [_ref(name) for name in kinds.values()],
            "discriminator": {
                "propertyName": "type",
                "mapping": {kind: _ref(name)["$ref"] for kind, name in kinds.items()},
            },
        },
        "BboxEvent": _object({"type": {"const": "bbox"}, "bbox": _ref("Bbox")}),
        "PathDeltaEvent": _object(
            {
                "type": {"const": "path_delta"},
                "chunk": text | {"description": "One whole path command of the model's path."},
                "completed": {"const": False},
                "token_index": {
                    "type": "integer",
                    "minimum": 1,
                    "description": "Tokens generated up to and including the chunk's last.",
                },
            }
        ),
        "FinalEvent": {"allOf": [_object(head), _ref("SegmentResponse")]},
        "ErrorEvent": _object(
            {"type": {"const": "error"}, "error": text, "request_id": text, "completed": done}
        ),
    }
