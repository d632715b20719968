"""The HTTP transport when things go wrong, over a backend whose failures are scripted."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import pytest
from serving import base64_text, picture, served, sse_events, until

from kestrel.api import (
    BboxEvent,
    InvalidRequest,
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    Overloaded,
    PathDelta,
    PromptTooLong,
    RequestError,
    SegmentRequest,
)
from kestrel.config import Limits, RuntimeConfig
from kestrel.openapi import openapi_document
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.server.compose import Refinement, compose_events, model_result
from kestrel.server.routes import build_app

BOX = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
LIMITS = Limits(max_body_bytes=20_000, max_image_pixels=10_000)
ASK = {"object": "disc", "image_url": base64_text(picture())}


class ScriptedBackend:
    """A backend whose model and refiner do what the test says.

    ``script`` lists the model's steps: an event to give, an exception to raise, or a number of
    seconds to think. ``held`` counts the requests that hold a slot or a refinement.
    """

    max_context: int | None = 512

    def __init__(self, **config: Any) -> None:
        self.config = RuntimeConfig(limits=LIMITS, **config)
        self.script: list[ModelEvent | Exception | float] = []
        self.refinement: Refinement | Exception | float = None
        self.not_ready: str | None = None
        self.held = 0
        self.begun = 0
        self.asked: list[SegmentRequest] = []
        self.ended_by: list[str] = []

    async def ready(self) -> str | None:
        return self.not_ready

    async def serving(self) -> str | None:
        return self.not_ready

    async def complete(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> tuple[ModelResult, Refinement]:
        model = await model_result(self._generate(request, request_id))
        return model, await self._refine(model)

    def events(
        self, request: SegmentRequest, request_id: str, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        return compose_events(
            self._generate(request, request_id),
            self._refine,
            request_id=request_id,
            timeout_s=timeout_s,
            return_base64=request.return_base64,
        )

    async def _generate(
        self, request: SegmentRequest, request_id: str
    ) -> AsyncGenerator[ModelEvent, None]:
        self.asked.append(request)
        with self._holding():
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
            metrics = ModelMetrics(input_tokens=9, output_tokens=3)
            path = "".join(s.chunk for s in self.script if isinstance(s, PathDelta))
            result = ModelResult(request_id, "stop", request.object, path, BOX, metrics)
            yield ModelDone(result)

    async def _refine(self, model: ModelResult) -> Refinement:
        with self._holding():
            if isinstance(self.refinement, Exception):
                raise self.refinement
            if isinstance(self.refinement, float):
                await asyncio.sleep(self.refinement)
                return None
            return self.refinement

    def _holding(self) -> _Holding:
        return _Holding(self)


class _Holding:
    def __init__(self, backend: ScriptedBackend) -> None:
        self.backend = backend

    def __enter__(self) -> None:
        self.backend.held += 1
        self.backend.begun += 1

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.backend.held -= 1
        self.backend.ended_by.append(kind.__name__ if kind else "end")


WELL: list[ModelEvent | Exception | float] = [
    BboxEvent(BOX),
    PathDelta("M0 0", 5),
    PathDelta("L1 0L1 1Z", 9),
]


@pytest.fixture
def backend() -> ScriptedBackend:
    made = ScriptedBackend(request_timeout_s=5.0)
    made.script = list(WELL)
    return made


@pytest.fixture
async def client(backend: ScriptedBackend) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_app(backend), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


def refused(response: httpx.Response, status: int, field: str | None = None) -> str:
    """The message of a refusal in the contract's shape."""
    body = response.json()
    assert response.status_code == status, body
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert body.get("field") == field
    assert set(body) == ({"error", "field"} if field else {"error"})
    assert isinstance(body["error"], str) and body["error"]
    return str(body["error"])


# Refusals of the model half


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_a_503_even_for_a_stream(client, backend, stream):
    backend.script = [Overloaded("7 requests are waiting already", retry_after_s=1.2)]
    response = await client.post("/v1/segment", json=ASK | {"stream": stream})
    assert refused(response, 503) == "7 requests are waiting already"
    assert response.headers["retry-after"] == "2"
    assert backend.held == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_does_not_fit_is_a_422(client, backend, stream):
    backend.script = [PromptTooLong("the prompt has 900 positions", "object")]
    response = await client.post("/v1/segment", json=ASK | {"stream": stream})
    refused(response, 422, "object")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_image_that_breaks_in_decoding_is_named_as_the_http_field(client, backend, stream):
    backend.script = [InvalidRequest("image cannot be decoded", "image")]
    response = await client.post("/v1/segment", json=ASK | {"stream": stream})
    assert refused(response, 400, "image_url") == "image_url cannot be decoded"


@pytest.mark.parametrize("path", ["/healthz", "/v1/segment"])
async def test_a_starting_server_says_when_to_come_back(client, backend, path):
    backend.not_ready = "the model is being loaded"
    method = "POST" if path.startswith("/v1") else "GET"
    response = await client.request(method, path, json=ASK)
    assert refused(response, 503) == "the model is being loaded"
    assert int(response.headers["retry-after"]) >= 1
    assert backend.begun == 0
    backend.not_ready = None
    assert (await client.request(method, path, json=ASK)).status_code == 200


# Faults


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_shows_a_request_id_and_nothing_of_the_server(client, backend, stream, caplog):
    backend.script = [KeyError("/srv/secret/place.py")]
    response = await client.post("/v1/segment", json=ASK | {"stream": stream})
    assert response.status_code == 500
    assert response.json() == {
        "error": "internal error",
        "request_id": response.headers["x-request-id"],
    }
    assert "secret" not in response.text and "Traceback" not in response.text
    logged = [r for r in caplog.records if r.exc_info and r.exc_info[0] is KeyError]
    assert len(logged) == 1 and response.headers["x-request-id"] in logged[0].getMessage()


async def test_a_bug_in_refinement_is_a_500_too(client, backend):
    backend.refinement = ZeroDivisionError("division by zero")
    response = await client.post("/v1/segment", json=ASK)
    assert response.status_code == 500 and "division" not in response.text


async def test_a_failure_inside_a_stream_is_one_error_event_and_a_whole_body(client, backend):
    backend.script = [*WELL[:2], RuntimeError("CUDA error at /srv/x.cu")]
    response = await client.post("/v1/segment", json=ASK | {"stream": True})
    assert response.status_code == 200
    kinds = [event["type"] for event in sse_events(response.text)]
    assert kinds == ["bbox", "path_delta", "error"]
    assert sse_events(response.text)[-1] == {
        "type": "error",
        "error": "internal error",
        "request_id": response.headers["x-request-id"],
        "completed": True,
    }


async def test_a_refusal_inside_a_stream_keeps_its_message(client, backend):
    backend.refinement = Overloaded("the refiner is unavailable")
    response = await client.post("/v1/segment", json=ASK | {"stream": True})
    events = sse_events(response.text)
    assert [e["type"] for e in events] == ["bbox", "path_delta", "path_delta", "error"]
    assert events[-1]["error"] == "the refiner is unavailable"


async def test_a_model_that_ends_without_a_result_is_a_fault_not_a_hang(client, backend):
    async def nothing(*_: Any) -> AsyncGenerator[ModelEvent, None]:
        yield BboxEvent(BOX)

    backend._generate = nothing
    response = await client.post("/v1/segment", json=ASK | {"stream": True})
    assert [e["type"] for e in sse_events(response.text)] == ["bbox", "error"]
    assert (await client.post("/v1/segment", json=ASK)).status_code == 500


async def test_a_backend_that_breaks_its_promise_still_ends_in_one_error_event(client, backend):
    async def broken(*_: Any) -> AsyncGenerator[dict[str, Any], None]:
        yield {"type": "bbox", "bbox": BOX}
        raise OSError("the backend broke off")

    backend.events = broken
    response = await client.post("/v1/segment", json=ASK | {"stream": True})
    assert [e["type"] for e in sse_events(response.text)] == ["bbox", "error"]


# Deadlines


@pytest.mark.parametrize("stream", [False, True])
async def test_a_slow_model_is_a_504_and_its_work_is_cancelled(client, backend, stream):
    backend.script = [30.0, *WELL]
    response = await client.post(
        "/v1/segment", json=ASK | {"stream": stream}, headers={"X-Request-Timeout-Ms": "50"}
    )
    refused(response, 504)
    assert backend.held == 0 and backend.ended_by == ["CancelledError"]


async def test_a_deadline_inside_a_stream_is_an_error_event(client, backend):
    backend.script = [*WELL[:1], 30.0]
    response = await client.post(
        "/v1/segment", json=ASK | {"stream": True}, headers={"X-Request-Timeout-Ms": "100"}
    )
    events = sse_events(response.text)
    assert [e["type"] for e in events] == ["bbox", "error"]
    assert "deadline" in events[-1]["error"]
    assert backend.held == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_slow_refinement_counts_against_the_deadline(client, backend, stream):
    backend.refinement = 30.0
    response = await client.post(
        "/v1/segment", json=ASK | {"stream": stream}, headers={"X-Request-Timeout-Ms": "100"}
    )
    if stream:
        assert sse_events(response.text)[-1]["type"] == "error"
    else:
        refused(response, 504)
    assert backend.held == 0 and backend.ended_by[-1] == "CancelledError"


async def test_a_client_cannot_lengthen_the_servers_deadline():
    backend = ScriptedBackend(request_timeout_s=0.1)
    backend.script = [30.0]
    transport = httpx.ASGITransport(build_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await asyncio.wait_for(
            client.post("/v1/segment", json=ASK, headers={"X-Request-Timeout-Ms": "60000"}), 5
        )
    refused(response, 504)


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "", "٣"])
async def test_a_timeout_that_is_no_whole_number_is_refused(client, backend, value):
    headers = {"X-Request-Timeout-Ms": value.encode()}
    response = await client.post("/v1/segment", json=ASK, headers=headers)
    refused(response, 400, "X-Request-Timeout-Ms")
    assert backend.begun == 0


async def test_a_body_that_never_ends_meets_the_deadline(backend):
    with served(build_app(backend)) as url, connected(url) as sock:
        head = post_head(url, {"Content-Length": "500", "X-Request-Timeout-Ms": "200"})
        sock.sendall(head + b'{"object"')
        assert b" 504 " in sock.recv(4096).split(b"\r\n")[0]
    assert backend.begun == 0


# Clients that go away


class connected:
    """A raw connection to the server; leaving closes it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)

    def __enter__(self) -> socket.socket:
        return self.sock

    def __exit__(self, *_: Any) -> None:
        self.sock.close()


def post_head(url: str, headers: dict[str, str]) -> bytes:
    lines = ["POST /v1/segment HTTP/1.1", f"Host: {urlsplit(url).netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post_bytes(url: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return post_head(url, {"Content-Length": str(len(content))}) + content


@pytest.fixture
def address(backend: ScriptedBackend) -> Iterator[str]:
    with served(build_app(backend)) as url:
        yield url


def test_a_plain_client_that_goes_away_frees_the_slot(address, backend):
    backend.script = [30.0]
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.held == 1)
    until(lambda: backend.held == 0, 3)
    assert backend.ended_by == ["CancelledError"]


def test_a_plain_client_that_goes_away_cancels_the_refinement(address, backend):
    backend.refinement = 30.0
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.begun == 2)
    until(lambda: backend.held == 0, 3)
    assert len(backend.ended_by) == 2 and backend.ended_by[-1] == "CancelledError"


@pytest.mark.parametrize("where", ["before the first event", "between events", "in refinement"])
def test_a_streaming_client_that_goes_away_frees_everything(address, backend, where):
    if where == "in refinement":
        backend.refinement = 30.0
    else:
        backend.script.insert(0 if where == "before the first event" else 1, 30.0)
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK | {"stream": True}))
        if where == "before the first event":
            until(lambda: backend.held == 1)
        else:
            seen = b""
            while b'"bbox"' not in seen:
                seen += sock.recv(4096)
            until(lambda: backend.begun == (2 if where == "in refinement" else 1))
    until(lambda: backend.held == 0, 3)
    assert backend.ended_by[-1] == "CancelledError"


def test_a_client_that_went_away_leaves_no_error_in_the_log(address, backend, caplog):
    backend.script = [30.0]
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.held == 1)
    until(lambda: backend.held == 0, 3)
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_events_are_sent_when_they_happen_not_when_all_is_done(address, backend):
    backend.script.insert(1, 30.0)
    with httpx.stream("POST", f"{address}/v1/segment", json=ASK | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert json.loads(next(response.iter_lines())[6:])["type"] == "bbox"


def test_one_stuck_request_does_not_hold_up_the_others(address, backend):
    backend.script = [30.0]
    with connected(address) as sock:
        sock.sendall(post_bytes(address, ASK))
        until(lambda: backend.held == 1)
        backend.script = list(WELL)
        assert httpx.post(f"{address}/v1/segment", json=ASK, timeout=5).status_code == 200
        assert backend.held == 1


# Bodies that are too large


def test_a_declared_body_over_the_limit_is_a_413_before_it_is_sent(address, backend):
    with connected(address) as sock:
        sock.sendall(post_head(address, {"Content-Length": str(10**9)}))
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_over_the_limit_is_a_413(address, backend):
    def chunks() -> Iterator[bytes]:
        yield b'{"object": "'
        for _ in range(30):
            yield b"x" * 1000

    response = httpx.post(f"{address}/v1/segment", content=chunks())
    assert "content-length" not in response.request.headers
    assert "20000" in refused(response, 413)


def test_a_sender_of_a_body_over_the_limit_gets_the_answer_not_a_reset(address, backend):
    for _ in range(5):
        response = httpx.post(f"{address}/v1/segment", content=b"x" * (LIMITS.max_body_bytes + 1))
        refused(response, 413)


async def test_a_body_of_exactly_the_limit_is_read(client, backend):
    body = json.dumps(ASK).encode()
    body += b" " * (LIMITS.max_body_bytes - len(body))
    assert (await client.post("/v1/segment", content=body)).status_code == 200


async def test_an_image_over_the_pixel_limit_is_a_413_before_the_model(client, backend):
    ask = ASK | {"image_url": base64_text(picture(101, 100))}
    refused(await client.post("/v1/segment", json=ask), 413, "image_url")
    assert backend.begun == 0


# Keys


@pytest.fixture
async def guarded() -> AsyncIterator[httpx.AsyncClient]:
    backend = ScriptedBackend(api_keys=("first-key", "second-key"))
    backend.script = list(WELL)
    transport = httpx.ASGITransport(build_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
        {"X-Moondream-Auth": "first-ke"},
        {"X-Moondream-Auth": ""},
        {"Authorization": "Bearer wrong", "X-Moondream-Auth": "first-key"},
    ],
)
@pytest.mark.parametrize("route", ["POST /v1/segment", "GET /v1/models"])
async def test_without_the_key_nothing_is_served(guarded, headers, route):
    method, path = route.split()
    response = await guarded.request(method, path, headers=headers)
    message = refused(response, 401)
    assert "key" in message and "first-key" not in message
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer second-key"},
        {"X-Moondream-Auth": "second-key"},
    ],
)
async def test_any_configured_key_opens_the_door(guarded, headers):
    assert (await guarded.post("/v1/segment", json=ASK, headers=headers)).status_code == 200
    assert (await guarded.get("/v1/models", headers=headers)).status_code == 200


async def test_probes_need_no_key(guarded):
    for path in ("/healthz", "/openapi.json", "/docs"):
        assert (await guarded.get(path)).status_code == 200


# Routes


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/segments", "/v1/segment/", "/docs/x"])
async def test_an_unknown_route_is_a_json_404(client, path):
    response = await client.post(path, json=ASK)
    refused(response, 404)


@pytest.mark.parametrize(
    "route", ["GET /v1/segment", "DELETE /v1/segment", "POST /healthz", "PUT /v1/models"]
)
async def test_the_wrong_method_is_a_json_405_that_names_the_right_one(client, route):
    method, path = route.split()
    response = await client.request(method, path)
    refused(response, 405)
    assert ("POST" if path == "/v1/segment" else "GET") in response.headers["allow"]


async def test_an_unknown_model_is_a_404_that_lists_what_is_served(client, backend):
    response = await client.post("/v1/segment", json=ASK | {"model": "moon"})
    assert "nano" in refused(response, 404, "model")
    assert backend.begun == 0


async def test_the_served_model_is_listed_under_the_name_that_requests_may_use(client):
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["id"] == "nano" and model["max_context"] == 512
    assert (await client.post("/v1/segment", json=ASK | {"model": model["id"]})).status_code == 200


# Answers that are well


async def test_every_answer_has_its_own_request_id(client):
    responses = [await client.post("/v1/segment", json=ASK) for _ in range(2)]
    responses += [await client.get("/healthz"), await client.get("/nothing")]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == len(ids)
    assert [r.json()["request_id"] for r in responses[:2]] == ids[:2]


@pytest.mark.parametrize("reason", ["unavailable", "rejected", None])
async def test_only_an_unavailable_refiner_is_announced(client, backend, reason):
    backend.refinement = SegmentRefineBitmapsResult(reason=reason) if reason else None
    response = await client.post("/v1/segment", json=ASK)
    assert response.status_code == 200
    assert response.headers.get("x-refinement") == (
        "unavailable" if reason == "unavailable" else None
    )


async def test_plain_and_streamed_answers_are_the_same(client, backend):
    refined_box = {"x_min": 0.2, "y_min": 0.2, "x_max": 0.7, "y_max": 0.7}
    backend.refinement = SegmentRefineBitmapsResult("M0 0L1 1Z", refined_box, "YQ==", "Yg==")
    for masks in (False, True):
        ask = ASK | {"return_base64": masks}
        plain = (await client.post("/v1/segment", json=ask)).json()
        events = sse_events((await client.post("/v1/segment", json=ask | {"stream": True})).text)
        final = events[-1]
        assert {k: final.pop(k) for k in ("type", "chunk", "completed")} == {
            "type": "final",
            "chunk": "",
            "completed": True,
        }
        assert plain.pop("request_id") != final.pop("request_id")
        assert plain == final
        assert plain["path"] == "M0 0L1 1Z" and plain["bbox"] == refined_box
        assert ("coarse_mask_base64" in plain, "refined_mask_base64" in plain) == (masks, masks)
        # The masks come with the last event only, the streamed path is the model's own.
        assert not any("mask" in key for event in events[:-1] for key in event)
        assert events[0] == {"type": "bbox", "bbox": BOX}
        assert "".join(e["chunk"] for e in events[1:-1]) == "M0 0L1 0L1 1Z"
        assert [e["completed"] for e in events[1:-1]] == [False, False]


async def test_a_request_the_transport_refused_never_reaches_the_model(client, backend):
    for body in (b"", b"{", b"[]", b'{"object": 3}', b'{"object": "a", "stream": 1}'):
        refused_status = (await client.post("/v1/segment", content=body)).status_code
        assert refused_status == 400, body
    assert backend.begun == 0


async def test_max_tokens_is_bounded_by_the_served_models_context(client, backend):
    for tokens, status in ((512, 200), (513, 400)):
        ask = ASK | {"settings": {"max_tokens": tokens}}
        assert (await client.post("/v1/segment", json=ask)).status_code == status


# The document


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return schema


def fits(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    whole = schema | {"components": document["components"]}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(value))


def unknown_keys(
    document: dict[str, Any], schema: dict[str, Any], value: dict[str, Any]
) -> set[str]:
    schema = resolve(document, schema)
    parts = [schema, *(resolve(document, part) for part in schema.get("allOf", ()))]
    return set(value) - {key for part in parts for key in part.get("properties", {})}


async def test_the_document_describes_the_answers_that_are_given(client, backend):
    document = (await client.get("/openapi.json")).json()
    responses = document["paths"]["/v1/segment"]["post"]["responses"]
    plain = responses["200"]["content"]["application/json"]["schema"]
    event = responses["200"]["content"]["text/event-stream"]["schema"]

    body = (await client.post("/v1/segment", json=ASK)).json()
    assert fits(document, plain, body) and not unknown_keys(document, plain, body)
    assert not fits(document, plain, body | {"finish_reason": "tired"})

    mapping = event_mapping(document, event)
    backend.refinement = RuntimeError("broken")
    streams = [await client.post("/v1/segment", json=ASK | {"stream": True})]
    backend.refinement = None
    streams.append(await client.post("/v1/segment", json=ASK | {"stream": True}))
    seen = {e["type"]: e for response in streams for e in sse_events(response.text)}
    assert set(seen) == set(mapping)
    for kind, payload in seen.items():
        assert fits(document, event, payload), kind
        assert not unknown_keys(document, {"$ref": mapping[kind]}, payload), kind


def event_mapping(document: dict[str, Any], event: dict[str, Any]) -> dict[str, str]:
    mapping: dict[str, str] = resolve(document, event)["discriminator"]["mapping"]
    return mapping


async def test_the_document_knows_every_refusal(client, backend):
    document = (await client.get("/openapi.json")).json()
    responses = document["paths"]["/v1/segment"]["post"]["responses"]

    def statuses(kind: type[RequestError]) -> set[int]:
        return {kind.status}.union(*(statuses(sub) for sub in kind.__subclasses__()))

    assert {str(status) for status in statuses(RequestError)} <= set(responses)
    answer = await client.post("/v1/segment", json={})
    schema = responses["400"]["content"]["application/json"]["schema"]
    assert fits(document, schema, answer.json())
    assert not unknown_keys(document, schema, answer.json())
    for status, response in responses.items():
        assert ("Retry-After" in response["headers"]) == (status in ("429", "503")), status


async def test_the_document_names_every_header_that_is_read(client):
    document = (await client.get("/openapi.json")).json()
    parameters = document["paths"]["/v1/segment"]["post"]["parameters"]
    schemes = document["components"]["securitySchemes"].values()
    named = {p["name"] for p in parameters} | {s["name"] for s in schemes if "name" in s}
    assert named == {"X-Request-Timeout-Ms", "X-Request-Id", "X-Moondream-Auth"}
    assert {"type": "http", "scheme": "bearer"} in schemes


def test_the_document_gives_the_bounds_of_its_own_server():
    limits = Limits(max_image_pixels=123_456, max_object_chars=77, max_spatial_refs=5)
    document = openapi_document(RuntimeConfig(limits=limits, max_context=640))
    schemas = document["components"]["schemas"]
    fields, tokens = schemas["SegmentRequest"]["properties"], schemas["Settings"]["properties"]
    assert tokens["max_tokens"]["maximum"] == tokens["max_tokens"]["default"] == 640
    assert "123456 pixels" in fields["image_url"]["description"]
    assert "77 characters" in fields["object"]["description"]
    assert fields["spatial_refs"]["maxItems"] == 5


async def test_every_reference_of_the_document_leads_somewhere(client):
    text = (await client.get("/openapi.json")).text
    document = json.loads(text)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names and names <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_the_docs_page_loads_nothing_from_elsewhere(client):
    response = await client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "/v1/segment" in response.text and "return_base64" in response.text
    for loader in ("<script", "<link", "<img", "src=", "//", "@import", "url("):
        assert loader not in response.text, loader


def test_two_servers_do_not_share_their_document():
    one, two = ScriptedBackend(), ScriptedBackend(model="other", api_keys=("k",))
    documents = []
    for backend in (one, two):
        with served(build_app(backend)) as url:
            documents.append(httpx.get(f"{url}/openapi.json").json())
    served_names = [
        d["components"]["schemas"]["SegmentRequest"]["properties"]["model"]["enum"][0]
        for d in documents
    ]
    assert served_names == ["nano", "other"]
    operations = [d["paths"]["/v1/segment"]["post"] for d in documents]
    assert [bool(o["security"]) for o in operations] == [False, True]
