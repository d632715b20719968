"""Measured service times of one deployment, from a JSON file: what the planner counts with.

``python -m serve_graph plan --measure URL`` writes one (``serve_graph.measure``).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.busy import at_full_speed
from kestrel.folders import made_writable

SHIPPED = Path(__file__).parent / "profiles"
LEVELS: tuple[str, ...] = ("held", "slot_s")
QUANTILES: tuple[str, ...] = ("work", "refine_s", "overhead_s")
"""Fields of a profile that are lists."""


class PlanError(ValueError):
    """The plan cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Profile:
    """One kind of model replica and one kind of refiner replica."""

    name: str
    measured: dict[str, Any]
    """Where it comes from: machine, model, picture, date. Shown with every plan."""
    slots: int
    """``max_batch_size`` of the replica that was measured."""
    held: tuple[float, ...]
    """Requests that it held on average, one entry per level of load, rising."""
    slot_s: tuple[float, ...]
    """Mean seconds of a request in the model at each of those levels."""
    work: tuple[float, ...]
    """Quantiles, evenly spaced, of a request's time in the model over the mean: longer answers."""
    refine_s: tuple[float, ...]
    """Quantiles of the seconds that one refinement takes alone on its replica."""
    refiner_cpus: float
    """CPUs of that replica; more refinements at once share them."""
    overhead_s: tuple[float, ...]
    """Quantiles of what is left of a request: HTTP, handle calls, encoding."""
    model_cores: float = 1.0
    """Cores that a model replica keeps busy while it works, where ``slot_s`` is CPU time: it
    encodes pictures beside its steps, and steps of a lone request take two."""
    door_s: float = 0.0
    """Seconds of CPU that client, HTTP door and ingress take of a request, where they were measured
    apart from ``overhead_s``, which is then what passes while nothing of it runs."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise PlanError(f"profile {self.name}: {problem}")

    def _problem(self) -> str | None:
        """The field that breaks its rule, and the rule."""
        if not isinstance(self.measured, dict):
            return "measured must be a mapping"
        if not isinstance(self.slots, int) or isinstance(self.slots, bool) or self.slots < 1:
            return f"slots must be an integer of at least 1, not {self.slots!r}"
        for key in ("refiner_cpus", "model_cores"):
            if not _over_0(value := getattr(self, key)):
                return f"{key} must be a number over 0, not {value!r}"
        if not _at_least_0(self.door_s):
            return f"door_s must be a number of at least 0, not {self.door_s!r}"
        for keys, fits, rule in (
            (LEVELS, _over_0, "over 0"),
            (QUANTILES, _at_least_0, "of at least 0"),
        ):
            for key in keys:
                values = getattr(self, key)
                if not isinstance(values, (list, tuple)) or not all(map(fits, values)):
                    return f"{key} must be a list of numbers {rule}"
                if not values:
                    return f"{key} is empty"
        for key in ("work", "refine_s"):
            if not any(getattr(self, key)):
                return f"{key} must not be 0 throughout"
        if len(self.held) != len(self.slot_s):
            return "held and slot_s must have as many entries"
        if any(after <= before for before, after in itertools.pairwise(self.held)):
            return "held must rise"
        return None

    def seconds(self, held: np.ndarray | float) -> np.ndarray:
        """Mean time in the model when a replica holds so many requests; beyond the measured levels
        the throughput stays that of the last."""
        held = np.asarray(held, float)
        known = np.interp(held, self.held, self.slot_s)
        return np.where(held > self.held[-1], known * held / self.held[-1], known)

    @property
    def model_per_s(self) -> float:
        """Requests per second of one model replica, at its best level."""
        return max(held / seconds for held, seconds in zip(self.held, self.slot_s, strict=True))

    def refiner_per_s(self, threads: int) -> float:
        """Refinements per second of one refiner replica with so many threads."""
        return at_full_speed(self.refiner_cpus, threads) / float(np.mean(self.refine_s))

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _at_least_0(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < math.inf


def _over_0(value: object) -> bool:
    return _at_least_0(value) and value != 0


def require_writable(path: Path, option: str) -> None:
    """PlanError, which names the option, where no file can be written there, its folder made where
    it is not there: said before minutes of measuring or simulation."""
    problem = made_writable(path.parent)
    if problem is not None and not path.exists():
        raise PlanError(f"{option}: {path.parent} {problem}")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise PlanError(f"{option}: {path} cannot be written")


def load(path: Path) -> Profile:
    """A profile from its file; PlanError where it does not fit."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise PlanError("it must be a mapping")
        tuples: dict[str, Any] = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        return Profile(**(fields | tuples))
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"{path} is not a profile: {error}") from error


def is_file(name: str) -> bool:
    """Whether ``--gpu`` is the path of a profile, whatever the folders of profiles are."""
    return name.endswith(".json")


def find(name: str, folders: Sequence[Path]) -> Profile:
    """The profile of that name (or file); PlanError that says how to measure one."""
    if is_file(name):
        return load(Path(name))
    known: list[str] = []
    for folder in folders:
        path = folder / f"{name}.json"
        if path.is_file():
            return load(path)
        known += sorted(file.stem for file in folder.glob("*.json"))
    raise PlanError(
        f"nothing was measured for {name!r} (known: {', '.join(known) or 'none'}). Deploy the "
        "graph with one model replica and one or more refiners on that machine, then run: "
        f"python -m serve_graph plan --measure http://127.0.0.1:8000 --refiners N --gpu {name}"
    )


def quantiles(values: Sequence[float] | np.ndarray, points: int = 101) -> tuple[float, ...]:
    """Evenly spaced quantiles of a sample, in order: all that the planner keeps of it."""
    return tuple(round(float(q), 6) for q in np.quantile(values, np.linspace(0, 1, points)))


def draw(rng: np.random.Generator, points: Sequence[float], size: int) -> np.ndarray:
    """Random values of the distribution with these evenly spaced quantiles."""
    return np.interp(rng.random(size), np.linspace(0, 1, len(points)), points)
