"""The built-in picture that shows whether a model serves what it is served for."""

from __future__ import annotations

import io
import json
import logging
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from kestrel.api import ModelResult, SegmentRequest
from kestrel.scheduler import EngineError
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

log = logging.getLogger(__name__)

SIDE = 252
"""Pixels of the drawn picture."""


@lru_cache(maxsize=1)
def check_request(checkpoint: Path) -> SegmentRequest:
    """The first picture of the checkpoint's ``samples/samples.json``, or a drawn ball.

    Masks are asked for, so that every stage runs.
    """
    folder = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "samples"
    listing = folder / "samples.json"
    if listing.is_file():
        first = json.loads(listing.read_text(encoding="utf-8"))[0]
        image = (folder / first["file"]).read_bytes()
        return SegmentRequest(first["noun"], image, return_base64=True)
    picture = Image.new("RGB", (SIDE, SIDE), (120, 170, 90))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((70, 80, 180, 190), fill=(220, 70, 40), outline=(120, 30, 20), width=4)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return SegmentRequest("ball", encoded.getvalue(), return_base64=True)


def check_outcome(model: ModelResult, refined: SegmentRefineBitmapsResult | None) -> None:
    """Raises ``EngineError`` when the answer shows that a part does not work.

    Finding nothing is no fault of the engine: it is logged, as the picture may be strange to the
    model.
    """
    if model.bbox is not None and not model.token_ids:
        raise EngineError(
            "the model gives a box and no path: this checkpoint is not trained for segmentation"
        )
    if model.bbox is None:
        log.warning("the model finds no %s in the built-in picture", model.object)
    if refined is not None and refined.reason in ("raster_failed", "refine_failed"):
        raise EngineError(f"the refiner does not work: {refined.reason} (see the log)")
