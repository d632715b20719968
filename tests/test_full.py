"""A full service takes the time of those that it serves to refuse others, or HAProxy refuses what
it should not, in another way, or in secret."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from scripted import ASK, WELL, ScriptedBackend, refused
from serving import connected, post_head, served, until
from starlette.types import ASGIApp, Receive, Scope, Send

from kestrel.server.room import Room
from kestrel.server.routes import build_app
from serve_graph import full, haproxy

pytest_plugins = ["behind_haproxy", "scripted"]

BY_HAPROXY = "the server is full"
BY_REPLICA = "the server is full (2 requests)"
PLACES = 2


class Replica:
    """Notes what comes to an application, and the headers that HAProxy adds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.came, self.told = app, 0, list[int]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.came += 1
            values = [v for k, v in scope["headers"] if k == full.TURNED_AWAY.lower().encode()]
            self.told += [int(value) for value in values]
        await self.app(scope, receive, send)


class Service:
    """A service of ``PLACES`` places behind HAProxy."""

    def __init__(self, url: str, replica: Replica, backend: ScriptedBackend) -> None:
        self.url, self.replica, self.backend = url, replica, backend
        self.go = threading.Event()
        """Lets those who have places have their answers."""

    def ask(self, **options: Any) -> httpx.Response:
        options = {"json": ASK, "timeout": 30} | options
        return httpx.post(f"{self.url}/v1/segment", **options)

    @contextlib.contextmanager
    def filled(self) -> Iterator[list[httpx.Response]]:
        """All places are taken, and HAProxy has been told; by requests whose answers are given."""
        self.go.clear()
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(self.ask())) for _ in range(PLACES)
        ]
        self.backend.script = [self.go, *WELL]
        for thread in threads:
            thread.start()
        until(lambda: self.backend.held == PLACES)
        self.backend.script = list(WELL)
        try:
            assert refused(self.ask(), 503) == BY_REPLICA
            yield answers
        finally:
            self.go.set()
            for thread in threads:
                thread.join()


def refusing(configuration: str) -> str:
    return full.refusing(haproxy.amended(configuration))


@pytest.fixture
def service(
    behind: Callable[..., str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Service]:
    """One whose replica's word holds for a minute, or for so many milliseconds (parameter)."""
    monkeypatch.setattr(full, "TOLD_MS", getattr(request, "param", 60_000))
    backend = ScriptedBackend(max_held_requests=PLACES)
    backend.script = list(WELL)
    replica = Replica(build_app(backend, room=Room(backend.config)))
    with served(replica) as url:
        yield Service(behind(int(url.rpartition(":")[2]), refusing), replica, backend)


def test_the_replica_itself_refuses_all_that_it_has_no_place_for(service: Service) -> None:
    with service.filled() as answers:
        came = service.replica.came
        for _ in range(20):
            answer = service.ask()
            assert refused(answer, 503) == BY_HAPROXY
            assert answer.headers["retry-after"] == "1"
            assert "x-service-full" not in answer.headers
        assert service.replica.came == came
    assert [answer.status_code for answer in answers] == [200] * PLACES


def test_haproxy_refuses_where_there_is_a_place(service: Service) -> None:
    with service.filled() as answers:
        assert refused(service.ask(), 503) == BY_HAPROXY
        service.go.set()
        until(lambda: answers)
        until(lambda: service.ask().status_code == 200, 5)


def test_nobody_counts_what_haproxy_refuses(service: Service) -> None:
    with service.filled():
        for _ in range(7):
            assert refused(service.ask(), 503) == BY_HAPROXY
    assert service.replica.told == []
    until(lambda: service.ask().status_code == 200)
    said = sum(service.replica.told)
    assert said >= 7
    # Told once, and clients have no say in it.
    assert service.ask(headers={full.TURNED_AWAY: "1000"}).status_code == 200
    assert sum(service.replica.told) == said


def test_a_refusal_has_another_id_than_its_request(service: Service) -> None:
    with service.filled():
        named = service.ask(headers={"X-Request-Id": "edge-7:abc.DEF_1"})
        assert refused(named, 503) == BY_HAPROXY
        assert named.headers.get_list("x-request-id") == ["edge-7:abc.DEF_1"]
        ids = {service.ask().headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3


@pytest.mark.parametrize("size", [10_000, 300_000, 8_000_000])
def test_who_sends_a_long_body_never_sees_the_refusal(service: Service, size: int) -> None:
    body = json.dumps({"object": "a" * size})
    with service.filled(), contextlib.closing(http.client.HTTPConnection(service.url[7:])) as line:
        for _ in range(3):  # the connection stays
            line.request("POST", "/v1/segment", body)
            answer = line.getresponse()
            assert (answer.status, json.load(answer)) == (503, {"error": BY_HAPROXY})


def test_who_sends_slowly_never_sees_the_refusal(service: Service) -> None:
    with service.filled(), connected(service.url) as client:
        client.sendall(post_head(service.url, {"Content-Length": "500000"}))
        for _ in range(10):
            client.sendall(b" " * 50_000)
            time.sleep(0.02)
        first, _, body = client.recv(10_000).partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 503 ") and json.loads(body) == {"error": BY_HAPROXY}


def chunks() -> Iterator[bytes]:
    yield json.dumps(ASK).encode()


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"headers": {"X-Request-Id": "two words"}}, 400),
        ({"headers": [("X-Request-Id", "a"), ("X-Request-Id", "b")]}, 400),
        ({"headers": {"X-Request-Id": "a" * 129}}, 400),
        ({"content": chunks(), "json": None}, 503),  # of any length
        ({"headers": {"Expect": "100-continue"}}, 503),
    ],
)
def test_haproxy_refuses_what_is_for_the_replica(
    service: Service, options: dict[str, Any], status: int
) -> None:
    with service.filled():
        answer = service.ask(**options)
        assert answer.status_code == status
        assert answer.json()["error"] != BY_HAPROXY


def test_who_sends_nothing_takes_all_of_haproxy_s_connections(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(full, "MOST_READ", 2)
    service: Service = request.getfixturevalue("service")
    head = post_head(service.url, {"Content-Length": "1000"})
    with service.filled(), contextlib.ExitStack() as silent:
        for _ in range(2):
            client = silent.enter_context(connected(service.url))
            client.sendall(head)
        until(lambda: refused(service.ask(), 503) == BY_REPLICA)
        with connected(service.url) as client:
            client.sendall(head)
            assert json.loads(client.recv(10_000).partition(b"\r\n\r\n")[2]) == {
                "error": BY_REPLICA
            }
        silent.close()
        until(lambda: refused(service.ask(), 503) == BY_HAPROXY)


@pytest.mark.parametrize("longest", [full.LONGEST_BODY, 2**31, 2**32])
def test_haproxy_reads_long_bodies_to_their_end(service: Service, longest: int) -> None:
    with service.filled(), connected(service.url) as client:
        length = str(longest + 1)
        client.sendall(post_head(service.url, {"Content-Length": length}))
        assert json.loads(client.recv(10_000).partition(b"\r\n\r\n")[2]) == {"error": BY_REPLICA}


def test_a_full_service_says_nothing_of_itself(service: Service) -> None:
    with service.filled():
        assert refused(service.ask(), 503) == BY_HAPROXY
        assert httpx.get(f"{service.url}/v1/models").status_code == 200
        assert httpx.post(f"{service.url}/elsewhere", json=ASK).status_code == 404
        assert httpx.get(f"{service.url}/v1/segment").status_code == 405


@pytest.mark.parametrize("service", [200], indirect=True)
def test_a_replica_s_word_holds_for_ever(service: Service) -> None:
    with service.filled():
        until(lambda: refused(service.ask(), 503) == BY_HAPROXY)
        until(lambda: refused(service.ask(), 503) == BY_REPLICA)


def test_haproxy_without_lua_does_not_start(tmp_path: Any) -> None:
    binary = haproxy.haproxy_binary()
    assert binary is not None and full.has_lua(binary)
    other = tmp_path / "haproxy"
    other.write_text("#!/bin/sh\necho 'Feature list : +EPOLL -LUA +MATH'\n")
    other.chmod(0o755)
    assert not full.has_lua(str(other))
