"""What a refiner replica reports of its refinements to the look-ahead policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from kestrel import busy
from kestrel.busy import Busy
from serve_graph.app import build
from serve_graph.args import GraphArgs


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(busy, "time", clock)
    return clock


def one_by_one(seen: Busy, clock: Clock, number: int, seconds: float) -> None:
    for _ in range(number):
        with seen.one():
            clock.now += seconds
        clock.now += 1.0  # nothing runs


def side_by_side(seen: Busy, clock: Clock, number: int, seconds: float) -> None:
    running = [seen.one() for _ in range(number)]
    for one in running:
        one.__enter__()
    clock.now += seconds
    for one in running:
        one.__exit__(None, None, None)


@pytest.mark.parametrize("load", [one_by_one, side_by_side])
def test_a_refinement_takes_its_part_of_a_replica_of_several_cpus_however_few_run(
    load: Callable[..., None], clock: Clock
) -> None:
    """At a light load four CPUs would seem as full as one, and a pool never shrink to what is
    needed: spread over more replicas, refinements are alone all the more."""
    seen = Busy(at_once=4)
    for _ in range(50):
        load(seen, clock, 4, 0.2)
    assert seen.mean_s == pytest.approx(0.05, rel=0.15)


def test_refinements_that_share_one_cpu_take_as_long_as_one_after_the_other(clock: Clock) -> None:
    apart, shared = Busy(), Busy()
    for _ in range(50):
        one_by_one(apart, clock, 2, 0.1)
        side_by_side(shared, clock, 2, 0.2)
    assert apart.mean_s == pytest.approx(0.1)
    assert shared.mean_s == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("num_cpus", "threads", "at_once"), [(1, 2, 1), (0, 2, 1), (4, 4, 4), (8, 2, 2), (2.5, 4, 2.5)]
)
def test_a_refiner_knows_how_many_refinements_it_runs_at_full_speed(
    num_cpus: float, threads: int, at_once: float
) -> None:
    args = GraphArgs(refiner_pool={"num_cpus": num_cpus, "threads": threads})
    ingress: Any = build(args)._bound_deployment
    (refiner,) = (
        bound._bound_deployment
        for bound in ingress.init_args
        if hasattr(bound, "_bound_deployment") and bound._bound_deployment.name == "Refiner"
    )
    assert refiner.init_args[-1] == at_once
