"""``python -m serve_graph plan``: the smallest pools that carry a load, found by simulation."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from serve_graph.args import LookAhead
from serve_graph.arrivals import Poisson
from serve_graph.profile import SHIPPED, PlanError, Profile, find, require_writable
from serve_graph.simulation import Outcome, Simulation
from serve_graph.trial import Aim, Starts, scenario, trial

MOST_MODELS, MOST_REFINERS = 1_000, 20_000
"""The largest pools that a plan may have."""
FEWEST_REQUESTS = 300
"""Requests that a trial sees, or its p99 would be that of a few."""
LONGEST_S = 1e5
"""Simulated time of a trial at most, seconds: a load of less than three requests in a quarter of an
hour is planned from fewer of them."""
SETTLES_S = 60.0
"""How long a rise is simulated beyond its end and the start of a node and a refiner, seconds."""


@dataclass(frozen=True)
class Plan:
    """Pools that hold the aim, and the simulation that shows it."""

    profile: Profile
    models: int
    refiners: int
    threads: int
    """Of each refiner."""
    outcome: Outcome


def search(profile: Profile, aim: Aim, starts: Starts, threads: int) -> Plan:
    """The smallest model pool beside ample refiners, then the smallest refiner pool beside it.

    Neither is busier than ``aim.busiest``, however well a trial went: a queue may take longer to
    fill than a trial lasts. PlanError where no pool holds the aim: a request alone takes longer
    than ``p99_s``, or the pools would be larger than ``MOST_MODELS`` and ``MOST_REFINERS``.
    """
    tried: dict[tuple[int, int], Outcome] = {}

    def holds(models: int, refiners: int) -> bool:
        key = (models, refiners)
        if key not in tried:
            tried[key] = trial(profile, aim, starts, models, refiners, threads)
        return tried[key].percentile(99) <= aim.p99_s

    floor = max(1, math.ceil(aim.rps / (aim.busiest * profile.model_per_s)))
    refiner_rate = aim.rps * aim.refined_share
    few = max(1, math.ceil(refiner_rate / (aim.busiest * profile.refiner_per_s(threads))))
    # Ample also while those that are lost are away.
    ample = min(MOST_REFINERS, 2 * few + 8 + aim.lost_refiners)
    if floor > MOST_MODELS or few > MOST_REFINERS:
        raise PlanError(
            f"{aim.rps:g} requests/s need {floor} model replicas and {few} refiners that are "
            f"{aim.busiest:.0%} busy; the planner goes up to {MOST_MODELS} and {MOST_REFINERS}"
        )
    models = _smallest(floor, MOST_MODELS, lambda n: holds(n, ample))
    if models is None:
        best = tried[MOST_MODELS, ample].percentile(99)
        if math.isinf(best):
            raise PlanError(
                f"--rps {aim.rps:g}: no request came in the {aim.seconds:g} s that are simulated"
            )
        # Rounded up, or one that is just missed would be told as one that is reached.
        raise PlanError(
            f"p99 {aim.p99_s:g} s is not reached with {MOST_MODELS} model replicas and {ample} "
            f"refiners: {math.ceil(best * 1e3) / 1e3:.3f} s"
        )
    refiners = _smallest(few, ample, lambda n: holds(models, n))
    assert refiners is not None, "the ample pool held the aim"
    return Plan(profile, models, refiners, threads, tried[models, refiners])


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number in low..high that holds, larger ones holding too; None: not even high."""
    step, top = 1, low
    while not holds(top):
        if top >= high:
            return None
        low, top = top + 1, min(high, top + step)
        step *= 2
    while low < top:
        middle = (low + top) // 2
        if holds(middle):
            top = middle
        else:
            low = middle + 1
    return top


def queue_bound(most: int, timely: float) -> int:
    """A bound that the simulated queue of at most ``most`` stays well below; as long, too, as what
    is answered in the time that p99 allows, ``timely`` requests; at least 16."""
    return max(16, 2 ** math.ceil(math.log2(max(2 * most + 1, timely))))


def _offered(
    profile: Profile, aim: Aim, threads: int, models: int, refiners: int
) -> tuple[float, float]:
    """What the load is of what so many model replicas and refiners can do."""

    def part(load: float, most: float) -> float:
        return load / most if most > 0 else math.inf if load else 0.0

    return (
        part(aim.rps, max(0, models) * profile.model_per_s),
        part(aim.rps * aim.refined_share, max(0, refiners) * profile.refiner_per_s(threads)),
    )


def describe(plan: Plan, aim: Aim, starts: Starts, prices: tuple[float, float] | None) -> str:
    """The plan for people: pools, queue bounds, latency, cost, and what it rests on."""
    outcome, profile = plan.outcome, plan.profile
    timely = aim.rps * aim.p99_s
    model_bound = queue_bound(outcome.model_queue, timely)
    refiner_bound = queue_bound(outcome.refiner_queue, timely * aim.refined_share)
    measured = ", ".join(f"{key} {value}" for key, value in profile.measured.items())
    cpus = plan.refiners * max(1.0, profile.refiner_cpus)
    model_offered, refiner_offered = _offered(
        profile, aim, plan.threads, plan.models, plan.refiners
    )
    lines = [
        f"{aim.rps:g} requests/s, p99 {aim.p99_s:g} s, {aim.refined_share:.0%} refined; "
        f"profile {profile.name} ({measured})",
        f"  model pool    {plan.models:6} replicas   offered {model_offered:4.0%}   "
        f"slots held {outcome.model_busy:4.0%}   "
        f"model_pool: {{max_queued_requests: {model_bound}}}",
        f"  refiner pool  {plan.refiners:6} replicas   offered {refiner_offered:4.0%}   "
        f"busy       {outcome.refiner_busy:4.0%}   "
        f"refiner_pool: {{max_queued_requests: {refiner_bound}}}",
        f"  simulated     {outcome.answered_per_s:.1f} answers/s, "
        f"p50 {outcome.percentile(50):.3f} s, p99 {outcome.percentile(99):.3f} s, "
        f"longest queues {outcome.model_queue} and {outcome.refiner_queue}",
    ]
    if aim.loses:
        lines.append(
            f"  survives      {aim.lost_models} model and {aim.lost_refiners} refiner replicas "
            f"lost at once, back after {starts.model_s:g} and {starts.refiner_s:g} s"
        )
        nodes = starts.lost_nodes(profile, aim)
        if any(nodes):
            lines[-1] += (
                f", those of {nodes[0]} and {nodes[1]} whole nodes {starts.node_s:g} s later"
            )
        left = [
            f"{part:.0%}" if math.isfinite(part) else "(none left)"
            for part in _offered(
                profile,
                aim,
                plan.threads,
                plan.models - aim.lost_models,
                plan.refiners - aim.lost_refiners,
            )
        ]
        lines.append(
            f"  meanwhile     offered {left[0]} and {left[1]} of what the others can do; "
            "p50 and p99 are of that time and until what piled up is worked off"
        )
    if prices is None:
        lines.append(
            f"  costs         {plan.models} hours of model replicas and {cpus:g} CPU-hours of "
            "refiners per hour"
        )
    else:
        gpu, cpu = prices
        total = plan.models * gpu + cpus * cpu
        per_million = total / (aim.rps * 3600) * 1e6
        lines.append(
            f"  costs         {total:.2f} per hour, {per_million:.2f} per million requests"
        )
    return "\n".join(lines)


def scaled(
    plan: Plan, aim: Aim, starts: Starts, threads: int, lookahead: bool, rise_s: float
) -> Outcome:
    """The load rises from a tenth to all of it within ``rise_s`` and lasts until the pools can have
    settled. The model pool is there; the refiners scale from a tenth of theirs, and from the nodes
    that these fill."""
    base = scenario(plan.profile, aim, starts, plan.models, plan.refiners, threads)
    busy_s = 1 / plan.profile.refiner_per_s(threads)
    begins = aim.warmup_s
    risen_s = rise_s + starts.node_s + starts.refiner_s

    def rate(at: float) -> float:
        risen = 1.0 if rise_s == 0 else min(1.0, max(0.0, (at - begins) / rise_s))
        return aim.rps * (0.1 + 0.9 * (risen if at >= begins else 0.0))

    room = 2
    return Simulation(
        replace(
            base,
            arrivals=Poisson(rate),
            seconds=begins + max(aim.seconds, risen_s + SETTLES_S),
            warmup_s=begins,
            lost_at_s=math.inf,
            lost_models=0,
            lost_refiners=0,
            refiner=replace(
                base.refiner,
                replicas=max(1, plan.refiners // 10),
                max_replicas=min(MOST_REFINERS, room * plan.refiners),
                target_ongoing=0.75 * threads,
                lookahead=LookAhead(start_s=starts.refiner_s, busy_s=busy_s) if lookahead else None,
            ),
        )
    ).run()


def _require_matplotlib() -> None:
    """PlanError without it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlanError("--plot needs matplotlib: pip install matplotlib") from error


def draw_plot(path: Path, plan: Plan, outcomes: dict[str, Outcome]) -> None:
    """Load, replicas and queues over time as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(outcomes)), layout="constrained")
    for row, (name, outcome) in enumerate(outcomes.items(), 1):
        axes = figure.add_subplot(len(outcomes), 1, row)
        times, rate, models, refiners, model_queue, refiner_queue = zip(*outcome.trace, strict=True)
        axes.plot(times, rate, color="0.6", label="requests/s")
        axes.step(times, models, where="post", label="model replicas")
        axes.step(times, refiners, where="post", label="refiner replicas")
        axes.plot(times, model_queue, ":", label="wait for a model slot")
        axes.plot(times, refiner_queue, ":", label="wait for a refiner")
        axes.set_title(
            f"{name}: p50 {outcome.percentile(50):.2f} s, p99 {outcome.percentile(99):.2f} s",
            fontsize=10,
        )
        axes.set_xlabel("seconds")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, ncols=5, loc="upper left")
    figure.suptitle(f"profile {plan.profile.name}", fontsize=10)
    figure.savefig(path, dpi=120)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of ``python -m serve_graph plan``."""
    add = command.add_argument
    add("--gpu", required=True, metavar="NAME", help="measured profile by name, or its .json file")
    add("--profiles", type=Path, default=Path("profiles"), help="folder of measured profiles")
    add("--rps", type=float, help="requests per second to carry")
    add("--p99", type=float, help="seconds within which 99 of 100 answers must come")
    add("--refined-share", type=float, default=1.0, help="part of the requests that is refined")
    add("--refiner-threads", type=int, default=2, help="refiner_pool.threads")
    add("--seconds", type=float, default=60, help="simulated time of each trial, at least")
    add(
        "--busiest",
        type=float,
        default=0.8,
        help="largest part of what either pool can do that the load may be",
    )
    add("--model-start", type=float, default=60, help="assumed start of a model replica, seconds")
    add("--refiner-start", type=float, default=10, help="assumed start of a refiner, seconds")
    add("--node-start", type=float, default=180, help="assumed start of a node, seconds")
    add("--gpus-per-node", type=int, default=8)
    add("--cpus-per-node", type=int, default=64)
    add("--lose-models", type=int, default=0, help="replicas lost at once while the aim must hold")
    add("--lose-refiners", type=int, default=0)
    add("--gpu-price", type=float, help="per model replica and hour, in any currency")
    add("--cpu-price", type=float, help="per CPU and hour, in the same currency")
    add("--rise", type=float, default=0, help="seconds in which the compared load rises; 0: a step")
    add("--plot", type=Path, help="PNG of both autoscaling policies under the risen load")
    add("--seed", type=int, default=1)
    add("--measure", metavar="URL", help="measure the graph there and write the profile")
    add("--image", type=Path, help="picture for --measure; default: the shipped sample")
    add("--object", help="noun for --measure")
    add("--masks", action="store_true", help="ask for masks in --measure")
    add("--slots", type=int, help="for --measure: runtime.max_batch_size of the graph")
    add("--refiners", type=int, default=1, help="for --measure: refiner replicas that serve")
    add("--refiner-cpus", type=float, default=1.0, help="for --measure: refiner_pool.num_cpus")
    add("--level-seconds", type=float, default=10, help="for --measure: time of each level")
    add("--machine", help="for --measure: what is written down as the machine")
    add("--api-key", help="for --measure")


OVER_0 = ("rps", "p99", "seconds", "model_start", "refiner_start", "refiner_cpus", "level_seconds")
AT_LEAST_0 = (
    "seed",
    "node_start",
    "rise",
    "lose_models",
    "lose_refiners",
    "gpu_price",
    "cpu_price",
)
AT_LEAST_1 = ("refiner_threads", "gpus_per_node", "cpus_per_node", "slots", "refiners")


def _check_numbers(options: argparse.Namespace) -> None:
    for names, fits, rule in (
        (OVER_0, lambda value: value > 0, "over 0"),
        (AT_LEAST_0, lambda value: value >= 0, "at least 0"),
        (AT_LEAST_1, lambda value: value >= 1, "at least 1"),
    ):
        for name in names:
            value = getattr(options, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise PlanError(f"--{name.replace('_', '-')} must be {rule}, not {value:g}")


def run(options: argparse.Namespace) -> None:
    """Measure a profile, or make a plan and print it. PlanError names the option at fault."""
    _check_numbers(options)
    if options.measure:
        from serve_graph.measure import measure_to_file

        measure_to_file(options)
        return
    if options.rps is None or options.p99 is None:
        raise PlanError("plan needs --rps and --p99 (or --measure)")
    if not 0 <= options.refined_share <= 1:
        raise PlanError("--refined-share must be in 0..1")
    if not 0 < options.busiest <= 1:
        raise PlanError(f"--busiest must be over 0 and at most 1, not {options.busiest:g}")
    if (options.gpu_price is None) != (options.cpu_price is None):
        raise PlanError("--gpu-price and --cpu-price belong together")
    if options.plot:
        if options.plot.suffix.lower() != ".png":
            raise PlanError(f"--plot writes a PNG: {options.plot} must end in .png")
        require_writable(options.plot, "--plot")
        _require_matplotlib()
    profile = find(options.gpu, [options.profiles, SHIPPED])
    starts = Starts(
        options.model_start,
        options.refiner_start,
        options.node_start,
        options.gpus_per_node,
        options.cpus_per_node,
    )
    aim = Aim(
        rps=options.rps,
        p99_s=options.p99,
        seconds=max(options.seconds, min(LONGEST_S, FEWEST_REQUESTS / options.rps)),
        warmup_s=max(5.0, 3 * float(profile.slot_s[-1])),
        refined_share=options.refined_share,
        lost_models=options.lose_models,
        lost_refiners=options.lose_refiners,
        seed=options.seed,
        busiest=options.busiest,
    )
    began = time.perf_counter()
    plan = search(profile, aim, starts, options.refiner_threads)
    took = time.perf_counter() - began
    prices = None if options.gpu_price is None else (options.gpu_price, options.cpu_price)
    print(describe(plan, aim, starts, prices))
    print(f"  found in      {took:.1f} s")
    if options.plot:
        outcomes = {"steady load, pools of this size": plan.outcome}
        for name, ahead in (("Serve's default", False), ("look-ahead", True)):
            outcomes[f"load rises tenfold, {name} scales refiners"] = scaled(
                plan, aim, starts, options.refiner_threads, ahead, options.rise
            )
        draw_plot(options.plot, plan, outcomes)
        print(f"  plot          {options.plot}")
