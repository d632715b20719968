"""The REST API of Ray Serve, as a program on the head's machine uses it: deploy, look, drain."""

from __future__ import annotations

import copy
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent import futures
from http.client import HTTPException
from typing import Any

from kestrel.serve_config import deployments_of, graph_of
from serve_graph.errors import LaunchError
from serve_graph.ray_token import token

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself: a proxy of the environment would hear the token and ask another."""


def draining(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the graph's ingress told to refuse new requests; other applications stay as
    they are. ValueError: see ``graph_of`` and ``deployments_of``."""
    config = copy.deepcopy(config)
    application = graph_of(config)
    deployments = application["deployments"] = deployments_of(application)
    if not any(one["name"] == "Ingress" for one in deployments):
        deployments.append({"name": "Ingress"})
    for one in deployments:
        if one["name"] == "Ingress":
            one["user_config"] = {**(one.get("user_config") or {}), "draining": True}
    return config


def _said(error: urllib.error.HTTPError) -> bytes:
    """The content of a refusal; nothing where it was cut."""
    try:
        return error.read()
    except (OSError, HTTPException):
        return b""


class ServeApi:
    """What the dashboard at ``url`` answers, which is asked with the token of ``variables``.

    ``check`` raises LaunchError where Ray is not there: somebody else may then have its port.
    """

    def __init__(self, url: str, variables: Mapping[str, str], check: Callable[[], None]) -> None:
        self.url = url
        self._variables = variables
        self._check = check

    def deploy(
        self,
        config: dict[str, Any],
        timeout_s: float = 180.0,
        stop: threading.Event | None = None,
    ) -> None:
        """Hand a Serve config to the cluster, like ``serve deploy``; it becomes ready later.

        Tried again while Serve itself is still starting, up to ``timeout_s`` seconds. LaunchError
        when it refuses the config. Returns early when ``stop`` is set.
        """
        url = f"{self.url}/api/serve/applications/"
        body = json.dumps(config).encode()
        deadline = time.monotonic() + timeout_s
        while not (stop and stop.is_set()):
            try:
                self._put(url, body, timeout_s, stop)
                return
            except urllib.error.HTTPError as error:
                if error.code < 500 or time.monotonic() > deadline:
                    reason = _said(error).decode(errors="replace")
                    raise LaunchError(f"Serve refused the config: {reason}") from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LaunchError(f"Serve does not take the config: {error}") from error
            self._check()
            time.sleep(1.0)

    def drain(
        self,
        config: dict[str, Any],
        url: str,
        timeout_s: float = 60.0,
        stop: threading.Event | None = None,
    ) -> bool:
        """Have the graph of ``config`` at ``url`` refuse new requests and finish the others.

        Whether none is left; after ``timeout_s`` seconds, or when ``stop`` is set, some may be; at
        0 the graph is not even told. With several ingress replicas, those that ``url`` does not
        lead to are not asked.
        """
        if timeout_s <= 0:
            return False
        deadline = time.monotonic() + timeout_s
        # However short the wait for requests is: Serve may take its time to be told.
        self.deploy(draining(config), max(timeout_s, 10.0), stop)
        while time.monotonic() < deadline and not (stop and stop.is_set()):
            try:
                self.call(f"{url}/healthz")
            except urllib.error.HTTPError as error:
                if b", 0 requests left" in _said(error):
                    return True
            except OSError:
                self._check()
            time.sleep(0.1)
        return False

    def status(self) -> dict[str, Any]:
        """The Serve REST API's view of the applications."""
        found = json.loads(self.call(f"{self.url}/api/serve/applications/"))
        assert isinstance(found, dict)
        return found

    def call(
        self, url: str, *, method: str = "GET", body: bytes | None = None, timeout_s: float = 5.0
    ) -> bytes:
        """The answer's content; OSError where there is none, and HTTPError, which is one, for what
        is no success. The token goes to the dashboard alone."""
        request = urllib.request.Request(url, data=body, method=method)
        if url.startswith(f"{self.url}/"):
            # When Ray is gone, somebody else may have its port.
            self._check()
            secret = token(self._variables)
            if secret:
                request.add_header("Authorization", f"Bearer {secret}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with _DIRECT.open(request, timeout=timeout_s) as response:
                content: bytes = response.read()
        except HTTPException as error:  # no HTTP, or cut: what answers is about to start or to end
            raise ConnectionError(f"{url} answers {error!r}") from error
        return content

    def _put(self, url: str, body: bytes, timeout_s: float, stop: threading.Event | None) -> None:
        """Returns early when ``stop`` is set; the request is then left to end with Ray."""
        pool = futures.ThreadPoolExecutor(1)
        put = pool.submit(self.call, url, method="PUT", body=body, timeout_s=timeout_s)
        pool.shutdown(wait=False)
        while not put.done():
            if stop and stop.is_set():
                return
            futures.wait([put], 0.2)
        put.result()

    def answers(self, url: str) -> bool:
        """Whether ``url`` is answered with success."""
        try:
            self.call(url)
        except (OSError, ValueError):
            return False
        return True

    def serves(self, url: str) -> bool:
        """Whether all applications run and ``url`` is answered; LaunchError where an application
        cannot be deployed."""
        try:
            applications = self.status()["applications"].values()
        except (OSError, ValueError, KeyError):
            return False
        failed = [_why(app) for app in applications if app["status"] == "DEPLOY_FAILED"]
        if failed:
            raise LaunchError(f"the application failed to start: {'; '.join(failed)}")
        # Asked too, as somebody else's service may answer at ``url``.
        running = [app["status"] == "RUNNING" for app in applications]
        return bool(running) and all(running) and self.answers(url)

    def not_running(self) -> str:
        """What Serve says of the applications that do not run; empty where all do."""
        try:
            applications = self.status()["applications"].items()
        except (OSError, ValueError, KeyError):
            return "; Serve does not answer"
        return "".join(
            f"\n{name} is {app['status']}: {app['message'] or 'no reason given'}"
            for name, app in applications
            if app["status"] != "RUNNING"
        )


def _why(application: dict[str, Any]) -> str:
    """Why it is DEPLOY_FAILED, as Serve says it, and of each deployment that did not start the last
    line: what was raised in its replica, after the traceback."""
    reasons = [application["message"]]
    for name, deployment in application.get("deployments", {}).items():
        lines = deployment["message"].split("\n")
        if deployment["status"] == "DEPLOY_FAILED" and any(lines):
            reasons.append(f"{name}: {[line for line in lines if line.strip()][-1].strip()}")
    return "\n".join(reasons)
