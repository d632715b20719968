"""Every benchmark and tool begins: what it sets up when it is loaded is still valid."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from project import ROOT
from serving import until

from benchmarks import chaos, graph
from serve_graph.environment import KEEP_MEMORY
from serve_graph.node import RayNode

# The first test waits for all of them.
pytestmark = pytest.mark.timeout(600)

SCRIPTS = sorted(
    file
    for folder in ("benchmarks", "tools")
    for file in (ROOT / folder).glob("*.py")
    if "argparse.ArgumentParser" in file.read_text()
)
# What most of them load takes seconds, so it is loaded once: each script then runs in a fork, and
# finds these there.
ALL = """
import contextlib
import os
import runpy
import sys
from pathlib import Path

import aiohttp
import cv2
import httpx
import numba
import numpy
import PIL.Image
import pydantic
import safetensors.torch
import tokenizers
import torch

import kestrel.engine
import kestrel.seg_refiner.refiner

with contextlib.suppress(ImportError):
    import ray.serve

    import serve_graph.app
    import serve_graph.launch

for script in map(Path, sys.argv[2:]):
    told = os.open(Path(sys.argv[1], f"{script.parent.name}.{script.stem}"), os.O_CREAT | os.O_RDWR)
    child = os.fork()
    if child == 0:
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.argv = [str(script), "--help"]
        sys.path[0] = str(script.parent)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)  # taking down what was loaded takes long
        sys.exit("it did not end with its options")
    _, status = os.waitpid(child, 0)
    os.write(told, f"\\nended with {os.waitstatus_to_exitcode(status)}".encode())
    os.close(told)
"""


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 15


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each script said to ``--help``, and how it ended."""
    folder = tmp_path_factory.mktemp("told")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", ALL, folder, *SCRIPTS], cwd=ROOT, env=environment, check=True
    )
    return folder


@pytest.mark.parametrize("script", [f"{file.parent.name}.{file.stem}" for file in SCRIPTS])
def test_a_script_tells_its_options(script: str, told: Path) -> None:
    said = (told / script).read_text()
    assert "usage:" in said and said.endswith("ended with 0"), said


def test_servers_that_are_compared_come_after_one_neighbour_and_after_another() -> None:
    systems = [graph.System(name, lambda number, masks: None) for name in graph.NAMES]
    rounds = [graph.in_turn(systems, number) for number in range(4)]
    asked = [system.name for each in rounds for _ in graph.LOADS for system in each]
    for name in graph.NAMES:
        before = [one for one, other in itertools.pairwise(asked) if other == name]
        assert max(map(before.count, before)) < 0.6 * len(before)


def test_a_server_that_answered_nothing_in_a_round_is_no_measure_of_another() -> None:
    told = {"p50_ms": 50.0, "cpu_ms": 90.0, "failed": 0}
    rates = {graph.FAST: (18.0, 18.0), graph.LITSERVE: (0.0, 0.0), graph.BENTOML: (12.0, 12.0)}
    ratios = graph.Ratios(
        {
            name: {
                "problem": "",
                "rounds": {
                    load: [{**told, "requests_per_s": rate} for rate in each]
                    for load in graph.LOADS
                },
            }
            for name, each in rates.items()
        }
    )
    holds = {name: judged["holds"] for name, judged in graph.verdicts(ratios).items()}
    assert {held for name, held in holds.items() if "LitServe" in name} == {None}
    assert {held for name, held in holds.items() if "BentoML" in name} == {True}


def test_servers_none_of_which_came_up_are_told_of(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.graph", "--only", graph.LITSERVE, graph.BENTOML]
    environment = os.environ | KEEP_MEMORY
    done = subprocess.run(
        [*command, "--logs", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not measured: no environment") == 2 * len(graph.LOADS)


REPLICA = """
import subprocess, sys
title = "ray::ServeReplica:segment:Refiner"
subprocess.run([title, "-c", "import time; time.sleep(60)"], executable=sys.executable)
"""


def test_replicas_that_chaos_stopped_are_killed_and_nobody_who_has_a_number_of_theirs(
    tmp_path: Path,
) -> None:
    node = RayNode(["-c", REPLICA], dict(os.environ), tmp_path / "log")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        cluster: Any = SimpleNamespace(head=node, nodes=[])
        bench = chaos.Bench(cluster, {}, [], stopped=[other.pid])
        until(lambda: bench.pids(f"{chaos.REPLICA}Refiner"))
        (replica,) = bench.pids(f"{chaos.REPLICA}Refiner")
        assert bench.refiner_hangs() == f"pid {replica}"
        bench.kill_stopped()
        until(lambda: replica not in node.pids())
        assert other.poll() is None
    finally:
        node.kill()
        other.kill()
        other.wait()
