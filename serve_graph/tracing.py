"""Traces of a request across the three deployments, for an operator who names an exporter.

Ray Serve makes a span in the HTTP door, in each router and in each replica, passes the context
along with every handle call and puts its request id on each; this module adds what only the graph
knows, the stages within a replica, and an exporter that speaks OTLP. Without an exporter nothing is
recorded and nothing is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any


def stages(stage_ms: Mapping[str, float]) -> None:
    """Spans of stages that ran one after the other and ended now, under the replica's span.

    ``stage_ms``: stage -> milliseconds, in order.
    """
    # Serve imports it when an exporter is configured.
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().is_recording():
        return
    from ray import serve

    named = {"request_id": serve.context._get_serve_request_context().request_id}
    tracer = trace.get_tracer("serve_graph")
    at = time.time_ns() - round(sum(stage_ms.values()) * 1e6)
    for stage, ms in stage_ms.items():
        span = tracer.start_span(stage, start_time=at, attributes=named)
        at += round(ms * 1e6)
        span.end(end_time=at)


def otlp() -> list[Any]:
    """For ``RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=serve_graph.tracing:otlp``: spans go to the
    collector that the standard ``OTEL_EXPORTER_OTLP_*`` variables name, over HTTP.

    Raises ImportError that says how to install the exporter.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ImportError(
            "traces over OTLP need opentelemetry-exporter-otlp-proto-http: "
            "pip install 'kestrel-segment-serve[otlp]'"
        ) from error
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]
