"""Assertions in the modules that tests share say what differed, like those of the tests."""

import pytest

pytest.register_assert_rewrite("engines", "scripted", "serving")
