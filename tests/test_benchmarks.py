"""Every benchmark and tool begins: what it sets up when it is loaded is still valid."""

import os
import subprocess
import sys

import pytest
from project import ROOT

SCRIPTS = sorted(
    file
    for folder in ("benchmarks", "tools")
    for file in (ROOT / folder).glob("*.py")
    if "argparse.ArgumentParser" in file.read_text()
)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 15


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_a_script_tells_its_options(script) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
