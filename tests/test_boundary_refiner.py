"""The boundary refiner: nearer to the object than the guided filter, and no harm to good masks."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from kestrel.config import ConfigError, RefinerConfig
from kestrel.seg_refiner import BACKENDS, SegmentRefiner
from kestrel.seg_refiner import boundary as boundary_module
from kestrel.seg_refiner.boundary import MODEL, WEIGHTS, BoundaryRefiner, load_network
from kestrel.seg_refiner.box import mask_iou
from kestrel.seg_refiner.guided import GuidedRefiner
from kestrel.seg_refiner.trust import (
    MOVED,
    MOVED_IN_DETAIL,
    VERTICES,
    moved_by,
    trusted,
    vertices_of,
)

SQUARE = "M0 0H1V1H0Z"
BOX = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}


@pytest.fixture(scope="module")
def refiner() -> BoundaryRefiner:
    return BoundaryRefiner()


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of three scales between two colours, float32 [h, w, 3]."""
    share = np.zeros((height, width), np.float32)
    for cells, strength in ((4, 0.5), (16, 0.3), (64, 0.2)):
        grid = rng.random((cells, cells), dtype=np.float32)
        share += strength * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    first, second = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    return first + share[..., None] * (second - first)


def scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture of a wavy textured thing on a texture, its mask, and 32 vertices near its outline."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    radius = np.ones_like(angle)
    for wave in range(2, 8):
        radius += rng.normal(0, 0.5 / wave) * np.cos(wave * angle + rng.uniform(0, 6.3))
    radius = np.clip(radius, 0.3, 1.6) * 0.26 * min(height, width)
    outline = np.stack([np.cos(angle) * radius + width / 2, np.sin(angle) * radius + height / 2], 1)
    truth = cv2.fillPoly(
        np.zeros((height, width), np.uint8), [np.round(outline).astype(np.int32)], 1
    )
    ground = texture(rng, height, width)
    soft = cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 0.8)[..., None]
    picture = (
        ground + soft * (texture(rng, height, width) - ground) + rng.normal(0, 4, ground.shape)
    )
    size = np.ptp(outline, axis=0).max()
    vertices = outline[:: 720 // 32][:32] + 0.02 * size * rng.standard_normal((32, 2))
    coarse = cv2.fillPoly(np.zeros_like(truth), [np.round(vertices).astype(np.int32)], 1)
    return np.clip(picture, 0, 255).astype(np.uint8), truth, coarse


@pytest.mark.parametrize("height, width", [(180, 240), (900, 700)])
def test_outlines_are_nearer_than_those_of_the_guided_filter(refiner, height, width):
    guided = GuidedRefiner(RefinerConfig())
    ours, theirs, before = [], [], []
    for seed in range(8):
        picture, truth, coarse = scene(seed, height, width)
        before.append(mask_iou(coarse, truth))
        ours.append(mask_iou(refiner(picture, coarse), truth))
        theirs.append(mask_iou(guided(picture, coarse), truth))
    # In parts of what is left to gain: large scenes come near to 1 with either.
    assert 1 - np.mean(ours) < 0.9 * (1 - np.mean(theirs))
    assert np.mean(np.array(ours) < np.array(before) - 0.01) <= 0.1


def test_a_perfect_mask_stays_as_it_is(refiner):
    for seed in range(12):
        picture, truth, _ = scene(seed, 180, 240)
        assert mask_iou(refiner(picture, truth), truth) > 0.98
    kept = [mask_iou(refiner(p, t), t) for p, t, _ in (scene(s, 400, 300) for s in range(12))]
    assert np.mean(kept) > 0.99


def test_true_masks_are_left_alone_and_few_jittered_vertices_are_not(refiner):
    scenes = [scene(seed, 400, 300) for seed in range(12)]
    left = [np.array_equal(refiner(picture, truth), truth) for picture, truth, _ in scenes]
    kept = [np.array_equal(refiner(picture, coarse), coarse) for picture, _, coarse in scenes]
    assert sum(left) >= 10 and sum(kept) == 0


@pytest.mark.parametrize("pieces", [1, 2])
def test_detail_counts_vertices_whatever_the_size(pieces):
    corners = np.array([[0.1, 0.2], [0.9, 0.1], [0.8, 0.9], [0.5, 0.6], [0.2, 0.9]])
    for side in (100, 1000):
        mask = np.zeros((side, pieces * side), np.uint8)
        for piece in range(pieces):
            shape = (corners * (1 - 0.5 * piece) + [piece, 0]) * side
            cv2.fillPoly(mask, [np.round(shape).astype(np.int32)], 1)
        assert 5 <= vertices_of(mask) <= 8
    angle = np.linspace(0, 2 * np.pi, 2000)
    star = (0.3 + 0.05 * np.sin(40 * angle)) * np.stack([np.cos(angle), np.sin(angle)])
    detailed = np.zeros((1000, 1000), np.uint8)
    cv2.fillPoly(detailed, [np.round(500 + 1000 * star.T).astype(np.int32)], 1)
    assert vertices_of(detailed) > VERTICES


def disc(radius: float, waves: int = 0) -> np.ndarray:
    """uint8 [256, 256] 0/1, with as many dents as ``waves``."""
    angle = np.linspace(0, 2 * np.pi, 4000)
    reach = radius * (1 + 0.08 * np.sin(waves * angle) * (waves > 0))
    outline = np.stack([128 + reach * np.cos(angle), 128 + reach * np.sin(angle)], 1)
    return cv2.fillPoly(np.zeros((256, 256), np.uint8), [np.round(outline).astype(np.int32)], 1)


def test_distance_between_outlines_is_in_pixels():
    coarse = disc(60).astype(np.float32)
    assert moved_by(coarse, coarse) == 0
    for further in (2, 4, 8):
        moved = moved_by(coarse, disc(60 + further).astype(np.float32))
        assert 0.7 * further < moved < 1.2 * further


def test_an_outline_with_detail_may_move_further_and_is_trusted():
    between = (MOVED + MOVED_IN_DETAIL) / 2
    for waves, expected in ((0, False), (30, True)):
        mask = disc(80, waves)
        coverage = mask.astype(np.float32)
        shifts = [np.roll(mask, shift, 1).astype(np.float32) for shift in range(1, 8)]
        near = [soft for soft in shifts if abs(moved_by(coverage, soft) - between) < 0.4]
        assert near and all(trusted(mask, coverage, soft) is expected for soft in near)
        assert trusted(mask, coverage, coverage)
        assert not trusted(mask, coverage, np.roll(mask, 12, 1).astype(np.float32))


def test_a_picture_without_edges_is_rounded_no_more_than_by_the_guided_filter(refiner):
    guided = GuidedRefiner(RefinerConfig())
    flat = np.full((200, 200, 3), 127, np.uint8)
    for seed in range(4):
        _, _, coarse = scene(seed, 200, 200)
        ours = mask_iou(refiner(flat, coarse), coarse)
        assert ours > mask_iou(guided(flat, coarse), coarse) - 0.005


@pytest.mark.parametrize(
    "height, width", [(1, 1), (1, 300), (300, 1), (3, 5), (17, 4000), (4000, 17), (33, 47)]
)
def test_any_shape_is_refined(refiner, height, width):
    rng = np.random.default_rng(height * 5000 + width)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for mask in (
        np.ones((height, width), np.uint8),
        (rng.random((height, width)) < 0.3).astype(np.uint8),
        np.pad(np.ones((1, 1), np.uint8), ((0, height - 1), (0, width - 1))),
    ):
        refined = refiner(picture, mask)
        assert refined.shape == mask.shape
        assert refined.dtype == np.uint8
        assert refined.max(initial=0) <= 1


def test_an_empty_mask_stays_empty(refiner):
    picture, _, coarse = scene(0, 60, 80)
    assert not refiner(picture, np.zeros_like(coarse)).any()


def test_neither_picture_nor_mask_is_written_to(refiner):
    picture, _, coarse = scene(1, 180, 240)
    picture.flags.writeable = coarse.flags.writeable = False
    refiner(picture, coarse)
    refiner(picture[:, ::-1], coarse[:, ::-1])


def test_a_mirrored_picture_gives_the_mirrored_mask(refiner):
    picture, _, coarse = scene(2, 192, 240)
    straight = refiner(picture, coarse)
    mirrored = refiner(
        np.ascontiguousarray(picture[:, ::-1]), np.ascontiguousarray(coarse[:, ::-1])
    )
    assert mask_iou(np.ascontiguousarray(mirrored[:, ::-1]), straight) > 0.97


def test_threads_do_not_disturb_each_other(refiner):
    scenes = [scene(seed, 180, 240) for seed in range(6)]
    alone = [refiner(picture, coarse) for picture, _, coarse in scenes]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda s: refiner(s[0], s[2]), scenes * 3))
    for expected, got in zip(alone * 3, together, strict=True):
        assert np.array_equal(expected, got)


def test_without_onnxruntime_the_install_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    load_network.cache_clear()
    with pytest.raises(ConfigError, match=r'pip install "onnxruntime'):
        BACKENDS["boundary"](RefinerConfig())


def test_other_refiners_run_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    picture, _, _ = scene(0, 60, 80)
    result = SegmentRefiner(RefinerConfig(refiner="guided")).refine_with_bitmaps(
        picture, SQUARE, BOX
    )
    assert result.reason == "refined"


def test_a_whole_request_is_refined():
    picture, _, _ = scene(0, 180, 240)
    refiner = SegmentRefiner(RefinerConfig(refiner="boundary"))
    result = refiner.refine_with_bitmaps(picture, SQUARE, BOX, return_base64=True)
    assert result.reason == "refined"
    assert result.refined_mask_base64


def test_the_refiner_process_stays_without_torch():
    program = (
        "import sys, numpy as np\n"
        "from kestrel.seg_refiner.boundary import BoundaryRefiner\n"
        "mask = np.zeros((64, 64), np.uint8); mask[16:48, 16:48] = 1\n"
        "BoundaryRefiner()(np.zeros((64, 64, 3), np.uint8), mask)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_the_weights_are_small_enough_for_the_repository():
    assert MODEL.stat().st_size <= 4 * 2**20


def test_sides_the_network_sees_are_those_it_can_halve():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 7, 2)) + 1)
        small, coverage = boundary_module._at_working_size(
            np.zeros((height, width, 3), np.uint8), np.ones((height, width), np.uint8)
        )
        assert small.shape[:2] == coverage.shape
        assert not any(side % boundary_module.STEP for side in coverage.shape)
        assert max(coverage.shape) <= boundary_module.WORKING_SIDE + boundary_module.STEP


def test_the_network_in_whole_numbers_says_what_its_weights_say(refiner):
    as_trained = BoundaryRefiner(load_network(MODEL.with_name(WEIGHTS)))
    for seed, size in enumerate([(180, 240), (900, 700), (400, 300), (64, 64)]):
        picture, _, coarse = scene(seed, *size)
        exact, quick = as_trained.look(picture, coarse), refiner.look(picture, coarse)
        assert not np.array_equal(exact.soft, quick.soft)
        assert np.abs(exact.soft - quick.soft).mean() < 2e-3
        masks = as_trained(picture, coarse), refiner(picture, coarse)
        assert mask_iou(*masks) > 0.998
