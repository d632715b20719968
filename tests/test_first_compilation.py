"""A process that compiles for seconds in silence, or says that it does where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys
from kestrel.cli import main
from kestrel.ops.jit import compiled

def twice(x):
    return 2 * x

def thrice(x):
    return 3 * x

main(["segment", "no-such-picture.jpg", "dog", "-o", "nowhere"])
print(compiled("int64(int64)", twice)(21) + compiled("int64(int64)", thrice)(7))
"""


def test_compiling_goes_on_in_silence_or_what_was_kept_is_compiled_again(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[1]
    variables = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "kept"),
        "PYTHONPATH": str(root),
    }
    first, second = (
        subprocess.run(
            [sys.executable, str(program)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=200,
        )
        for _ in range(2)
    )
    assert first.stdout == second.stdout == "63\n", first.stderr
    assert first.stderr.count("kestrel: compiling for this processor") == 1
    assert "compiling" not in second.stderr
