"""What a Serve config says of the graph: which application it is, where HTTP is listened to."""

from __future__ import annotations

import string
from typing import Any

from kestrel.config import ConfigError
from kestrel.ports import is_port

IMPORT_PATHS = ("serve_graph.app:build", "serve_graph.app.build")
"""How a Serve config names the graph."""
LONGEST_HOST = 253
"""Bytes of a host's name."""
NOT_IN_HOSTS = frozenset(string.whitespace + "\0")
HTTP = ("127.0.0.1", 8000)
"""Where a server of this project listens unless it is told otherwise."""
SERVE_HOST = "0.0.0.0"
"""Where Serve listens, by a config without a host: every interface."""


def is_graph(application: dict[str, Any]) -> bool:
    """Whether an application is named as the graph itself, not something built around it."""
    return application.get("import_path") in IMPORT_PATHS


def applications_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Its applications; ConfigError where they are not a list of mappings."""
    return _mappings(config.get("applications"), "applications")


def deployments_of(application: dict[str, Any]) -> list[dict[str, Any]]:
    """What an application says of its deployments; ConfigError as above, or where one that has no
    name could not be told from the others."""
    found = _mappings(application.get("deployments"), "deployments")
    for i, deployment in enumerate(found):
        name = deployment.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"deployments[{i}].name must be a non-empty string, not {name!r}")
    return found


def _mappings(value: Any, key: str) -> list[dict[str, Any]]:
    # A key without a value is null in YAML.
    found: Any = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{key} must be a list of mappings, not {value!r}")
    return found


def mapping_of(part: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands under ``key``, nothing for null. The value of another type is not shown, as it
    may hold API keys."""
    value = part.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a mapping")
    return value


def graph_of(config: dict[str, Any]) -> dict[str, Any]:
    """The application that is the graph, or the only one, which may be built around it; ConfigError
    where none or several are."""
    applications = applications_of(config)
    found = [one for one in applications if is_graph(one)]
    if not found and len(applications) == 1:
        found = applications
    if len(found) != 1:
        raise ConfigError(
            f"applications: exactly one must have the import_path {IMPORT_PATHS[0]}, "
            f"not {len(found)}"
        )
    return found[0]


def names_a_host(host: str) -> bool:
    """Whether it can be looked up as a name or an address: no label is empty or over 63 bytes."""
    try:
        return 0 < len(host.encode("idna")) <= LONGEST_HOST and not set(host) & NOT_IN_HOSTS
    except UnicodeError:
        return False


def http_address(config: dict[str, Any]) -> tuple[str, int]:
    """Host and port of its ``http_options``; ConfigError where they are none."""
    options = config.get("http_options")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise ConfigError(f"http_options must be a mapping, not {options!r}")
    host, port = options.get("host", SERVE_HOST), options.get("port", HTTP[1])
    if not isinstance(host, str) or not names_a_host(host):
        raise ConfigError(f"http_options.host must be a name or an address, not {host!r}")
    if not is_port(port):
        raise ConfigError(f"http_options.port must be an integer in 0..65535, not {port!r}")
    return host, port
