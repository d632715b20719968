"""The keys that Ray Serve knows in its config: it takes others without a word."""

from __future__ import annotations

from typing import Any

from kestrel.config import ConfigError
from kestrel.serve_config import applications_of, deployments_of


def check_keys(config: dict[str, Any]) -> None:
    """ConfigError, which names key and place, for a key of a Serve config that Serve would ignore:
    with ``http_option`` the door would be where nobody asked for it."""
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

    _known("", config, ServeDeploySchema)
    _known("http_options.", config.get("http_options"), HTTPOptionsSchema)
    for i, application in enumerate(applications_of(config)):
        _known(f"applications[{i}].", application, ServeApplicationSchema)
        for j, deployment in enumerate(deployments_of(application)):
            _known(f"applications[{i}].deployments[{j}].", deployment, DeploymentSchema)


def _known(place: str, given: Any, schema: Any) -> None:
    # What is no mapping is refused where it is read.
    for key in given if isinstance(given, dict) else ():
        if key not in schema.model_fields:
            known = ", ".join(sorted(schema.model_fields))
            raise ConfigError(f"unknown key {place}{key}; known keys are {known}")
