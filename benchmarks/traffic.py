"""Steady load on a running graph in which every request is accounted for.

Requests are sent on a clock, whatever becomes of those before (an open loop), plain, with masks and
as streams in turn. Each answer is compared with the one that the undisturbed graph gave.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kestrel.api import DeadlineExceeded
from serve_graph.demo import Sample

RIGHT = "right"
UNREFINED = "unrefined"
"""Answered with the model's own path and ``X-Refinement: unavailable``."""
REFUSED = "refused"
"""503 or 429 with ``Retry-After``."""
LATE = "late"
"""504, or a stream that was right until the event which says that its deadline passed."""
BROKEN = "broken stream"
"""A stream that was right until its one error event, which said something else."""
LEFT = "left"
"""The client went away on purpose."""

JSON = {"Content-Type": "application/json"}
KINDS = ("plain", "masks", "stream")
GRACE_S = 15.0
"""An answer that comes this much after the request's deadline is lost."""


@dataclass(frozen=True)
class Sent:
    """What became of one request."""

    kind: str
    at: float
    """``time.monotonic`` of sending, seconds."""
    seconds: float
    outcome: str
    """One of the above; anything else says how it was lost."""
    said: str
    """The message of a refusal or an error event."""
    redials: int
    """Connections that broke or were refused before an answer came through another door."""

    @property
    def lost(self) -> bool:
        """Whether nobody can say that this request was served or refused as it should be."""
        return self.outcome not in (RIGHT, UNREFINED, REFUSED, LATE, BROKEN, LEFT)


@dataclass
class Expected:
    """The undisturbed graph's answer about one picture."""

    sample: Sample
    path: str
    bbox: dict[str, float] | None
    masks: dict[str, str]
    box_event: dict[str, Any]
    chunks: list[tuple[int, str]]
    """Token index and text of each path_delta."""
    _bodies: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def own_path(self) -> str:
        """The model's path before refinement."""
        return "".join(chunk for _, chunk in self.chunks)

    def body(self, kind: str) -> bytes:
        """The JSON of a request of one kind, made once: the client is not to be what is slow."""
        if kind not in self._bodies:
            image = base64.b64encode(self.sample.image).decode()
            flags = {"stream": kind == "stream", "return_base64": kind == "masks"}
            fields = {"object": self.sample.noun, "image_url": image, **flags}
            self._bodies[kind] = json.dumps(fields).encode()
        return self._bodies[kind]

    def judge(self, kind: str, answer: dict[str, Any], unavailable: bool) -> str:
        """What a 200's fields are worth."""
        if unavailable:
            same = (answer["path"], answer["bbox"]) == (self.own_path, self.box_event["bbox"])
            return UNREFINED if same and kind != "masks" else "wrong answer without refinement"
        if (answer["path"], answer["bbox"]) != (self.path, self.bbox):
            return "wrong path"
        masks = {key: answer[key] for key in answer if key.endswith("_base64")}
        return RIGHT if masks == (self.masks if kind == "masks" else {}) else "wrong masks"

    def judge_events(self, events: list[dict[str, Any]]) -> str:
        """What the events of a stream that ended in order are worth."""
        if not events or events[0] != self.box_event:
            return "stream without its box"
        *middle, last = events[1:] or [{"type": "nothing"}]
        chunks = [(event.get("token_index"), event.get("chunk")) for event in middle]
        if last["type"] == "error":
            if chunks != self.chunks[: len(chunks)]:
                return "wrong chunks, then an error"
            # The event has no status, only the message.
            return LATE if last.get("error") == DeadlineExceeded().message else BROKEN
        if chunks != self.chunks:
            return "chunks repeated or missing"
        if last["type"] != "final":
            return f"stream ended with {last['type']}"
        if last["path"] == self.own_path and last["path"] != self.path:
            return UNREFINED
        return self.judge("stream", last, unavailable=False)


def connections(timeout_s: float, headers: dict[str, str] | None = None) -> aiohttp.ClientSession:
    """As many as there are requests; each has so many seconds. The load shares its machine with
    the graph, and this client takes far less of its time than httpx."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=timeout_s)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)


async def learn(client: aiohttp.ClientSession, url: str, samples: list[Sample]) -> list[Expected]:
    """Ask about every picture while nothing is wrong; those with a path are kept."""
    known = []
    for sample in samples:
        blank = Expected(sample, "", None, {}, {}, [])
        answers = {}
        for kind in ("masks", "stream"):
            async with client.post(f"{url}/v1/segment", data=blank.body(kind), headers=JSON) as ask:
                ask.raise_for_status()
                answers[kind] = await ask.read()
        answer, events = json.loads(answers["masks"]), events_of(answers["stream"])
        masks = {key: answer[key] for key in answer if key.endswith("_base64")}
        if not answer["path"] or len(masks) < 2:
            continue
        chunks = [(e["token_index"], e["chunk"]) for e in events if e["type"] == "path_delta"]
        known.append(Expected(sample, answer["path"], answer["bbox"], masks, events[0], chunks))
    if not known:
        raise RuntimeError("the graph outlines none of the sample pictures")
    return known


@dataclass
class Traffic:
    """Requests at a steady rate through several doors, as a load balancer would spread them."""

    doors: list[str]
    """Base URLs; may change while it runs."""
    expected: list[Expected]
    headers: dict[str, str] = field(default_factory=dict)
    rate: float = 8.0
    """Requests per second."""
    timeout_s: float = 60.0
    """Deadline that each request carries."""
    kinds: tuple[str, ...] = KINDS
    leave_every: int = 0
    """Every n-th client goes away after 20 ms; 0: none."""
    sent: list[Sent] = field(default_factory=list)
    _stopped: bool = False

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True

    async def run(self, seconds: float = math.inf) -> None:
        """Send for so long or until ``stop``, then wait for the last answer."""
        began, number = time.monotonic(), 0
        pending: set[asyncio.Task[None]] = set()
        async with connections(self.timeout_s + GRACE_S) as client:
            while (due := began + number / self.rate) < began + seconds:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._stopped:
                    break
                task = asyncio.create_task(self.one(client, number))
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
            await asyncio.gather(*pending)

    async def one(self, client: aiohttp.ClientSession, number: int) -> None:
        """Send request ``number`` and note what becomes of it."""
        kind = self.kinds[number % len(self.kinds)]
        expected = self.expected[number // len(self.kinds) % len(self.expected)]
        leaves = bool(self.leave_every) and number % self.leave_every == self.leave_every - 1
        at, redials, said = time.monotonic(), 0, ""
        while True:
            door = self.doors[(number + redials) % len(self.doors)]
            left = self.timeout_s - (time.monotonic() - at)
            if left <= 0:
                outcome = "no door answered"
                break
            headers = {
                **JSON,
                **self.headers,
                "X-Request-Timeout-Ms": str(max(1, round(left * 1e3))),
            }
            work = self._ask(client, door, kind, expected, headers)
            try:
                patience = 0.02 if leaves else left + GRACE_S
                outcome, said = await asyncio.wait_for(work, patience)
                break
            except asyncio.TimeoutError:
                outcome = LEFT if leaves else "no answer"
                break
            except aiohttp.ClientError:
                redials += 1
                await asyncio.sleep(0.05)
            except Exception as error:  # no JSON, or not the fields of an answer
                outcome, said = "answer that cannot be read", repr(error)[:200]
                break
        self.sent.append(Sent(kind, at, time.monotonic() - at, outcome, said, redials))

    async def _ask(
        self,
        client: aiohttp.ClientSession,
        door: str,
        kind: str,
        expected: Expected,
        headers: dict[str, str],
    ) -> tuple[str, str]:
        body = expected.body(kind)
        async with client.post(f"{door}/v1/segment", data=body, headers=headers) as answer:
            content = await answer.read()
        if answer.status == 200 and kind == "stream":
            events = events_of(content)
            return expected.judge_events(events), str((events or [{}])[-1].get("error", ""))
        if answer.status == 200:
            return expected.judge(kind, json.loads(content), "x-refinement" in answer.headers), ""
        said = content.decode(errors="replace")[:200]
        if answer.status in (429, 503) and answer.headers.get("retry-after"):
            return REFUSED, said
        return LATE if answer.status == 504 else f"status {answer.status}", said

    def outcomes(self) -> Counter[str]:
        """How many requests ended how."""
        return Counter(sent.outcome for sent in self.sent)

    def lost(self) -> list[Sent]:
        """Those that nobody can account for."""
        return [sent for sent in self.sent if sent.lost]


def events_of(content: bytes) -> list[dict[str, Any]]:
    """The events of one stream that ended."""
    lines = content.decode().splitlines()
    return [json.loads(line[5:]) for line in lines if line.startswith("data:")]
