"""The built-in picture that shows whether a model serves what it is served for."""

from __future__ import annotations

import io
import json
import logging
import math
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from kestrel.api import ModelResult, SegmentRequest, validate_segment
from kestrel.config import MOST_IMAGE_PIXELS, Limits, ModelSource, RuntimeConfig
from kestrel.image import decode
from kestrel.job import EngineError
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

log = logging.getLogger(__name__)

SIDE = 252
"""Pixels of the drawn picture."""


@lru_cache(maxsize=4)
def check_request(folder: Path | None, most_pixels: int = MOST_IMAGE_PIXELS) -> SegmentRequest:
    """The first picture of ``samples/samples.json`` in a checkpoint's folder, or a drawn ball;
    shrunk to ``most_pixels`` where it has more.

    Masks are asked for, so that every stage runs. A file of that name which is something else is
    logged and passed over.
    """
    listed = folder / "samples" / "samples.json" if folder is not None else None
    if listed is not None and listed.is_file():
        try:
            return _first_sample(listed, most_pixels)
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("%s lists no picture and noun (%r); a ball is drawn", listed, error)
    picture = Image.new("RGB", (SIDE, SIDE), (120, 170, 90))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((70, 80, 180, 190), fill=(220, 70, 40), outline=(120, 30, 20), width=4)
    return SegmentRequest("ball", _png(picture, most_pixels), return_base64=True)


def _png(picture: Image.Image, most_pixels: int) -> bytes:
    """The picture, shrunk to ``most_pixels`` where it has more."""
    scale = math.sqrt(most_pixels / (picture.width * picture.height))
    if scale < 1:
        width = min(max(1, int(picture.width * scale)), most_pixels)
        height = min(max(1, int(picture.height * scale)), most_pixels // width)
        picture = picture.resize((width, height))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def _first_sample(listed: Path, most_pixels: int) -> SegmentRequest:
    """Raises what is wrong with the file, its entry or the picture."""
    first = json.loads(listed.read_text(encoding="utf-8"))[0]
    image = (listed.parent / first["file"]).read_bytes()
    request = validate_segment(object=first["noun"], image=image, return_base64=True)
    pixels = decode(image)
    if pixels.shape[0] * pixels.shape[1] > most_pixels:
        request.image = _png(Image.fromarray(pixels), most_pixels)
    return request


class Unfit(EngineError):
    """The model does not do what it is served for: ``cause``, and the ``remedy``."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause, self.remedy = cause, remedy

    def __str__(self) -> str:
        return f"{self.cause}. {self.remedy[0].upper()}{self.remedy[1:]}"


def check_outcome(
    model: ModelResult, refined: SegmentRefineBitmapsResult | None, config: RuntimeConfig
) -> bool:
    """Whether something was found; raises ``EngineError`` when the answer shows that a part does
    not work.

    Finding nothing is no fault of the engine: it is logged, as the picture may be strange to the
    model.
    """
    found = model.bbox is not None or model.parse_error is not None
    if not found:
        log.warning("the model finds no %s in the built-in picture", model.object)
    elif model.parse_error is not None or not model.path:
        given = "a box and a path that is not whole" if model.path else "a box and no path"
        cause = (
            f"{config.model} gives {given if model.bbox else 'no box'} for the built-in picture "
            f"({model.parse_error or 'it ended at once'}): its checkpoint "
            f"({_described(config.located)}) is not trained for segmentation"
        )
        room = ""
        if model.finish_reason == "length":
            cause += ", or max_context and kv_cache_bytes leave its answer too little room"
            room = "raise those where they are set; or "
        elif model.path and _bounds_paths(config.limits):
            cause += ", or limits.max_path_chars or max_path_commands is too low for its paths"
            room = "raise those; or "
        if not config.allow_empty_paths:
            raise Unfit(
                cause,
                f"{room}serve one that is: a Moondream 3 segmentation checkpoint, as "
                "model: {repo, filename, revision} or {path}; or set allow_empty_paths: true to "
                "serve boxes alone",
            )
        log.warning("%s; it is served, as allow_empty_paths is set", cause)
    if refined is not None and refined.reason in ("raster_failed", "refine_failed"):
        raise EngineError(f"the refiner does not work: {refined.reason} (see the log)")
    return found


def _bounds_paths(limits: Limits) -> bool:
    """Whether they let in less of a path than by default."""
    usual = Limits()
    return (
        limits.max_path_chars < usual.max_path_chars
        or limits.max_path_commands < usual.max_path_commands
    )


def not_finite(config: RuntimeConfig, dtype: torch.dtype) -> Unfit:
    """What a model is refused with that computes NaN or infinity for the built-in picture."""
    name = str(dtype).removeprefix("torch.")
    cause = (
        f"{config.model} computes scores that are not finite in {name}: its weights "
        f"({_described(config.located)}) hold NaN or infinity"
    )
    if dtype != torch.float16:
        return Unfit(cause, "download or convert the weights again")
    return Unfit(
        f"{cause}, or its activations leave the range of float16",
        "set dtype: bfloat16 or float32; if that does not help, download the weights again",
    )


def _described(source: ModelSource) -> str:
    if source.repo is None:
        return str(source.path)
    return f"{source.repo}@{source.revision}" + (f" {source.filename}" if source.filename else "")
