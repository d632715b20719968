"""The planner's simulation against what queueing theory knows, and against Serve's own rules."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest

from serve_graph.args import LookAhead
from serve_graph.arrivals import ClosedLoop, Paced, Poisson, Recorded
from serve_graph.profile import Profile
from serve_graph.simulated_pool import Delay, PoolPlan
from serve_graph.simulation import DOOR_PROCESSES, Scenario, Simulation

EXPONENTIAL = tuple((-np.log(1 - np.linspace(0, 0.9999, 2001))).tolist())
SECOND = Profile(
    name="one second",
    measured={},
    slots=1,
    held=(1.0,),
    slot_s=(1.0,),
    work=EXPONENTIAL,
    refine_s=(0.1, 0.1),
    refiner_cpus=1.0,
    overhead_s=(0.0, 0.0),
)


def steady(profile: Profile, models: int, rate: float, **fields: object) -> Scenario:
    scenario = Scenario(
        profile=profile,
        model=PoolPlan(models, max_ongoing=profile.slots),
        refiner=PoolPlan(200, max_ongoing=1),
        arrivals=Poisson(lambda _: rate),
        seconds=6000,
        refined_share=0.0,
        warmup_s=500,
    )
    return replace(scenario, **fields)  # type: ignore[arg-type]


def erlang_wait(servers: int, load: float) -> float:
    """Mean wait of M/M/c with service time 1 (Erlang C)."""
    terms = [load**n / math.factorial(n) for n in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last) / (servers - load)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (4, 3.2), (10, 8.5)])
def test_waits_are_those_of_erlang(servers: int, load: float) -> None:
    outcome = Simulation(steady(SECOND, servers, load)).run()
    assert outcome.latency.mean() == pytest.approx(1 + erlang_wait(servers, load), rel=0.12)
    assert outcome.model_busy == pytest.approx(load / servers, rel=0.05)


def test_shared_processor_takes_the_time_of_processor_sharing() -> None:
    # One replica whose requests share it fully: mean time 1 / (1 - load).
    held = tuple(float(n) for n in range(1, 65))
    sharing = replace(SECOND, slots=64, held=held, slot_s=held)
    outcome = Simulation(steady(sharing, 1, 0.6)).run()
    assert outcome.latency.mean() == pytest.approx(1 / 0.4, rel=0.12)


def sent(scenario: Scenario) -> int:
    """Requests of a load with the scenario's seed."""
    rng = np.random.default_rng(scenario.seed)
    return len(scenario.arrivals.times(scenario.seconds, rng))


def test_every_request_of_an_overload_is_answered_in_the_end() -> None:
    scenario = steady(SECOND, 2, 6.0, seconds=300.0, warmup_s=0.0)
    outcome = Simulation(scenario).run()
    assert len(outcome.latency) == sent(scenario)
    # Three times what the two can do: the last waits for two thirds of them all.
    assert outcome.model_queue == pytest.approx(1200, rel=0.15)
    assert outcome.answered_per_s == pytest.approx(2.0, rel=0.05)


def test_requests_of_replicas_that_die_run_again() -> None:
    scenario = steady(SECOND, 8, 6.0, seconds=300.0, warmup_s=0.0, refined_share=1.0)
    calm = Simulation(scenario).run()
    lost = Simulation(replace(scenario, lost_at_s=150.0, lost_models=6, lost_refiners=150)).run()
    assert len(calm.latency) == len(lost.latency) == sent(scenario)
    assert lost.percentile(99) > calm.percentile(99)
    # Back to size after the start: 8 replicas again at the end.
    assert lost.trace[-1].models == 8


def test_replicas_that_come_back_after_the_last_answer_are_no_part_of_the_load() -> None:
    scenario = steady(SECOND, 8, 4.0, seconds=300.0, warmup_s=0.0, refined_share=1.0)
    slow = replace(
        scenario,
        model=replace(scenario.model, start_s=1e5),
        refiner=PoolPlan(2, max_ongoing=1, start_s=1e5),
        lost_at_s=150.0,
        lost_models=1,
        lost_refiners=1,
    )
    outcome = Simulation(slow).run()
    # Lost ones are paid for until they are back: 4 of 8, and 0.4 of 2.
    assert outcome.model_busy == pytest.approx(0.5, rel=0.15)
    assert outcome.refiner_busy == pytest.approx(0.2, rel=0.15)
    assert outcome.refiner_seconds == pytest.approx(2 * 300, rel=0.05)


@pytest.mark.parametrize(("lost", "whole_nodes"), [(3, 0), (4, 1), (7, 1), (8, 2)])
def test_replicas_that_fill_a_node_are_lost_with_it_and_wait_for_another(
    lost: int, whole_nodes: int
) -> None:
    pool = PoolPlan(12, max_ongoing=1, per_node=4, start_s=10, node_start_s=40)
    scenario = steady(SECOND, 8, 1.0, seconds=200.0, model=pool, lost_at_s=100.0, lost_models=lost)
    sizes = {look.at: look.models for look in Simulation(scenario).run().trace}
    assert sizes[101.0] == 12 - lost
    assert sizes[111.0] == 12 - 4 * whole_nodes
    assert sizes[149.0] == 12 - 4 * whole_nodes and sizes[151.0] == 12


def test_refiners_that_are_too_few_are_where_requests_wait() -> None:
    scenario = steady(SECOND, 20, 10.0, seconds=60.0, warmup_s=0.0, refined_share=1.0)
    few = replace(scenario, refiner=PoolPlan(1, max_ongoing=1))
    outcome = Simulation(replace(few, arrivals=Poisson(lambda _: 12.0))).run()
    assert outcome.refiner_queue > 20 and outcome.refiner_busy > 0.9
    assert Simulation(scenario).run().refiner_queue == 0


def rising(lookahead: LookAhead | None, **fields: object) -> Scenario:
    """Long decodes, then refinements; the load rises sixfold after a minute."""
    pool = PoolPlan(
        2, max_replicas=40, max_ongoing=1, start_s=10, target_ongoing=1, lookahead=lookahead
    )
    slow = replace(
        SECOND, slots=64, held=(64.0,), slot_s=(8.0,), work=(0.8, 1.2), refine_s=(0.5, 0.5)
    )
    scenario = Scenario(
        profile=slow,
        model=PoolPlan(8, max_ongoing=64),
        refiner=replace(pool, **fields),  # type: ignore[arg-type]
        arrivals=Poisson(lambda at: 20.0 if at > 60 else 3.0),
        seconds=180,
        warmup_s=60,
    )
    return scenario


def test_looking_ahead_is_ready_sooner_than_looking_at_the_queue() -> None:
    behind = Simulation(rising(None)).run()
    ahead = Simulation(rising(LookAhead(start_s=10, busy_s=0.5))).run()
    assert ahead.percentile(99) < behind.percentile(99)
    assert ahead.refiner_queue < behind.refiner_queue
    assert max(look.refiners for look in ahead.trace) <= 40


def test_a_long_start_does_not_end_in_more_refiners_than_the_queue_needs() -> None:
    aims = LookAhead(start_s=20, busy_s=0.5)
    scenario = rising(aims, start_s=20, max_replicas=500, replicas=4, min_replicas=4)
    brief = replace(scenario.profile, slot_s=(2.0,))
    step = Paced(lambda at: 20.0 if at > 60 else 3.0)
    outcome = Simulation(replace(scenario, profile=brief, arrivals=step)).run()
    # Half a second of each of 20 a second, 70 % busy; and what four refiners have left of 20 s of
    # it, gone in 5 s.
    needed = 20 * 0.5 / 0.7 + (20 - 4 / 0.5) * 20 * 0.5 / 5
    assert max(look.refiners for look in outcome.trace) <= math.ceil(needed)


def test_nodes_that_must_start_first_are_waited_for() -> None:
    aims = LookAhead(start_s=10, busy_s=0.5)
    there = Simulation(rising(aims, per_node=4, nodes=10)).run()
    away = Simulation(rising(aims, per_node=4, nodes=1, node_start_s=40)).run()
    assert away.percentile(99) > there.percentile(99) + 5


def test_pool_shrinks_when_the_load_is_gone_and_finishes_what_it_has() -> None:
    scenario = rising(LookAhead(start_s=10, busy_s=0.5), downscale_delay_s=10)
    falling = Poisson(lambda at: 20.0 if at < 60 else 0.5)
    gone = replace(scenario, arrivals=falling, warmup_s=0.0)
    outcome = Simulation(gone).run()
    assert max(look.refiners for look in outcome.trace) > 8 and outcome.trace[-1].refiners <= 4
    assert len(outcome.latency) == sent(gone)


def test_a_pool_that_shrinks_while_it_grows_calls_off_starts_and_keeps_who_serves() -> None:
    simulation = Simulation(rising(None, replicas=3, start_s=30))
    pool = simulation.refiner
    for _ in range(3):
        pool.add(0.0)
    for now, target, serving, starting in (
        (0.0, 6, 3, 3),
        (1.0, 4, 3, 1),
        (2.0, 5, 3, 2),
        (3.0, 3, 3, 0),
        (4.0, 2, 2, 0),
        (5.0, 4, 2, 2),
    ):
        simulation.resize(now, pool, target)
        assert (len(pool.replicas), len(pool.starting)) == (serving, starting), target
    # Those that were called off do not come.
    came = []
    while simulation.events:
        at, _, kind, what = heapq.heappop(simulation.events)
        simulation.handle(at, kind, what)
        came.append((at, len(pool.replicas)))
    assert came[-1] == (35.0, 4) and max(size for at, size in came if at < 35) == 2


def test_same_seed_same_outcome() -> None:
    scenario = rising(LookAhead())
    one, other = Simulation(scenario).run(), Simulation(scenario).run()
    assert np.array_equal(one.latency, other.latency)


def test_delays_are_those_of_serve() -> None:
    pytest.importorskip("ray.serve")
    from ray.serve.autoscaling_policy import _apply_delay_logic
    from ray.serve.config import AutoscalingConfig

    plan = PoolPlan(3, max_replicas=99, upscale_delay_s=4, downscale_delay_s=7)
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=99, upscale_delay_s=4, downscale_delay_s=7
    )
    rng = np.random.default_rng(3)
    ours, state = Delay(plan), {}
    target = theirs = 3
    wish = 3
    for now in range(3000):
        if rng.random() < 0.15:
            wish = int(rng.integers(0, 12))
        target = ours(wish, target, float(now))
        theirs, state = _apply_delay_logic(wish, theirs, config, state, float(now))
        assert target == theirs, now


def one_machine(cores: float, **fields: object) -> Scenario:
    """Requests that take a second of a refiner thread and nothing else, on a machine's cores."""
    brief = replace(SECOND, slots=64, held=(64.0,), slot_s=(1e-6,), refine_s=EXPONENTIAL)
    return steady(brief, 1, 0.0, refined_share=1.0, cores=cores, **fields)


@pytest.mark.parametrize(("cores", "load"), [(1, 0.6), (2, 1.6), (4, 3.0)])
def test_threads_on_shared_cores_take_the_time_of_processor_sharing(
    cores: int, load: float
) -> None:
    # Evenly shared or one after the other, M/M/c has as many requests in it.
    outcome = Simulation(one_machine(cores, arrivals=Poisson(lambda _: load))).run()
    assert outcome.latency.mean() == pytest.approx(1 + erlang_wait(cores, load), rel=0.12)


def test_pools_on_one_machine_slow_each_other_down_and_on_their_own_do_not() -> None:
    even = replace(SECOND, work=(1.0, 1.0), refine_s=(1.0, 1.0), door_s=0.5)
    loop = ClosedLoop(4)
    apart = steady(even, 1, 0.0, arrivals=loop, refined_share=1.0, seconds=300.0, warmup_s=0.0)
    # The model's one thread takes a second of each.
    assert Simulation(apart).run().answered_per_s == pytest.approx(1.0, rel=0.05)
    # All of it takes 2.5 s of one core.
    together = Simulation(replace(apart, cores=1.0)).run()
    assert together.answered_per_s == pytest.approx(1 / 2.5, rel=0.05)
    assert together.latency.mean() == pytest.approx(4 * 2.5, rel=0.05)
    alone = Simulation(replace(apart, cores=1.0, arrivals=ClosedLoop(1))).run()
    assert alone.latency.mean() == pytest.approx(2.5)


def test_model_that_uses_two_cores_has_them_while_nobody_else_does() -> None:
    both = replace(SECOND, work=(1.0, 1.0), refine_s=(1.0, 1.0), model_cores=2.0)
    loop = steady(
        both, 1, 0.0, arrivals=ClosedLoop(1), refined_share=1.0, seconds=300.0, warmup_s=0.0
    )
    # A second of CPU in the model, on two cores, then one on the refiner's.
    assert Simulation(replace(loop, cores=2.0)).run().latency.mean() == pytest.approx(1.5)
    assert Simulation(replace(loop, cores=1.0)).run().latency.mean() == pytest.approx(2.0)
    full = Simulation(replace(loop, arrivals=ClosedLoop(8), cores=2.0)).run()
    assert full.answered_per_s == pytest.approx(1.0, rel=0.05)


def test_door_lets_so_many_through_at_once_as_it_has_processes() -> None:
    busy_door = replace(SECOND, slots=64, held=(64.0,), slot_s=(1e-6,), door_s=1.0)
    loop = steady(busy_door, 1, 0.0, arrivals=ClosedLoop(12), seconds=300.0, warmup_s=0.0)
    assert Simulation(replace(loop, cores=16.0)).run().answered_per_s == pytest.approx(
        DOOR_PROCESSES, rel=0.05
    )


def test_closed_loop_keeps_its_clients_and_counts_their_requests_once() -> None:
    scenario = steady(SECOND, 2, 0.0, arrivals=ClosedLoop(5), seconds=200.0, warmup_s=0.0)
    outcome = Simulation(scenario).run()
    # Nobody ever pauses: by Little's law as many requests as clients.
    assert outcome.answered_per_s * outcome.latency.mean() == pytest.approx(5, rel=0.05)


def test_recorded_and_paced_requests_come_when_they_came() -> None:
    rng = np.random.default_rng(0)
    assert Recorded((0.5, 1.5, 7.0)).times(5.0, rng) == [0.5, 1.5]
    assert Recorded((0.5, 1.5, 7.0)).rate(0.0) == pytest.approx(3 / 7)
    assert Paced(lambda _: 2.0).times(1.6, rng) == pytest.approx([0.0, 0.5, 1.0, 1.5])
    quick = replace(SECOND, work=(1.0, 1.0))
    apart = steady(quick, 1, 0.0, arrivals=Recorded((0.0, 10.0)), seconds=20.0, warmup_s=0.0)
    assert Simulation(apart).run().latency == pytest.approx([1.0, 1.0])
    near = replace(apart, arrivals=Recorded((0.0, 0.25)))
    assert Simulation(near).run().latency == pytest.approx([1.0, 1.75])
