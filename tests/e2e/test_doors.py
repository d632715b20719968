"""The doors of the running graph beside plain HTTP: a handle, Ray Client, the Python client."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running_graph import KEY, Driver, Graph, wait_for, without_times

from serve_graph.client import SegmentClient
from serve_graph.demo import Sample
from serve_graph.environment import FAST_SERVE

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=["handle", "ray client"])
def ray_driver(graph: Graph, request: pytest.FixtureRequest) -> Iterator[Driver]:
    if request.param == "handle":
        yield graph.driver
        return
    driver = Driver(graph.cluster.client_address, graph.environment)
    yield driver
    driver.close()


def test_ray_doors_answer_like_http(
    ray_driver: Driver, answers: list[dict[str, Any]], samples: list[Sample], tmp_path: Any
) -> None:
    picture = tmp_path / "picture"
    picture.write_bytes(samples[0].image)
    ask = {"object": samples[0].noun, "image": str(picture), "return_base64": True}
    for command in ("segment", "segment in a loop", "asegment"):
        assert without_times(ray_driver.ask(command, **ask)["ok"]) == without_times(answers[0])
    for command in ("stream", "stream in a loop", "astream"):
        first, *deltas, final = ray_driver.ask(command, **ask)["ok"]
        assert first["type"] == "bbox" and {delta["type"] for delta in deltas} == {"path_delta"}
        assert without_times(final) == without_times(answers[0])


def test_ray_doors_raise_the_errors_of_the_contract(
    ray_driver: Driver, samples: list[Sample], tmp_path: Any
) -> None:
    # Past the client's own validation: only the model notices that pixels are missing.
    picture = tmp_path / "cut"
    picture.write_bytes(samples[0].image[: len(samples[0].image) // 2])
    for command in ("segment", "stream"):
        reply = ray_driver.ask(command, object="dog", image=str(picture))
        assert (reply["type"], reply["status"]) == ("InvalidRequest", 400)
    assert ray_driver.ask("segment", object=" ")["field"] == "object"


def test_ray_doors_take_the_model_s_name_and_a_deadline(
    ray_driver: Driver, samples: list[Sample], huge: bytes, tmp_path: Path
) -> None:
    picture, large = tmp_path / "picture", tmp_path / "huge.png"
    picture.write_bytes(samples[0].image)
    large.write_bytes(huge)
    ask = {"object": samples[0].noun, "image": str(picture)}
    assert ray_driver.ask("segment", **ask, model="nano")["ok"]["path"]
    unknown = ray_driver.ask("segment", **ask, model="gpt")
    assert (unknown["type"], unknown["status"]) == ("UnknownModel", 404)
    late = ray_driver.ask("with_deadline", **ask | {"image": str(large)}, timeout_s=0.15)
    assert (late["type"], late["status"]) == ("DeadlineExceeded", 504)


def test_ray_client_keeps_nothing_of_calls_that_were_left(
    graph: Graph, samples: list[Sample], tmp_path: Path
) -> None:
    picture = tmp_path / "picture"
    picture.write_bytes(samples[0].image)
    ask = {"object": samples[0].noun, "image": str(picture), "return_base64": True}
    driver = Driver(graph.cluster.client_address, graph.environment)
    try:
        assert driver.ask("segment", **ask)["ok"]["path"]
        always, left = driver.ask("unheard")["ok"], 8
        for _ in range(left):
            assert driver.ask("leave soon", **ask)["type"] == "TimeoutError"
        assert driver.ask("segment", **ask)["ok"]["path"]
        # Each would stay, and its answer on the cluster, until Ray Client disconnects. Now and then
        # Ray itself gives up a question to a busy replica, which stays likewise.
        assert wait_for(lambda: driver.ask("unheard")["ok"] < always + left // 2)
    finally:
        driver.close()


def test_ray_client_serves_a_program_with_the_variables_of_a_node(
    graph: Graph, answers: list[dict[str, Any]], samples: list[Sample], tmp_path: Path
) -> None:
    picture = tmp_path / "picture"
    picture.write_bytes(samples[0].image)
    ask = {"object": samples[0].noun, "image": str(picture), "return_base64": True}
    driver = Driver(graph.cluster.client_address, {**graph.environment, **FAST_SERVE})
    try:
        *_, final = driver.ask("stream", **ask)["ok"]
        for answer in (driver.ask("segment", **ask)["ok"], final):
            assert without_times(answer) == without_times(answers[0])
    finally:
        driver.close()


def test_stream_by_handle_that_is_left_frees_what_it_holds(
    graph: Graph, samples: list[Sample], huge: bytes, tmp_path: Path
) -> None:
    picture = tmp_path / "huge.png"
    picture.write_bytes(huge)

    def cancelled() -> int:
        # The word comes while the model decodes or, a little later, while the path is refined.
        return graph.count("Model", "cancelled") + graph.count("Refiner", "cancelled")

    before = cancelled()

    def left_in_time() -> bool:
        """Whether it was left before its answer was there: on a busy machine it may be."""
        first = graph.driver.ask("leave_stream", object=samples[0].noun, image=str(picture))
        assert first["ok"]["type"] == "bbox"
        return wait_for(lambda: cancelled() > before, 10)

    assert any(left_in_time() for _ in range(5))
    assert wait_for(lambda: graph.count("Model", "running") == 0)
    assert wait_for(lambda: graph.count("Refiner", "running") == 0)


def test_http_client_gives_the_same_and_raises_the_same(
    graph: Graph, answers: list[dict[str, Any]], samples: list[Sample]
) -> None:
    from kestrel.api import InvalidRequest, Unauthorized

    ask: dict[str, Any] = {"object": samples[0].noun, "return_base64": True}
    with SegmentClient(graph.url, api_key=KEY) as client:
        pixels = np.asarray(Image.open(io.BytesIO(samples[0].image)).convert("RGB"))
        for image in (samples[0].image, pixels):
            answer = client.segment(image=image, **ask)
            assert without_times(answer) == without_times(answers[0])
        *_, final = client.segment(image=samples[0].image, stream=True, **ask)
        assert without_times(final) == without_times(answers[0])
        with pytest.raises(InvalidRequest, match="object"):
            client.segment(object="")
        with pytest.raises(InvalidRequest):
            client.segment(object="dog", image=samples[0].image[:200])
    with SegmentClient(graph.url) as anonymous, pytest.raises(Unauthorized):
        anonymous.segment(object="dog")

    async def asynchronously() -> tuple[dict[str, Any], dict[str, Any]]:
        async with SegmentClient(graph.url, api_key=KEY) as client:
            image = samples[0].image
            plain = await client.asegment(image=image, **ask)
            *_, final = [event async for event in client.astream(image=image, **ask)]
            with pytest.raises(InvalidRequest):
                await client.asegment(object="dog", image=image[:200])
            return plain, final

    for answer in asyncio.run(asynchronously()):
        assert without_times(answer) == without_times(answers[0])
