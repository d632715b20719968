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

import pytest
from running_graph import body

from serve_graph.demo import Sample
from serve_graph.launch import REPOSITORY, free_port


@pytest.mark.timeout(400)
def test_a_request_under_way_is_answered_before_up_ends(samples: list[Sample], huge: bytes) -> None:
    port = free_port()
    command = [sys.executable, "-m", "serve_graph", "up", f"--port={port}", "--drain-s=60"]
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
            connection.request("POST", "/v1/segment", ask, {"Content-Type": "application/json"})
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
