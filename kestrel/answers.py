"""Answers of the contract: the plain body, the Python segment, the server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kestrel.api import (
    Bbox,
    BboxEvent,
    ModelMetrics,
    ModelResult,
    PathDelta,
    RequestError,
    outcome,
)
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult


def _metrics(metrics: ModelMetrics) -> dict[str, float]:
    return {
        "input_tokens": metrics.input_tokens,
        "output_tokens": metrics.output_tokens,
        "prefill_time_ms": round(metrics.prefill_time_ms, 3),
        "decode_time_ms": round(metrics.decode_time_ms, 3),
        "ttft_ms": round(metrics.ttft_ms, 3),
    }


def _outline(
    model: ModelResult, refined: SegmentRefineBitmapsResult | None
) -> tuple[str, Bbox | None]:
    if refined is not None and refined.refined_svg_path and refined.refined_bbox:
        return refined.refined_svg_path, refined.refined_bbox
    return ("" if model.parse_error is not None else model.path), model.bbox


def _masks(refined: SegmentRefineBitmapsResult | None, return_base64: bool) -> dict[str, str]:
    """The mask keys; one that there is no mask for is not there."""
    if refined is None or not return_base64:
        return {}
    pairs = {
        "coarse_mask_base64": refined.coarse_mask_base64,
        "refined_mask_base64": refined.refined_mask_base64,
    }
    return {key: mask for key, mask in pairs.items() if mask is not None}


def segment_response(
    model: ModelResult, refined: SegmentRefineBitmapsResult | None, *, return_base64: bool
) -> dict[str, Any]:
    """The body of a plain HTTP answer."""
    path, bbox = _outline(model, refined)
    body: dict[str, Any] = {
        "request_id": model.request_id,
        "finish_reason": model.finish_reason,
        "path": path,
        "bbox": bbox,
        "metrics": _metrics(model.metrics),
    }
    if model.parse_error is not None:
        body["parse_error"] = model.parse_error
    return body | _masks(refined, return_base64)


def segment_output(
    model: ModelResult, refined: SegmentRefineBitmapsResult | None, *, return_base64: bool
) -> dict[str, Any]:
    """One entry of ``EngineResult.output["segments"]``."""
    path, bbox = _outline(model, refined)
    segment: dict[str, Any] = {
        "object": model.object,
        "text": model.text,
        "svg_path": path,
        "bbox": bbox,
        "coarse_path": model.path,
        "coarse_bbox": model.bbox,
        "path_tokens": model.path_tokens,
        "token_ids": model.token_ids,
        "points": model.points,
        "sizes": model.sizes,
    }
    if model.parse_error is not None:
        segment["parse_error"] = model.parse_error
    return segment | _masks(refined, return_base64)


def event_payload(event: BboxEvent | PathDelta) -> dict[str, Any]:
    """The SSE event of a model event."""
    if isinstance(event, BboxEvent):
        return {"type": "bbox", "bbox": event.bbox}
    return {
        "type": "path_delta",
        "chunk": event.chunk,
        "completed": False,
        "token_index": event.token_index,
    }


def final_event(
    model: ModelResult, refined: SegmentRefineBitmapsResult | None, *, return_base64: bool
) -> dict[str, Any]:
    """The last SSE event of a request that went well: the plain answer's fields."""
    head = {"type": "final", "chunk": "", "completed": True}
    return head | segment_response(model, refined, return_base64=return_base64)


class ErrorEvent(dict[str, Any]):
    """The last SSE event of a request that failed after its first event."""

    def __init__(self, error: BaseException, request_id: str) -> None:
        message = "internal error"
        self.outcome = "broken_stream"
        """What operators call the end of that request; clients are not told."""
        if isinstance(error, RequestError):
            message, self.outcome = error.message, outcome(error)
        super().__init__(type="error", error=message, request_id=request_id, completed=True)


def sse_frame(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"
