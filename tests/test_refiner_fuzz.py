"""2,000 generated refine calls: nothing but a result or a ValueError.

The generator is that of ``benchmarks/fuzz_refiner.py``, which runs 100,000.
"""

from __future__ import annotations

import logging

import pytest

from benchmarks.fuzz_refiner import Tally, make_case
from kestrel.config import RefinerConfig
from kestrel.seg_refiner import SegmentRefiner

CASES = 2000


@pytest.fixture
def quiet():
    """Most cases end with a warning."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(900)
def test_a_call_gives_a_result_or_a_value_error(quiet):
    refiner = SegmentRefiner(RefinerConfig(min_agreement=0.0))
    tally = Tally()
    for number in range(CASES):
        tally.add(refiner, number)
    assert tally.failures == []
    # Every end that hostile input can have is reached, or the generator has gone blind.
    reached = {"refined", "no_path", "raster_failed", "empty_coarse", "trace_failed", "ValueError"}
    assert reached <= set(tally.outcomes)
    assert tally.outcomes["refined"] > CASES / 8


def test_a_case_is_made_from_its_number_alone():
    a, b = make_case(7), make_case(7)
    assert (a.path, a.bbox, a.refiner) == (b.path, b.bbox, b.refiner)
