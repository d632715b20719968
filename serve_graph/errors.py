"""What stops a start, and how it is said."""

from __future__ import annotations

from pydantic import ValidationError


class LaunchError(RuntimeError):
    """Ray or the application did not come up, or must not; where Ray ran, the message ends with
    the log's last lines."""


def reason(error: ValueError) -> str:
    """What is wrong with which key, in one line, without pydantic's names and addresses."""
    if not isinstance(error, ValidationError):
        return str(error)
    reasons = []
    for found in error.errors(include_url=False, include_input=False):
        key = ".".join(map(str, found["loc"]))
        said = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            said = "unknown key"
        reasons.append(said if not key or said.startswith(key) else f"{key}: {said}")
    return "; ".join(reasons)
