"""Spans of a replica's stages, and the exporter; e2e/test_scaling.py has whole traces."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("ray.serve")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray import serve

from kestrel.config import SHIPPED_MODELS, Limits, RefinerConfig
from kestrel.image import decode
from kestrel.seg_refiner import SegmentRefiner
from serve_graph import tracing

SAMPLES = SHIPPED_MODELS / "nano" / "samples"
STAGES = {"prepare": 5.0, "prefill": 20.0, "decode": 300.0}


@pytest.fixture()
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TracerProvider, list]]:
    """A provider in place of the process's own, and what ends up in its exporter."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    token = serve.context._serve_request_context.set(
        serve.context._RequestContext(request_id="edge-7")
    )
    yield provider, exporter.get_finished_spans
    serve.context._serve_request_context.reset(token)


def test_stages_follow_each_other_under_the_span_of_the_replica(exported) -> None:
    provider, finished = exported
    with provider.get_tracer("serve").start_as_current_span("replica") as replica:
        tracing.stages(STAGES)
    *stages, _ = finished()
    assert [span.name for span in stages] == list(STAGES)
    for span, ms in zip(stages, STAGES.values(), strict=True):
        assert span.parent.span_id == replica.get_span_context().span_id
        assert span.attributes["request_id"] == "edge-7"
        assert span.end_time - span.start_time == pytest.approx(ms * 1e6, abs=2)
    for before, after in itertools.pairwise(stages):
        assert after.start_time == before.end_time
    # They ended when the stages did, so the first began before the call.
    assert stages[0].start_time < replica.start_time


@pytest.mark.parametrize("whole", [True, False], ids=["array", "reduced file"])
def test_stages_of_a_refinement_are_told_in_the_order_in_which_they_ended(whole) -> None:
    """As spans they follow each other: nothing is refined before it is decoded and rasterised."""
    refiner = SegmentRefiner(RefinerConfig(refiner="guided"))
    file = (SAMPLES / "owl.jpg").read_bytes()
    box = {"x_min": 0.2, "y_min": 0.2, "x_max": 0.8, "y_max": 0.8}
    if whole:
        pixels = decode(file, Limits())
        result = refiner.refine_with_bitmaps(pixels, "M0 0H1V1H0Z", box, return_base64=True)
        came = ["decode", "raster"]
    else:
        result = refiner.refine_encoded(file, "M0 0H1V1H0Z", box, return_base64=True)
        came = ["raster", "decode"]
    came += ["refine", "clean", "encode", "trace"]
    told = list(result.timings_ms)
    assert told == [stage for stage in came if stage in told]
    assert {"raster", "refine", "clean", "encode", "trace"} <= set(told)


def test_request_that_is_not_sampled_costs_no_spans(exported) -> None:
    _, finished = exported
    tracing.stages(STAGES)
    assert finished() == ()


def test_without_an_exporter_nothing_is_even_imported() -> None:
    program = (
        "import sys; from serve_graph import tracing; tracing.stages({'decode': 1.0});"
        "sys.exit(any(name.startswith(('opentelemetry', 'ray')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_otlp_reaches_the_collector_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    server = HTTPServer(("127.0.0.1", 0), Collector)
    server.received = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    provider = TracerProvider()
    for processor in tracing.otlp():
        provider.add_span_processor(processor)
    provider.get_tracer("test").start_span("decode", attributes={"request_id": "edge-7"}).end()
    provider.shutdown()
    server.shutdown()
    thread.join()
    server.server_close()
    ((path, request),) = server.received  # type: ignore[attr-defined]
    assert path == "/v1/traces"
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert span.name == "decode"
    assert {a.key: a.value.string_value for a in span.attributes} == {"request_id": "edge-7"}


def test_missing_exporter_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"pip install 'kestrel-segment-serve\[otlp\]'"):
        tracing.otlp()
