"""The Python client: what it sends, what it makes of answers, what is left when it is left."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import threading
from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scripted import BOX, WELL, ScriptedBackend
from serving import picture, served, until

from kestrel.api import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestError,
    ServiceFault,
    UnknownModel,
    timeout_of_call,
    validate_call,
)
from kestrel.config import Limits
from kestrel.image import decode
from kestrel.server.routes import build_app
from serve_graph.client import SegmentClient

pytest_plugins = ["scripted"]


@pytest.fixture
def address(backend: ScriptedBackend) -> Iterator[str]:
    with served(build_app(backend)) as url:
        yield url


def test_a_ray_cluster_that_does_not_let_in_is_no_word_about_its_token(monkeypatch):
    ray = pytest.importorskip("ray")
    exceptions = pytest.importorskip("ray.exceptions")
    monkeypatch.setattr("serve_graph.handle_door.use_token", lambda: None)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for error in (
        ConnectionError("ray client connection timeout"),
        exceptions.AuthenticationError("the token is missing"),
        RuntimeError("not found"),
    ):
        monkeypatch.setattr(ray, "init", Mock(side_effect=error))
        with pytest.raises(
            ConnectionError, match=r"RAY_AUTH_MODE=token \(it is not set\)"
        ) as raised:
            SegmentClient("ray://127.0.0.1:1")
        assert str(error)[:20] in str(raised.value)


def everyhow(address: str, **options: Any) -> list[Any]:
    """A call in each way of the client; what it gave last, or the error that it raised."""

    def streamed(**fields: Any) -> Any:
        with SegmentClient(address, **options) as client:
            return list(client.segment(**fields, stream=True))[-1]

    def plain(**fields: Any) -> Any:
        with SegmentClient(address, **options) as client:
            return client.segment(**fields)

    async def aplain(**fields: Any) -> Any:
        async with SegmentClient(address, **options) as client:
            return await client.asegment(**fields)

    async def astreamed(**fields: Any) -> Any:
        async with SegmentClient(address, **options) as client:
            return [event async for event in client.astream(**fields)][-1]

    return [
        plain,
        streamed,
        lambda **fields: asyncio.run(aplain(**fields)),
        lambda **fields: asyncio.run(astreamed(**fields)),
    ]


@contextlib.contextmanager
def swallowing() -> Iterator[str]:
    """An address whose connections are not made and not refused: its queue of them is full."""
    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(3):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of a server that gives each request these bytes and closes its connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()).strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


# Over HTTP


def test_every_field_arrives_as_it_was_given(address, backend):
    settings = {"temperature": 0.5, "max_tokens": 40, "refiner": "none"}
    refs = [[0.5, 0.5], [0.1, 0.2, 0.3, 0.4]]
    for call in everyhow(address):
        call(object=" disc ", image=picture(), spatial_refs=refs, return_base64=True,
             settings=settings, model="nano")  # fmt: skip
    assert [asked.stream for asked in backend.asked] == [False, True, False, True]
    for asked in backend.asked:
        assert (asked.object, asked.image, asked.return_base64) == ("disc", picture(), True)
        assert [list(ref) for ref in asked.spatial_refs or []] == refs
        chosen = asked.settings
        assert (chosen.temperature, chosen.top_p, chosen.max_tokens) == (0.5, 1.0, 40)
        assert chosen.refiner == "none"


def test_an_array_arrives_with_its_pixels_and_a_file_with_its_bytes(address, backend, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    file = tmp_path / "picture"
    file.write_bytes(picture())
    with SegmentClient(address) as client:
        client.segment(object="disc", image=pixels)
        client.segment(object="disc", image=file)
        client.segment(object="disc")
    first, second, third = (asked.image for asked in backend.asked)
    assert np.array_equal(decode(first), pixels)
    assert second == picture() and third is None


def test_defaults_are_left_to_a_service_with_a_smaller_context(address, backend):
    backend.max_context = 100
    with SegmentClient(address) as client:
        client.segment(object="disc", image=picture())
    assert backend.asked[0].settings.max_tokens == 100


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after_s=3), Overloaded),
        (InvalidRequest("image cannot be decoded", "image"), InvalidRequest),
        (RuntimeError("a bug"), ServiceFault),
    ],
)
def test_a_refusal_is_raised_as_what_it_is_in_every_way(address, backend, error, kind):
    backend.script = [error]
    for call in everyhow(address):
        with pytest.raises(RequestError) as caught:
            call(object="disc", image=picture())
        assert type(caught.value) is kind
        if kind is Overloaded:
            assert caught.value.retry_after_s == 3
        if kind is ServiceFault:
            assert "internal error (request " in caught.value.message


def test_a_host_that_swallows_packets_cannot_be_reached_in_every_way():
    with swallowing() as address:
        for call in everyhow(address, timeout_s=0.3):
            with pytest.raises(ConnectionError):
                call(object="disc")


EVENT = b'data: {"type":"bbox","bbox":null}\n\n'


@pytest.mark.parametrize("cut", [b"", EVENT, EVENT + b'data: {"type":"fi'])
def test_a_stream_that_is_cut_is_a_lost_connection(cut):
    """A body that ends with its connection, as behind a proxy of HTTP/1.0, may end anywhere."""
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with answering(head + cut) as address:
        _, streamed, _, astreamed = everyhow(address)
        for call in (streamed, astreamed):
            with pytest.raises(ConnectionError, match="without its last event"):
                call(object="disc")


@pytest.mark.parametrize("kind", ["final", "error"])
def test_a_stream_is_whole_with_its_last_event(kind):
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    last = b'data: {"type":"%s","completed":true}\n\n' % kind.encode()
    with answering(head + EVENT + last) as address:
        _, streamed, _, astreamed = everyhow(address)
        for call in (streamed, astreamed):
            assert call(object="disc") == {"type": kind, "completed": True}


def test_a_plain_answer_that_is_no_json_is_a_lost_connection():
    with answering(
        b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"request_id":'
    ) as address:
        plain, _, aplain, _ = everyhow(address)
        for call in (plain, aplain):
            with pytest.raises(ConnectionError, match="no JSON object"):
                call(object="disc")


def test_another_model_is_refused_in_every_way(address, backend):
    for call in everyhow(address):
        with pytest.raises(UnknownModel, match="nano"):
            call(object="disc", model="other")
    assert backend.begun == 0


def test_the_client_s_deadline_is_kept_by_the_service_in_every_way(address, backend):
    backend.script = [30.0]
    for call in everyhow(address, timeout_s=0.3):
        with pytest.raises(DeadlineExceeded):
            call(object="disc", image=picture())
    until(lambda: backend.held == 0)
    assert backend.begun == 4 and backend.ended_by == ["CancelledError"] * 4
    assert all(0 < seconds <= 0.3 for seconds in backend.timeouts)


def test_a_failure_after_the_first_event_is_the_last_event(address, backend):
    backend.script = [*WELL, RuntimeError("late bug")]
    with SegmentClient(address) as client:
        events = list(client.segment(object="disc", image=picture(), stream=True))
    assert events[0] == {"type": "bbox", "bbox": BOX}
    assert [event["type"] for event in events[1:]] == ["path_delta", "path_delta", "error"]


def test_a_stream_that_is_left_frees_the_slot(address, backend):
    backend.script = [*WELL, 30.0]
    with SegmentClient(address) as client:
        stream = client.segment(object="disc", image=picture(), stream=True)
        assert next(iter(stream))["type"] == "bbox"
        stream.close()
        until(lambda: backend.held == 0)


def test_a_service_that_is_not_there_is_a_connection_error():
    with SegmentClient("http://127.0.0.1:9") as client, pytest.raises(ConnectionError):
        client.segment(object="disc")


# By handle


def taken(**fields: Any) -> Any:
    return validate_call(fields, limits=Limits(), served_model="nano", max_context=900)


def test_a_call_by_handle_is_read_like_the_body_of_a_post():
    request = taken(object=" disc ", image=picture(), model="nano", stream=False, user="me")
    assert request.object == "disc" and request.image == picture()
    with pytest.raises(UnknownModel, match="nano") as caught:
        taken(object="disc", model="other")
    assert caught.value.field == "model"
    with pytest.raises(InvalidRequest, match="object is required"):
        taken(image=picture())


def test_the_deadline_of_a_call_by_handle_shortens_and_never_lengthens():
    assert timeout_of_call(None, 60.0) == 60.0
    assert timeout_of_call(2, 60.0) == 2.0
    assert timeout_of_call(600, 60.0) == 60.0
    for wrong in (0, -1, "5", True, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest) as caught:
            timeout_of_call(wrong, 60.0)
        assert caught.value.field == "timeout_s"


async def test_a_stream_left_while_its_thread_waits_ends_as_cancelled_and_is_closed():
    pytest.importorskip("ray")
    from serve_graph.handle_door import in_threads

    at_second, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def blocking() -> Generator[int, None, None]:
        try:
            yield 1
            at_second.set()
            go_on.wait(30)
            yield 2
        finally:
            closed.set()

    async def read() -> None:
        async for item in in_threads(blocking()):
            assert item == 1

    reading = asyncio.create_task(read())
    await asyncio.to_thread(at_second.wait, 30)
    reading.cancel()
    await asyncio.sleep(0)
    assert not closed.is_set()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert closed.is_set()


class NeverTaken:
    """A call of a handle that no replica takes."""

    def __init__(self, *_: Any, **fields: Any) -> None:
        self.fields = fields
        self.cancelled = False

    def __aiter__(self) -> NeverTaken:
        return self

    async def __anext__(self) -> Any:
        # As Ray does, which leaves a task to wait for the item.
        await asyncio.wait({asyncio.ensure_future(asyncio.sleep(60))})

    def __iter__(self) -> NeverTaken:
        return self

    def __next__(self) -> Any:
        threading.Event().wait(60)

    def result(self, timeout_s: float) -> Any:
        threading.Event().wait(timeout_s)
        raise TimeoutError

    def cancel(self) -> None:
        self.cancelled = True


class EmptyQueue:
    """A queue of Ray into which nobody puts anything, and its actor."""

    def __init__(self, **_: Any) -> None:
        self.actor = self
        self.get = SimpleNamespace(remote=lambda timeout: timeout)

    def shutdown(self, force: bool) -> None: ...


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[NeverTaken]]:
    """The door of a handle whose calls nobody takes, deadline 0.3 s; and the calls."""
    pytest.importorskip("ray.serve")
    from ray.util.queue import Empty

    from serve_graph.handle_door import HandleDoor

    calls: list[NeverTaken] = []

    def waited(seconds: float, timeout: float) -> Any:
        assert seconds <= timeout
        threading.Event().wait(seconds)
        raise Empty

    def remote(*args: Any, **fields: Any) -> NeverTaken:
        calls.append(NeverTaken(*args, **fields))
        return calls[-1]

    handle = SimpleNamespace(stream=SimpleNamespace(remote=remote))
    handle.stream_into, handle.options = handle.stream, lambda **_: handle
    door: Any = HandleDoor.__new__(HandleDoor)
    door._handle, door._timeout_s, door._through_queue = handle, 0.3, False
    door._late = (TimeoutError, asyncio.TimeoutError)
    door._busy = door._task_error = door._lost = ()
    door._ray = SimpleNamespace(get=waited)
    monkeypatch.setattr("ray.util.queue.Queue", EmptyQueue)
    return door, calls


@pytest.mark.timeout(40)
@pytest.mark.parametrize("through_queue", [False, True])
def test_a_stream_by_handle_that_nobody_serves_is_late_and_cancelled(handled, through_queue):
    door, calls = handled
    door._through_queue = through_queue
    threads = set(threading.enumerate())
    with pytest.raises(DeadlineExceeded):
        list(door.events({"object": "disc"}))

    async def read() -> None:
        async for _ in door.aevents({"object": "disc"}):
            pass

    with pytest.raises(DeadlineExceeded):
        asyncio.run(read())
    assert [call.cancelled for call in calls] == [True, True]
    assert [call.fields["timeout_s"] for call in calls] == [0.3, 0.3]
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("through_queue", [False, True])
def test_a_late_reader_of_a_stream_by_handle_gets_what_came_in_time(
    handled, monkeypatch, through_queue
):
    door, calls = handled
    door._through_queue = through_queue
    come = [{"type": "bbox"}, {"type": "final", "completed": True}]

    async def anext_(_: Any) -> Any:
        await asyncio.sleep(0.01)
        if not come:
            raise StopAsyncIteration
        return come.pop(0)

    monkeypatch.setattr(NeverTaken, "__anext__", anext_)
    door._ray.get = lambda _, timeout: come.pop(0)
    events = door.events({"object": "disc"})
    assert next(events)["type"] == "bbox"
    threading.Event().wait(0.4)
    assert [event["type"] for event in events] == ["final"]
    assert calls[0].cancelled


def test_a_client_breaks_in_a_second_event_loop(address: str) -> None:
    client = SegmentClient(address)
    answers = [asyncio.run(client.asegment(object="well", image=picture())) for _ in range(3)]
    assert {answer["path"] for answer in answers} == {answers[0]["path"]}
    # Those of loops that have ended are not kept.
    assert len(client._door._async_clients) == 1  # type: ignore[attr-defined]

    async def streamed() -> list[Any]:
        return [event async for event in client.astream(object="well", image=picture())]

    assert [asyncio.run(streamed())[-1]["path"] for _ in range(2)] == [answers[0]["path"]] * 2
    client.close()


def test_a_client_breaks_in_the_loops_of_several_threads(address: str) -> None:
    client, found = SegmentClient(address), []

    def ask() -> None:
        for _ in range(3):
            found.append(asyncio.run(client.asegment(object="well", image=picture())))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer["path"] for answer in found] == [found[0]["path"]] * 9
    client.close()
