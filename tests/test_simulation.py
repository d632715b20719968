"""The planner's simulation against what queueing theory knows, and against Serve's own rules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from serve_graph.args import LookAhead
from serve_graph.profile import Profile
from serve_graph.simulation import Delay, PoolPlan, Scenario, Simulation

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
        rate=lambda _: rate,
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


def test_every_request_is_answered_or_refused() -> None:
    bounded = steady(SECOND, 2, 6.0, seconds=300.0, warmup_s=0.0)
    bounded = replace(bounded, model=replace(bounded.model, max_queued=5))
    outcome = Simulation(bounded).run()
    assert len(outcome.latency) + outcome.refused == outcome.arrived
    assert outcome.refused > outcome.arrived / 2
    assert outcome.model_queue == 5
    assert outcome.percentile(99) < 15


def test_requests_of_replicas_that_die_run_again() -> None:
    scenario = steady(SECOND, 8, 6.0, seconds=300.0, warmup_s=0.0, refined_share=1.0)
    calm = Simulation(scenario).run()
    lost = Simulation(replace(scenario, lost_at_s=150.0, lost_models=6, lost_refiners=150)).run()
    assert len(calm.latency) == len(lost.latency) == lost.arrived
    assert lost.percentile(99) > calm.percentile(99)
    # Back to size after the start: 8 replicas again at the end.
    assert lost.trace[-1][2] == 8


def test_refiners_that_are_too_few_are_where_requests_wait() -> None:
    scenario = steady(SECOND, 20, 10.0, seconds=60.0, warmup_s=0.0, refined_share=1.0)
    few = replace(scenario, refiner=PoolPlan(1, max_ongoing=1))
    outcome = Simulation(replace(few, rate=lambda _: 12.0)).run()
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
        rate=lambda at: 20.0 if at > 60 else 3.0,
        seconds=180,
        warmup_s=60,
    )
    return scenario


def test_looking_ahead_is_ready_sooner_than_looking_at_the_queue() -> None:
    behind = Simulation(rising(None)).run()
    ahead = Simulation(rising(LookAhead(start_s=10, busy_s=0.5))).run()
    assert ahead.percentile(99) < behind.percentile(99)
    assert ahead.refiner_queue < behind.refiner_queue
    assert ahead.refiners_at_most <= 40


def test_nodes_that_must_start_first_are_waited_for() -> None:
    aims = LookAhead(start_s=10, busy_s=0.5)
    there = Simulation(rising(aims, per_node=4, nodes=10)).run()
    away = Simulation(rising(aims, per_node=4, nodes=1, node_start_s=40)).run()
    assert away.percentile(99) > there.percentile(99) + 5


def test_pool_shrinks_when_the_load_is_gone_and_finishes_what_it_has() -> None:
    scenario = rising(LookAhead(start_s=10, busy_s=0.5), downscale_delay_s=10)
    gone = replace(scenario, rate=lambda at: 20.0 if at < 60 else 0.5, warmup_s=0.0)
    outcome = Simulation(gone).run()
    assert outcome.refiners_at_most > 8 and outcome.trace[-1][3] <= 4
    assert len(outcome.latency) == outcome.arrived


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
