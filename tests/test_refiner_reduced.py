"""Requests whose JPEG is decoded smaller: nearly the same masks, and the same refusals."""

from __future__ import annotations

import base64
import io
import tracemalloc
from collections.abc import Iterator
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from kestrel import image as image_module
from kestrel.api import InvalidRequest, TooLarge
from kestrel.config import Limits, RefinerConfig
from kestrel.image import decode
from kestrel.seg_refiner import (
    BACKENDS,
    SegmentRefineBitmapsResult,
    SegmentRefiner,
    boundary,
    guided,
    jpeg_box,
)
from kestrel.seg_refiner.boundary import BoundaryRefiner
from kestrel.seg_refiner.box import Size, mask_iou
from kestrel.seg_refiner.enlarge import reduction_for
from kestrel.seg_refiner.guided import GuidedRefiner
from kestrel.seg_refiner.jpeg_box import decode_box

ORIENTATION = 0x0112
REFINERS = ("boundary", "guided", "none")
OCTAGON = "M.3 0H.7L1 .3V.7L.7 1H.3L0 .7V.3Z"
MIDDLE = {"x_min": 0.25, "y_min": 0.26, "x_max": 0.75, "y_max": 0.74}
LARGE = {"x_min": 0.1, "y_min": 0.12, "x_max": 0.9, "y_max": 0.88}
WHOLE = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
TINY = {"x_min": 0.7, "y_min": 0.2, "x_max": 0.72, "y_max": 0.23}
WIDTH, HEIGHT = 2880, 2048


@pytest.fixture(scope="module")
def refiner() -> SegmentRefiner:
    return SegmentRefiner(RefinerConfig(selectable=REFINERS))


@cache
def scene(width: int, height: int, fills: float = 0.78) -> Image.Image:
    """A textured ellipse, which the octagon only roughly outlines, on another texture; ``fills``
    that much of the width."""
    rng = np.random.default_rng(width)

    def texture(level: float) -> np.ndarray:
        coarse = rng.normal(level, 25, (9, 12, 3)).astype(np.float32)
        fine = rng.normal(0, 5, (height // 4, width // 4, 3)).astype(np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + cv2.resize(
            fine, (width, height), interpolation=cv2.INTER_LINEAR
        )

    inside = np.zeros((height, width), np.float32)
    axes = (round(width * 0.5 * fills), round(height * 0.48 * fills))
    cv2.ellipse(inside, (width // 2, height // 2), axes, 0, 0, 360, 1.0, -1, cv2.LINE_AA)
    share = inside[..., None]
    pixels = share * texture(160) + (1 - share) * texture(80)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def file(
    width: int = WIDTH,
    height: int = HEIGHT,
    orientation: int = 1,
    fills: float = 0.78,
    **options: Any,
) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = io.BytesIO()
    scene(width, height, fills).save(
        content, **{"format": "JPEG", "quality": 90, "exif": exif.tobytes(), **options}
    )
    return content.getvalue()


def masks(result: SegmentRefineBitmapsResult) -> list[np.ndarray]:
    """Coarse and refined mask, bool [H, W]."""
    found = []
    for encoded in (result.coarse_mask_base64, result.refined_mask_base64):
        assert encoded is not None
        found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))) > 0)
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The reductions at which pictures, or boxes of them, are decoded."""
    seen: list[int] = []

    def noted_box(content: bytes, box: Any, limits: Limits, reduction: int) -> np.ndarray:
        seen.append(reduction)
        return decode_box(content, box, limits, reduction)

    def noted(*arguments: Any, reduction: int = 1, **named: Any) -> np.ndarray:
        seen.append(reduction)
        return decode(*arguments, reduction=reduction, **named)

    monkeypatch.setattr(image_module, "decode", noted)
    monkeypatch.setattr(jpeg_box, "decode_box", noted_box)
    yield seen


def both(
    refiner: SegmentRefiner, content: bytes, box: dict[str, float], name: str
) -> tuple[SegmentRefineBitmapsResult, SegmentRefineBitmapsResult]:
    """Refined from all pixels, and as a file."""
    given: Any = (OCTAGON, box)
    options: Any = {"return_base64": True, "refiner": name}
    whole = refiner.refine_with_bitmaps(decode(content), *given, **options)
    return whole, refiner.refine_encoded(content, *given, **options)


def differing(a: SegmentRefineBitmapsResult, b: SegmentRefineBitmapsResult) -> float:
    """Of the refined masks, per pixel of the picture."""
    assert a.reason == b.reason == "refined"
    assert a.coarse_mask_base64 == b.coarse_mask_base64
    first, second = masks(a)[1], masks(b)[1]
    assert first.shape == second.shape
    return float((first != second).mean())


@pytest.mark.parametrize(
    ("name", "box", "fills", "reduction"),
    [
        ("boundary", MIDDLE, 0.48, 2),
        ("guided", MIDDLE, 0.48, 1),
        ("none", MIDDLE, 0.48, 8),
        ("boundary", LARGE, 0.78, 1),
        ("boundary", WHOLE, 0.98, 1),
        ("none", WHOLE, 0.98, 8),
    ],
)
def test_masks_of_a_smaller_picture_are_those_of_the_whole_one(
    refiner: SegmentRefiner,
    decoded: list[int],
    name: str,
    box: dict[str, float],
    fills: float,
    reduction: int,
) -> None:
    whole, smaller = both(refiner, file(fills=fills), box, name)
    assert decoded == [reduction]
    assert masks(smaller)[1].shape == (HEIGHT, WIDTH)
    assert differing(whole, smaller) <= (0.002 if reduction == 2 else 0)
    if name != "none" and box is not WHOLE:
        coarse, refined = masks(smaller)
        assert (coarse != refined).sum() > 0.02 * coarse.sum()  # there was something to refine


@pytest.mark.parametrize("reduction", [4, 8])
@pytest.mark.parametrize("backend", [BoundaryRefiner, lambda: GuidedRefiner(RefinerConfig())])
def test_backends_take_pictures_that_are_smaller_still(backend: Any, reduction: int) -> None:
    refine = backend()
    # Neither side is a whole number of reduced pixels.
    content = file(2050, 1501)
    mask = np.zeros((1501, 2050), np.uint8)
    cv2.ellipse(mask, (1020, 755), (760, 580), 0, 0, 360, 1, -1)
    whole = refine(decode(content), mask)
    smaller = refine(decode(content, reduction=reduction), mask, reduction)
    assert smaller.shape == mask.shape and smaller.dtype == np.uint8
    outlines, _ = cv2.findContours(whole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    # Half a reduced pixel in the mean: one that lies a pixel aside is further off.
    assert (whole != smaller).sum() < 0.5 * reduction * len(max(outlines, key=len))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_refined_as_it_is_seen(
    refiner: SegmentRefiner, decoded: list[int], orientation: int
) -> None:
    whole, smaller = both(refiner, file(orientation=orientation, fills=0.48), MIDDLE, "boundary")
    assert decoded == [2]
    assert masks(smaller)[1].shape == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    assert differing(whole, smaller) <= 0.002


@pytest.mark.parametrize("name", REFINERS)
def test_a_tiny_object_is_looked_at_with_all_pixels_of_its_box(
    refiner: SegmentRefiner, decoded: list[int], name: str
) -> None:
    whole, smaller = both(refiner, file(), TINY, name)
    assert decoded == [8 if name == "none" else 1]
    assert whole.refined_mask_base64 == smaller.refined_mask_base64
    assert whole.refined_svg_path == smaller.refined_svg_path


@pytest.mark.parametrize("name", REFINERS)
@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP"}], ids=str)
def test_other_formats_are_decoded_whole(
    refiner: SegmentRefiner, decoded: list[int], options: dict[str, str], name: str
) -> None:
    content = file(300, 200, **options)
    whole, same = both(refiner, content, LARGE, name)
    assert decoded == [1]
    assert whole.refined_mask_base64 == same.refined_mask_base64


@pytest.mark.parametrize("module", [boundary, guided])
def test_boxes_keep_enough_pixels_on_both_sides(module: Any) -> None:
    least = module.LEAST_SIDE
    huge = 100 * least, 100 * least

    def by(width: int, height: int, picture: Size = huge) -> int:
        return reduction_for((width, height), picture, least)

    assert by(481, 321) == by(2 * least - 1, 2000) == 1
    assert by(2 * least, 2000) == by(2000, 2 * least) == 2
    assert by(4 * least, 400) == 4
    assert by(80 * least, 60 * least) == 8
    assert by(4 * least, 60) == 1  # long, and too narrow to spare any
    assert by(4 * least, 4 * least, (5 * least, 5 * least)) == 1  # most of the picture
    assert by(4 * least, 4 * least, (6 * least, 5 * least)) == 4


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("long", "short"), [(60_000, 1), (40_000, 7), (30_000, 40)])
def test_a_strip_takes_the_guided_filter_no_more_memory_than_its_pixels_do(
    long: int, short: int, turned: bool
) -> None:
    rng = np.random.default_rng(long)
    picture = rng.integers(0, 60, (short, long, 3), np.uint8)
    truth = np.zeros((short, long), np.uint8)
    truth[:, long // 4 : -long // 4] = 1
    picture[truth > 0] += 180
    coarse = np.roll(truth, long // 150, axis=1)
    if turned:
        picture, coarse, truth = picture.transpose(1, 0, 2), coarse.T, truth.T
    backend = GuidedRefiner(RefinerConfig())
    tracemalloc.start()
    try:
        refined = backend(picture, np.ascontiguousarray(coarse))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * coarse.size + 2**21
    assert mask_iou(refined, truth) > mask_iou(coarse, truth)


def test_a_backend_that_says_nothing_gets_every_pixel(
    decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def plain(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.append(image.shape)
        return mask

    monkeypatch.setitem(BACKENDS, "plain", lambda config: plain)
    result = SegmentRefiner(RefinerConfig(refiner="plain")).refine_encoded(file(), OCTAGON, WHOLE)
    assert result.reason == "refined"
    assert shapes == [(HEIGHT, WIDTH, 3)] and decoded == [1]


@pytest.mark.parametrize("asked", [1, 4, 64])
def test_a_backend_of_ones_own_gets_the_reduction_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    calls: list[Any] = []

    class Mine:
        def reduction(self, box: Size, picture: Size) -> int:
            assert picture == (801, 600)
            calls.append(box)
            return asked

        def __call__(self, image: Any, mask: Any, reduction: int = 1) -> Any:
            calls.append((image.shape[:2], mask.shape, reduction))
            return mask

    monkeypatch.setitem(BACKENDS, "mine", lambda config: Mine())
    refiner = SegmentRefiner(RefinerConfig(refiner="mine"))
    box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.5, "y_max": 0.5}
    result = refiner.refine_encoded(file(801, 600), "M0 0H1V1H0Z", box)
    assert result.reason == "refined"
    (width, height), call = calls
    # The box with a quarter of its sides all round.
    assert abs(width - 300) <= 4 and abs(height - 225) <= 4
    image, mask, reduction = call
    assert reduction == min(asked, 8)
    # Whole pixels of the smaller picture, which hold the box.
    assert image == tuple(-(-side // reduction) for side in mask)
    assert 0 <= mask[0] - height < 2 * reduction and 0 <= mask[1] - width < 2 * reduction


@pytest.mark.parametrize("name", REFINERS)
@pytest.mark.parametrize("path", [OCTAGON, "", "no path", "M0 0H0V0Z"])
def test_a_broken_file_is_refused_whatever_else_is_wrong(
    refiner: SegmentRefiner, name: str, path: str
) -> None:
    before = dict(refiner.outcomes)
    whole = file(300, 200)
    for broken in (whole[: len(whole) // 2], whole[:-100], b"", b"\xff\xd8\xff", b"<svg/>"):
        with pytest.raises(InvalidRequest) as caught:
            refiner.refine_encoded(broken, path, LARGE, refiner=name)
        assert caught.value.field == "image"
    assert refiner.outcomes == before


@pytest.mark.parametrize("name", REFINERS)
def test_a_good_file_with_a_bad_path_is_decoded_once_and_as_small_as_can_be(
    refiner: SegmentRefiner, decoded: list[int], name: str
) -> None:
    result = refiner.refine_encoded(file(300, 200), "", LARGE, refiner=name)
    assert result.reason == "no_path"
    assert decoded == [8] and "decode" in result.timings_ms


@pytest.mark.parametrize("name", REFINERS)
def test_the_limit_is_for_the_file_s_own_pixels_and_comes_before_decoding(
    decoded: list[int], name: str
) -> None:
    limited = SegmentRefiner(
        RefinerConfig(refiner=name), limits=Limits(max_image_pixels=300 * 200 - 1)
    )
    with pytest.raises(TooLarge, match="300 x 200"):
        limited.refine_encoded(file(300, 200), OCTAGON, LARGE)
    assert decoded == []
