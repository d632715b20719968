"""2,000 generated refine calls: nothing but a result or a ValueError.

The generator is that of ``benchmarks/fuzz_refiner.py``, which runs 100,000.
"""

from __future__ import annotations

import logging
import re
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from serving import until

from benchmarks.fuzz_refiner import Tally, make_case, make_refiner, run_child
from kestrel.config import RefinerConfig
from kestrel.seg_refiner import raster, trace
from kestrel.svg import parse_path

CASES = 2000


@pytest.fixture
def quiet():
    """Most cases end with a warning."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(900)
def test_a_call_gives_a_result_or_a_value_error(quiet):
    refiner = make_refiner()
    tally = Tally()
    for number in range(CASES):
        tally.add(refiner, number)
    assert tally.failures == []
    # Every end that hostile input can have is reached, or the generator has gone blind.
    reached = {"refined", "no_path", "raster_failed", "empty_coarse", "trace_failed", "ValueError"}
    assert reached <= set(tally.outcomes)
    assert tally.outcomes["refined"] > CASES / 8


def test_a_path_that_would_be_longer_than_paths_may_be_is_shortened(quiet):
    # The grainy picture of this case gave one of 66,587 characters.
    refiner, case = make_refiner(), make_case(22287)
    result = refiner.refine_with_bitmaps(case.image, case.path, case.bbox, refiner=case.refiner)
    path = result.refined_svg_path
    assert path is not None and len(path) > refiner.limits.max_path_chars / 5
    assert parse_path(path, refiner.limits).commands


def test_a_case_is_made_from_its_number_alone():
    a, b = make_case(7), make_case(7)
    assert (a.path, a.bbox, a.refiner) == (b.path, b.bbox, b.refiner)


def children() -> list[int]:
    said = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for pid in " ".join(said).split()]


def test_the_case_at_which_a_process_dies_is_named():
    running, told = children(), list[str]()
    batch = threading.Thread(target=lambda: told.append(run_child(1000, 100_000)[2]))
    batch.start()
    until(lambda: set(children()) - set(running))
    (child,) = set(children()) - set(running)
    # Of which it is ready to begin within one; the kernel then ends it, wherever it is.
    resource.prlimit(child, resource.RLIMIT_CPU, (4, 4))
    batch.join()
    named = re.match(r"case (\d+): exit status -\d+: ", told[0])
    assert named is not None and int(named[1]) > 1000, told[0]
    assert told[0].endswith(named[1])


def test_cases_ask_for_the_default_refiner_and_reach_every_size_that_is_taken_in_pieces():
    asked, sides = set(), []
    for number in range(CASES):
        case = make_case(number)
        asked.add(case.refiner)
        if isinstance(case.image, np.ndarray) and case.image.ndim == 3:
            sides.append(case.image.shape[:2])
    assert RefinerConfig().refiner in asked
    past = [side for side in sides if max(side) > raster.TILE]
    assert len(past) > 5 and {side[0] > side[1] for side in past} == {True, False}
    assert any(min(side) > 256 and max(side) >= trace.HALVED_FROM for side in sides)
