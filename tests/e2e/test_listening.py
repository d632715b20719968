"""What a running graph offers to other machines: nothing without Ray's token, unless asked to."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import httpx
import pytest
from running_graph import Graph, body, listening_beyond_loopback, wait_for
from starting import FOLDER, HOOK

from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import Sample
from serve_graph.errors import LaunchError
from serve_graph.launch import LocalCluster
from serve_graph.ports import free_port

CALL = "/ray.serve.ASGIService/HandleRequest"


def refuses_a_stranger(port: int) -> bool:
    """Whether a gRPC call without the token is turned away before it is looked at."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(CALL)(b"", timeout=10)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def test_only_replicas_listen_beyond_this_machine_and_they_ask_for_the_token(graph: Graph) -> None:
    assert graph.cluster.head is not None
    beyond = listening_beyond_loopback(graph.cluster.head)
    replicas = graph.pids("ray::ServeReplica:")
    # Serve binds these itself; no setting of its confines them. HAProxy's pages are confined.
    assert set(beyond) <= set(replicas)
    assert all(refuses_a_stranger(port) for ports in beyond.values() for port in ports)


def test_haproxy_has_its_pages_on_loopback_alone(graph: Graph) -> None:
    for page, path in (("STATS", "/stats"), ("METRICS", "/metrics")):
        port = graph.cluster.variables[f"RAY_SERVE_HAPROXY_{page}_PORT"]
        assert "haproxy" in httpx.get(f"http://127.0.0.1:{port}{path}").text.lower()


class Stranger(HTTPServer):
    """Somebody else's service: answers whatever it is asked, and keeps what it was told."""

    def __init__(self, port: int = 0) -> None:
        told = self.told = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.append((self.path, self.headers.get("Authorization")))
                self.send_response(200)
                self.end_headers()

            do_PUT = do_GET

        super().__init__(("127.0.0.1", port), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def test_whoever_takes_the_dashboard_s_port_while_ray_starts_is_told_nothing(
    tmp_path: Path,
) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    starting = {"RAY_START_HOOK": HOOK, FOLDER: str(tmp_path)}
    cluster = LocalCluster(environment={**token, **starting})
    try:
        with ThreadPoolExecutor() as pool:
            started = pool.submit(cluster.start)
            assert wait_for((tmp_path / "started").exists, 120)
            with Stranger(cluster.dashboard_port) as stranger:
                (tmp_path / "go").touch()
                with pytest.raises(LaunchError, match="already occupied"):
                    started.result()
                stranger.shutdown()
    finally:
        cluster.stop()
    assert not stranger.told


@pytest.mark.timeout(600)
def test_serves_own_door_serves_too(samples: list[Sample]) -> None:
    config = read_config(LOCAL, free_port())
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with LocalCluster(haproxy=False, environment=token) as cluster:
        cluster.deploy(config)
        with Stranger() as stranger:
            cluster.wait_ready(f"http://127.0.0.1:{stranger.server_port}/healthz")
            stranger.shutdown()
        (application,) = cluster.status()["applications"].values()
        assert application["status"] == "RUNNING", "somebody else's 200 was enough"
        url = service_url(config)
        cluster.wait_ready(f"{url}/healthz")
        ask = body(samples[0], return_base64=True)
        reply = httpx.post(f"{url}/v1/segment", json=ask, timeout=60)
        assert reply.status_code == 200 and "refined_mask_base64" in reply.json()
        assert httpx.post(f"{url}/v1/segment", json={}, timeout=60).status_code == 400
        assert cluster.head is not None
        beyond = listening_beyond_loopback(cluster.head)
        assert set(beyond) <= set(cluster.head.pids("ray::ServeReplica:"))
