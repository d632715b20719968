"""``python -m serve_graph demo``: the whole service on the sample pictures, drawn and measured."""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from kestrel.config import SHIPPED_MODELS
from kestrel.image import decode
from kestrel.overlay import decode_mask, overlay
from serve_graph.client import SegmentClient
from serve_graph.errors import LaunchError

SAMPLES = SHIPPED_MODELS / "nano" / "samples"
STAGES = ("prepare", "prefill", "decode", "refine")
"""Of a ``Server-Timing`` header (``kestrel.server.compose.server_timing``)."""


@dataclass(frozen=True)
class Sample:
    """A picture, the noun to ask for, and where that noun really is."""

    name: str
    image: bytes
    noun: str
    truth: np.ndarray
    """bool [H, W]"""

    @property
    def folder(self) -> str:
        """Where the demo puts its answer: a picture may be asked for several nouns."""
        return f"{self.name}-{self.noun.replace(' ', '-')}"


def load_samples(folder: Path = SAMPLES) -> list[Sample]:
    """The pictures that ship beside the model."""
    samples = []
    for entry in json.loads((folder / "samples.json").read_text()):
        truth = np.asarray(Image.open(folder / entry["truth"]).convert("L")) > 127
        image = (folder / entry["file"]).read_bytes()
        samples.append(Sample(Path(entry["file"]).stem, image, entry["noun"], truth))
    return samples


def iou(mask: np.ndarray | None, truth: np.ndarray) -> float:
    """Intersection over union of two bool [H, W] masks; 0 where there is none."""
    if mask is None:
        return 0.0
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def same_answer(plain: dict[str, Any], final: dict[str, Any]) -> bool:
    """Whether a plain answer and a final event agree in everything but times and ids."""
    keys = ("finish_reason", "path", "bbox", "coarse_mask_base64", "refined_mask_base64")
    return all(plain.get(key) == final.get(key) for key in keys)


def server_times(header: str) -> dict[str, float]:
    """Milliseconds by stage from a ``Server-Timing`` header; nothing where there is none."""
    return {stage: float(ms) for stage, ms in re.findall(r"([\w-]+);dur=([\d.]+)", header)}


def run(url: str, output: Path) -> None:
    """Send each sample plain and streamed, write what came back, print a table.

    Raises LaunchError when a plain request fails or the two ways disagree.
    """
    rows = [f"{'picture':<22} {'object':<12} {'box':<27} IoU coarse refined"]
    rows[0] += "".join(f"{stage:>9}" for stage in (*STAGES, "total ms"))
    # Without the proxies of the environment: it is this machine.
    plain = httpx.Client(base_url=url, timeout=120, trust_env=False)
    with plain as http, SegmentClient(url) as client:
        for sample in load_samples():
            image = base64.b64encode(sample.image).decode()
            ask = {"object": sample.noun, "image_url": image, "return_base64": True}
            began = time.perf_counter()
            reply = http.post("/v1/segment", json=ask)
            total_ms = (time.perf_counter() - began) * 1e3
            if reply.is_error:
                raise LaunchError(f"{sample.name}: {reply.status_code} {reply.text[:200]}")
            *_, final = client.segment(
                object=sample.noun, image=sample.image, return_base64=True, stream=True
            )
            if not same_answer(reply.json(), final):
                raise LaunchError(f"{sample.name}: the plain and the streamed answer differ")
            times = server_times(reply.headers.get("server-timing", ""))
            rows.append(
                _write(sample, reply.json(), {**times, "total": total_ms}, output / sample.folder)
            )
    print("\n".join(rows))
    print(f"\nplain and streamed answers agree; pictures, masks and answers: {output.resolve()}")


def _write(sample: Sample, answer: dict[str, Any], times_ms: dict[str, float], folder: Path) -> str:
    """Files of one answer, and its row of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("coarse", "refined"):  # an earlier run's, where there is none this time
        (folder / f"{kind}.png").unlink(missing_ok=True)
    (folder / "response.json").write_text(json.dumps(answer, indent=1))
    masks: dict[str, np.ndarray] = {}
    for kind in ("coarse", "refined"):
        encoded = answer.get(f"{kind}_mask_base64")
        if encoded is not None:
            (folder / f"{kind}.png").write_bytes(base64.b64decode(encoded))
            masks[kind] = decode_mask(encoded)
    drawn = overlay(decode(sample.image), masks.get("coarse"), masks.get("refined"))
    Image.fromarray(drawn).save(folder / "overlay.png")
    box = answer["bbox"]
    corners = " ".join(f"{box[k]:.3f}" for k in ("x_min", "y_min", "x_max", "y_max")) if box else ""
    times = (times_ms.get(stage, 0.0) for stage in (*STAGES, "total"))
    return (
        f"{sample.name:<22} {sample.noun:<12} {corners:<27} "
        f"{iou(masks.get('coarse'), sample.truth):>10.3f} "
        f"{iou(masks.get('refined'), sample.truth):>7.3f}" + "".join(f"{ms:>9.1f}" for ms in times)
    )
