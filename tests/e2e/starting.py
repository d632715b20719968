"""What Ray runs before it starts its processes (RAY_START_HOOK), and an application beside the
graph."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ray import serve

HOOK = "tests.e2e.starting.wait"
FOLDER = "TESTS_STARTING"
"""Variable with the folder through which ``wait`` is told when to go on."""
OTHER = {"name": "other", "route_prefix": "/other", "import_path": "tests.e2e.starting:other"}


def wait(*_: Any) -> None:
    """Say that Ray starts (a file ``started``), and wait for a file ``go``."""
    folder = Path(os.environ[FOLDER])
    (folder / "started").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self) -> str:
        return "other"


other = Other.bind()  # type: ignore[attr-defined]
