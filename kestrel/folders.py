"""Folders that a command is to write into, looked at before its work."""

from __future__ import annotations

import os
from pathlib import Path


def made_writable(folder: Path) -> str | None:
    """Make a folder where it is not there; what is wrong with it, None where it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    return None if os.access(folder, os.W_OK) else "is not yours to write"
