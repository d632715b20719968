"""What stops a start."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """Ray or the application did not come up, or must not; where Ray ran, the message ends with
    the log's last lines."""
