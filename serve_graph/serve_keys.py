"""What Ray Serve would take in its config without a word: keys that it does not know, and scaling
policies with which an application never runs. And what it would refuse, once it is there."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_args

from kestrel.config import ConfigError
from kestrel.serve_config import applications_of, deployments_of
from serve_graph.errors import reason


def check_keys(config: dict[str, Any]) -> None:
    """ConfigError, which names key and place, for a key of a Serve config that Serve would ignore:
    with ``http_option`` the door would be where nobody asked for it. Likewise for a policy that
    its controller could not call."""
    from ray.serve.config import AutoscalingPolicy
    from ray.serve.schema import ServeDeploySchema

    # These are lists, or it is said here.
    applications = [(one, deployments_of(one)) for one in applications_of(config)]
    _known("", config, ServeDeploySchema)
    for i, (application, deployments) in enumerate(applications):
        # What comes with an environment of its own may be importable there alone.
        here = not application.get("runtime_env")
        policy = application.get("autoscaling_policy")
        if policy is not None:
            place = f"applications[{i}].autoscaling_policy"
            _known(f"{place}.", policy, AutoscalingPolicy)  # a plain dict in Serve's schema
            _check_policy(place, policy, here)
        for j, deployment in enumerate(deployments):
            scaling = deployment.get("autoscaling_config")
            if isinstance(scaling, dict) and "policy" in scaling:
                place = f"applications[{i}].deployments[{j}].autoscaling_config.policy"
                # Without a function it is Serve's default, which an application's cannot be.
                default = AutoscalingPolicy.model_fields["policy_function"].default
                _check_policy(place, scaling["policy"], here, default)


def check_values(config: dict[str, Any]) -> None:
    """ValueError for what Serve itself would refuse, in a config that ``check_keys`` has taken. By
    Serve's own schema, and as Serve is told it: in JSON."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    try:
        told = json.dumps(config)
    except (TypeError, ValueError) as error:
        # As a date is, which YAML has: 2026-11-30.
        raise ConfigError(f"a value or key is none of JSON, write it as text: {error}") from None
    config = json.loads(told)
    ServeDeploySchema.model_validate(config)
    # A plain dict in that schema, which Serve reads as it deploys.
    for i, application in enumerate(applications_of(config)):
        for j, deployment in enumerate(deployments_of(application)):
            scaling = deployment.get("autoscaling_config")
            if not isinstance(scaling, dict):
                continue
            if deployment.get("num_replicas") == "auto":
                scaling = {**AutoscalingConfig.default().model_dump(), **scaling}
            try:
                # Its policy is looked at by ``check_keys``.
                AutoscalingConfig(**{k: v for k, v in scaling.items() if k != "policy"})
            except ValueError as error:
                place = f"applications[{i}].deployments[{j}].autoscaling_config"
                raise ConfigError(f"{place}: {reason(error)}") from None


def _known(place: str, given: Any, schema: Any) -> None:
    # What is neither mapping nor list is refused where it is read.
    for key, value in given.items() if isinstance(given, dict) else ():
        if key not in schema.model_fields:
            known = ", ".join(sorted(schema.model_fields))
            raise ConfigError(f"unknown key {place}{key}; known keys are {known}")
        for part in _schemas(schema.model_fields[key].annotation):
            if isinstance(value, list):
                for i, one in enumerate(value):
                    _known(f"{place}{key}[{i}].", one, part)
            else:
                _known(f"{place}{key}.", value, part)


def _schemas(annotation: Any) -> list[Any]:
    """The schemas among the types of a field, those of a list's entries too."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [schema for part in get_args(annotation) for schema in _schemas(part)]


def _check_policy(place: str, policy: Any, here: bool, default: str | None = None) -> None:
    """ConfigError for a policy that is none, or, where it would be ``here``, cannot be imported or
    made."""
    from ray.serve.config import AutoscalingPolicy

    if not isinstance(policy, dict):
        raise ConfigError(f"{place} must be a mapping, not {policy!r}")
    path = policy.get("policy_function", default)
    if not isinstance(path, str):
        raise ConfigError(f"{place}.policy_function must be package.module:name, not {path!r}")
    kwargs = policy.get("policy_kwargs", {})
    if not isinstance(kwargs, dict):
        raise ConfigError(f"{place}.policy_kwargs must be a mapping, not {kwargs!r}")
    if not here:
        return
    try:
        found = AutoscalingPolicy(policy_function=path).get_policy()
    except Exception as error:
        raise ConfigError(
            f"{place}.policy_function cannot be imported: {path!r}: {error}"
        ) from None
    if not callable(found):
        raise ConfigError(f"{place}.policy_function must be a function or a class, not {path!r}")
    if inspect.isclass(found):  # to a function Serve gives none
        try:
            inspect.signature(found).bind(**kwargs)
        except TypeError as error:
            raise ConfigError(f"{place}.policy_kwargs do not fit {path!r}: {error}") from None
