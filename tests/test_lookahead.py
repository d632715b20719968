"""The look-ahead policy on made-up traces: when it grows, when it holds still, when it shrinks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from serve_graph.args import LookAhead
from serve_graph.lookahead import ModelLoad, RefinerLoad, Starting, decide, due_per_s

AIMS = LookAhead(start_s=10, drain_s=5, busy_target=0.7, busy_s=0.2)
IDLE = ModelLoad(waiting=0, running=0, slots=16, seconds=2.0, left_s=2.0)
STEADY = replace(IDLE, running=8, left_s=1.0)
"""Eight requests of two seconds each, as many old as new: four leave per second."""


def refiners(replicas: int, requests: float = 0, **fields: float) -> RefinerLoad:
    return RefinerLoad(
        requests, replicas, int(fields.get("target", replicas)), fields.get("busy_s", 0.2)
    )


def test_rate_of_a_steady_batch_is_littles_law_however_far_it_looks() -> None:
    for within_s in (0.5, 2.0, 10.0, 60.0):
        assert due_per_s(STEADY, within_s) == pytest.approx(4.0)


def test_requests_that_wait_count_up_to_the_slots_that_serve_them() -> None:
    full = replace(STEADY, running=16, waiting=0)
    assert due_per_s(replace(full, waiting=500), 10) == due_per_s(full, 10) == pytest.approx(8.0)
    # Slots are free, so those that wait are about to get one.
    assert due_per_s(replace(STEADY, waiting=4), 10) == pytest.approx(6.0)


def test_requests_that_need_no_refiner_are_not_counted() -> None:
    assert due_per_s(replace(STEADY, share=0.25), 10) == pytest.approx(1.0)
    assert due_per_s(IDLE, 10) == 0


def test_long_decodes_that_just_began_are_not_due_yet() -> None:
    began = ModelLoad(waiting=0, running=16, slots=16, seconds=60, left_s=60)
    middle = replace(began, left_s=30)
    assert due_per_s(began, 5) < due_per_s(middle, 5) == pytest.approx(16 / 60)


def test_steady_load_gets_the_replicas_that_keep_them_as_busy_as_aimed() -> None:
    decision = decide([STEADY] * 10, refiners(1), AIMS)
    # 40 a second, 0.2 s each: 8 busy replicas, at 70 % of their time.
    assert decision.due_per_s == pytest.approx(40)
    assert decision.wanted >= math.ceil(8 / 0.7)
    settled = decide([STEADY] * 10, refiners(12, requests=8), AIMS)
    assert (settled.wanted, settled.reason) == (12, "keep")


def test_it_grows_before_the_first_request_reaches_a_refiner() -> None:
    burst = replace(IDLE, running=16, waiting=40)
    decision = decide([burst], refiners(1, requests=0), AIMS)
    assert decision.wanted > 1
    assert decision.queue == 0 and decision.queue_ahead > 0
    assert decision.reason == "grow: a queue ahead"


def test_queue_without_new_work_still_gets_replicas() -> None:
    decision = decide([IDLE], refiners(2, requests=400), AIMS)
    # What is left of 398 after 10 s of two replicas, 0.2 s each, in 5 s.
    assert decision.wanted == math.ceil((398 - 100) * 0.2 / 5)


def test_a_rounding_error_costs_no_replica() -> None:
    # 10.5 a second, 0.2 s each, at 70 % of their time: three replicas, and a last bit.
    decision = decide([replace(STEADY, running=7)] * 3, refiners(3), AIMS)
    assert decision.due_per_s * 0.2 / 0.7 > 3
    assert (decision.wanted, decision.reason) == (3, "keep")


def test_border_load_does_not_swing() -> None:
    sizes = []
    target = 6
    for step in range(200):
        running = 8 + 0.6 * math.sin(step)
        load = replace(STEADY, running=running)
        target = decide([load] * 5, refiners(target, requests=4), AIMS).wanted
        sizes.append(target)
    assert len(set(sizes[20:])) == 1


def test_idle_pool_shrinks_to_nothing_and_the_first_request_in_decode_wakes_it() -> None:
    assert decide([IDLE], refiners(5), AIMS).wanted == 0
    assert decide([replace(IDLE, running=1)], refiners(0), AIMS).wanted >= 1


def test_replicas_that_are_starting_are_not_asked_for_again() -> None:
    load = [replace(STEADY, running=16)] * 4
    first = decide(load, refiners(2), AIMS).wanted
    again = decide(load, refiners(2, target=first), AIMS)
    assert again.wanted == first and again.reason == "keep"


def test_a_replica_that_starts_is_worth_the_time_that_it_will_have_served() -> None:
    starting = Starting()
    assert starting(2, 2, now=1.0, start_s=10) == 0
    # Four were asked for at that look, two more at the next.
    assert starting(2, 6, now=5.0, start_s=10) == pytest.approx(4 * 0.4)
    assert starting(2, 8, now=6.0, start_s=10) == pytest.approx(4 * 0.5 + 2 * 0.1)
    # Three of the first serve, one of the last is called off.
    assert starting(5, 7, now=9.0, start_s=10) == pytest.approx(0.8 + 0.4)
    # Overdue, a replica counts in full and not more.
    assert starting(5, 7, now=99.0, start_s=10) == pytest.approx(2.0)
    assert starting(7, 7, now=99.0, start_s=10) == starting(7, 5, now=99.0, start_s=10) == 0
    # One that died was asked for after the last look.
    assert starting(4, 5, now=100.0, start_s=10) == pytest.approx(0.1)


def test_a_step_of_load_is_asked_for_once_while_replicas_start() -> None:
    load = [replace(STEADY, running=16)] * 6
    wanted, start, queue = [], Starting(), 0.0
    target = 2
    for second in range(10):
        starting = start(2, target, float(second), AIMS.start_s)
        pool = RefinerLoad(queue + 2, 2, target, 0.2, starting)
        target = decide(load, pool, AIMS).wanted
        wanted.append(target)
        # What two replicas leave of 48 a second.
        queue += 48 - 2 / 0.2
    # The first decision foresaw the queue that is there in the end; nobody is called off meanwhile.
    assert wanted == [wanted[0]] * 10


def test_decision_tells_everything_it_came_from() -> None:
    text = str(decide([STEADY], refiners(1, requests=3), AIMS))
    inputs = ("due_per_s=4", "queue=2", "model_running=8", "target=1", "starting=0", "busy_s=0.2")
    for part in ("wanted=", *inputs):
        assert part in text


@pytest.mark.parametrize("left_s", [0.0, 1e-12])
def test_overdue_requests_count_in_full(left_s: float) -> None:
    assert due_per_s(replace(STEADY, left_s=left_s), 10) == pytest.approx(4.0)
