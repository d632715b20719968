"""Threads that compute hold up those that answer requests."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from kestrel import InferenceEngine
from kestrel.config import Limits, RefinerConfig
from kestrel.cores import BEHIND, give_way
from kestrel.refining import RefineThreads

pytest_plugins = ["engines"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="niceness is a process's")


def niceness(thread_id: int | None = None) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread_id or threading.get_native_id())


def behind() -> int:
    return min(19, niceness(os.getpid()) + BEHIND)


def test_a_thread_gives_way_to_none_or_its_whole_process_does() -> None:
    before, found = niceness(), list[int]()

    def work() -> None:
        for _ in range(2):
            give_way()
            found.append(niceness())
        further = threading.Thread(target=lambda: found.append(niceness()))
        further.start()
        further.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [behind()] * 3
    assert niceness() == before


def test_a_refinement_holds_up_requests() -> None:
    threads = RefineThreads(1, 30.0)
    assert threads.submit(niceness).result(30) == behind()
    threads.close(30.0)


def test_steps_of_the_model_hold_up_requests(engine: InferenceEngine) -> None:
    assert niceness(engine._scheduler._thread.native_id) == behind()


def test_a_replica_s_refinement_holds_up_its_requests() -> None:
    pytest.importorskip("ray.serve")
    from serve_graph.refiner import RefinerDeployment

    refiner = RefinerDeployment(RefinerConfig(refiner="none"), Limits(), 1, 30.0)
    assert refiner._threads.submit(niceness).result(30) == behind()
    assert niceness() == niceness(os.getpid())
