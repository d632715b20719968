"""What the project's own files say: where they are, and which releases the constraints pin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(python: str = "3.11") -> dict[str, str]:
    """Release of each package that the constraints give for a Python version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    asked = [Requirement(line) for line in lines if not line.startswith("#")]
    wanted = [r for r in asked if not r.marker or r.marker.evaluate({"python_version": python})]
    found = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in wanted}
    assert len(found) == len(wanted), "a package is pinned twice"
    return found
