"""Which Serve configs are not deployed: said before Ray starts, and before Serve has written what
they hold into its log."""

from __future__ import annotations

from typing import Any

from kestrel.config import ConfigError
from kestrel.serve_config import (
    applications_of,
    deployments_of,
    graph_of,
    http_address,
    is_graph,
    mapping_of,
)
from serve_graph.args import (
    POOLS,
    GraphArgs,
    IngressSettings,
    gpu_for,
    known_backends,
    model_settings,
    refiner_settings,
)
from serve_graph.errors import reason
from serve_graph.overrides import check_lookahead, overridden
from serve_graph.serve_keys import check_keys, check_values


def refusal(config: dict[str, Any]) -> str | None:
    """Why a Serve config is not served, in one line: Serve or the graph would not take it, or HTTP
    would not lead to the graph. None: it is."""
    try:
        check_keys(config)
        check(config)
        http_address(config)
        _check_door(config)
        prefix = graph_of(config).get("route_prefix", "/")
        _check_prefixes(config)
        # Last, as it knows less of what is meant than the graph.
        check_values(config)
    except ValueError as error:
        return reason(error)
    if not isinstance(prefix, str):
        return f"route_prefix must be a path, as / or /seg, not {prefix}"
    return None


def _check_door(config: dict[str, Any]) -> None:
    """ConfigError where no door or no replica would ever answer, or the door would take requests in
    the clear although the config has a certificate."""
    if config.get("proxy_location") == "Disabled":
        raise ConfigError("proxy_location: Disabled leaves no HTTP door; say HeadOnly or EveryNode")
    if config.get("target_capacity") == 0:
        raise ConfigError("target_capacity: 0 keeps no replica of any pool")
    options = mapping_of(config, "http_options")
    for key in ("ssl_keyfile", "ssl_certfile"):
        if options.get(key):
            raise ConfigError(
                f"http_options.{key}: HAProxy, the HTTP door, does not hear of it and takes "
                "requests in the clear; have a load balancer before it do TLS"
            )


def _check_prefixes(config: dict[str, Any]) -> None:
    """ConfigError for a prefix that Serve refuses as it deploys, or takes and then cannot say what
    runs any more."""
    for i, application in enumerate(applications_of(config)):
        prefix = application.get("route_prefix")
        if not isinstance(prefix, str) or prefix == "/":
            continue
        if not prefix.startswith("/") or prefix.endswith("/") or set(prefix) & set("{}"):
            raise ConfigError(
                f"applications[{i}].route_prefix must begin with / and not end with it, and have "
                f"no braces, as / or /seg, not {prefix!r}"
            )


def check(config: dict[str, Any]) -> None:
    """ValueError where the graph would refuse its part of a Serve config, or what Serve would make
    of its pools."""
    for i, application in enumerate(applications_of(config)):
        if not is_graph(application):
            continue
        args = GraphArgs.model_validate(mapping_of(application, "args"))
        named: dict[str, tuple[str, dict[str, Any]]] = {}
        for j, deployment in enumerate(deployments_of(application)):
            name, place = deployment["name"], f"applications[{i}].deployments[{j}]"
            if name not in POOLS:
                raise ConfigError(
                    f"{place}.name: there is no deployment {name!r}; the deployments are "
                    f"{', '.join(POOLS)}"
                )
            if name in named:
                raise ConfigError(f"{place}.name: {name!r} is there twice")
            named[name] = (place, deployment)
            _check_settings(overridden(args, deployment, place), deployment)
        check_lookahead(args, application, named)


def _check_settings(args: GraphArgs, deployment: dict[str, Any]) -> None:
    """ValueError for a ``user_config`` that its deployment would refuse."""
    name, settings = deployment["name"], mapping_of(deployment, "user_config")
    if name == "Ingress":
        IngressSettings.model_validate(settings)
    if name == "Model":
        model_settings(settings)
    if name == "Refiner":
        refiner = refiner_settings(args.refiner, settings)
        known_backends(refiner)
        gpu_for(refiner, args.refiner_pool)
