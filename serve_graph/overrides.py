"""What the ``deployments`` of a Serve config make of the graph's pools, by the graph's rules.

Serve puts them in the place of what the graph built from ``args``, and the graph never sees them.
"""

from __future__ import annotations

from typing import Any

from kestrel.config import ConfigError
from kestrel.serve_config import mapping_of
from serve_graph.args import POOLS, GraphArgs, LookAhead, Pool
from serve_graph.errors import reason

SAME = (
    "max_ongoing_requests",
    "max_queued_requests",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
    "max_replicas_per_node",
)
"""Options that a pool has under the same name."""
SCALING = (
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "upscale_delay_s",
    "downscale_delay_s",
    "metrics_interval_s",
    "look_back_period_s",
)
"""Those of Serve's ``autoscaling_config``."""
SERVE_SCALES = {"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 2}
"""Serve's own, where an ``autoscaling_config`` does not say; no key of the graph's stays."""
AUTO = {**SERVE_SCALES, "max_replicas": 100}
"""Serve's own for ``num_replicas: auto``, of a pool that does not scale."""
SERVE_RESERVES = {"num_cpus": 1, "num_gpus": 0, "resources": {}}
"""Serve's own, where ``ray_actor_options`` do not say; no key of the graph's stays."""
LOOKAHEAD_PATHS = ("serve_graph.autoscaling:Policy", "serve_graph.autoscaling.Policy")
"""How an application names the look-ahead policy."""
OPTIONS = (*SAME, "num_replicas", "autoscaling_config", "ray_actor_options")


def overridden(args: GraphArgs, deployment: dict[str, Any], place: str) -> GraphArgs:
    """``args`` with the pool that is left where a Serve config says ``deployment`` of it.

    ConfigError where the graph would not have taken that pool: it names the options at fault, which
    stand at ``place``.
    """
    name = deployment["name"]
    given = {key: deployment[key] for key in OPTIONS if key in deployment}
    try:
        return _with(args, name, given)
    except ValueError as error:
        # Those without which all is well; no single one is where two are wrong by themselves.
        blamed = [
            key for key in given if _fits(args, name, {k: given[k] for k in given if k != key})
        ]
        options = ", ".join(f"{place}.{key}" for key in blamed or given)
        raise ConfigError(f"{options}: {reason(error)}") from None


def _fits(args: GraphArgs, name: str, given: dict[str, Any]) -> bool:
    try:
        _with(args, name, given)
    except ValueError:
        return False
    return True


def _with(args: GraphArgs, name: str, given: dict[str, Any]) -> GraphArgs:
    """``args`` with these options in a deployment's pool; ValueError where they do not fit."""
    pool: Pool = getattr(args, POOLS[name])
    fields = {key: given[key] for key in SAME if key in given}
    fields |= _replicas(pool, given, pool.scales or (name == "Model" and args.refiner_pool.scales))
    if "ray_actor_options" in given:
        said = mapping_of(given, "ray_actor_options")
        said = {key: value for key, value in said.items() if value is not None}
        fields |= {key: said.get(key, default) for key, default in SERVE_RESERVES.items()}
    others = {key: getattr(args, key) for key in GraphArgs.model_fields}
    changed = GraphArgs.model_validate({**others, POOLS[name]: {**pool.model_dump(), **fields}})
    drain_s = changed.ingress_pool.graceful_shutdown_timeout_s
    asked = name == "Ingress" and "graceful_shutdown_timeout_s" in given
    if asked and drain_s < changed.ingress_drain_s:  # of args the graph takes the longer
        raise ConfigError(
            f"{drain_s:g} must be at least {changed.ingress_drain_s:g}, which is "
            "runtime.request_timeout_s + 5: an update would cut requests that still have time"
        )
    return changed


def _replicas(pool: Pool, given: dict[str, Any], scaled: bool) -> dict[str, Any]:
    """How many replicas Serve would run, as keys of a pool. ``scaled``: whether the graph gives it
    an ``autoscaling_config``."""
    count, scaling = given.get("num_replicas"), mapping_of(given, "autoscaling_config")
    aims = {key: scaling[key] for key in SCALING if key in scaling}
    if count == "auto":
        return {} if scaled and not scaling else {**AUTO, **aims}
    replaced = given.get("autoscaling_config") is not None
    if replaced or (scaled and "autoscaling_config" not in given):
        if count is not None:
            raise ConfigError(
                f"num_replicas ({count}) changes nothing where a pool scales; give min_replicas "
                "and max_replicas in autoscaling_config, or set that to null"
            )
        return {**SERVE_SCALES, **aims} if replaced else {}
    if count is None:
        count = 1 if scaled or "num_replicas" in given else pool.min_replicas
    return {"min_replicas": count, "max_replicas": count}


def check_lookahead(
    args: GraphArgs, application: dict[str, Any], deployments: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """ConfigError where an application names the look-ahead policy and its ``deployments``, by name
    with their places, would take from it what ``args`` give it, without a word."""
    policy = mapping_of(application, "autoscaling_policy").get("policy_function")
    refiner, model = (deployments.get(name, ("", {})) for name in ("Refiner", "Model"))
    watched = args.refiner_pool.scales
    if policy not in LOOKAHEAD_PATHS or not _scaled(watched, refiner[1]):
        return
    if not _scaled(watched or args.model_pool.scales, model[1]):
        place = f"{(model if watched else refiner)[0]}.autoscaling_config"
        raise ConfigError(
            f"{place}: the look-ahead policy would not see the model pool, which reports its load "
            "where it has an autoscaling_config; the graph gives it one where args.refiner_pool "
            "scales (max_replicas over min_replicas)"
        )
    place, scaling = refiner[0], mapping_of(refiner[1], "autoscaling_config")
    auto = refiner[1].get("num_replicas") == "auto"
    if watched and not scaling and (auto or "autoscaling_config" not in refiner[1]):
        return  # the graph's stays
    aims = mapping_of(scaling, "policy").get("policy_kwargs")
    if aims is not None:
        try:
            LookAhead.model_validate(aims)
        except ValueError as error:
            place = f"{place}.autoscaling_config.policy.policy_kwargs"
            raise ConfigError(f"{place}: {reason(error)}") from None
    elif args.refiner_pool.lookahead != LookAhead():
        raise ConfigError(
            f"{place}.autoscaling_config takes the place of the graph's, and drops "
            "refiner_pool.lookahead with it: give its keys as "
            "autoscaling_config.policy.policy_kwargs too, or give all of it as args.refiner_pool"
        )


def _scaled(by_args: bool, deployment: dict[str, Any]) -> bool:
    """Whether a pool has an ``autoscaling_config`` in the end."""
    if deployment.get("num_replicas") == "auto":
        return True
    return deployment.get("autoscaling_config", {} if by_args else None) is not None
