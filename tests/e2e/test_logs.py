"""What the logs of the cluster do not show, whatever the other tests have asked of the graph."""

from __future__ import annotations

from pathlib import Path

import httpx
from running_graph import KEY, Graph, body

from serve_graph.demo import Sample


def test_no_log_of_the_cluster_shows_a_key_or_the_token(
    graph: Graph, samples: list[Sample]
) -> None:
    wrong = "a-key-that-nobody-has"
    for headers in ({"Authorization": f"Bearer {wrong}"}, {"X-Moondream-Auth": wrong}):
        reply = httpx.post(f"{graph.url}/v1/segment", json=body(samples[0]), headers=headers)
        assert reply.status_code == 401
    token = graph.cluster.variables["RAY_AUTH_TOKEN"]
    logs = [f for f in Path(graph.cluster.dir).glob("session_2*/logs/**/*") if f.is_file()]
    assert logs
    shown = [
        (file.name, secret)
        for file in logs
        for secret in (KEY, wrong, token)
        if secret.encode() in file.read_bytes()
    ]
    assert not shown
