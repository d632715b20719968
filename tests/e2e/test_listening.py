"""What a running graph offers to other machines: nothing without Ray's token, unless asked to."""

from __future__ import annotations

import secrets

import grpc
import httpx
import pytest
from running_graph import Graph, body, listening_beyond_loopback

from serve_graph.__main__ import LOCAL, read_config, service_url
from serve_graph.demo import Sample
from serve_graph.launch import LocalCluster, free_port

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


@pytest.mark.timeout(600)
def test_serves_own_door_serves_too(samples: list[Sample]) -> None:
    config = read_config(LOCAL, free_port())
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with LocalCluster(haproxy=False, environment=token) as cluster:
        cluster.deploy(config)
        url = service_url(config)
        cluster.wait_ready(f"{url}/healthz")
        ask = body(samples[0], return_base64=True)
        reply = httpx.post(f"{url}/v1/segment", json=ask, timeout=60)
        assert reply.status_code == 200 and "refined_mask_base64" in reply.json()
        assert httpx.post(f"{url}/v1/segment", json={}, timeout=60).status_code == 400
        assert cluster.head is not None
        beyond = listening_beyond_loopback(cluster.head)
        assert set(beyond) <= set(cluster.head.pids("ray::ServeReplica:"))
