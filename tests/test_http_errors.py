"""The HTTP transport when things go wrong, over a backend whose failures are scripted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest
from scripted import ASK, BOX, WELL, ScriptedBackend, refused
from serving import connected, post_head, served, sse_events

from kestrel import api
from kestrel.api import BboxEvent, InvalidRequest, ModelEvent, Overloaded, PromptTooLong
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.server.routes import build_app

pytest_plugins = ["scripted"]


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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_that_passes_while_the_body_is_looked_at_is_a_504(
    client, backend, monkeypatch, stream
):
    parse = api.parse_segment_json

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return parse(*args, **options)

    monkeypatch.setattr(api, "parse_segment_json", slow)
    response = await client.post(
        "/v1/segment", json=ASK | {"stream": stream}, headers={"X-Request-Timeout-Ms": "50"}
    )
    refused(response, 504)
    assert backend.begun == 0


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


async def test_an_unknown_route_below_a_prefix_is_told_where_the_others_are(backend):
    transport = httpx.ASGITransport(build_app(backend), root_path="/seg")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        message = refused(await client.get("/seg/v1"), 404)
    assert "POST /seg/v1/segment, see /seg/docs" in message


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
