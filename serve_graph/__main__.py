"""``python -m serve_graph``: ``up`` serves, ``demo`` runs the samples, ``plan`` sizes a cluster."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from kestrel.config import SHIPPED_MODELS
from kestrel.folders import made_writable
from kestrel.ports import is_port, written
from kestrel.serve_config import (
    HTTP,
    deployments_of,
    graph_of,
    http_address,
    is_graph,
    mapping_of,
)
from serve_graph import plan
from serve_graph.args import longest_request_s
from serve_graph.environment import BEFORE_RAY, LOOPBACK, SERVE_PROXY
from serve_graph.errors import LaunchError
from serve_graph.haproxy import SUPPORTED, haproxy_variables
from serve_graph.launch import START_S, LocalCluster
from serve_graph.placement import no_room
from serve_graph.ports import free_port, require_free
from serve_graph.ray_token import MODE
from serve_graph.refusals import refusal

LOCAL = Path(__file__).resolve().parent.parent / "configs" / "local.yaml"
HAPROXY_HELP = (
    "HAProxy as the HTTP door, which is faster than Serve's Python proxy; for Linux only, where it "
    "is the default"
)
TOKEN_HELP = "start although RAY_AUTH_MODE turns Ray's token off: ports then run anybody's code"
SAMPLES = SHIPPED_MODELS / "nano" / "samples"
MOST = 86_400
"""Largest count of CPUs and GPUs, and of seconds to start and to drain: a day."""


def read_config(path: Path, port: int | None) -> dict[str, Any]:
    """A Serve config with its HTTP port replaced when ``port`` is given, on the loopback interface
    where it names no host; LaunchError where it cannot be read, the graph would refuse it, or HTTP
    would not lead to the graph."""
    if port is not None and not is_port(port):
        raise LaunchError(f"--port must be in 0..65535, not {port}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LaunchError(f"{path} cannot be read as a YAML file: {reason}") from None
    if not isinstance(config, dict):
        raise LaunchError(f"{path} is not a Serve config: it must be a mapping with applications")
    # A key without a value is null in YAML.
    http = config["http_options"] = config.get("http_options") or {}
    if isinstance(http, dict):
        http.setdefault("host", HTTP[0])  # Serve's own default is every interface
        if port is not None:
            http["port"] = port
    refused = refusal(config)
    if refused is not None:
        raise LaunchError(f"{path}: {refused}")
    return config


def service_url(config: dict[str, Any]) -> str:
    """Where this machine reaches the graph of a config over HTTP, without a slash at the end."""
    host, port = http_address(config)
    prefix = graph_of(config).get("route_prefix", "/").rstrip("/")
    return f"http://{written('127.0.0.1' if host in ('0.0.0.0', '::') else host, port)}{prefix}"


def sample_request(folder: Path) -> tuple[str, Path]:
    """The noun of the first sample picture and a file with its JSON request, written to folder."""
    sample = json.loads((SAMPLES / "samples.json").read_text())[0]
    image = base64.b64encode((SAMPLES / sample["file"]).read_bytes()).decode()
    path = folder / "request.json"
    path.write_text(json.dumps({"object": sample["noun"], "image_url": image}))
    return sample["noun"], path


def curl_line(config: dict[str, Any], request: Path) -> str:
    """For a shell: the request in a file to the graph of a config, with a place for the API key
    where one is asked for."""
    graph = graph_of(config)
    keys = None
    if is_graph(graph):  # nobody knows the args of what is built around it
        keys = mapping_of(mapping_of(graph, "args"), "runtime").get("api_keys")
        for deployment in deployments_of(graph):
            if deployment["name"] == "Ingress":
                changed = mapping_of(deployment, "user_config").get("api_keys")
                keys = keys if changed is None else changed
    headers = ["Content-Type: application/json", *(["Authorization: Bearer KEY"] if keys else [])]
    shown = " ".join(f"-H '{header}'" for header in headers)
    return f"curl -s {service_url(config)}/v1/segment {shown} -d @{shlex.quote(str(request))}"


def driver_variables(cluster: LocalCluster) -> str:
    """What a Ray program on this machine needs before it to find the cluster and be let in, for a
    shell; but for the token itself."""
    names = (*LOOPBACK, MODE, "RAY_AUTH_TOKEN_PATH")
    variables = {name: cluster.variables[name] for name in names if name in cluster.variables}
    variables["RAY_ADDRESS"] = cluster.address
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def _check_numbers(options: argparse.Namespace) -> None:
    """LaunchError for what Ray or a clock would refuse later, or wait for without an end."""
    for name, least in (("num_cpus", 1), ("num_gpus", 0), ("start_s", 1), ("drain_s", 0)):
        value = getattr(options, name)
        if not least <= value <= MOST:
            raise LaunchError(
                f"--{name.replace('_', '-')} must be in {least}..{MOST}, not {value:g}"
            )


def _check_host(host: str, options: argparse.Namespace) -> None:
    """LaunchError where HAProxy would not reach the ingress: its replicas listen where the HTTP
    door does, and HAProxy asks them at their node's address, which is 127.0.0.1."""
    if options.haproxy and host not in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
        raise LaunchError(
            f"http_options.host: HAProxy does not find the ingress replicas at {host}; say "
            "127.0.0.1, or 0.0.0.0 for all interfaces, or start with --no-haproxy"
        )


def _check_ports(http: int, options: argparse.Namespace) -> None:
    """LaunchError where two are to listen on one port: nobody does yet, and the second would wait
    for it, or be asked what is for the first."""
    named = {
        "--port or http_options.port": http,
        "--dashboard-port": options.dashboard_port,
        "--client-port": options.client_port,
    }
    for (one, port), (other, same) in combinations(named.items(), 2):
        if port == same and port:  # 0: a free one
            raise LaunchError(f"{one} and {other} are both {port}: each needs a port of its own")


def _at_hangup(handler: Callable[[int, Any], None]) -> None:
    """What happens when the terminal closes, which does not reach Ray in its own session; nothing
    where whoever started this wants it to go on (nohup)."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)


def _end(number: int, _: Any) -> None:
    """SystemExit, once: stopping Ray takes a while, in which the signal may come again."""
    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def up(options: argparse.Namespace) -> None:
    """Start, say how to call it, wait for a signal, let requests finish, stop."""
    _check_numbers(options)
    stop, at_once = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: at_once.set() if stop.is_set() else stop.set())
    _at_hangup(lambda *_: stop.set())  # never at once: a terminal that closes sends several
    config = read_config(options.config, options.port)
    lacking = no_room(config, {"CPU": options.num_cpus, "GPU": options.num_gpus})
    if lacking is not None:
        raise LaunchError(f"{options.config} would never run on this one node: {lacking}")
    url = service_url(config)
    host, port = http_address(config)
    _check_host(host, options)
    _check_ports(port, options)
    # Serve would not say so, and whoever listens there may answer in its place.
    require_free(host, port, "HTTP", "--port or http_options.port")
    began = time.monotonic()
    cluster = LocalCluster(
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        dashboard_port=options.dashboard_port,
        client_port=options.client_port,
        haproxy=options.haproxy,
        longest_request_s=longest_request_s(config),
        without_token=options.without_token,
    )
    with contextlib.ExitStack() as started:
        cluster.start(stop=stop)
        started.push(cluster)
        cluster.deploy(config, stop=stop)
        cluster.wait_ready(f"{url}/healthz", options.start_s, stop)
        if stop.is_set():
            return
        noun, request = sample_request(cluster.dir)
        print(
            f"""ready in {time.monotonic() - began:.0f} s: {url} (documentation at {url}/docs)

  {curl_line(config, request)}   # a {noun}

dashboard   {cluster.dashboard}
Ray Client  SegmentClient("{cluster.client_address}")
handle      {driver_variables(cluster)}
token       {cluster.variables.get("RAY_AUTH_TOKEN_PATH", "as in your environment")}
logs        {cluster.dir}/session_latest/logs/serve

Ctrl-C stops it when its requests are done, a second Ctrl-C at once.""",
            flush=True,
        )
        while not stop.wait(2):
            cluster.check()
        cluster.drain(config, url, options.drain_s, at_once)
    print("stopped")


def demo(options: argparse.Namespace) -> None:
    """Serve the local config on free ports, run the samples through it, stop."""
    from serve_graph.demo import run

    problem = made_writable(options.output)
    if problem is not None:  # before Ray is up
        raise LaunchError(f"--output {options.output} {problem}; name another folder")
    signal.signal(signal.SIGTERM, _end)
    _at_hangup(_end)
    config = read_config(LOCAL, free_port())
    url = service_url(config)
    began = time.monotonic()
    with LocalCluster(haproxy=options.haproxy, without_token=options.without_token) as cluster:
        cluster.deploy(config)
        cluster.wait_ready(f"{url}/healthz")
        print(f"Ray, model and refiner are up after {time.monotonic() - began:.0f} s", flush=True)
        run(url, options.output)


def env(options: argparse.Namespace) -> None:
    """Print the environment of the serving mode, for a shell that starts Ray on a node."""
    variables = {**BEFORE_RAY, **(haproxy_variables() if options.haproxy else SERVE_PROXY)}
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m serve_graph", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("up", help="start Ray and the graph, wait for Ctrl-C")
    command.add_argument(
        "--config",
        type=Path,
        default=LOCAL,
        help="Serve config to deploy; by default configs/local.yaml",
    )
    command.add_argument("--port", type=int, help="HTTP port in place of the config's")
    command.add_argument("--num-cpus", type=int, default=2, help="logical CPUs given to Ray (2)")
    command.add_argument("--num-gpus", type=int, default=0, help="GPUs given to Ray (0)")
    command.add_argument(
        "--dashboard-port", type=int, default=8265, help="of Ray's dashboard (8265)"
    )
    command.add_argument(
        "--client-port", type=int, default=10001, help="port of the Ray Client (10001)"
    )
    command.add_argument(
        "--start-s",
        type=float,
        default=START_S,
        help="seconds that the graph may take to start, a checkpoint's download included "
        f"({START_S:g})",
    )
    command.add_argument(
        "--drain-s", type=float, default=30.0, help="seconds that requests may take to finish (30)"
    )
    command.add_argument("--without-token", action="store_true", help=TOKEN_HELP)
    command.set_defaults(run=up)
    command = commands.add_parser(
        "env", help='environment of the serving mode: eval "$(... env)" before `ray start`'
    )
    command.set_defaults(run=env)
    command = commands.add_parser("demo", help="run the sample pictures through a fresh graph")
    command.add_argument(
        "--output", type=Path, default=Path("demo_out"), help="folder for its files (demo_out)"
    )
    command.add_argument("--without-token", action="store_true", help=TOKEN_HELP)
    command.set_defaults(run=demo)
    command = commands.add_parser(
        "plan", help="the smallest pools that carry a load, by simulation"
    )
    plan.add_arguments(command)
    command.set_defaults(run=plan.run)
    for name in ("up", "env", "demo"):
        commands.choices[name].add_argument(
            "--haproxy",
            action=argparse.BooleanOptionalAction,
            default=SUPPORTED,
            help=HAPROXY_HELP,
        )
    options = parser.parse_args()
    try:
        options.run(options)
    except (LaunchError, plan.PlanError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
