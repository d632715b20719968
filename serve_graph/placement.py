"""Whether the replicas of a graph have a place on the one node that ``up`` starts: Serve would wait
for room that never comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kestrel.serve_config import applications_of, deployments_of, is_graph, mapping_of
from serve_graph.args import POOLS, GraphArgs, Pool
from serve_graph.overrides import overridden

OPTIONS = {"CPU": "--num-cpus", "GPU": "--num-gpus"}


def no_room(config: dict[str, Any], node: Mapping[str, float]) -> str | None:
    """Why a config that is not refused (``serve_graph.refusals``) never runs on one ``node`` of
    these resources, ``CPU`` and ``GPU``; None: it may."""
    needed: Counter[str] = Counter()
    for application in applications_of(config):
        if not is_graph(application):
            continue  # nobody knows what it needs
        for name, pool in _pools(application).items():
            # A graph is ready when a refiner has answered too, kept or not.
            replicas = max(1, pool.min_replicas)
            most = pool.max_replicas_per_node
            if most is not None and replicas > most:
                return f"{name} has {replicas} replicas, and max_replicas_per_node is {most}"
            needed.update({"CPU": replicas * pool.num_cpus, "GPU": replicas * pool.num_gpus})
            needed.update({what: replicas * some for what, some in pool.resources.items()})
    for what, some in needed.items():
        # In Ray's grains, beyond which sums of fractions are not equal.
        if round(some, 4) > node.get(what, 0.0):
            option = OPTIONS.get(what)
            there = f"{option} is {node[what]:g}" if option else "only nodes of a cluster have it"
            return f"its replicas need {round(some, 4):g} {what} in all, and {there}"
    return None


def _pools(application: dict[str, Any]) -> dict[str, Pool]:
    """The pools of a graph by their keys in ``args``, as Serve makes them."""
    args = GraphArgs.model_validate(mapping_of(application, "args"))
    pools: dict[str, Pool] = {key: getattr(args, key) for key in POOLS.values()}
    for deployment in deployments_of(application):
        key = POOLS[deployment["name"]]
        pools[key] = getattr(overridden(args, deployment, "deployments"), key)
    return pools
