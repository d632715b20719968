"""The real graph, started once, seen from outside: HTTP, SSE, a handle, Ray Client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from running_graph import (
    REFINE_TIMEOUT_S,
    Graph,
    body,
    enlarged,
    sse,
    wait_for,
    without_times,
)

from kestrel.overlay import decode_mask
from serve_graph.demo import Sample, iou

pytestmark = pytest.mark.timeout(600)


def test_health_is_503_until_a_request_would_be_answered(
    graph: Graph, answers: list[dict[str, Any]]
) -> None:
    # The fixture asked from the deployment on, and then at once for the first answers.
    assert graph.health[-1] == 200 and len(answers) > 1
    assert graph.health.count(200) == 1 and 503 in graph.health
    # Before there is a route, Serve's door answers by itself.
    assert set(graph.health) <= {404, 503, 200}


def test_masks_have_the_size_of_the_picture_and_two_values(
    answers: list[dict[str, Any]], samples: list[Sample]
) -> None:
    for answer, sample in zip(answers, samples, strict=True):
        for key in ("coarse_mask_base64", "refined_mask_base64"):
            png = Image.open(io.BytesIO(base64.b64decode(answer[key])))
            assert (png.format, png.mode) == ("PNG", "L")
            mask = np.asarray(png)
            assert mask.shape == sample.truth.shape
            assert set(np.unique(mask)) == {0, 255}


def test_a_file_of_many_megabytes_reaches_both_halves(
    graph: Graph, answers: list[dict[str, Any]], samples: list[Sample]
) -> None:
    # What follows the end of a JPEG is not read. As base64 it is nearly ``limits.max_body_bytes``.
    large = replace(samples[0], image=samples[0].image + bytes(23 * 2**20))
    reply = graph.http.post("/v1/segment", json=body(large, return_base64=True))
    assert reply.status_code == 200, reply.text
    assert without_times(reply.json()) == without_times(answers[0])
    asked = body(large, return_base64=True, stream=True)
    with graph.http.stream("POST", "/v1/segment", json=asked) as response:
        *_, final = sse(response)
    assert without_times(final) == without_times(answers[0])


def test_masks_cover_the_object_and_refinement_changes_them(
    answers: list[dict[str, Any]], samples: list[Sample]
) -> None:
    coarse, refined = [], []
    for answer, sample in zip(answers, samples, strict=True):
        masks = [decode_mask(answer[f"{kind}_mask_base64"]) for kind in ("coarse", "refined")]
        assert not np.array_equal(*masks)
        coarse.append(iou(masks[0], sample.truth))
        refined.append(iou(masks[1], sample.truth))
    assert np.mean(coarse) > 0.5
    assert np.mean(refined) > 0.5


def test_a_request_chooses_its_refiner_among_those_loaded(
    graph: Graph, answers: list[dict[str, Any]], samples: list[Sample]
) -> None:
    def asked(name: str) -> httpx.Response:
        request = body(samples[0], return_base64=True, settings={"refiner": name})
        return graph.http.post("/v1/segment", json=request)

    coarse = asked("none").json()
    assert coarse["refined_mask_base64"] == coarse["coarse_mask_base64"]
    assert without_times(asked("boundary").json()) == without_times(answers[0])
    assert asked("guided").json()["path"] not in (coarse["path"], answers[0]["path"])
    refused = asked("hq-sam")
    assert (refused.status_code, refused.json()["field"]) == (400, "settings.refiner")
    assert "loaded are boundary, none, guided" in refused.json()["error"]


def test_stream_is_box_then_path_then_the_plain_answer(
    graph: Graph, answers: list[dict[str, Any]], samples: list[Sample]
) -> None:
    request = body(samples[0], stream=True, return_base64=True)
    with graph.http.stream("POST", "/v1/segment", json=request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first, *deltas, final = sse(response)
    assert first["type"] == "bbox"
    assert deltas and all(delta["type"] == "path_delta" for delta in deltas)
    assert not any("coarse_mask_base64" in event for event in (first, *deltas))
    assert final["type"] == "final" and final["completed"]
    assert without_times(final) == without_times(answers[0])


def test_without_return_base64_no_mask_is_encoded_or_sent(
    graph: Graph, samples: list[Sample]
) -> None:
    encoded, answered = graph.count("Refiner", "encoded"), graph.count("Refiner", "answered")
    plain = graph.http.post("/v1/segment", json=body(samples[0])).json()
    with graph.http.stream("POST", "/v1/segment", json=body(samples[0], stream=True)) as response:
        *_, final = sse(response)
    for answer in (plain, final):
        assert not any("mask" in key for key in answer)
        assert answer["path"]
    assert graph.count("Refiner", "answered") == answered + 2
    assert graph.count("Refiner", "encoded") == encoded


def test_answer_that_is_cut_off_is_no_path_and_nobody_refines_it(
    graph: Graph, samples: list[Sample]
) -> None:
    cut = {"return_base64": True, "settings": {"max_tokens": 20}}
    answered = graph.count("Refiner", "answered")
    plain = graph.http.post("/v1/segment", json=body(samples[0], **cut)).json()
    request = body(samples[0], stream=True, **cut)
    with graph.http.stream("POST", "/v1/segment", json=request) as response:
        first, *deltas, final = sse(response)
    assert first["bbox"] == plain["bbox"] and deltas
    assert without_times(final) == without_times(plain)
    assert (plain["path"], plain["finish_reason"]) == ("", "length")
    assert "20 tokens" in plain["parse_error"]
    assert not any("mask" in key for key in plain)
    assert graph.count("Refiner", "answered") == answered


def test_refiner_replicas_never_load_torch(graph: Graph) -> None:
    stats = graph.stats()
    assert len(stats["Refiner"]) == 2
    assert not any(replica["torch"] for replica in stats["Refiner"])
    assert all(replica["torch"] for replica in stats["Model"])


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"object": "  "}, 400, "object"),
        ({"stream": "true"}, 400, "stream"),
        ({"image_url": "https://example.com/dog.png"}, 400, "image_url"),
        ({"image_url": "bm90IGFuIGltYWdl"}, 400, "image_url"),
        ({"image_url": None, "return_base64": True}, 400, "return_base64"),
        ({"spatial_refs": [[0.5, 2]]}, 400, "spatial_refs"),
        ({"settings": {"top_k": 1}}, 400, "settings.top_k"),
        ({"model": "gpt"}, 404, "model"),
    ],
)
def test_wrong_request_is_refused_by_field(
    graph: Graph, samples: list[Sample], fields: dict[str, Any], status: int, field: str
) -> None:
    reply = graph.http.post("/v1/segment", json=body(samples[0]) | fields)
    assert (reply.status_code, reply.json()["field"]) == (status, field)


def test_other_errors_have_their_status(graph: Graph, samples: list[Sample]) -> None:
    assert graph.http.post("/v1/segment", content=b"{").status_code == 400
    assert graph.http.get("/v1/nothing").status_code == 404
    assert graph.http.get("/v1/segment").status_code == 405
    huge = b'{"object": "' + b"x" * (33 * 2**20) + b'"}'
    assert graph.http.post("/v1/segment", content=huge).status_code == 413
    wrong = {"Authorization": "Bearer wrong"}
    assert graph.http.post("/v1/segment", json={}, headers=wrong).status_code == 401
    with httpx.Client(base_url=graph.url) as anonymous:
        assert anonymous.post("/v1/segment", json=body(samples[0])).status_code == 401
        assert anonymous.get("/healthz").status_code == 200


def test_truncated_picture_is_the_client_s_fault(graph: Graph, samples: list[Sample]) -> None:
    cut = base64.b64encode(samples[0].image[: len(samples[0].image) // 2]).decode()
    reply = graph.http.post("/v1/segment", json={"object": "dog", "image_url": cut})
    assert reply.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_does_not_fit_the_model_is_a_422(
    graph: Graph, samples: list[Sample], stream: bool
) -> None:
    # As many characters as a noun may have, and each is several tokens.
    request = body(samples[0], stream=stream) | {"object": "\N{DOG FACE}" * 256}
    reply = graph.http.post("/v1/segment", json=request)
    assert reply.status_code == 422
    assert "positions" in reply.json()["error"]


@contextlib.contextmanager
def short_of_memory(pids: list[int], left: int = 96 * 2**20) -> Iterator[None]:
    """Processes that may have only so many bytes more than they have: enough for what Ray does
    beside a request, less than the pixels of the huge picture."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_AS) for pid in pids}
    for pid, (_, hard) in before.items():
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + left, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_AS, limits)


def test_fault_within_a_half_is_a_500_that_names_the_request_and_nothing_else(
    graph: Graph, samples: list[Sample], huge: bytes
) -> None:
    # Other bytes than other tests send: what was encoded is remembered.
    request = body(replace(samples[0], image=huge + b"fault"))
    pids = {
        half: [replica["pid"] for replica in graph.stats()[half]] for half in ("Model", "Refiner")
    }
    with short_of_memory(pids["Model"]):
        reply = graph.http.post("/v1/segment", json=request)
    assert reply.status_code == 500
    named = reply.headers["x-request-id"]
    assert reply.json() == {"error": "internal error", "request_id": named}
    # The path is there without refinement.
    with short_of_memory(pids["Refiner"]):
        reply = graph.http.post("/v1/segment", json=request)
    assert reply.status_code == 200
    assert reply.json()["path"]
    after = graph.http.post("/v1/segment", json=body(samples[0]))
    assert after.status_code == 200 and "x-refinement" not in after.headers
    for half, before in pids.items():
        assert sorted(replica["pid"] for replica in graph.stats()[half]) == sorted(before)


def test_documents_are_served(graph: Graph) -> None:
    assert graph.http.get("/v1/models").json()["data"][0]["id"] == "nano"
    document = graph.http.get("/openapi.json").json()
    assert {"/v1/segment", "/v1/models", "/healthz"} <= set(document["paths"])
    assert "text/html" in graph.http.get("/docs").headers["content-type"]


def test_deadline_is_a_504_and_frees_the_slot(
    graph: Graph, samples: list[Sample], huge: bytes
) -> None:
    request = body(replace(samples[0], image=huge))
    reply = graph.http.post("/v1/segment", json=request, headers={"X-Request-Timeout-Ms": "150"})
    assert reply.status_code == 504
    assert wait_for(lambda: graph.count("Model", "running") == 0)


def test_client_that_leaves_frees_the_slot(
    graph: Graph, samples: list[Sample], huge: bytes, tmp_path: Path
) -> None:
    numbers = itertools.count()

    def fresh() -> bytes:
        """Other bytes each time, behind the end of the PNG: what was encoded is remembered."""
        return huge + bytes([next(numbers)])

    async def leave_http(**fields: bool) -> None:
        request = body(replace(samples[0], image=fresh()))
        async with httpx.AsyncClient(base_url=graph.url, headers=graph.http.headers) as client:
            answer = asyncio.create_task(client.post("/v1/segment", json=request | fields))
            while not await asyncio.to_thread(graph.count, "Model", "running"):
                assert not answer.done()
            answer.cancel()
            await asyncio.wait([answer])

    async def leave_handle() -> None:
        picture = tmp_path / "huge.png"
        picture.write_bytes(fresh())
        assert "ok" in graph.driver.ask("leave", object=samples[0].noun, image=str(picture))

    def freed(leave: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        cancelled = graph.count("Model", "cancelled")
        asyncio.run(leave())
        told = wait_for(lambda: graph.count("Model", "cancelled") == cancelled + 1, 10)
        assert wait_for(lambda: graph.count("Model", "running") == 0)
        return told

    # On a busy machine the model may be done before it hears of it: then once more.
    assert any(freed(leave_http) for _ in range(4))
    assert any(freed(partial(leave_http, stream=True)) for _ in range(4))
    assert any(freed(leave_handle) for _ in range(4))


def test_client_that_leaves_cancels_the_refinement(
    graph: Graph, samples: list[Sample], huge: bytes
) -> None:
    request = body(replace(samples[0], image=huge)) | {"stream": True}
    before = graph.count("Refiner", "cancelled")

    def left_while_refining() -> bool:
        """Whether the refinement was seen to run: on a busy machine it may end before."""
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.Client(base_url=graph.url, headers=graph.http.headers) as client,
            client.stream("POST", "/v1/segment", json=request) as response,
        ):
            for event in sse(response):
                if event["type"] == "path_delta" and event["chunk"].endswith("Z"):
                    return wait_for(lambda: graph.count("Refiner", "running") > 0, 5)
        return False

    def cancelled() -> bool:
        return wait_for(lambda: graph.count("Refiner", "cancelled") > before, 10)

    assert any(left_while_refining() and cancelled() for _ in range(5))
    assert wait_for(lambda: graph.count("Refiner", "running") == 0)


def test_full_queue_is_a_503_that_says_when_to_come_back(
    graph: Graph, samples: list[Sample]
) -> None:
    # One body for all, or the senders would be slower than the graph where cores are few.
    request = json.dumps(body(replace(samples[0], image=enlarged(samples[0], 3000, 2000)))).encode()
    sent = {"content": request, "headers": {"content-type": "application/json"}}
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: graph.http.post("/v1/segment", **sent), range(40)))
    by_status = {status: [r for r in replies if r.status_code == status] for status in (200, 503)}
    assert len(by_status[200]) + len(by_status[503]) == 40
    assert by_status[200] and by_status[503]
    for reply in by_status[503]:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]


def test_request_survives_the_death_of_its_refiner(graph: Graph, samples: list[Sample]) -> None:
    # Refined for a while, and four of them within the time that refinement has, twice over.
    large = enlarged(samples[0], 4000, 2500)
    request = body(replace(samples[0], image=large), return_base64=True)
    busy: list[int] = []

    def refining() -> bool:
        busy[:] = [replica["pid"] for replica in graph.stats()["Refiner"] if replica["running"]]
        return bool(busy)

    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(graph.http.post, "/v1/segment", json=request) for _ in range(4)]
        assert wait_for(refining)
        victim = busy[0]
        os.kill(victim, signal.SIGKILL)
        statuses = [reply.result().status_code for reply in replies]
        masks = ["refined_mask_base64" in reply.result().json() for reply in replies]
    assert statuses == [200] * 4
    assert all(masks)

    def replaced() -> bool:
        pids = {replica["pid"] for replica in graph.stats()["Refiner"]}
        return len(pids) == 2 and victim not in pids

    assert wait_for(replaced, 90)


def test_without_a_refiner_the_path_is_the_model_s_and_masks_are_a_503(
    graph: Graph, samples: list[Sample]
) -> None:
    pids = [replica["pid"] for replica in graph.stats()["Refiner"]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        requests = [body(samples[0]), body(samples[0], return_base64=True)]
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            plain, masks = pool.map(lambda r: graph.http.post("/v1/segment", json=r), requests)
        assert time.monotonic() - began < REFINE_TIMEOUT_S + 20
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert plain.status_code == 200 and plain.json()["path"]
    assert plain.headers["x-refinement"] == "unavailable"
    assert masks.status_code == 503 and int(masks.headers["retry-after"]) >= 1
    assert wait_for(
        lambda: "x-refinement" not in graph.http.post("/v1/segment", json=body(samples[0])).headers,
        60,
    )


def test_nothing_but_the_token_opens_ray(graph: Graph) -> None:
    assert httpx.get(f"{graph.cluster.dashboard}/api/serve/applications/").status_code == 401
