"""Processes that serve for long keep what they no longer use."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from serving import served, until

from benchmarks.decode_memory import resident
from kestrel import freed_memory
from kestrel.config import RuntimeConfig
from kestrel.freed_memory import GivingBack, give_back, settle
from kestrel.server.http import create_app

MB = 2**20
BLOCK = 100_000
"""Bytes of an array that glibc takes from its heap and not from the kernel."""


def leave_gaps() -> list[np.ndarray]:
    """64 MB of small arrays of which every hundredth is still in use."""
    arrays = [np.ones(BLOCK, np.uint8) for _ in range(64 * MB // BLOCK)]
    kept = arrays[::100] + arrays[-1:]
    del arrays
    gc.collect()
    return kept


@pytest.mark.skipif(
    not freed_memory.available(), reason="the C library keeps nothing, or gives nothing back"
)
@pytest.mark.parametrize("by", ["hand", "itself"])
def test_what_was_freed_between_things_in_use_stays_resident(by: str) -> None:
    kept = leave_gaps()
    before = resident("VmRSS")
    if by == "hand":
        give_back()
        assert resident("VmRSS") < before - 40 * MB
    else:
        giving = GivingBack(every_s=0.05)
        until(lambda: resident("VmRSS") < before - 40 * MB, 20)
        giving.stop()
    assert all(array.all() for array in kept)


def giving() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == freed_memory.THREAD]


def test_a_server_gives_nothing_back_or_goes_on_after_its_end() -> None:
    before = giving()
    with served(create_app(RuntimeConfig(device="cpu", torch_threads=1))):
        (thread,) = set(giving()) - set(before)
        assert thread.daemon
        until(lambda: gc.get_freeze_count() > 0, 30)
    thread.join(10)
    assert not thread.is_alive()
    assert not gc.get_freeze_count()


class Node:
    """Refers to itself: freed by the garbage collector alone."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def unsettled() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("settled", [False, True])
def test_what_requests_leave_is_freed_once_in_a_while(unsettled: None, settled: bool) -> None:
    if settled:
        settle()
    gc.disable()  # which would come by itself, but late
    left = [weakref.ref(Node()) for _ in range(100)]
    giving = GivingBack(every_s=0.05)
    until(lambda: all(node() is None for node in left), 20)
    giving.stop()


def test_the_garbage_collector_does_not_look_at_what_is_there_for_good(unsettled: None) -> None:
    loaded = [[n] for n in range(100_000)]
    settle()
    assert gc.get_freeze_count() > len(loaded)
    assert len(gc.get_objects()) < 10_000


def test_what_was_replaced_is_freed_when_a_process_settles_anew(unsettled: None) -> None:
    network = Node()
    settle()
    seen = weakref.ref(network)
    del network
    gc.collect()
    assert seen() is not None
    settle()
    assert seen() is None
