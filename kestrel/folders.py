"""Where a command is to write, and a checkpoint to be read, looked at before the work."""

from __future__ import annotations

import os
from pathlib import Path


def unreadable(path: Path) -> str | None:
    """What keeps the checkpoint at ``path``, a file or a folder, from being read; None where
    nothing does."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return f"there is no checkpoint at {path}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    mode = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    return None if os.access(path, mode) else f"{path} is not yours to read"


def made_writable(folder: Path) -> str | None:
    """Make a folder where it is not there; what is wrong with it, None where it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    return None if os.access(folder, os.W_OK) else "is not yours to write"
