"""The capacity planner: smallest pools, honest refusals, its files and its command line."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from scripted import ScriptedBackend
from serving import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from kestrel.server.compose import server_timing
from kestrel.server.routes import build_app
from serve_graph import __main__, cpu_time
from serve_graph.arrivals import ClosedLoop
from serve_graph.cpu_time import CpuTime
from serve_graph.measure import (
    Answer,
    Level,
    Refiners,
    ask,
    closed_loop,
    measure,
    profile_in_cpu_time,
    profile_of,
    read_timing,
)
from serve_graph.plan import (
    Aim,
    Starts,
    _smallest,
    add_arguments,
    describe,
    queue_bound,
    run,
    scaled,
    scenario,
    search,
)
from serve_graph.profile import PlanError, Profile, find, load, quantiles
from serve_graph.simulation import Simulation
from serve_graph.trial import trial

ROOT = Path(__file__).resolve().parent.parent
MADE_UP = Profile(
    name="made-up",
    measured={"machine": "none"},
    slots=8,
    held=(1.0, 8.0),
    slot_s=(0.2, 0.4),
    work=(0.5, 1.0, 1.5),
    refine_s=(0.05, 0.15),
    refiner_cpus=1.0,
    overhead_s=(0.01, 0.01),
)
AIM = Aim(
    rps=50.0,
    p99_s=1.0,
    seconds=20,
    warmup_s=3,
    refined_share=1.0,
    lost_models=0,
    lost_refiners=0,
    seed=1,
)
STARTS = Starts(model_s=30, refiner_s=5, node_s=60, gpus_per_node=8, cpus_per_node=32)


@pytest.mark.parametrize("wanted", [1, 2, 7, 63, 64, 65, 100])
def test_smallest_number_is_found_and_none_where_there_is_none(wanted: int) -> None:
    assert _smallest(1, 100, lambda n: n >= wanted) == wanted
    assert _smallest(1, 100, lambda n: n >= wanted + 100) is None


def test_plan_holds_the_aim_and_one_replica_less_does_not() -> None:
    plan = search(MADE_UP, replace(AIM, busiest=1.0), STARTS, threads=2)
    assert plan.outcome.percentile(99) <= AIM.p99_s
    for models, refiners in ((plan.models - 1, plan.refiners), (plan.models, plan.refiners - 1)):
        outcome = Simulation(scenario(MADE_UP, AIM, STARTS, models, refiners, 2)).run()
        assert outcome.percentile(99) > AIM.p99_s
    # 50 a second: 20 each model replica at most, a tenth of a second each refinement.
    assert plan.models >= 3 and plan.refiners >= 5


def test_replicas_that_may_be_lost_are_planned_for() -> None:
    calm = search(MADE_UP, AIM, STARTS, threads=2)
    ready = search(MADE_UP, replace(AIM, lost_models=2, lost_refiners=3), STARTS, threads=2)
    assert ready.models > calm.models and ready.refiners > calm.refiners


def test_more_refiners_may_be_lost_than_the_load_alone_would_need() -> None:
    light = replace(AIM, rps=5.0, lost_refiners=12, lost_models=4)
    plan = search(MADE_UP, light, STARTS, threads=2)
    assert plan.outcome.percentile(99) <= AIM.p99_s
    assert 12 < plan.refiners < 20 and 4 < plan.models < 10


@pytest.mark.parametrize(("gpus_per_node", "away_s"), [(8, 30.0), (3, 50.0)])
def test_a_plan_holds_for_as_long_as_what_is_lost_is_away(
    gpus_per_node: int, away_s: float
) -> None:
    # Nine left can do 180 a second: what piles up takes more than ten seconds to be too much.
    aim = replace(AIM, rps=190.0, lost_models=3)
    starts = replace(STARTS, node_s=20.0, gpus_per_node=gpus_per_node)
    plan = search(MADE_UP, aim, starts, threads=2)
    pools = scenario(MADE_UP, aim, starts, plan.models, plan.refiners, 2)
    back_s = pools.lost_at_s + away_s
    outcome = Simulation(replace(pools, seconds=back_s + 5, warmup_s=pools.lost_at_s)).run()
    during = [took for end, took in outcome.finished if end - took < back_s]
    assert len(during) > 0.9 * aim.rps * away_s
    assert np.percentile(during, 99) <= aim.p99_s
    assert outcome.model_queue < queue_bound(plan.outcome.model_queue, 0.0)


def test_a_pool_that_does_not_fill_its_node_is_lost_with_it() -> None:
    """Five on a node of eight: when eight are lost, another node must start first."""
    aim = replace(AIM, rps=10.0, lost_models=8, p99_s=60.0)
    pools = scenario(MADE_UP, aim, STARTS, 5, 10, 2)
    back = {look.at: look.models for look in Simulation(pools).run().trace}
    lost_at_s = round(pools.lost_at_s)
    assert back[lost_at_s + 31] == 0 == back[lost_at_s + 89] and back[lost_at_s + 91] == 5
    # No request waits for that long, so some must be left.
    plan = search(MADE_UP, aim, STARTS, threads=2)
    assert plan.models > 8 and "those of 1 and 0 whole nodes" in describe(plan, aim, STARTS, None)


def test_an_outage_that_sees_few_requests_is_simulated_more_than_once() -> None:
    rare = replace(AIM, rps=1.0, seconds=300.0, lost_models=1)
    assert 250 < len(search(MADE_UP, rare, STARTS, threads=2).outcome.latency) < 400


def test_pools_hold_for_longer_than_the_trial_that_found_them() -> None:
    # Three model replicas can do 60 a second, which takes longer than a trial to be too few.
    aim = replace(AIM, rps=59.0)
    plan = search(MADE_UP, aim, STARTS, threads=2)
    pools = scenario(MADE_UP, aim, STARTS, plan.models, plan.refiners, 2)
    outcome = Simulation(replace(pools, seconds=400.0)).run()
    assert outcome.percentile(99) <= aim.p99_s
    assert outcome.model_queue < queue_bound(plan.outcome.model_queue, 0.0)
    assert outcome.refiner_queue < queue_bound(plan.outcome.refiner_queue, 0.0)


def test_pools_are_no_busier_than_is_said_and_what_they_are_offered_is_told() -> None:
    for busiest, models, refiners in ((0.8, 4, 7), (0.5, 5, 10)):
        aim = replace(AIM, busiest=busiest)
        plan = search(MADE_UP, aim, STARTS, threads=2)
        assert (plan.models, plan.refiners) == (models, refiners)
        told = describe(plan, aim, STARTS, None)
        # 20 a second each model replica, 10 each refiner.
        assert re.search(rf"model pool .* offered +{50 / 20 / models:.0%} ", told)
        assert re.search(rf"refiner pool .* offered +{50 / 10 / refiners:.0%} ", told)


def test_plan_tells_how_busy_those_are_that_are_left() -> None:
    aim = replace(AIM, lost_models=1, lost_refiners=2, seconds=5)
    plan = search(MADE_UP, aim, STARTS, threads=2)
    left = f"{50 / 20 / (plan.models - 1):.0%} and {50 / 10 / (plan.refiners - 2):.0%}"
    said = f"meanwhile     offered {left} of what the others can do"
    assert said in describe(plan, aim, STARTS, None)
    for losing, others in (
        (replace(aim, lost_models=plan.models), f"(none left) and {left.split()[-1]}"),
        (replace(aim, lost_refiners=plan.refiners, refined_share=0), f"{left.split()[0]} and 0%"),
    ):
        assert f"offered {others} of what" in describe(plan, losing, STARTS, None)


def test_the_rate_of_a_plan_is_that_of_its_load_although_replicas_come_back_later() -> None:
    plan = search(MADE_UP, replace(AIM, lost_models=2), STARTS, threads=2)
    assert plan.outcome.answered_per_s == pytest.approx(AIM.rps, rel=0.1)


@pytest.mark.parametrize("under_s", [0.001, 0.00001])
def test_the_p99_of_the_largest_pools_is_not_told_as_one_that_was_reached(under_s: float) -> None:
    aim = replace(AIM, rps=5.0, p99_s=0.1, seconds=5)
    reached = re.compile(r"refiners: ([\d.]+) s")

    def told(p99_s: float) -> float:
        with pytest.raises(PlanError, match=reached) as refused:
            search(MADE_UP, replace(aim, p99_s=p99_s), STARTS, threads=2)
        found = reached.search(str(refused.value))
        assert found is not None
        return float(found[1])

    best = trial(MADE_UP, aim, STARTS, 1000, 10, 2).percentile(99)
    assert told(best - under_s) > best - under_s


def test_deadline_that_no_pool_can_hold_is_refused() -> None:
    with pytest.raises(PlanError, match="is not reached"):
        search(MADE_UP, replace(AIM, p99_s=0.1, seconds=5), STARTS, threads=2)
    with pytest.raises(PlanError, match="80% busy"):
        search(MADE_UP, replace(AIM, rps=1e6), STARTS, threads=2)


def test_a_rising_load_waits_for_nodes_that_the_small_pool_does_not_fill() -> None:
    plan = search(MADE_UP, AIM, STARTS, threads=2)

    def p99_s(node_s: float, cpus_per_node: int) -> float:
        starts = replace(STARTS, node_s=node_s, cpus_per_node=cpus_per_node)
        return scaled(plan, AIM, starts, 2, lookahead=True, rise_s=5.0).percentile(99)

    assert p99_s(0, 1) == p99_s(0, 1_000)
    assert p99_s(60, 1) > p99_s(60, 1_000) + 30


@pytest.mark.parametrize(("rise_s", "node_s"), [(0.0, 60.0), (100.0, 60.0), (0.0, 200.0)])
def test_a_rise_is_simulated_to_its_end_and_until_its_nodes_have_started(
    rise_s: float, node_s: float
) -> None:
    light, starts = replace(AIM, rps=5.0), replace(STARTS, node_s=node_s, cpus_per_node=1)
    plan = search(MADE_UP, light, starts, threads=2)
    looks = scaled(plan, light, starts, 2, lookahead=True, rise_s=rise_s).trace
    assert looks[-1].at > light.warmup_s + rise_s + node_s + starts.refiner_s + 30
    assert looks[-1].rate == light.rps


def test_a_node_holds_as_many_refiners_as_have_their_cpus() -> None:
    for cpus, held in ((1.0, 32), (0.5, 32), (3.0, 10), (64.0, 1)):
        profile = replace(MADE_UP, refiner_cpus=cpus)
        assert scenario(profile, AIM, STARTS, 1, 1, 2).refiner.per_node == held


def test_plan_tells_what_is_lost_with_its_nodes() -> None:
    lost = replace(AIM, lost_models=2, lost_refiners=3, seconds=5)
    for gpus, said in (
        (8, "back after 30 and 5 s\n"),
        (2, "those of 1 and 0 whole nodes 60 s later"),
    ):
        starts = replace(STARTS, gpus_per_node=gpus)
        assert said in describe(search(MADE_UP, lost, starts, 2), lost, starts, None)


@pytest.mark.parametrize(("threads", "of_eight_cpus"), [(1, 1), (2, 2), (8, 8), (16, 8)])
def test_a_refiner_is_counted_with_the_cpus_that_its_threads_use(
    threads: int, of_eight_cpus: int
) -> None:
    large = replace(MADE_UP, refiner_cpus=8.0)
    assert large.refiner_per_s(threads) == pytest.approx(10 * of_eight_cpus)
    plan = search(large, AIM, STARTS, threads)
    assert plan.refiners >= AIM.rps / (10 * of_eight_cpus)
    simulated = Simulation(scenario(large, AIM, STARTS, plan.models, plan.refiners, threads))
    assert simulated.refiner_s == pytest.approx(1 / large.refiner_per_s(threads))


def test_queue_bounds_leave_room() -> None:
    assert queue_bound(0, 0.0) == 16
    assert queue_bound(100, 0.0) == 256
    # A pool that is not busy has no queue, and yet one is to be borne that it answers in time.
    assert queue_bound(0, 2000 * 1.5) == 4096


def test_profile_survives_its_file_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "made-up.json"
    MADE_UP.save(path)
    assert load(path) == MADE_UP == find("made-up", [tmp_path])
    fields = json.loads(path.read_text())
    for broken in ({**fields, "held": [2, 1]}, {**fields, "wor": []}, [], {"name": "x"}):
        path.write_text(json.dumps(broken))
        with pytest.raises(PlanError, match="is not a profile"):
            load(path)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("slots", 0, "slots must be an integer of at least 1"),
        ("slots", "8", "slots must be an integer of at least 1"),
        ("held", (1.0, 1.0), "held must rise"),
        ("held", 1.0, "held must be a list of numbers over 0"),
        ("slot_s", (0.2, math.nan), "slot_s must be a list of numbers over 0"),
        ("slot_s", (0.2, "0.4"), "slot_s must be a list of numbers over 0"),
        ("work", (), "work is empty"),
        ("work", (1.0, -1.0), "work must be a list of numbers of at least 0"),
        ("refine_s", 0, "refine_s must be a list of numbers of at least 0"),
        ("refine_s", (0.0, 0.0), "refine_s must not be 0 throughout"),
        ("refine_s", (0.1, math.nan), "refine_s must be a list of numbers of at least 0"),
        ("refine_s", (0.1, "x"), "refine_s must be a list of numbers of at least 0"),
        ("refine_s", "0.1", "refine_s must be a list of numbers of at least 0"),
        ("overhead_s", (0.01, math.inf), "overhead_s must be a list of numbers of at least 0"),
        ("refiner_cpus", 0, "refiner_cpus must be a number over 0"),
        ("refiner_cpus", True, "refiner_cpus must be a number over 0"),
        ("model_cores", math.nan, "model_cores must be a number over 0"),
        ("door_s", -1, "door_s must be a number of at least 0"),
        ("measured", "here", "measured must be a mapping"),
    ],
)
def test_profile_names_the_field_that_is_wrong_and_its_rule(
    tmp_path: Path, field: str, value: object, rule: str
) -> None:
    path = tmp_path / "made-up.json"
    MADE_UP.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(PlanError, match=f"{path} is not a profile: .*{rule}"):
        load(path)


def test_times_beyond_what_was_measured_keep_the_throughput() -> None:
    assert MADE_UP.seconds(4.5) == pytest.approx(0.3)
    assert MADE_UP.seconds(16) == pytest.approx(0.8)
    assert MADE_UP.model_per_s == 20 and MADE_UP.refiner_per_s(2) == pytest.approx(10)


def test_answers_say_where_their_time_went() -> None:
    from kestrel.api import ModelMetrics, ModelResult
    from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

    model = ModelResult(
        request_id="r",
        finish_reason="stop",
        object="dog",
        path="",
        bbox=None,
        metrics=ModelMetrics(prefill_time_ms=20, decode_time_ms=50, ttft_ms=25),
    )
    refined = SegmentRefineBitmapsResult(timings_ms={"raster": 3.0, "refine": 7.0})
    times = read_timing(server_timing(model, refined))
    assert times == pytest.approx(
        {"prepare": 0.005, "prefill": 0.02, "decode": 0.05, "refine": 0.01}
    )
    assert "refine" not in read_timing(server_timing(model, None))


def level(clients: int, per_s: float, slot: float, refine: float | None = 0.02) -> Level:
    answer = Answer(total=slot + 0.05, slot=slot, refine=refine)
    return Level(clients, per_s, [answer, replace(answer, slot=1.2 * slot)])


def test_measurement_becomes_a_profile_without_what_queued() -> None:
    levels = [level(1, 5, 0.1), level(2, 8, 0.2), level(4, 9, 0.5, refine=0.09), level(8, 9, 0.5)]
    profile = profile_of("x", levels, 4, Refiners(), {})
    # The third level filled the refiner, the fourth holds no more than it.
    assert profile.held == pytest.approx((0.55, 1.76, 4.95))
    assert max(profile.refine_s) == pytest.approx(0.02)
    assert max(profile.overhead_s) == pytest.approx(0.03)
    assert quantiles([1.0, 2.0, 3.0], 3) == (1.0, 2.0, 3.0)
    with pytest.raises(PlanError, match="refined"):
        profile_of("x", [level(1, 5, 0.1, refine=None)], 4, Refiners(), {})


def test_loads_that_several_refiners_carry_stay_in_the_profile() -> None:
    levels = [level(n, 5 * n, 0.1, refine=0.1) for n in (1, 2, 4, 8, 16)]
    profile = profile_of("x", levels, 16, Refiners(20), {})
    assert profile.held == pytest.approx([level.held for level in levels], abs=1e-3)
    # Two CPUs are worth two refiners of one, where there are threads for them.
    assert profile_of("x", levels, 16, Refiners(10, cpus=2.0, threads=2), {}).held == profile.held
    few = profile_of("x", levels, 16, Refiners(5, threads=8), {})
    assert few.held == profile.held[:4]
    # A thread does not use more than one CPU.
    lone = profile_of("x", levels, 16, Refiners(8, cpus=4.0, threads=1), {})
    assert lone.held == few.held


def test_refinements_that_share_a_cpu_do_not_seem_to_be_more_than_it_can_do() -> None:
    """Two threads on one CPU: each refinement takes longer beside another, and no more of it."""
    levels = [
        level(1, 6, 0.1, refine=0.03),
        level(4, 20, 0.15, refine=0.06),
        level(8, 32, 0.2, refine=0.06),
    ]
    refiners = Refiners(threads=2)
    busy = [refiners.busy(one, levels[0].refine_s) for one in levels]
    assert busy == pytest.approx([0.18, 0.6, 0.96])
    profile = profile_of("x", levels, 8, refiners, {})
    # The second level left the refiner room, the third did not; its times are those of the first.
    assert profile.held == pytest.approx([one.held for one in levels[:2]], abs=1e-3)
    assert max(profile.refine_s) == pytest.approx(0.03)


def test_more_refinements_at_once_than_the_refiners_can_run_are_refused() -> None:
    # Eight under way, and one refiner runs two: it is not one that serves.
    with pytest.raises(PlanError, match=r"8\.0 refinements .* --refiners"):
        profile_of("x", [level(1, 5, 0.1), level(16, 80, 0.1, refine=0.1)], 16, Refiners(), {})
    with pytest.raises(PlanError, match="one client keeps 1 refiners busy"):
        profile_of("x", [level(1, 5, 0.1, refine=0.1)], 4, Refiners(), {})


def test_cpu_times_of_processes_become_a_profile_that_tells_the_measured_times_again() -> None:
    # Alone: 80 ms in a slot, 20 ms refining, 50 ms around them, of which 30 ms are computed.
    cpu = CpuTime(model=0.09, refiner=0.02, door=0.03, machine=0.2)
    idle = CpuTime(model=0.0, refiner=0.0, door=0.04, machine=0.1)
    alone = Level(1, 1 / 0.15, [Answer(0.15, 0.08, 0.02)] * 9, cpu)
    full_cpu = CpuTime(model=0.05, refiner=0.02, door=0.03, machine=0.2)
    full = Level(8, 20.0, [Answer(0.4, 0.35, 0.04)] * 9, full_cpu)
    profile = profile_in_cpu_time("x", [alone, full], 8, idle, {})
    assert profile.held == pytest.approx((1.0, 7.0))
    assert profile.slot_s == pytest.approx((0.09, 7 * 0.05))
    assert profile.model_per_s == pytest.approx(20)
    assert profile.refine_s[50] == pytest.approx(0.02)
    # Idling is not part of a request: 0.04 s of a second with 6.7 or 20 requests.
    assert profile.door_s == pytest.approx(0.03 - 0.04 * (0.15 + 0.05) / 2)
    assert profile.model_cores == pytest.approx(0.09 / 0.08, abs=1e-3)
    plan = scenario(profile, AIM, STARTS, 1, 1, 2)
    lone = replace(plan, arrivals=ClosedLoop(1), cores=2.0, seconds=20.0)
    assert Simulation(lone).run().percentile(50) == pytest.approx(0.15, abs=0.003)
    with pytest.raises(PlanError, match="refined"):
        profile_in_cpu_time("x", [replace(alone, answers=[Answer(0.1, 0.1, None)])], 8, idle, {})


def test_processes_of_this_machine_are_found_to_have_computed(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.25 < cpu_time._used([child.pid]) < 2
        child.communicate(b"\n")
    assert cpu_time._used([child.pid]) == 0
    assert cpu_time._used_by_machine() > 0.3


async def test_measuring_something_else_or_a_failing_graph_is_said_plainly() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503 if request.content == b"busy" else 200, text="busy")

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(PlanError, match="503"):
            await ask(client, b"busy")
        with pytest.raises(PlanError, match="Server-Timing"):
            await ask(client, b"{}")


async def test_rate_of_a_closed_loop_is_right_however_few_requests_it_had() -> None:
    timing = "prepare;dur=1.0, prefill;dur=20.0, decode;dur=80.0, refine;dur=10.0"

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.2)
        return httpx.Response(200, headers={"Server-Timing": timing}, json={})

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        level = await closed_loop(client, iter([b"{}"] * 100), clients=3, seconds=0.5)
    # Three clients, each an answer every 0.2 s: 15 a second, each 0.1 s in a slot.
    assert level.per_s == pytest.approx(15, rel=0.3)
    assert level.held == pytest.approx(1.5, rel=0.3)
    assert level.refining == pytest.approx(0.15, rel=0.3)


async def test_a_graph_of_this_machine_is_measured_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    backend = ScriptedBackend()
    with served(build_app(backend)) as url, pytest.raises(PlanError, match="400"):
        await measure(url, iter([b"{}"] * 100), slots=1, seconds=0.1)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_profile_measured_to_a_file_is_found_there_by_both_modes(tmp_path: Path) -> None:
    seen = set()

    async def answer(request: Request) -> JSONResponse:
        seen.add(request.headers["authorization"])
        await asyncio.sleep(0.02)
        timing = "prepare;dur=0, prefill;dur=2.0, decode;dur=8.0, refine;dur=1.0"
        return JSONResponse({}, headers={"Server-Timing": timing})

    app = Starlette(routes=[Route("/v1/segment", answer, methods=["POST"])])
    path = tmp_path / "mine" / "H100.json"
    elsewhere = ("--profiles", str(tmp_path / "elsewhere"), "--gpu", str(path))
    with served(app) as url:
        brief = ("--slots", "1", "--level-seconds", "0.1", "--api-key", "of-mine\r\n")
        run(options("--measure", url, *elsewhere, *brief))
    assert [file.name for file in tmp_path.rglob("*.json")] == ["H100.json"]
    assert load(path).name == "H100" and seen == {"Bearer of-mine"}
    run(options(*elsewhere, "--rps", "5", "--p99", "1"))


Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``python -m serve_graph plan`` with some arguments, in this process: what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["serve_graph", "plan", *arguments])
        __main__.main()
        return capsys.readouterr().out

    return run


def test_command_prints_a_plan_and_draws_it(command: Command, tmp_path: Path) -> None:
    MADE_UP.save(tmp_path / "made-up.json")
    plot = tmp_path / "plan.png"
    printed = command(
        *("--gpu", "made-up", "--profiles", str(tmp_path), "--rps", "40", "--p99", "1"),
        *("--seconds", "20", "--plot", str(plot), "--gpu-price", "2", "--cpu-price", "0.05"),
    )
    for part in ("model pool", "refiner pool", "max_queued_requests", "per million requests"):
        assert part in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_is_said_before_anything_is_simulated() -> None:
    asked = ["--gpu", "nano-on-cpu", "--rps", "5", "--p99", "2", "--plot", "plan.png"]
    away = "import sys; sys.modules['matplotlib'] = None; "
    started = [sys.executable, "-c", f"{away}from serve_graph.__main__ import main; main()"]
    done = subprocess.run([*started, "plan", *asked], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "error: --plot needs matplotlib: pip install matplotlib\n"
    assert done.returncode == 1 and done.stdout == ""


def test_command_plans_with_the_profile_that_ships() -> None:
    asked = ["--gpu", "nano-on-cpu", "--rps", "100", "--p99", "0.5", "--seconds", "10"]
    started = [sys.executable, "-m", "serve_graph", "plan", *asked]
    done = subprocess.run(started, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "model pool" in done.stdout and "2 shared cores" in done.stdout


def test_a_rate_so_low_that_nothing_comes_in_a_minute_is_called_impossible(
    command: Command,
) -> None:
    printed = command("--gpu", "nano-on-cpu", "--rps", "0.01", "--p99", "5")
    assert re.search(r"model pool +1 replicas", printed)


def test_a_search_that_is_interrupted_ends_without_a_traceback(command: Command) -> None:
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()  # what is raised in a callback of its own, as Hypothesis has one, is lost
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(SystemExit) as ended:
            command("--gpu", "nano-on-cpu", "--rps", "20000", "--p99", "1")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        gc.enable()
    assert ended.value.code == 130


NOBODY = ("--gpu", "H100", "--measure", "http://127.0.0.1:9")
AIMED = ("--gpu", "nano-on-cpu", "--rps", "5", "--p99", "2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "H100", "--rps", "2000", "--p99", "1.5"), "--measure"),
        (("--gpu", "H100"), "--rps and --p99"),
        (("--gpu", "H100", "--rps", "-1", "--p99", "1"), "--rps must be over 0"),
        ((*AIMED, "--rps", "nan"), "--rps must be over 0, not nan"),
        ((*AIMED, "--rps", "1e-9"), "--rps 1e-09: no request came in the 100000 s"),
        ((*AIMED, "--p99", "inf"), "--p99 must be over 0, not inf"),
        ((*AIMED, "--refiner-threads", "0"), "--refiner-threads must be at least 1"),
        ((*AIMED, "--gpus-per-node", "0"), "--gpus-per-node must be at least 1"),
        ((*NOBODY, "--slots", "4", "--refiners", "0"), "--refiners must be at least 1"),
        ((*AIMED, "--lose-models", "-1"), "--lose-models must be at least 0"),
        ((*AIMED, "--seed", "-1"), "--seed must be at least 0"),
        ((*AIMED, "--busiest", "0"), "--busiest must be over 0 and at most 1"),
        ((*AIMED, "--busiest", "80"), "--busiest must be over 0 and at most 1"),
        (NOBODY, "--slots"),
        ((*AIMED, "--plot", "/dev/null/plan.png"), "--plot: /dev/null cannot be made"),
        ((*AIMED, "--plot", "plan.foo"), "must end in .png"),
        ((*NOBODY, "--slots", "4", "--profiles", "/dev/null"), "--profiles: /dev/null cannot be"),
        ((*NOBODY, "--slots", "4", "--profiles", "{folder}"), "is the graph there"),
        (
            (*NOBODY, "--slots", "4", "--profiles", "{folder}", "--measure", "http://[::1]:99999"),
            "--measure http://[::1]:99999: Port out of range 0-65535",
        ),
        ((*NOBODY, "--slots", "4", "--object", "dog", "--image", "no.jpg"), "cannot be read"),
        (
            (*NOBODY, "--slots", "4", "--api-key", "s3cret-k\u00e9y"),
            "--api-key must be visible ASCII",
        ),
        ((*NOBODY, "--slots", "4", "--api-key", "s3cret key"), "--api-key must be visible ASCII"),
        ((*NOBODY, "--slots", "4", "--gpu", "/dev/null/x.json"), "--gpu: /dev/null cannot be"),
    ],
)
def test_command_says_in_one_line_what_is_missing(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as ended:
        command(*(argument.format(folder=tmp_path) for argument in arguments))
    assert said in str(ended.value.code) and "s3cret" not in str(ended.value.code)
