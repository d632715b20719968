"""Assertions in the modules that tests share say what differed, like those of the tests."""

import os

import pytest

pytest.register_assert_rewrite("engines", "scripted", "serving")

# Set before torch is loaded. Threads of its that wait for each other else do so in a loop: where
# tests with a cluster, or anything, take the cores, that multiplies the time of large products.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
