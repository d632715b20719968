"""A large JPEG, decoded smaller, shows the model something else than the whole of it."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from kestrel import InferenceEngine, RuntimeConfig, pictures
from kestrel.config import SHIPPED_MODELS, Limits
from kestrel.image import decode, probe
from kestrel.moondream.config import MOONDREAM_3, MoondreamConfig
from kestrel.moondream.crops import crop_reduction, overlap_crops
from kestrel.ops.lanczos import resized, resized_by_pillow
from kestrel.svg import parse_path

NANO = SHIPPED_MODELS / "nano"
VISION = MoondreamConfig.from_file(NANO / "config.json").vision
SIDE = VISION.crop_size


def patterned(width: int, height: int) -> Image.Image:
    """Waves, stripes and edges of many sizes, in colour."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / a + y / b) for a, b in ((9, 31), (41, -13), (150, 70))]
    plane = np.stack(waves, -1) * 60 + 128
    plane[(x // 90 + y // 70) % 5 == 0] = (250, 30, 60)
    plane[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2] = (20, 180, 40)
    return Image.fromarray(plane.clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


def cropped(content: bytes) -> tuple[int, np.ndarray]:
    header = probe(content)
    by = crop_reduction(header.width, header.height, header.reduction, VISION)
    extent = (header.height / by, header.width / by)
    return by, overlap_crops(decode(content, reduction=by), VISION, extent)[0][0]


@pytest.mark.parametrize(
    ("width", "height", "by", "orientation"),
    [
        (4 * SIDE, 4 * SIDE + 60, 2, 1),
        (4 * SIDE + 3, 5 * SIDE + 1, 2, 1),
        (5 * SIDE + 1, 4 * SIDE, 2, 6),
        (8 * SIDE + 5, 9 * SIDE + 7, 4, 1),
        (16 * SIDE + 1, 16 * SIDE + 3, 8, 1),
        (4 * SIDE - 1, 9 * SIDE, 1, 1),
        # Turned round, a part of a pixel would come first.
        (4 * SIDE + 3, 5 * SIDE + 1, 1, 3),
    ],
)
def test_a_crop_shows_another_picture(width, height, by, orientation):
    content = jpeg(patterned(width, height), orientation)
    reduction, crop = cropped(content)
    assert reduction == by
    whole = overlap_crops(decode(content), VISION)[0][0]
    off = np.abs(crop.astype(int) - whole)
    # An eighth is decoded as the means of blocks, which are rounded.
    assert off.mean() < (1 if by == 8 else 0.5) and np.percentile(off, 99.9) <= 12
    assert (reduction == 1) == (not off.any())


def test_an_extent_is_taken_for_whole_pixels():
    small = np.array(patterned(300, 400))
    for extent in ((400.0, 300.0), (399.5, 299.25), (399.125, 300.0)):
        found = resized(small, 61, 87, extent)
        assert (found == resized_by_pillow(small, 61, 87, extent)).all()
    assert (resized(small, 61, 87, (399.5, 299.25)) != resized(small, 61, 87)).any()


def test_detail_is_lost_to_a_model_with_local_crops():
    assert crop_reduction(9000, 9000, 8, MOONDREAM_3.vision) == 1
    one_crop = dataclasses.replace(MOONDREAM_3.vision, max_crops=0)
    assert crop_reduction(9000, 9000, 8, one_crop) == 8


def test_what_no_jpeg_is_comes_smaller():
    file = io.BytesIO()
    patterned(8 * SIDE, 8 * SIDE).save(file, "PNG", compress_level=1)
    assert cropped(file.getvalue())[0] == 1


async def test_a_large_jpeg_is_answered_otherwise_than_its_pixels(monkeypatch):
    decoded: list[int] = []
    real = pictures.decode_image

    def counted(image: bytes, limits: Limits, reduction: int = 1) -> np.ndarray:
        decoded.append(reduction)
        return real(image, limits, reduction=reduction)

    monkeypatch.setattr(pictures, "decode_image", counted)
    entry = json.loads((NANO / "samples" / "samples.json").read_text())[0]
    with Image.open(NANO / "samples" / entry["file"]) as sample:
        scale = 4 * SIDE / min(sample.size) + 0.01
        size = (round(sample.width * scale), round(sample.height * scale))
        content = jpeg(sample.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    async with await InferenceEngine.create(RuntimeConfig()) as engine:
        smaller, whole = [
            await engine.segment(image=image, object=entry["noun"], return_base64=True)
            for image in (content, decode(content))
        ]
    assert decoded[-2:] == [2, 1]
    boxes = [list(r.output["segments"][0]["bbox"].values()) for r in (smaller, whole)]
    assert np.abs(np.subtract(*boxes)).max() < 0.02
    for result in (smaller, whole):
        segment = result.output["segments"][0]
        assert parse_path(segment["svg_path"], Limits())
        assert segment["refined_mask_base64"]
