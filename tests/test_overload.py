"""What the overload benchmark makes of its samples: growth, verdicts, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from serving import until

from benchmarks.overload import described, verdicts
from benchmarks.soak import FLAT, Growth, flat, name_of
from benchmarks.traffic import BROKEN, LATE, REFUSED, RIGHT, Expected, Sent, Traffic
from serve_graph.demo import Sample
from serve_graph.node import RayNode


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ray::ServeReplica:segment:Model.handle_request_streaming", "Model"),
        ("ray::ServeReplica:segment:Refiner", "Refiner"),
        ("ray::ProxyActor.run()", "ProxyActor"),
        ("/x/bin/python3 -u /x/ray/dashboard/dashboard.py --host=127.0.0.1", "dashboard.py"),
        ("/x/ray/core/gcs_server --log_dir=/tmp", "gcs_server"),
    ],
)
def test_processes_are_named_by_what_they_are(line: str, name: str) -> None:
    assert name_of(line) == name


def grown(per_minute: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of ten minutes in which caches fill first and then processes grow steadily."""
    growth = Growth(node=None)  # type: ignore[arg-type]
    for sample in range(120):
        growth.at.append(5.0 * sample)
        filled = min(sample, 30) * 4.0
        held = {
            (number, name): 200 + filled + slope * sample / 12
            for number, (name, slope) in enumerate(per_minute.items())
        }
        # One that came late is no growth of the others.
        growth.held.append(held | ({(99, "late"): 500.0} if sample > 60 else {}))
    return growth.rows()


def test_growth_after_the_warm_up_is_found_and_caches_that_fill_are_not() -> None:
    rows = grown({"Model": 0.0, "Refiner": 2.0})
    assert [row["process"] for row in rows] == ["Refiner", "Model"]
    assert [row["mb_per_minute"] for row in rows] == pytest.approx([2.0, 0.0], abs=0.01)
    assert not flat(rows)
    assert flat(grown({"Model": 0.0, "Refiner": FLAT / 2}))
    # Each of them a little is too much together.
    assert not flat(grown({"Model": 0.8 * FLAT, "Refiner": 0.8 * FLAT}))


def test_verdicts_are_about_goodput_deadlines_and_refusals() -> None:
    good = {
        "goodput_of_capacity": 0.93,
        "let_in_and_late": 0,
        "lost": 0,
        "right_longest_ms": 4000.0,
        "probe_refused_p99_ms": 40.0,
    }
    assert list(verdicts(good, 10.0).values()) == [True, True, True]
    for change, failing in (
        ({"goodput_of_capacity": 0.89}, 0),
        ({"let_in_and_late": 1}, 1),
        ({"lost": 1}, 1),
        ({"right_longest_ms": 10_001.0}, 1),
        ({"probe_refused_p99_ms": 50.1}, 2),
        ({"probe_refused_p99_ms": None}, 2),
    ):
        judged = list(verdicts({**good, **change}, 10.0).values())
        assert [number for number, holds in enumerate(judged) if not holds] == [failing]


def test_a_serving_process_that_is_replaced_is_told_and_others_may_come_and_go() -> None:
    growth = Growth(node=None)  # type: ignore[arg-type]
    for sample in range(144):
        # 100 MB a minute more, until the sixth, when another takes its place.
        leaking = (3, "Refiner") if sample < 72 else (4, "Refiner")
        held = {(1, "Ingress"): 190.0, (2, "Model"): 500.0, leaking: 300 + 100 * (sample % 72) / 12}
        # Gone before the warm-up is over; no part of the service.
        held |= {(5, "Model"): 100.0} if sample < 40 else {}
        held |= {(6, "IDLE"): 100.0} if sample % 2 else {}
        growth.at.append(5.0 * sample)
        growth.held.append(held)
    assert flat(growth.rows())
    told = [(row["pid"], row["came"], row["went"], row["mb_last"]) for row in growth.replaced()]
    assert told == [(3, False, True, 891.7), (4, True, False, 891.7)]


def test_a_service_whose_processes_stay_is_not_told_of_any() -> None:
    growth = Growth(node=None)  # type: ignore[arg-type]
    growth.at, growth.held = [0.0, 5.0], [{(1, "Model"): 1.0}] * 2
    assert growth.replaced() == []


def test_a_load_that_ends_with_an_error_ends_the_watch_with_it(tmp_path: Any) -> None:
    node = RayNode(["-c", ""], {}, tmp_path / "log")
    node.kill()

    async def fails() -> None:
        raise OSError("too many open files")

    async def watched() -> None:
        await Growth(node).watch(asyncio.create_task(fails()))

    with pytest.raises(OSError, match="too many"):
        asyncio.run(watched())


BOX = {"type": "bbox", "bbox": None}
CHUNKS = [{"type": "path_delta", "chunk": text, "token_index": n} for n, text in enumerate("MLZ")]


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([BOX, *CHUNKS[:2], {"type": "error", "error": "the request's deadline passed"}], LATE),
        ([BOX, {"type": "error", "error": "the request's deadline passed"}], LATE),
        ([BOX, CHUNKS[0], {"type": "error", "error": "internal error"}], BROKEN),
        (
            [BOX, CHUNKS[1], {"type": "error", "error": "the request's deadline passed"}],
            "wrong chunks, then an error",
        ),
    ],
)
def test_streams_that_end_at_their_deadline_are_late_and_others_broken(
    events: list[dict[str, Any]], outcome: str
) -> None:
    sample = Sample("cat", b"", "cat", np.zeros((1, 1), bool))
    known = Expected(sample, "MLZ", None, {}, BOX, list(enumerate("MLZ")))
    assert known.judge_events(events) == outcome


def test_overload_counts_late_and_broken_streams_among_those_let_in() -> None:
    sent = [Sent("plain", 0.1 * n, 0.5, RIGHT, "", 0) for n in range(90)]
    late = Sent("stream", 1.0, 10.0, LATE, "the request's deadline passed", 0)
    broken = Sent("stream", 1.0, 2.0, BROKEN, "internal error", 0)
    probed = [{"status": 503, "retry_after": True, "seconds": 0.005}]
    for more, met in (([], True), ([late], False), ([broken], False)):
        found = described([*sent, *more], probed, 9.0, 9.5)
        assert found["let_in_and_late"] == (more == [late])
        assert found["lost_how"] == (
            {"stream: broken stream internal error": 1} if more == [broken] else {}
        )
        assert list(verdicts(found, 10.0).values()) == [True, met, True]


@pytest.mark.parametrize(("slow", "holds"), [(1, True), (2, False)])
def test_one_refusal_of_a_hundred_may_be_slow(slow: int, holds: bool) -> None:
    sent = [Sent("plain", 0.1 * n, 0.5, RIGHT, "", 0) for n in range(90)]
    took = [0.2] * slow + [0.005] * (100 - slow)
    found = described(
        sent, [{"status": 503, "retry_after": True, "seconds": s} for s in took], 9.0, 9.5
    )
    assert list(verdicts(found, 10.0).values()) == [True, True, holds]
    assert found["right_p50_ms"] == 500 and found["probe_refused_p50_ms"] == 5


@pytest.mark.parametrize("outcome", [LATE, REFUSED])
def test_overload_in_which_nothing_is_answered_fails_and_is_told(outcome: str) -> None:
    found = described(
        [Sent("plain", 0.1 * n, 10.0, outcome, "", 0) for n in range(9)], [], 1.0, 6.0
    )
    assert (found["right"], found["goodput_of_capacity"]) == (0, 0)
    assert not any(verdicts(found, 10.0).values())


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Unreadable(BaseHTTPRequestHandler):
    """Says 200 to everything, with an answer that is cut, or without its fields."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = b'data: {"type":"bb' if asked["stream"] else b"{}"
        if asked["return_base64"]:
            said = b'{"path": "M'
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: Any) -> None:
        pass


def test_answers_that_cannot_be_read_are_lost_and_accounted_for() -> None:
    known = Expected(Sample("cat", b"", "cat", np.zeros((1, 1), bool)), "MLZ", None, {}, BOX, [])
    with listening(Unreadable) as url:
        traffic = Traffic([url], [known], rate=60)
        asyncio.run(traffic.run(0.19))
    assert len(traffic.sent) == len(traffic.lost()) == 12
    assert {sent.kind for sent in traffic.sent if sent.said} == {"plain", "masks", "stream"}


class Busy(BaseHTTPRequestHandler):
    """Refuses what says ``full``, breaks the line at ``broken``."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        said = self.rfile.read(int(self.headers["Content-Length"]))
        if said == b"broken":
            self.close_connection = True
            return
        assert self.headers["X-Request-Timeout-Ms"] == "2000"
        self.send_response(503)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def door() -> Iterator[str]:
    with listening(Busy) as url:
        yield f"{url}/v1/segment"


@pytest.mark.parametrize(("body", "status"), [(b"full", 503), (b"broken", 0)])
def test_probe_times_refusals_and_counts_broken_lines(door: str, body: bytes, status: int) -> None:
    command = [sys.executable, "-m", "benchmarks.probe", door, "--seconds", "0.3"]
    done = subprocess.run(
        [*command, "--deadline-s", "2"], input=body, capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) >= 4 and {answer["status"] for answer in found} == {status}
    assert all(answer["retry_after"] == (status == 503) for answer in found)


def test_every_process_of_a_node_is_sampled(tmp_path: Any) -> None:
    from benchmarks.soak import resident

    node = RayNode(["-c", "import time; time.sleep(60)"], {}, tmp_path / "log")
    try:
        # A process that has just begun has no name yet, and next to no memory.
        until(lambda: max(resident(node).values(), default=0) > 1)
        held = resident(node)
    finally:
        node.kill()
    assert len(held) == 1 and 1 < next(iter(held.values())) < 1000
