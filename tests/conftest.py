"""What holds for all tests: assertions in the modules that they share say what differed, and those
with a cluster run one after the other, in one of the processes that ``make test`` starts."""

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("engines", "scripted", "serving")

CLUSTERS = Path(__file__).with_name("e2e")
YIELDING = 10
"""Niceness of the tests beside those with a cluster, which wait for what takes seconds anyway."""


def _has_cluster(item: pytest.Item) -> bool:
    return CLUSTERS in item.path.parents


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _has_cluster(item):
            item.add_marker(pytest.mark.xdist_group("cluster"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # The largest group comes first, so that its process never was a yielding one.
    if "PYTEST_XDIST_WORKER" in os.environ and not _has_cluster(item):
        os.setpriority(os.PRIO_PROCESS, 0, YIELDING)
