"""What ``python -m serve_graph up`` owes a request when it is told to stop: its answer."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from running_graph import body, wait_for
from starting import FOLDER, HOOK, OTHER

from serve_graph.__main__ import LOCAL
from serve_graph.demo import Sample
from serve_graph.launch import REPOSITORY
from serve_graph.ports import free_port


@pytest.mark.timeout(400)
def test_a_request_under_way_is_answered_before_up_ends(
    samples: list[Sample], huge: bytes, tmp_path: Path
) -> None:
    """Of a graph that is not at the root, and not alone."""
    config = yaml.safe_load(LOCAL.read_text())
    config["applications"][0]["route_prefix"] = "/seg"
    config["applications"].append(OTHER)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [sys.executable, "-m", "serve_graph", "up", f"--port={port}", "--drain-s=60"]
    command += [f"--config={path}"]
    command += [f"--dashboard-port={free_port()}", f"--client-port={free_port()}"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = {**os.environ, **token, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = next((line for line in process.stdout if line.startswith("Ctrl-C stops")), None)
            assert said, "it ended before it served"
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
            connection.connect()
            ask = json.dumps(body(replace(samples[0], image=huge)))
            connection.request("POST", "/seg/v1/segment", ask, {"Content-Type": "application/json"})
            time.sleep(0.1)
            answered, _, _ = select.select([connection.sock], [], [], 0)
            assert not answered, f"nothing was under way: {connection.getresponse().read()!r}"
            process.send_signal(signal.SIGTERM)
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            assert json.loads(reply.read())["path"]
            assert process.wait(90) == 0
            assert "stopped" in process.stdout.read()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # a second one stops it at once
                process.wait(120)


def test_up_ends_when_told_to_while_ray_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve_graph", "up", f"--port={free_port()}"]
    command += [f"--dashboard-port={free_port()}", f"--client-port={free_port()}"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    starting = {"RAY_START_HOOK": HOOK, FOLDER: str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env={**os.environ, **token, **starting}) as process:
        try:
            assert wait_for((tmp_path / "started").exists, 120)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            (tmp_path / "go").touch()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
