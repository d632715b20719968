"""The demo: pictures that are not written, figures in its table that are not what they say."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from scripted import WELL, ScriptedBackend
from serving import served, until

from kestrel.api import Overloaded, PathDelta
from kestrel.config import Limits, RuntimeConfig
from kestrel.server.http import create_app
from kestrel.server.routes import build_app
from serve_graph import demo
from serve_graph.errors import LaunchError


def test_every_sample_is_drawn_written_and_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    samples = demo.load_samples()
    assert len({sample.folder for sample in samples}) == len(samples) > 8
    samples = samples[:8]
    monkeypatch.setattr(demo, "load_samples", lambda: samples)
    with served(create_app(RuntimeConfig(device="cpu", torch_threads=1))) as url:
        until(lambda: httpx.get(f"{url}/healthz", timeout=60).status_code == 200, 120)
        demo.run(url, tmp_path)
    head, *rows = capsys.readouterr().out.splitlines()[: 1 + len(samples)]
    columns = head.split()
    assert columns[-6:] == ["prepare", "prefill", "decode", "refine", "total", "ms"]
    for sample, row in zip(samples, rows, strict=True):
        folder = tmp_path / sample.folder
        answer = json.loads((folder / "response.json").read_text())
        assert row.startswith(sample.name) and f"{answer['bbox']['x_min']:.3f}" in row
        coarse, refined, *times, total = map(float, row.split()[-7:])
        masks = [np.asarray(Image.open(folder / f"{kind}.png")) for kind in ("coarse", "refined")]
        for mask, shown in zip(masks, (coarse, refined), strict=True):
            assert abs(demo.iou(mask > 127, sample.truth) - shown) < 0.001
        # Refinement's own time, not what is left of the whole.
        assert all(ms > 0 for ms in times) and sum(times) < total
        width, height = Image.open(folder / "overlay.png").size
        assert height >= masks[0].shape[0] and width >= 3 * masks[0].shape[1]


@pytest.mark.parametrize("stream_only", [False, True])
def test_a_request_that_fails_or_two_answers_that_differ_end_the_demo(
    tmp_path: Path, stream_only: bool
):
    backend = ScriptedBackend()
    object.__setattr__(backend.config, "limits", Limits())
    backend.script = [*WELL] if stream_only else [Overloaded("full")]
    events = backend.events

    def other(*asked):
        backend.script = [WELL[0], PathDelta("M0 0L1 1Z", 5)]
        return events(*asked)

    backend.events = other
    said = pytest.raises(LaunchError, match="differ" if stream_only else "503")
    with served(build_app(backend)) as url, said:
        demo.run(url, tmp_path)


def test_masks_of_an_earlier_run_do_not_stay_where_there_are_none_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    backend = ScriptedBackend()
    object.__setattr__(backend.config, "limits", Limits())
    backend.script = [*WELL]
    first = demo.load_samples()[0]
    monkeypatch.setattr(demo, "load_samples", lambda: [first])
    stale = tmp_path / first.folder / "refined.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of another model")
    # A proxy of the environment would look for the graph on its own machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with served(build_app(backend)) as url:
        demo.run(url, tmp_path)
    answer = json.loads((stale.parent / "response.json").read_text())
    assert ("refined_mask_base64" in answer) is stale.exists() is False
