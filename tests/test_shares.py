"""Threads that share a picture come to other numbers than one does, wait for each other for ever,
or take cores that others use."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from engines import CONFIG, NANO, SAMPLES, comparable
from tiny_models import TINY_3, random_model
from torch import Tensor

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.batch import SHARES, Batch
from kestrel.cores import RUNNING, idle_cores, usable_cores
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.model import load
from kestrel.ops import attention
from kestrel.ops.shares import Share, Team

THREADS = range(1, SHARES + 2)
"""One more than take part."""


@pytest.fixture(autouse=True)
def torchs_threads() -> Iterator[None]:
    """Encoding sets them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def team() -> Iterator[Team]:
    made = Team(SHARES - 1)
    yield made
    made.close()


def sizes(grid: int = 5) -> MoondreamConfig:
    """Experts, and twenty-five patches, which no number of threads divides; heads of 32."""
    config = TINY_3
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, dim=64, prefix_attn=grid**2 + 1),
        vision=dataclasses.replace(
            config.vision, enc_dim=64, proj_out_dim=64, crop_size=14 * grid, max_crops=0
        ),
        region=dataclasses.replace(config.region, dim=64),
    )


def crops(side: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (1, side, side, 3), np.uint8)


def same_by_shares(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = crops(batch.model.config.vision.crop_size)
    with torch.inference_mode():
        torch.set_num_threads(1)
        alone = batch.prefix(batch.features(picture), (1, 1))
    taken: list[int] = []
    by_shares = Team.by_shares

    def told(self: Team, count: int, threads: int, work: Any) -> list[Tensor]:
        given = by_shares(self, count, threads, work)
        taken.append(len(given))
        return given

    monkeypatch.setattr(Team, "by_shares", told)
    most = max(1, min(SHARES, batch.model.config.vision.n_patches // attention.FEW))
    for threads in THREADS:
        for _ in range(3):  # threads meet otherwise each time
            taken.clear()
            found = batch.encode(picture, (1, 1), threads)
            assert torch.equal(found, alone), f"{threads} threads"
            assert max(taken) == min(threads, most) or not all(batch._alike.values())
    batch.close()
    if not all(batch._alike.values()):
        pytest.skip("on this processor a row of a product depends on those beside it")


def test_threads_that_give_other_numbers_go_on_sharing(monkeypatch, caplog):
    model = load(NANO, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        batch = Batch(model, 1)
    picture = crops(model.config.vision.crop_size)
    alone = batch.encode(picture, (1, 1))
    features = Batch.features

    def otherwise(self: Batch, crops: Any, share: Share | None = None) -> Tensor:
        return features(self, crops, share) * (1 if share is None else 1.001)

    monkeypatch.setattr(Batch, "features", otherwise)
    for _ in range(2):
        assert torch.equal(batch.encode(picture, (1, 1), 2), alone)
    assert caplog.text.count("2 threads gave other numbers") == 1
    monkeypatch.setattr(Team, "_by_shares", None)
    assert torch.equal(batch.encode(picture, (1, 1), 2), alone)
    batch.close()


@pytest.mark.parametrize("half_kv", [False, True])
def test_a_picture_of_the_shipped_model_comes_out_otherwise(monkeypatch, half_kv):
    model = load(NANO, torch.device("cpu"), torch.float32, half_kv=half_kv)
    with torch.inference_mode():
        batch = Batch(model, 1)
    same_by_shares(batch, monkeypatch)


def test_a_picture_in_bfloat16_comes_out_otherwise(monkeypatch):
    model = load(NANO, torch.device("cpu"), torch.float32, half_images=True, half_kv=True)
    with torch.inference_mode():
        batch = Batch(model, 1)
    if not (model.vision.shares_features and model.cached.shares_prefixes):
        pytest.skip("this processor has no products of its own for it, or a unit for matrices")
    same_by_shares(batch, monkeypatch)


def test_a_picture_of_experts_and_odd_sizes_comes_out_otherwise(monkeypatch):
    model = random_model(sizes())
    model.fuse()
    with torch.inference_mode():
        batch = Batch(model, 1)
    same_by_shares(batch, monkeypatch)


@pytest.mark.parametrize("grid", [1, 3])
def test_a_picture_of_few_patches_comes_out_otherwise(monkeypatch, grid):
    """Threads would have none of them, or fewer than are asked at once."""
    model = random_model(sizes(grid))
    model.fuse()
    with torch.inference_mode():
        batch = Batch(model, 1)
    same_by_shares(batch, monkeypatch)


def test_heads_for_which_torch_has_the_attention_are_shared(monkeypatch):
    model = random_model(TINY_3)
    model.fuse()
    with torch.inference_mode():
        batch = Batch(model, 1)
    monkeypatch.setattr(Team, "_by_shares", None)
    batch.encode(crops(28), (1, 1), 2)
    batch.close()


def test_a_machine_without_numba_shares_what_it_cannot(monkeypatch):
    monkeypatch.setattr(attention, "_kernel", lambda numbers: None)
    model = load(NANO, torch.device("cpu"), torch.float32)
    assert not model.vision.shares_features and not model.cached.shares_prefixes


# Threads


def test_what_is_gathered_is_not_in_order(team):
    lines = torch.arange(10.0)

    def work(share: Share | None) -> Tensor:
        assert share is not None
        own = lines[share.part]
        for step in range(50):
            every = share.gathered(own + step, 0)
            assert torch.equal(every, lines + step)
        return own

    given = team.by_shares(10, 3, work)
    assert [len(part) for part in given] == [3, 3, 4]
    assert torch.equal(torch.cat(given), lines)


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("meetings", [0, 1])
def test_a_share_that_fails_keeps_the_others_waiting(team, failing, meetings):
    def work(share: Share | None) -> Tensor:
        assert share is not None
        for step in range(3):
            if share.number == failing and step == meetings:
                raise ZeroDivisionError
            share.gathered(torch.zeros(1), 0)
        return torch.zeros(1)

    with pytest.raises(ZeroDivisionError):
        team.by_shares(9, 3, work)
    assert len(team.by_shares(9, 3, lambda share: torch.zeros(1))) == 3, "it is not free again"


def test_two_computations_take_each_others_threads(team):
    begun, go_on = threading.Event(), threading.Event()

    def held(share: Share | None) -> Tensor:
        begun.set()
        assert go_on.wait(30)
        return torch.zeros(1)

    first = threading.Thread(target=team.by_shares, args=(8, 2, held))
    first.start()
    assert begun.wait(30)
    shares: list[Share | None] = []
    team.by_shares(8, 2, lambda share: shares.append(share) or torch.zeros(1))
    go_on.set()
    first.join(30)
    assert shares == [None]


@pytest.mark.parametrize("started", range(3))
def test_helpers_that_are_gone_fail_a_picture_or_wait_for_ever(monkeypatch, started):
    """The engine ends, or the machine gives no more threads, while shares are handed out."""
    team = Team(SHARES - 1)
    submit, asked, ends = ThreadPoolExecutor.submit, [], []

    def told(self: ThreadPoolExecutor, *work: Any) -> Any:
        if len(asked) == started:
            team.close()
        asked.append(work)
        return submit(self, *work)

    def work(share: Share | None) -> Tensor:
        try:
            return torch.zeros(1) if share is None else share.gathered(torch.zeros(1), 0)
        finally:
            ends.append(share)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", told)
    for _ in range(2):
        assert len(team.by_shares(8, SHARES, work)) == 1
    shares = [share for share in ends if share is not None]
    assert len(shares) == started, "a share waits"


def test_a_thread_that_cannot_be_started_is_counted_on(monkeypatch):
    """What was meant for it lies in the executor's line, which then is wrong about who is free."""
    team = Team(SHARES - 1)
    start, left = threading.Thread.start, [1, 0, 0]

    def few(self: threading.Thread) -> None:
        if not left.pop(0):
            raise RuntimeError("can't start new thread")
        start(self)

    def work(share: Share | None) -> Tensor:
        return torch.zeros(1) if share is None else share.gathered(torch.zeros(1), 0)

    monkeypatch.setattr(threading.Thread, "start", few)
    for _ in range(3):
        time.sleep(0.1)  # what lies in the line is taken
        assert len(team.by_shares(8, 3, work)) == 1


def test_one_thread_is_given_company(team):
    shares: list[Share | None] = []
    team.by_shares(8, 1, lambda share: shares.append(share) or torch.zeros(1))
    assert shares == [None]


# The engine


async def test_a_picture_takes_cores_that_others_use(monkeypatch):
    """Two cores: a lone picture gets both, one beside another or beside running rows its own."""
    monkeypatch.setattr("kestrel.pictures.usable_cores", lambda: 2)
    monkeypatch.setattr("kestrel.scheduler.idle_cores", lambda: 1)
    encode, step = Batch.encode, Batch.step
    given: list[int] = []
    encoding, stepping, go_on = threading.Event(), threading.Event(), threading.Event()

    def told(self: Batch, crops: Any, tiling: Any, threads: int) -> Tensor:
        given.append(threads)
        encoding.set()
        if len(given) == 2:
            assert go_on.wait(30)
        return encode(self, crops, tiling, threads)

    def held(self: Batch, chunks: Any) -> Any:
        if len(given) == 4:
            stepping.set()
            assert go_on.wait(30)
        return step(self, chunks)

    async with await InferenceEngine.create(RuntimeConfig(**CONFIG, refiner=None)) as engine:
        monkeypatch.setattr(Batch, "encode", told)
        monkeypatch.setattr(Batch, "step", held)
        asked = list({arguments["image"]: arguments for arguments in SAMPLES}.values())

        async def ask(number: int) -> Any:
            arguments = asked[number % len(asked)]
            image = arguments["image"] + number.to_bytes(4, "big")
            return await engine.segment(**{**arguments, "image": image})

        await ask(0)
        assert given == [2]
        encoding.clear()
        first = asyncio.create_task(ask(1))
        assert await asyncio.to_thread(encoding.wait, 30)
        encoding.clear()
        second = asyncio.create_task(ask(2))
        assert await asyncio.to_thread(encoding.wait, 30)
        assert given == [2, 2, 1]
        go_on.set()
        await asyncio.gather(first, second)
        go_on.clear()
        encoding.clear()
        first = asyncio.create_task(ask(3))
        assert await asyncio.to_thread(stepping.wait, 30)
        second = asyncio.create_task(ask(4))
        deadline = time.monotonic() + 30
        while len(given) < 5 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(first, second)
    assert given == [2, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.max": "x"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "0"}, 8),
    ],
)
def test_a_container_is_given_threads_for_the_cores_of_its_machine(
    monkeypatch, tmp_path, files, cores
):
    """More threads than its time is for wait for each other while it is held up."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr("kestrel.cores.CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert usable_cores() == cores


async def test_a_picture_takes_cores_that_other_processes_use(monkeypatch):
    monkeypatch.setattr("kestrel.pictures.usable_cores", lambda: 4)
    given: list[int] = []
    encode = Batch.encode

    def told(self: Batch, crops: Any, tiling: Any, threads: int) -> Tensor:
        given.append(threads)
        return encode(self, crops, tiling, threads)

    async with await InferenceEngine.create(RuntimeConfig(**CONFIG, refiner=None)) as engine:
        monkeypatch.setattr(Batch, "encode", told)
        for number, idle in enumerate((0, 1, 2, 9)):
            monkeypatch.setattr("kestrel.scheduler.idle_cores", lambda idle=idle: idle)
            image = SAMPLES[0]["image"] + number.to_bytes(4, "big")
            await engine.segment(**{**SAMPLES[0], "image": image})
    assert given == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("told", "idle"),
    [
        ("0.20 0.18 0.12 1/80 11206", 7),
        ("0.20 0.18 0.12 3/80 11206", 5),
        ("9.20 8.18 9.12 30/80 11206", 0),
        ("what is this", 7),
        (None, 7),
    ],
)
def test_idle_cores_are_counted_wrongly(monkeypatch, tmp_path, told, idle):
    file = tmp_path / "loadavg"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr("kestrel.cores.RUNNING", file)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert idle_cores() == idle


@pytest.mark.skipif(not RUNNING.exists(), reason="this kernel does not tell")
def test_the_kernel_tells_otherwise_of_threads_that_run():
    """Threads of another process that do nothing but run."""
    cores = os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores + 1)]
    try:
        deadline = time.monotonic() + 30
        while idle_cores() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert idle_cores() == 0
    finally:
        for process in busy:
            process.kill()
            process.wait()


async def test_a_lone_request_is_answered_otherwise_by_several_threads(monkeypatch):
    answers = []
    for cores in (1, 3):
        monkeypatch.setattr("kestrel.pictures.usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr("kestrel.scheduler.idle_cores", lambda cores=cores: cores - 1)
        async with await InferenceEngine.create(RuntimeConfig(**CONFIG)) as engine:
            answers.append([comparable(await engine.segment(**asked)) for asked in SAMPLES])
    assert answers[0] == answers[1]
