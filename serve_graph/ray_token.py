"""Ray's token: found or made before Ray starts, the refusal to start without one, and shown by a
program that connects."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_graph.errors import LaunchError

MODE = "RAY_AUTH_MODE"
"""Variable by which Ray knows whether it asks for a token, and shows one."""


def token_variables(
    environment: Mapping[str, str], private_dir: Path, *, without_token: bool = False
) -> dict[str, str]:
    """What to add to ``environment`` so that Ray asks for a token, and one exists.

    A token that the user has (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``)
    is used; else one is written where every Ray program of this user looks for it, or into
    ``private_dir`` when the home directory is read-only. LaunchError where ``RAY_AUTH_MODE`` turns
    the token off and ``without_token`` does not say that this is meant.
    """
    # As Ray reads it: in any case.
    mode = environment.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token":
        if not without_token:
            # A variable of some profile is no decision: replicas listen on every interface, and
            # whoever reaches one unasked has it unpickle what he sends, which runs it.
            raise LaunchError(
                f"RAY_AUTH_MODE={mode}: whoever reaches a port of this machine could run code on "
                "it. Unset it, or say that this is meant with --without-token "
                "(LocalCluster(without_token=True))"
            )
        return {"RAY_AUTH_MODE": mode}
    if environment.get("RAY_AUTH_TOKEN"):
        return {"RAY_AUTH_MODE": mode}
    given = environment.get("RAY_AUTH_TOKEN_PATH")
    if given:
        return {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": given}
    for path in (Path.home() / ".ray" / "auth_token", private_dir / "auth_token"):
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(secrets.token_hex(32))
            return {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(path)}
        except OSError:
            continue
    raise LaunchError(f"could not write a Ray token to {Path.home()} or {private_dir}")


def use_token() -> None:
    """Have this process show the token that it has to the cluster that it is about to connect to,
    unless ``RAY_AUTH_MODE`` says otherwise: Ray does so by itself only for a cluster that it has
    found, not for one whose address it is given.

    Raises ``ray.exceptions.AuthenticationError`` where ``RAY_AUTH_TOKEN_PATH`` leads nowhere.
    """
    if MODE in os.environ:
        return
    import ray._raylet

    compiled: Any = ray._raylet
    if not (hasattr(compiled, "AuthenticationTokenLoader") and hasattr(compiled, "Config")):
        return  # another release, for which the variable has to be set before it is imported
    if compiled.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ[MODE] = "token"
        # It has read the variable when it was imported.
        compiled.Config.initialize("")


def token(variables: Mapping[str, str]) -> str | None:
    """The token itself, for the dashboard's REST API; None when authentication is off."""
    environment = {**os.environ, **variables}
    if environment.get("RAY_AUTH_MODE") != "token":
        return None
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"]
    return Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
