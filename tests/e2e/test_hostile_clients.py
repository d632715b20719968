"""The graph's HTTP door before hostile clients: no fault, no hang, nothing that grows."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running_graph import KEY, Graph, body, wait_for

from serve_graph.demo import Sample
from serve_graph.environment import AFTER_DEADLINE_S

schemathesis = pytest.importorskip("schemathesis")
sys.path.append(str(Path(__file__).resolve().parent.parent))

from test_http_fuzz import BROKEN_FRAMING, FEW, HEAD, TIMEOUT_S, allowed, exchange  # noqa: E402

pytestmark = pytest.mark.timeout(600)

BODIES: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",  # a pickle
    b"[" * 100_000,
    b'{"object": "a", "image_url": "file:///etc/passwd"}',
    b'{"object": "a", "image_url": "http://127.0.0.1:8265/"}',
    b'{"object": "a", "image_url": "' + b"A" * 500_000 + b'"}',
    b'{"object": "\xff"}',
    b'{"object": "a", "settings": {"refiner": "os:system"}}',
]
GREW_BYTES = 30e6
"""What a process may take more after hundreds of hostile requests: arenas of the allocator, not the
half megabyte that some of them carry."""


SETTINGS = b"\x04"
"""The type of HTTP/2's first frame."""


def refused(graph: Graph) -> None:
    """Every one of them, once."""
    for sent in BODIES:
        assert 400 <= graph.http.post("/v1/segment", content=sent).status_code < 500, sent[:50]
    for sent in BROKEN_FRAMING:
        answer = exchange(graph.url, sent.replace(HEAD, KNOWN + HEAD.partition(b"\r\n")[2]))
        if answer.startswith(b"HTTP/1.1 100 "):
            answer = answer.split(b"\r\n\r\n", 1)[1]
        if sent.startswith(b"PRI ") and answer[3:4] == SETTINGS:
            continue  # HAProxy speaks HTTP/2
        assert not answer or allowed(int(answer.split(b" ", 2)[1])), answer[:200]


KNOWN = f"POST /v1/segment HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n".encode()
"""The first lines of ``HEAD`` from a client with a key: the others get no further than a 401."""


def held(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def test_hostile_requests_again_and_again_break_nothing_and_nothing_grows(
    graph: Graph, samples: list[Sample]
) -> None:
    for _ in range(3):
        refused(graph)
    titles = ("ray::ProxyActor", "ray::ServeReplica:segment:Ingress")
    before = {pid: held(pid) for title in titles for pid in graph.pids(title)}
    assert len(before) >= 2
    for _ in range(15):
        refused(graph)
    for pid, (resident, _) in before.items():
        assert held(pid)[0] - resident < GREW_BYTES
    # Connections that broke may take a moment to be closed.
    assert wait_for(lambda: all(held(pid)[1] <= files + 10 for pid, (_, files) in before.items()))
    assert graph.http.post("/v1/segment", json=body(samples[0])).status_code == 200


SERVE_S = [
    ([(b"X-Request-Id", b"caf\xe9")], 400),
    ([(b"X-Request-Id", b"one"), (b"X-Request-Id", b"\xff")], 400),
    ([(b"X-Request-Timeout-Seconds", b"0.000001")], 200),
    ([(b"X-Request-Timeout-Seconds", b"\xff")], 200),
    ([(b"X-Request-Disconnect-Disabled", b"\xff")], 200),
    ([(b"X_Session_Id", b"\xff")], 200),
    ([(b"serve_multiplexed_model_id", b"\xff")], 200),
]


@pytest.mark.parametrize(("headers", "status"), SERVE_S)
def test_serve_answers_in_the_place_of_the_graph(
    graph: Graph, samples: list[Sample], headers: list[tuple[bytes, bytes]], status: int
) -> None:
    reply = graph.http.post("/v1/segment", json=body(samples[0]), headers=headers)
    assert reply.status_code == status, reply.content
    assert reply.json().get("field") == ("X-Request-Id" if status == 400 else None)


def test_haproxy_keeps_room_for_silent_clients_or_cuts_long_requests(graph: Graph) -> None:
    written = Path(graph.cluster.variables["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
    configurations = [file.read_text() for file in written.rglob("haproxy.cfg")]
    longest = graph.config["applications"][0]["args"]["runtime"]["request_timeout_s"]
    assert configurations
    for configuration in configurations:
        assert "timeout http-request 10s" in configuration
        (seconds,) = re.findall(r"hard-stop-after (\d+)s", configuration)
        assert int(seconds) >= longest + AFTER_DEADLINE_S


@pytest.fixture(scope="module")
def api(graph: Graph) -> Any:
    return schemathesis.openapi.from_url(f"{graph.url}/openapi.json")


@pytest.mark.parametrize("mode", ["positive", "negative"])
@given(choice=st.data())
@settings(FEW, max_examples=25)
def test_what_the_document_allows_or_forbids_breaks_nothing(
    graph: Graph, api: Any, choice: st.DataObject, mode: str
) -> None:
    generation = schemathesis.GenerationMode(mode)
    case = choice.draw(api["/v1/segment"]["POST"].as_strategy(generation_mode=generation))
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {KEY}"}
    answer = case.call(timeout=TIMEOUT_S)
    assert allowed(answer.status_code), answer.content
    assert answer.status_code != 401
