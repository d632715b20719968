"""A Ray cluster on one machine, for ``make serve``, the demo, the benchmarks and the tests.

It listens on the loopback interface, asks for Ray's token, and stops exactly what it started.
This module does not import Ray: it drives ``ray start`` and the Serve REST API like an operator.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from serve_graph.environment import (
    AFTER_DEADLINE_S,
    BEFORE_RAY,
    DRAIN_S,
    HARD_STOP,
    LOOPBACK,
    SERVE_PROXY,
)
from serve_graph.errors import LaunchError
from serve_graph.haproxy import SUPPORTED, haproxy_variables
from serve_graph.node import RayNode
from serve_graph.ports import INGRESS_BLOCK, free_port, ingress_block, page_ports, require_free
from serve_graph.ray_token import token_variables
from serve_graph.serve_api import ServeApi

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 300.0
"""How long a graph may take to start where nobody says, seconds."""
LONGEST_FOLDER = {"Ray": 40, "HAProxy": 32}
"""Bytes of the path of a cluster's folder with which those of its sockets are not too long: Ray's
have up to 67 more of 107, HAProxy's 65 more of 97."""


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that come meanwhile are handled at the end: what a handler raises between the start
    of a process and its being noted would leave that running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    former = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: handler for number, handler in former.items() if callable(handler)}
    for number in handled:
        signal.signal(number, lambda n, _: came.append(n))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for n in came:
            signal.raise_signal(n)


class LocalCluster:
    """``ray start --head`` on the loopback interface, as a context manager.

    Ports that are not given are picked free, so that several clusters live side by side.
    ``num_cpus`` are logical CPUs; ``haproxy``: see ``haproxy_variables``; ``longest_request_s``:
    deadline that requests may have, seconds, where it is over 105; ``environment`` adds to and
    overrides that of Ray's processes; ``without_token``: see ``token_variables``.
    """

    def __init__(
        self,
        *,
        num_cpus: int = 2,
        num_gpus: int = 0,
        dashboard_port: int | None = None,
        client_port: int | None = None,
        object_store_bytes: int = 256 * 2**20,
        haproxy: bool = SUPPORTED,
        longest_request_s: float = 0.0,
        environment: dict[str, str] | None = None,
        without_token: bool = False,
    ) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="segment-ray-"))
        self.gcs_port = free_port()
        self.client_port = client_port or free_port()
        self.dashboard_port = dashboard_port or free_port()
        self._haproxy, self._longest_request_s = haproxy, longest_request_s
        try:
            self.variables = {
                **BEFORE_RAY,
                **LOOPBACK,
                # There is one machine: nobody could take over what draining waits for.
                DRAIN_S: "0",
                # How long Ray waits for the dashboard before it gives up, seconds: Ray's 60 are
                # short on a busy machine, and ``start`` has a bound of its own.
                "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
                **(self._haproxy_variables() if haproxy else SERVE_PROXY),
                **(environment or {}),
            }
            found = {**os.environ, **self.variables}
            self.variables |= token_variables(found, self.dir, without_token=without_token)
        except LaunchError:
            self.dir.rmdir()
            raise
        self._num_cpus, self._num_gpus = num_cpus, num_gpus
        self._object_store_bytes = object_store_bytes
        self.api = ServeApi(self.dashboard, self.variables, lambda: self.check())
        self.head: RayNode | None = None
        self.nodes: list[RayNode] = []
        """Those that joined the head, dead ones too."""

    @property
    def address(self) -> str:
        """What a driver on this machine passes to ``ray.init``."""
        return f"127.0.0.1:{self.gcs_port}"

    @property
    def client_address(self) -> str:
        """What a Ray Client passes to ``ray.init``."""
        return f"ray://127.0.0.1:{self.client_port}"

    @property
    def dashboard(self) -> str:
        """The dashboard and its REST API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def log(self) -> Path:
        """What ``ray start`` printed; the logs of the replicas are beside it."""
        return self.dir / "ray-start.log"

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(keep_logs=isinstance(error, LaunchError))

    def start(self, timeout_s: float = 180.0, stop: threading.Event | None = None) -> None:
        """Start Ray and wait until it is up; LaunchError when it does not come up in ``timeout_s``
        seconds, when the port of its dashboard or of Ray Client is taken, or where its folder would
        be too deep for sockets.

        Returns early when ``stop`` is set.
        """
        try:
            require_free("127.0.0.1", self.dashboard_port, "Ray's dashboard", "--dashboard-port")
            require_free("127.0.0.1", self.client_port, "Ray Client", "--client-port")
            self._check_folder()
        except LaunchError:
            self.stop()
            raise
        command = ["-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.gcs_port}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        # Without it Ray goes on where somebody has taken the port meanwhile.
        command += ["--include-dashboard=true"]
        command += [f"--ray-client-server-port={self.client_port}"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=false"]
        command += [f"--num-cpus={self._num_cpus}", f"--num-gpus={self._num_gpus}"]
        command += [f"--object-store-memory={self._object_store_bytes}", f"--temp-dir={self.dir}"]
        # Ray writes it when all of its processes are up. Until then somebody else may have the
        # dashboard's port, and is asked nothing: what is asked there carries the token.
        up = self.dir / "ray_current_cluster"
        version = f"{self.dashboard}/api/version"
        try:
            with _signals_later():
                self.head = RayNode(command, self._environment(), self.log)
            self._wait(lambda: up.exists() and self.api.answers(version), timeout_s, "Ray", stop)
        except BaseException as error:
            self.stop(keep_logs=isinstance(error, LaunchError))
            raise

    def _check_folder(self) -> None:
        whose = "HAProxy" if self._haproxy else "Ray"
        most = LONGEST_FOLDER[whose] - len(f"/{self.dir.name}")
        if len(os.fsencode(self.dir.parent)) > most:
            # Ray would say so at the end of a traceback, HAProxy in a file that is soon gone.
            raise LaunchError(
                f"the folder for temporary files, {self.dir.parent}, must have a path of at most "
                f"{most} bytes, or {whose} has no sockets in it: set TMPDIR, to /tmp say"
            )

    def _haproxy_variables(self) -> dict[str, str]:
        """``haproxy_variables``, with files and ports that no other cluster of this machine has."""
        prefix, first = "RAY_SERVE_HAPROXY_", ingress_block()
        variables = haproxy_variables()
        longest = math.ceil(self._longest_request_s) + AFTER_DEADLINE_S
        return {
            **variables,
            HARD_STOP: str(max(int(variables[HARD_STOP]), longest)),
            f"{prefix}CONFIG_FILE_LOC": str(self.dir / "haproxy.cfg"),
            # Serve puts a folder of 56 letters in between, see ``LONGEST_FOLDER``.
            f"{prefix}SOCKET_PATH": str(self.dir / "ha.sock"),
            f"{prefix}SERVER_STATE_BASE": str(self.dir),
            f"{prefix}SERVER_STATE_FILE": str(self.dir / "server-state"),
            f"{prefix}METRICS_SOCKET_PATH": str(self.dir / "log.sock"),
            # Serve's own proxy, which HAProxy asks while it knows no ingress replica: shared too.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + INGRESS_BLOCK),
            **page_ports(),
        }

    def add_node(
        self,
        *,
        num_cpus: int = 2,
        num_gpus: int = 0,
        resources: dict[str, float] | None = None,
        http_port: int | None = None,
    ) -> RayNode:
        """One more node on this machine, in the cluster on return; LaunchError when it fails.

        ``http_port``: of its HTTP door, because nodes of one machine share its ports; None: a free
        one.
        """
        options = {
            "gcs_address": self.address,
            "node_ip_address": "127.0.0.1",
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "resources": resources or {},
            "object_store_memory": self._object_store_bytes,
            "dashboard_agent_listen_port": free_port(),
            "node_manager_port": 0,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "include_log_monitor": False,
        }
        variables = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(http_port or free_port())}
        if self._haproxy:
            variables |= page_ports()
        joined = self.dir / f"joined-{len(self.nodes)}"
        command = ["-m", "serve_graph.join", json.dumps(options), str(joined)]
        node = RayNode(command, {**self._environment(), **variables}, self.log)
        self.nodes.append(node)
        # Waited for, as two that start at once would take the same names for their sockets.
        while not joined.exists():
            if not node.running:
                raise LaunchError(f"a node did not join\n{self._last_words()}")
            time.sleep(0.1)
        return node

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, **self.variables}
        environment.pop("RAY_ADDRESS", None)
        # Replicas import serve_graph and kestrel from here, installed or not.
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["RAY_USAGE_STATS_ENABLED"] = "0"
        return environment

    def deploy(
        self,
        config: dict[str, Any],
        timeout_s: float = 180.0,
        stop: threading.Event | None = None,
    ) -> None:
        """See ``ServeApi.deploy``."""
        self.api.deploy(config, timeout_s, stop)

    def wait_ready(
        self, url: str, timeout_s: float = START_S, stop: threading.Event | None = None
    ) -> None:
        """Wait until Serve says that all applications run and ``url`` (a ``/healthz``) answers 200;
        LaunchError with the reason otherwise.

        Returns early when ``stop`` is set.
        """
        self._wait(
            lambda: self.api.serves(url), timeout_s, "the application", stop, self._not_running
        )

    def _not_running(self) -> str:
        # A checkpoint that is fetched takes as long as it takes.
        return f" (serve_graph up has --start-s, wait_ready timeout_s){self.api.not_running()}"

    def drain(
        self,
        config: dict[str, Any],
        url: str,
        timeout_s: float = 60.0,
        stop: threading.Event | None = None,
    ) -> bool:
        """See ``ServeApi.drain``."""
        return self.api.drain(config, url, timeout_s, stop)

    def check(self) -> None:
        """LaunchError when Ray is no longer there."""
        if self.head is None or not self.head.running:
            raise LaunchError(f"Ray ended\n{self._last_words()}")

    def status(self) -> dict[str, Any]:
        """See ``ServeApi.status``."""
        return self.api.status()

    def stop(self, timeout_s: float = 20.0, *, keep_logs: bool = False) -> None:
        """Stop Ray and every process that it started; its directory goes too, or its logs stay."""
        for node in self.nodes:
            node.kill()
        head, self.head = self.head, None
        if head is not None:
            head.stop(timeout_s)
        if not keep_logs:
            shutil.rmtree(self.dir, ignore_errors=True)

    def _wait(
        self,
        ready: Callable[[], bool],
        timeout_s: float,
        what: str,
        stop: threading.Event | None = None,
        state: Callable[[], str] = str,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not (stop and stop.is_set()):
            if ready():
                return
            self.check()
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{what} did not start in {timeout_s:g} s{state()}\n{self._last_words()}"
                )
            time.sleep(0.2)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([*lines[-15:], f"logs: {self.dir}"])
