"""Measure a running graph from outside: the profile that the planner counts with.

The graph must have one model replica, a known number of refiners and nobody else to serve. Closed
loops of 1, 2, 4, ... clients give the time of a request by how many the replica holds;
``Server-Timing`` of the answers says which stage took what. Where everything shares one machine's
cores, the CPU time of the processes says it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime
import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kestrel.api_keys import given_key
from kestrel.busy import at_full_speed
from kestrel.config import SHIPPED_MODELS
from kestrel.ports import check_port, leads_here
from serve_graph.cpu_time import CpuTime
from serve_graph.profile import (
    PlanError,
    Profile,
    is_file,
    quantiles,
    require_writable,
)

SAMPLES = SHIPPED_MODELS / "nano" / "samples"
WARMUP = 0.2
"""Part of a level's time that comes before it and is not counted."""
CALM = 0.5
"""Levels with more refinements under way than this, of those that run at full speed, have them slow
each other down, which is not part of what a refinement takes."""
FULL = 0.95
"""Levels that keep the refiners busier than this wait for them, and say nothing of the model."""


@dataclass(frozen=True)
class Answer:
    """One request's times, seconds."""

    total: float
    slot: float
    """Prefill and decode: the time in a slot of the model."""
    refine: float | None
    """None: it was not refined."""
    prepare: float = 0.0
    """In the model before that: waiting, and the picture."""


@dataclass(frozen=True)
class Level:
    """What one closed loop gave."""

    clients: int
    per_s: float
    answers: list[Answer]
    cpu: CpuTime | None = None
    """Of one request, seconds; None: not looked at."""

    @property
    def slot_s(self) -> float:
        return float(np.mean([answer.slot for answer in self.answers]))

    @property
    def model_s(self) -> float:
        """In the model, with what comes before the slot."""
        return self.slot_s + float(np.mean([answer.prepare for answer in self.answers]))

    @property
    def held(self) -> float:
        """Requests in slots on average, by Little's law."""
        return self.per_s * self.slot_s

    @property
    def refine_s(self) -> float:
        """Of an answer, whether it was refined or not."""
        return float(np.mean([answer.refine or 0.0 for answer in self.answers]))

    @property
    def refining(self) -> float:
        """Refinements under way on average, by Little's law."""
        return self.per_s * self.refine_s


@dataclass(frozen=True)
class Refiners:
    """The refiner pool that serves while a graph is measured."""

    replicas: int = 1
    cpus: float = 1.0
    """``refiner_pool.num_cpus``."""
    threads: int = 2
    """``refiner_pool.threads``."""

    @property
    def at_once(self) -> float:
        """Refinements that the pool runs without slowing each other down."""
        return self.replicas * at_full_speed(self.cpus, self.threads)

    def busy(self, level: Level, alone_s: float) -> float:
        """Part of the pool's full speed that a level took. ``alone_s``: ``Level.refine_s`` of one
        client, as refinements that share CPUs take longer and no more of them."""
        return level.per_s * alone_s / self.at_once

    def crowded(self, level: Level) -> float:
        """Refinements that were under way, of those that run without slowing each other down."""
        return level.refining / self.at_once

    def check(self, level: Level) -> None:
        """PlanError where a level had more refinements under way than this pool can have."""
        most = self.replicas * self.threads
        if level.refining > 1.05 * most:
            raise PlanError(
                f"{level.refining:.1f} refinements were under way at once, more than the {most} of "
                f"{self.replicas} refiners with {self.threads} threads: say with --refiners how "
                "many serve, with --refiner-threads what refiner_pool.threads is"
            )


def read_timing(header: str) -> dict[str, float]:
    """Stage -> seconds of a ``Server-Timing`` header."""
    stages = re.findall(r"([\w-]+);dur=([\d.]+)", header)
    return {stage: float(ms) / 1e3 for stage, ms in stages}


def bodies(image: bytes, noun: str, masks: bool) -> Iterator[bytes]:
    """Requests about one picture, each with other bytes: the model remembers pictures by them."""
    for number in itertools.count(time.time_ns()):
        # What follows the end of a JPEG or PNG is not read.
        varied = base64.b64encode(image + number.to_bytes(8, "big")).decode()
        yield json.dumps({"object": noun, "image_url": varied, "return_base64": masks}).encode()


async def ask(client: httpx.AsyncClient, body: bytes) -> Answer:
    """One request; PlanError when it is not answered well."""
    sent = time.monotonic()
    reply = await client.post("/v1/segment", content=body)
    total = time.monotonic() - sent
    if reply.status_code != 200:
        raise PlanError(f"the graph answered {reply.status_code}: {reply.text[:200]}")
    stages = read_timing(reply.headers.get("server-timing", ""))
    if "prefill" not in stages:
        raise PlanError("the answers carry no Server-Timing header: is this the graph?")
    slot = stages["prefill"] + stages["decode"]
    return Answer(total, slot, stages.get("refine"), stages["prepare"])


async def closed_loop(
    client: httpx.AsyncClient,
    requests: Iterator[bytes],
    clients: int,
    seconds: float,
    cpu_time: Callable[[], CpuTime] | None = None,
) -> Level:
    """So many clients, each with one request at a time, for so long."""
    answers: list[Answer] = []

    async def one(until: float, counted: bool) -> None:
        while time.monotonic() < until:
            answer = await ask(client, next(requests))
            if counted:
                answers.append(answer)

    async def all_for(span: float, counted: bool) -> None:
        until = time.monotonic() + span
        await asyncio.gather(*(one(until, counted) for _ in range(clients)))

    await all_for(WARMUP * seconds, counted=False)
    before = cpu_time and cpu_time()
    await all_for(seconds, counted=True)
    cpu = (cpu_time() - before).each(len(answers)) if cpu_time and before else None
    # Nobody ever pauses, so by Little's law this is the rate, however few requests it was.
    return Level(clients, clients / float(np.mean([a.total for a in answers])), answers, cpu)


async def measure(
    url: str,
    requests: Iterator[bytes],
    *,
    slots: int,
    seconds: float,
    api_key: str | None = None,
    cpu_time: Callable[[], CpuTime] | None = None,
    refiners: Refiners = Refiners(),
) -> list[Level]:
    """Closed loops of 1, 2, 4, ... clients up to twice the slots. ``requests``: bodies, enough of
    them. ``cpu_time``: what the graph and its client have had so far, for graphs on one machine.
    PlanError where the graph does not answer well."""
    levels: list[Level] = []
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None)
    proxies = not leads_here(url)
    async with httpx.AsyncClient(
        base_url=url, timeout=300, headers=headers, limits=limits, trust_env=proxies
    ) as client:
        clients = 1
        while clients <= 2 * slots:
            levels.append(await closed_loop(client, requests, clients, seconds, cpu_time))
            last, alone_s = levels[-1], levels[0].refine_s
            print(
                f"{clients:4} clients  {last.per_s:8.2f} requests/s  model {last.slot_s:.3f} s, "
                f"{last.held:.1f} of {slots} slots held  "
                f"refiners busy {refiners.busy(last, alone_s):.0%}",
                flush=True,
            )
            clients *= 2
    return levels


def profile_of(
    name: str, levels: list[Level], slots: int, refiners: Refiners, measured: dict[str, Any]
) -> Profile:
    """What the planner keeps of a measurement, of one model replica and of one of ``refiners``;
    PlanError when it is not enough, or ``refiners`` cannot be what served."""
    for level in levels:
        refiners.check(level)
    alone_s = levels[0].refine_s
    calm = [level for level in levels if refiners.crowded(level) < CALM and level.clients <= slots]
    if not calm:
        raise PlanError(
            f"one client keeps {refiners.replicas} refiners busy: measure with more of them, and "
            "say with --refiners how many"
        )
    refines = [a.refine for level in calm for a in level.answers if a.refine is not None]
    if not refines:
        raise PlanError("no answer was refined: choose an --image that shows the --object")
    rising: list[Level] = []
    for level in levels:
        # Held by Little's law, so that it may stay where it is once the slots are full.
        room = refiners.busy(level, alone_s) < FULL
        if room and (not rising or level.held > 1.05 * rising[-1].held):
            rising.append(level)
    return Profile(
        name=name,
        measured=measured,
        slots=slots,
        held=tuple(round(level.held, 3) for level in rising),
        slot_s=tuple(round(level.slot_s, 5) for level in rising),
        work=quantiles([a.slot / level.slot_s for level in rising for a in level.answers]),
        refine_s=quantiles(refines),
        refiner_cpus=refiners.cpus,
        overhead_s=quantiles(
            [
                max(0.0, a.total - a.slot - (a.refine or 0.0))
                for level in calm
                for a in level.answers
            ]
        ),
    )


def profile_in_cpu_time(
    name: str, levels: list[Level], slots: int, idle: CpuTime, measured: dict[str, Any]
) -> Profile:
    """A profile of a graph whose stages share one machine's cores: what each takes with a core to
    itself. ``idle``: of a second without requests. The first level must be that of one client, in
    which nothing waits; the others say how the model's time changes with the requests it holds.
    """
    alone = levels[0]
    number = sum(len(level.answers) for level in levels)
    refined = sum(a.refine is not None for level in levels for a in level.answers)
    if not refined or all(a.refine is None for a in alone.answers):
        raise PlanError("no answer was refined: choose pictures that show what is asked for")
    own = []
    for level in levels:
        assert level.cpu is not None, "measured with cpu_time"
        own.append(level.cpu - idle.each(level.per_s))
    weights = [len(level.answers) / number for level in levels]
    door_s = sum(w * cpu.door for w, cpu in zip(weights, own, strict=True))
    refiner_s = sum(w * cpu.refiner for w, cpu in zip(weights, own, strict=True))
    refine_s = np.array([a.refine for a in alone.answers if a.refine is not None])
    refine_s *= refiner_s * number / refined / refine_s.mean()
    held: list[float] = []
    slot_s: list[float] = []
    for level, cpu in zip(levels, own, strict=True):
        # While it works it holds one at least.
        holds = max(1.0, level.held)
        if not held or holds > 1.05 * held[-1]:
            held.append(round(holds, 3))
            slot_s.append(round(holds * cpu.model, 5))
    waits = np.array([a.total - a.slot - (a.refine or 0.0) for a in alone.answers])
    # Alone, nothing keeps the model from as many cores as it can use.
    cores = max(1.0, own[0].model / alone.model_s)
    # What of it the stages and the door take beyond what the answers say of them.
    waits -= (own[0].model / cores - alone.slot_s) + (own[0].refiner - alone.refine_s)
    waits -= own[0].door
    return Profile(
        name=name,
        measured=measured,
        slots=slots,
        held=tuple(held),
        slot_s=tuple(slot_s),
        work=quantiles([a.slot / alone.slot_s for a in alone.answers]),
        refine_s=quantiles(refine_s),
        refiner_cpus=1.0,
        overhead_s=quantiles(np.maximum(waits, 0.0)),
        model_cores=round(cores, 3),
        door_s=round(door_s, 5),
    )


def measure_to_file(options: argparse.Namespace) -> None:
    """``python -m serve_graph plan --measure URL --gpu NAME``."""
    if options.slots is None:
        raise PlanError("--measure needs --slots: runtime.max_batch_size of the graph")
    try:
        check_port(options.measure)
    except ValueError as error:
        raise PlanError(f"--measure {options.measure}: {error}") from None
    image, noun = options.image, options.object
    if image is None:
        sample = json.loads((SAMPLES / "samples.json").read_text())[0]
        image, noun = SAMPLES / sample["file"], noun or sample["noun"]
    if noun is None:
        raise PlanError("--image needs --object")
    try:
        content = image.read_bytes()
    except OSError as error:
        raise PlanError(f"--image cannot be read: {error}") from error
    refiners = Refiners(options.refiners, options.refiner_cpus, options.refiner_threads)
    named = Path(options.gpu) if is_file(options.gpu) else None
    path = named or options.profiles / f"{options.gpu}.json"
    require_writable(path, "--gpu" if named else "--profiles")
    try:
        said = (options.api_key or "").strip()  # an empty variable or file is no key
        api_key = given_key(said, "--api-key") if said else None
    except ValueError as error:
        raise PlanError(str(error)) from None
    try:
        levels = asyncio.run(
            measure(
                options.measure,
                bodies(content, noun, options.masks),
                slots=options.slots,
                seconds=options.level_seconds,
                api_key=api_key,
                refiners=refiners,
            )
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PlanError(
            f"--measure {options.measure}: {error or type(error).__name__}; is the graph there?"
        ) from error
    measured = {
        "date": datetime.date.today().isoformat(),
        "machine": options.machine or platform.processor() or platform.machine(),
        "image": f"{image.name}, {len(content)} bytes",
        "masks": options.masks,
        "refiners": options.refiners,
        "seconds per level": options.level_seconds,
    }
    profile = profile_of(path.stem, levels, options.slots, refiners, measured)
    profile.save(path)
    print(f"wrote {path}")
