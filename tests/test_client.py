"""The Python client: what it sends, what it makes of answers, what is left when it is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scripted import BOX, WELL, ScriptedBackend
from serving import answering, picture, served, until

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
from serve_graph.patience import Patience

pytest_plugins = ["scripted"]


@pytest.fixture
def address(backend: ScriptedBackend) -> Iterator[str]:
    with served(build_app(backend)) as url:
        yield url


@pytest.fixture
def ray_s_kind() -> Iterator[str]:
    """The address of a server that speaks as Ray's do."""
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_ray_cluster_that_does_not_let_in_is_no_word_about_its_token(monkeypatch, ray_s_kind):
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
            SegmentClient(f"ray://{ray_s_kind}")
        assert str(error)[:20] in str(raised.value)


def not_ray(monkeypatch: pytest.MonkeyPatch, address: str | None) -> str:
    """What a client says that is given this address, before Ray is asked for it."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", Mock(side_effect=RuntimeError("Ray was asked")))
    with pytest.raises(ConnectionError) as raised:
        SegmentClient(address)
    assert "Ray was asked" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_ray_does_not_wait_for_minutes_for_a_server_that_is_none_of_its_own(monkeypatch, scheme):
    with answering(b"HTTP/1.0 404 Not Found\r\n\r\n") as url:
        place = url.removeprefix("http://")
        said = not_ray(monkeypatch, scheme + place)
    assert "server of another kind" in said and f"for HTTP write {url}" in said
    monkeypatch.setenv("RAY_ADDRESS", place)
    said = not_ray(monkeypatch, None)  # nobody is there any more
    assert f"no Ray cluster at {place}: " in said and "refused" in said


def test_ray_does_not_wait_for_minutes_for_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr("serve_graph.ray_address.ANSWER_S", 0.2, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "says nothing" in not_ray(monkeypatch, f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("named", [False, True])
def test_ray_does_not_look_for_minutes_elsewhere_for_a_cluster_on_loopback(monkeypatch, named):
    services = pytest.importorskip("ray._private.services")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with answering(b"\x00\x00\x12\x04") as url:
        place = url.removeprefix("http://")
        monkeypatch.setattr(services, "find_gcs_addresses", lambda: {place})
        address = place if named else "auto"
        monkeypatch.setattr(services, "get_node_ip_address", lambda *_: "127.0.0.2")
        said = not_ray(monkeypatch, address)
        assert "127.0.0.2" in said and f"RAY_ADDRESS={place}" in said
        # There too, or Ray knows where it is.
        monkeypatch.setattr(services, "get_node_ip_address", lambda *_: "127.0.0.1")
        with pytest.raises(ConnectionError, match="Ray was asked"):
            SegmentClient(address)


@pytest.mark.parametrize("address", [None, "auto"])
def test_ray_does_not_try_for_minutes_a_cluster_that_was_here(monkeypatch, tmp_path, address):
    """Ray notes the last cluster of this machine, and nobody strikes it out when it dies."""
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(place)
    said = not_ray(monkeypatch, address)
    assert f"no Ray cluster at {place}: " in said and "refused" in said


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The address that this process is connected to, by Ray."""
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    found: list[str] = []
    # As in a program that was told of the loopback address before it imported Ray.
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "get_node_ip_address", lambda *_: "127.0.0.1")
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(found))
    monkeypatch.setattr(ray, "init", lambda address, **_: found.append(address))
    monkeypatch.setattr(ray, "shutdown", found.clear)
    monkeypatch.setattr(serve, "get_app_handle", lambda app: Mock())
    return found


def test_a_client_that_is_closed_leaves_ray_to_the_other_clients(connected, ray_s_kind):
    for _ in range(2):
        clients = [SegmentClient(ray_s_kind) for _ in range(3)]
        for client in clients[:2]:
            client.close()
            client.close()
            assert connected == [ray_s_kind]
        clients[2].close()
        assert connected == []


def test_the_connection_that_the_program_made_stays(connected, ray_s_kind):
    connected.append("the program's own")
    with SegmentClient(ray_s_kind), SegmentClient(ray_s_kind):
        pass
    assert connected == ["the program's own"]


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


def failures(calls: list[Any], **fields: Any) -> list[BaseException | None]:
    """What each call raises, all made at once."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [made.exception() for made in [threads.submit(call, **fields) for call in calls]]


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
        errors = failures(everyhow(address, timeout_s=0.3), object="disc")
    assert [type(error) for error in errors] == [ConnectionError] * 4


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


def test_a_service_that_has_moved_is_a_lost_connection_that_says_where_to():
    with answering(
        b"HTTP/1.0 301 Moved\r\nLocation: https://serve.example/v1/segment\r\n\r\n"
    ) as address:
        for call in everyhow(address):
            with pytest.raises(
                ConnectionError, match=r"redirects to 'https://serve\.example': give"
            ):
                call(object="disc")


def test_an_answer_that_cannot_be_unpacked_is_a_lost_connection():
    with answering(b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\nabcde") as address:
        for call in everyhow(address):
            with pytest.raises(ConnectionError):
                call(object="disc")


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), "5"])
def test_a_deadline_that_is_none_is_refused_before_the_first_call(timeout_s):
    with pytest.raises(ValueError, match="timeout_s"):
        SegmentClient("http://127.0.0.1:9", timeout_s=timeout_s)


def test_a_key_from_a_file_opens_the_door_with_its_line_end_too():
    backend = ScriptedBackend(api_keys=["a-key-of-a-client"])
    with served(build_app(backend)) as url:
        for call in everyhow(url, api_key="a-key-of-a-client\r\n"):
            call(object="disc")


@pytest.mark.parametrize("key", ["two\nlines", "schl\u00fcssel", "with space", " \n"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="api_key must be visible ASCII") as raised:
        SegmentClient("http://127.0.0.1:9", api_key=key)
    assert key.strip() == "" or key not in repr(raised.value)


def test_the_scheme_of_an_address_is_read_in_capitals_too(address):
    with SegmentClient(address.replace("http", "HTTP")) as client:
        assert client.segment(object="disc")["path"]


def test_a_client_that_is_closed_answers_no_call_in_any_way(address, backend):
    client = SegmentClient(address)
    client.close()
    called_off(client)
    assert backend.begun == 0


def called_off(client: SegmentClient) -> None:
    """Every call of this client says that it was closed."""

    async def streamed() -> list[Any]:
        return [event async for event in client.astream(object="disc")]

    for call in (
        lambda: client.segment(object="disc"),
        lambda: list(client.segment(object="disc", stream=True)),
        lambda: asyncio.run(client.asegment(object="disc")),
        lambda: asyncio.run(streamed()),
    ):
        with pytest.raises(ConnectionError, match="the client was closed"):
            call()


def test_a_stream_that_is_begun_after_its_client_was_closed_starts_no_thread(address):
    client, threads = SegmentClient(address), set(threading.enumerate())
    events = client.segment(object="disc", stream=True)
    client.close()
    with pytest.raises(ConnectionError, match="the client was closed"):
        next(iter(events))
    assert set(threading.enumerate()) <= threads


def test_another_model_is_refused_in_every_way(address, backend):
    for call in everyhow(address):
        with pytest.raises(UnknownModel, match="nano"):
            call(object="disc", model="other")
    assert backend.begun == 0


def test_the_client_s_deadline_is_kept_by_the_service_in_every_way(address, backend):
    backend.script = [30.0]
    errors = failures(everyhow(address, timeout_s=0.8), object="disc", image=picture())
    assert [type(error) for error in errors] == [DeadlineExceeded] * 4
    until(lambda: backend.held == 0)
    assert backend.begun == 4 and backend.ended_by == ["CancelledError"] * 4
    assert all(0 < seconds <= 0.8 for seconds in backend.timeouts)


@pytest.mark.parametrize("dripped", [b" ", EVENT])
def test_an_answer_that_drips_is_late_in_every_way(monkeypatch, dripped):
    monkeypatch.setattr("serve_graph.patience.LATE_S", 0.2)

    def dripping() -> Iterator[bytes]:
        yield b"HTTP/1.0 200 OK\r\n\r\n"
        while True:
            yield dripped
            threading.Event().wait(0.02)

    with answering(dripping) as address:
        calls, began = everyhow(address, timeout_s=0.8), time.monotonic()
        errors = failures(calls, object="disc")
    # A stream that has begun may take ``LATE_S`` more.
    assert 0.8 < time.monotonic() - began < 5
    assert [type(error) for error in errors] == [DeadlineExceeded] * 4


def test_time_that_a_reader_takes_for_himself_does_not_count(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("serve_graph.patience.time", clock)
    clock.monotonic = lambda: clock.now
    patience = Patience(10.0)
    # Beyond the deadline nothing is waited for before an event has come.
    for begins, longest, ends in ((0.0, 10.0, 1.0), (99.0, 100.0, 99.25), (500.0, 500.75, 500.5)):
        clock.now = begins
        with patience.waiting() as last:
            assert last == longest
            clock.now = ends


def test_no_call_waits_for_the_connections_of_others():
    all_here = threading.Barrier(120)

    def answer() -> Iterator[bytes]:
        all_here.wait(20)
        yield b"HTTP/1.0 200 OK\r\n\r\n{}"

    async def ask_at_once(address: str) -> list[Any]:
        async with SegmentClient(address, timeout_s=20) as client:
            calls = [client.asegment(object="disc") for _ in range(all_here.parties)]
            return await asyncio.gather(*calls)

    with answering(answer) as address:
        assert asyncio.run(ask_at_once(address)) == [{}] * all_here.parties


def test_the_service_is_told_what_connecting_has_left_of_the_deadline(
    address, backend, monkeypatch
):
    """A name server that takes its time."""

    def slow(host: Any, port: Any, *_: Any, **__: Any) -> Any:
        threading.Event().wait(0.2)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    calls = everyhow(address.replace("127.0.0.1", "a-service.test"), timeout_s=4.0)
    assert failures(calls, object="disc") == [None] * 4
    assert len(backend.timeouts) == 4 and 0 < max(backend.timeouts) <= 3.8


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


def test_calls_after_each_other_share_a_connection_those_with_a_stream_too(backend):
    app, ports = build_app(backend), set()

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            ports.add(scope["client"])
        await app(scope, receive, send)

    with served(noting) as address, SegmentClient(address) as client:
        for _ in range(2):
            assert list(client.segment(object="disc", stream=True))
            client.segment(object="disc")
    assert len(ports) == 1


HERE = ["http://127.0.0.1:9", "http://localhost:9", "http://LOCALHOST.:9/seg", "http://[::1]:9"]
ELSEWHERE = ["http://192.0.2.1:9", "http://serve.example", "http://localhost.example"]


@pytest.mark.parametrize("address", HERE + ELSEWHERE)
def test_a_proxy_of_the_environment_is_asked_for_this_machine_or_for_no_other(
    monkeypatch, backend, address
):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with served(build_app(backend)) as proxy, SegmentClient(address) as client:
        monkeypatch.setenv("http_proxy", proxy)
        if address in ELSEWHERE:
            # It answers in the place of the service.
            with pytest.raises(RequestError):
                client.segment(object="disc", model="asked through a proxy")
        else:
            with pytest.raises(ConnectionError):
                client.segment(object="disc", model="asked through a proxy")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:9", "http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1"],
)
def test_a_service_that_is_not_there_is_a_connection_error(address):
    with SegmentClient(address) as client:
        with pytest.raises(ConnectionError):
            client.segment(object="disc")
        with pytest.raises(ConnectionError):
            list(client.segment(object="disc", stream=True))


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

    at_second, told, go_on, closed = (threading.Event() for _ in range(4))

    def blocking() -> Generator[int, None, None]:
        try:
            yield 1
            at_second.set()
            go_on.wait(30)
            yield 2
        finally:
            closed.set()

    async def read() -> None:
        async for item in in_threads(blocking(), told.set):
            assert item == 1

    reading = asyncio.create_task(read())
    await asyncio.to_thread(at_second.wait, 30)
    reading.cancel()
    await asyncio.sleep(0)
    assert told.is_set() and not closed.is_set()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert closed.is_set()


async def test_no_stream_waits_for_the_threads_of_others():
    pytest.importorskip("ray")
    from serve_graph.handle_door import in_threads

    all_here = threading.Barrier(40)

    def blocking() -> Generator[int, None, None]:
        yield all_here.wait(20)

    async def read() -> list[int]:
        return [item async for item in in_threads(blocking(), lambda: None)]

    threads = set(threading.enumerate())
    read_ = await asyncio.gather(*(read() for _ in range(all_here.parties)))
    assert sorted(items[0] for items in read_) == list(range(all_here.parties))
    until(lambda: set(threading.enumerate()) <= threads)


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

    def __await__(self) -> Any:
        return asyncio.sleep(60).__await__()

    async def _to_object_ref(self) -> Any:
        await asyncio.sleep(60)

    def result(self, timeout_s: float) -> Any:
        refused_in_a_loop()
        threading.Event().wait(timeout_s)
        raise TimeoutError

    def cancel(self) -> None:
        self.cancelled = True


def refused_in_a_loop(answer: Any = None) -> Any:
    """As Ray's sync methods do."""
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("Sync methods should not be called from within an `asyncio` event loop")
    return answer


class EmptyQueue:
    """A queue of Ray into which nobody puts anything, and its actor."""

    def __init__(self, **_: Any) -> None:
        self.actor = self
        self.get = SimpleNamespace(remote=lambda timeout: timeout)

    def shutdown(self, force: bool) -> None: ...


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SegmentClient, list[NeverTaken]]]:
    """A client by handle whose calls nobody takes, deadline 0.3 s; and the calls."""
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

    method = SimpleNamespace(remote=remote)
    handle = SimpleNamespace(segment=method, stream=method, stream_into=method)
    handle.options = lambda **_: handle
    door: Any = HandleDoor.__new__(HandleDoor)
    door._handle, door._timeout_s, door._through_queue = handle, 0.3, False
    door._late = (TimeoutError, asyncio.TimeoutError)
    door._busy = door._task_error = door._lost = ()
    door._ray, door._joined = SimpleNamespace(get=waited), False
    monkeypatch.setattr("ray.util.queue.Queue", EmptyQueue)
    monkeypatch.setattr("serve_graph.handle_door.HandleDoor", lambda *_, **__: door)
    with SegmentClient() as client:
        yield client, calls


@pytest.mark.timeout(40)
@pytest.mark.parametrize("through_queue", [False, True])
def test_a_stream_by_handle_that_nobody_serves_is_late_and_cancelled(handled, through_queue):
    client, calls = handled
    client._door._through_queue = through_queue
    threads = set(threading.enumerate())
    with pytest.raises(DeadlineExceeded):
        list(client.segment(object="disc", stream=True))

    async def read() -> None:
        async for _ in client.astream(object="disc"):
            pass

    with pytest.raises(DeadlineExceeded):
        asyncio.run(read())
    assert [call.cancelled for call in calls] == [True, True]
    # What is left when a call is sent, which each was long ago.
    assert all(0 < pickle.loads(pickle.dumps(call.fields["timeout_s"])) < 0.3 for call in calls)
    client.close()
    until(lambda: set(threading.enumerate()) <= threads)
    called_off(client)
    assert len(calls) == 2


def serves(monkeypatch: pytest.MonkeyPatch, client: Any, events: list[Any]) -> None:
    """From now on a stream by handle gives these, and a plain call is answered with the last."""
    answer, events = events[-1], [*events]

    async def anext_(_: Any) -> Any:
        await asyncio.sleep(0.01)
        if not events:
            raise StopAsyncIteration
        return events.pop(0)

    monkeypatch.setattr(NeverTaken, "__anext__", anext_)
    monkeypatch.setattr(NeverTaken, "__await__", lambda _: asyncio.sleep(0, answer).__await__())
    told: Future[Any] = Future()
    told.set_result(answer)
    ref = SimpleNamespace(future=lambda: told)
    monkeypatch.setattr(NeverTaken, "_to_object_ref", lambda _: asyncio.sleep(0, ref))
    monkeypatch.setattr(NeverTaken, "result", lambda _, timeout_s: refused_in_a_loop(answer))
    client._door._ray.get = lambda _, timeout: events.pop(0)


@pytest.mark.parametrize("through_queue", [False, True])
def test_a_late_reader_of_a_stream_by_handle_gets_what_came_in_time(
    handled, monkeypatch, through_queue
):
    client, calls = handled
    client._door._through_queue = through_queue
    came = [{"type": "bbox"}, {"type": "final", "completed": True}]

    async def read() -> list[str]:
        types = []
        async for event in client.astream(object="disc"):
            types.append(event["type"])
            await asyncio.sleep(0.4)
        return types

    serves(monkeypatch, client, came)
    assert asyncio.run(read()) == ["bbox", "final"]
    serves(monkeypatch, client, came)
    events = client.segment(object="disc", stream=True)
    assert next(events)["type"] == "bbox"
    threading.Event().wait(0.4)
    assert [event["type"] for event in events] == ["final"]
    assert [call.cancelled for call in calls] == [True, True]


@pytest.mark.parametrize("through_queue", [False, True])
def test_a_program_that_runs_an_event_loop_need_not_await_a_call_by_handle(
    handled, monkeypatch, through_queue
):
    client, _ = handled
    client._door._through_queue = through_queue
    came = [{"type": "bbox"}, {"type": "final", "completed": True}]

    async def ask() -> None:
        assert client.segment(object="disc") == came[-1]
        assert list(client.segment(object="disc", stream=True)) == came

    serves(monkeypatch, client, came)
    asyncio.run(ask())


def test_a_program_that_runs_an_event_loop_need_not_await_a_call_over_http(address):
    async def ask() -> None:
        with SegmentClient(address) as client:
            answer = client.segment(object="disc")
            *_, final = client.segment(object="disc", stream=True)
            assert final["path"] == answer["path"]

    asyncio.run(ask())


def test_a_client_that_is_dropped_or_closed_leaves_no_thread_and_no_caller(address, backend):
    threads = set(threading.enumerate())
    SegmentClient(address).segment(object="disc")
    gc.collect()
    backend.script = [30.0]
    client = SegmentClient(address)
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(client.segment, object="disc")
        until(lambda: backend.held == 1)
        client.close()
        with pytest.raises(ConnectionError, match="closed"):
            asked.result()
    until(lambda: set(threading.enumerate()) <= threads)
    until(lambda: backend.held == 0)


def test_a_client_breaks_in_a_second_event_loop(address: str) -> None:
    client = SegmentClient(address)
    answers = [asyncio.run(client.asegment(object="well", image=picture())) for _ in range(3)]
    assert {answer["path"] for answer in answers} == {answers[0]["path"]}
    # Those of loops that have ended are not kept.
    assert len(client._door._clients) == 1  # type: ignore[attr-defined]

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
