"""``python -m serve_graph demo``: the whole service on the sample pictures, drawn and measured."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kestrel.config import SHIPPED_MODELS
from kestrel.image import decode
from kestrel.overlay import decode_mask, overlay
from serve_graph.client import SegmentClient
from serve_graph.launch import LaunchError

SAMPLES = SHIPPED_MODELS / "nano" / "samples"


@dataclass(frozen=True)
class Sample:
    """A picture, the noun to ask for, and where that noun really is."""

    name: str
    image: bytes
    noun: str
    truth: np.ndarray
    """bool [H, W]"""


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


def run(url: str, output: Path) -> None:
    """Send each sample plain and streamed, write what came back, print a table.

    Raises LaunchError when the two ways disagree.
    """
    rows = [f"{'picture':<22} {'object':<12} {'box':<27} IoU coarse refined" + " " * 3]
    rows[0] += "prefill  decode  refine   total ms"
    with SegmentClient(url) as client:
        for sample in load_samples():
            ask: dict[str, Any] = {"object": sample.noun, "image": sample.image}
            began = time.perf_counter()
            plain = client.segment(**ask, return_base64=True)
            total_ms = (time.perf_counter() - began) * 1e3
            *_, final = client.segment(**ask, return_base64=True, stream=True)
            if not same_answer(plain, final):
                raise LaunchError(f"{sample.name}: the plain and the streamed answer differ")
            rows.append(_write(sample, plain, total_ms, output / sample.name))
    print("\n".join(rows))
    print(f"\nplain and streamed answers agree; pictures, masks and answers: {output.resolve()}")


def _write(sample: Sample, answer: dict[str, Any], total_ms: float, folder: Path) -> str:
    """Files of one answer, and its row of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "response.json").write_text(json.dumps(answer, indent=1))
    masks: dict[str, np.ndarray] = {}
    for kind in ("coarse", "refined"):
        encoded = answer.get(f"{kind}_mask_base64")
        if encoded is not None:
            (folder / f"{kind}.png").write_bytes(base64.b64decode(encoded))
            masks[kind] = decode_mask(encoded)
    drawn = overlay(decode(sample.image), masks.get("coarse"), masks.get("refined"))
    Image.fromarray(drawn).save(folder / "overlay.png")
    box, metrics = answer["bbox"], answer["metrics"]
    corners = " ".join(f"{box[k]:.3f}" for k in ("x_min", "y_min", "x_max", "y_max")) if box else ""
    model_ms = metrics["prefill_time_ms"] + metrics["decode_time_ms"]
    return (
        f"{sample.name:<22} {sample.noun:<12} {corners:<27} "
        f"{iou(masks.get('coarse'), sample.truth):>10.3f} "
        f"{iou(masks.get('refined'), sample.truth):>7.3f} "
        f"{metrics['prefill_time_ms']:>9.1f} {metrics['decode_time_ms']:>7.1f} "
        f"{total_ms - model_ms:>7.1f} {total_ms:>7.1f}"
    )
