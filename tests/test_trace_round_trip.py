"""A traced path, painted again, is the mask it came from; whoever reads it."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from kestrel.config import Limits
from kestrel.seg_refiner import bitmap_to_path, render_svg_to_soft_mask, trace, trace_work, tracers
from kestrel.seg_refiner.box import mask_iou
from kestrel.seg_refiner.clean import clean_mask
from kestrel.seg_refiner.raster import rasterize, rasterize_relative
from kestrel.seg_refiner.tracers import TracerMissing, load_tracer, pack_words
from kestrel.svg import parse_path, path_to_string, place_path


def have(tracer: str) -> bool:
    try:
        load_tracer(tracer)
    except TracerMissing:
        return False
    return True


TRACERS = [
    pytest.param(name, marks=pytest.mark.skipif(not have(name), reason=f"{name} is not installed"))
    for name in ("libpotrace", "pypotrace", "potracer")
]


def disc(height: int = 300, width: int = 400) -> np.ndarray:
    return cv2.circle(np.zeros((height, width), np.uint8), (180, 140), 90, 1, -1)


def ring() -> np.ndarray:
    return cv2.circle(disc(), (180, 140), 45, 0, -1)


def target() -> np.ndarray:
    return cv2.circle(ring(), (180, 140), 20, 1, -1)


def test_paths_keep_to_the_limits_of_paths():
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.random((400, 500), np.float32), (0, 0), 1.5) > 0.5
    free, _ = bitmap_to_path(noise)
    for limits in (Limits(max_path_chars=9000), Limits(max_path_commands=700)):
        with pytest.raises(ValueError, match="limit"):
            parse_path(free, limits)
        path, _ = bitmap_to_path(noise, limits=limits)
        assert len(path) < len(free) / 2
        assert parse_path(path, limits).commands
    assert bitmap_to_path(noise, limits=Limits(max_path_chars=10**7, max_path_commands=10**6)) == (
        free,
        bitmap_to_path(noise)[1],
    )


def pieces() -> np.ndarray:
    mask = cv2.ellipse(disc(), (330, 230), (60, 40), 30, 0, 360, 1, -1)
    return cv2.rectangle(mask, (5, 220), (80, 290), 1, -1)


def touching_the_rim() -> np.ndarray:
    mask = np.zeros((200, 200), np.uint8)
    mask[:, :120] = 1
    mask[150:] = 1
    return mask


def everything() -> np.ndarray:
    return np.ones((120, 160), np.uint8)


def blob(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    noise = cv2.resize(rng.random((7, 9)).astype(np.float32), (width, height), interpolation=2)
    mask = (noise > 0.5).astype(np.uint8)
    return cv2.circle(mask, (width // 2, height // 2), height // 4, 1, -1)


SHAPES = [disc, ring, target, pieces, touching_the_rim, everything]


def even_odd(d: str, bbox: dict[str, float], width: int, height: int) -> np.ndarray:
    placed = path_to_string(place_path(parse_path(d), bbox, width, height), 3)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<path fill="#fff" fill-rule="evenodd" d="{placed}"/></svg>'
    )
    return (render_svg_to_soft_mask(svg, width, height) > 0.5).astype(np.uint8)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda f: f.__name__)
def test_trace_gives_the_mask_back_under_both_fill_rules(shape, tracer):
    mask = shape()
    height, width = mask.shape
    d, bbox = bitmap_to_path(mask, tracer=tracer)
    assert mask_iou(mask, rasterize_relative(d, bbox, width, height)) >= 0.99
    assert mask_iou(mask, even_odd(d, bbox, width, height)) >= 0.99


@pytest.mark.parametrize("size", [(480, 640), (1213, 1546), (3024, 4032)])
def test_trace_of_large_pictures_loses_nothing_to_rounding(size):
    mask = blob(*size)
    d, bbox = bitmap_to_path(mask)
    again = rasterize_relative(d, bbox, size[1], size[0])
    assert mask_iou(mask, again) >= 0.99
    assert len(d) < 20_000


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (2, 24_000), (1, 60_000)])
def test_long_strips_of_a_pixel_or_two_are_outlined(size):
    mask = np.pad(np.ones(size, np.uint8), 2)
    d, bbox = bitmap_to_path(mask)
    assert mask_iou(mask, rasterize_relative(d, bbox, size[1] + 4, size[0] + 4)) >= 0.99


@pytest.mark.parametrize("size", [(3, 40_000), (40_000, 3), (9, 20_000), (30, 70_001), (4, 16_385)])
def test_a_long_strip_keeps_its_width(size):
    """Its length is halved to be traced; of three pixels of width, a third would then be gone."""
    mask = ellipse(*size)
    d, bbox = bitmap_to_path(mask)
    assert mask_iou(mask, rasterize_relative(d, bbox, size[1], size[0])) >= 0.98


@pytest.mark.parametrize("side", [6, 10, 20, 40, 80, 160])
@pytest.mark.parametrize("seed", range(3))
def test_small_objects_are_not_rounded_away(side, seed):
    rng = np.random.default_rng(seed)
    noise = cv2.resize(rng.random((4, 5)).astype(np.float32), (side, side), interpolation=2)
    mask = np.pad((noise > np.median(noise)).astype(np.uint8), 9)
    d, bbox = bitmap_to_path(mask, turdsize=0)
    again = rasterize_relative(d, bbox, side + 18, side + 18)
    assert mask_iou(mask, again) >= 0.99


def test_one_pixel_is_a_pixel():
    mask = np.zeros((5, 5), np.uint8)
    mask[2, 3] = 1
    d, bbox = bitmap_to_path(mask, turdsize=0)
    assert np.array_equal(rasterize_relative(d, bbox, 5, 5), mask)


@pytest.mark.parametrize("apart", [12, 24])
def test_specks_that_turdsize_drops_do_not_make_the_rest_jagged(apart):
    mask = disc()
    mask[::apart, ::apart] ^= 1
    assert "C" in bitmap_to_path(mask, turdsize=4)[0]


@pytest.mark.parametrize("tracer", TRACERS)
def test_the_tracers_are_one_algorithm(tracer):
    mask = target()
    d, bbox = bitmap_to_path(mask, tracer=tracer)
    reference, reference_bbox = bitmap_to_path(mask)
    assert bbox == reference_bbox
    a, b = (rasterize_relative(p, bbox, 400, 300) for p in (d, reference))
    assert mask_iou(a, b) > 0.998


@pytest.mark.parametrize("shape", SHAPES, ids=lambda f: f.__name__)
def test_coordinates_are_relative_to_the_box_of_the_mask(shape):
    mask = shape()
    d, bbox = bitmap_to_path(mask)
    ys, xs = np.nonzero(mask)
    height, width = mask.shape
    assert bbox == {
        "x_min": xs.min() / width,
        "y_min": ys.min() / height,
        "x_max": (xs.max() + 1) / width,
        "y_max": (ys.max() + 1) / height,
    }
    values = [v for _, coords in parse_path(d).commands for v in coords]
    assert min(values) >= 0
    assert max(values) <= 1
    assert max(values) > 0.98


@pytest.mark.parametrize("dtype", [bool, np.uint8])
@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_ones_bools_and_255_trace_alike(dtype, value):
    mask = (disc() * np.uint8(value)).astype(dtype)
    assert bitmap_to_path(mask) == bitmap_to_path(disc())


def test_a_view_of_a_mask_traces_as_its_copy():
    mask = blob(200, 300)
    view = mask[::-1, ::2]
    assert bitmap_to_path(view) == bitmap_to_path(view.copy())


@pytest.mark.parametrize("tracer", TRACERS)
def test_nothing_to_trace_is_none(tracer):
    mask = np.zeros((20, 30), np.uint8)
    assert bitmap_to_path(mask, tracer=tracer) is None
    mask[4, 5] = 1
    assert bitmap_to_path(mask, tracer=tracer) is None
    assert bitmap_to_path(mask, turdsize=0, tracer=tracer) is not None
    assert bitmap_to_path(np.zeros((0, 0), np.uint8), tracer=tracer) is None


def test_turdsize_drops_specks():
    mask = disc()
    mask[5:8, 5:8] = 1
    assert bitmap_to_path(mask, turdsize=2)[0].count("Z") == 2
    assert bitmap_to_path(mask, turdsize=9)[0].count("Z") == 1


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("turdsize", [2**31 - 1, 2**31, 2**40])
def test_a_turdsize_over_an_int_of_c_still_drops_everything(tracer, turdsize):
    assert bitmap_to_path(disc(), turdsize=turdsize, tracer=tracer) is None


def test_alphamax_zero_keeps_every_corner():
    assert "C" not in bitmap_to_path(ring(), alphamax=0.0)[0]
    assert "C" in bitmap_to_path(ring(), alphamax=1.0)[0]


def test_mask_that_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="H, W"):
        bitmap_to_path(np.zeros((3, 4, 1), np.uint8))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 63, 64, 65, 130])
def test_packed_words_hold_the_leftmost_pixel_in_the_highest_bit(width):
    rng = np.random.default_rng(width)
    crop = rng.integers(0, 2, (5, width), dtype=np.uint8)
    words = pack_words(crop)
    bits = words.dtype.itemsize * 8
    assert words.shape == (5, -(-width // bits))
    for y in range(5):
        for x in range(width):
            assert int(words[y, x // bits]) >> (bits - 1 - x % bits) & 1 == crop[y, x]


def test_missing_libpotrace_says_which_package_has_it(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(tracers.ctypes, "CDLL", no_library)
    monkeypatch.setattr(tracers.ctypes.util, "find_library", lambda name: None)
    tracers._libpotrace.cache_clear()
    tracers._auto.cache_clear()
    try:
        with pytest.raises(TracerMissing, match="apt-get install libpotrace0"):
            load_tracer("libpotrace")
        # "auto" goes on with what there is.
        assert bitmap_to_path(disc()) is not None
    finally:
        tracers._libpotrace.cache_clear()
        tracers._auto.cache_clear()


def test_the_slow_tracer_is_announced_once(monkeypatch, caplog):
    def missing():
        raise TracerMissing("libpotrace is not installed: apt-get install libpotrace0")

    monkeypatch.setitem(tracers._TRACERS, "libpotrace", missing)
    tracers._auto.cache_clear()
    try:
        for _ in range(3):
            bitmap_to_path(disc())
    finally:
        tracers._auto.cache_clear()
    assert sum("apt-get install libpotrace0" in r.getMessage() for r in caplog.records) == 1


def test_no_tracer_at_all_names_every_way_to_get_one(monkeypatch):
    monkeypatch.setattr(tracers, "_open_library", lambda: _raise(TracerMissing("no library")))
    monkeypatch.setitem(sys.modules, "potrace", None)
    caches = (
        tracers._libpotrace,
        tracers._pypotrace,
        tracers._potracer,
        tracers._auto,
    )
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(TracerMissing, match=r"no library.*pypotrace.*potracer"):
            bitmap_to_path(disc())
    finally:
        for cache in caches:
            cache.cache_clear()


def _raise(error):
    raise error


def test_potracer_is_not_taken_for_pypotrace():
    """Both packages install a module named ``potrace``; their bitmaps mean opposite things."""
    if have("potracer"):
        assert not have("pypotrace")
    extension = SimpleNamespace(__name__="potrace", _potrace=object())
    assert not tracers._is_pure_python(extension)


def test_large_round_objects_are_not_painted_to_be_checked(monkeypatch):
    painted = []
    paint = trace.load_rasterizer("auto")
    monkeypatch.setattr(
        trace, "load_rasterizer", lambda name: lambda *a: painted.append(a) or paint(*a)
    )
    big = cv2.circle(np.zeros((1500, 1500), np.uint8), (750, 750), 600, 1, -1)
    assert bitmap_to_path(big) is not None and not painted
    assert bitmap_to_path(disc()) is not None and len(painted) == 1


@pytest.mark.parametrize("seed", range(8))
def test_what_is_surely_faithful_gives_the_mask_back(seed):
    rng = np.random.default_rng(seed)
    noise = cv2.resize(rng.random((5, 5)).astype(np.float32), (500, 500), interpolation=2)
    crop = (noise > rng.uniform(0.3, 0.6)).astype(np.uint8)
    alphamax, opttolerance = rng.uniform(0, 4 / 3), rng.uniform(0, 1)
    tracing = trace._Tracing(load_tracer(), 0, opttolerance)
    path = tracing(crop, np.ones(2), alphamax, (500, 500))
    farthest = trace.FARTHEST + opttolerance
    # Whatever it may lose within that distance of the outline, it does not lose more.
    length = np.hypot(*np.diff(trace.points_of(path.commands), axis=0).T).sum()
    again = trace.load_rasterizer("auto")(path, 500, 500)
    assert np.count_nonzero(again != crop) <= length * farthest
    large = np.ones((4000, 4000), np.uint8)
    assert trace._surely_faithful(path, large, large, farthest)
    assert not trace._surely_faithful(path, crop[:60, :60], crop[:60, :60], farthest)


def test_details_that_half_the_size_would_lose_are_kept():
    mask = np.zeros((2100, 2100), np.uint8)
    mask[::100] = 1
    mask[:, ::100] = 1
    d, bbox = bitmap_to_path(mask)
    assert mask_iou(mask, rasterize_relative(d, bbox, 2100, 2100)) >= 0.99


def ellipse(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    axes = (width // 2, height // 3)
    return cv2.ellipse(mask, (width // 2, height // 2), axes, 0, 0, 360, 1, -1)


@pytest.mark.parametrize("size", [(2500, 2500), (2501, 2499), (2049, 40)])
def test_masks_traced_at_half_their_size_come_back(size):
    mask = ellipse(*size)
    d, bbox = bitmap_to_path(mask)
    assert mask_iou(mask, rasterize_relative(d, bbox, size[1], size[0])) >= 0.99


@pytest.mark.parametrize("most", [None, 16])
@pytest.mark.parametrize("size", [(150, 150_000), (150_000, 150)])
def test_a_long_mask_is_not_traced_at_a_size_that_takes_minutes(monkeypatch, size, most):
    load, sides = trace.load_tracer, []

    def noted(name):
        def traced(crop, *options):
            sides.append(max(crop.shape))
            return load(name)(crop, *options)

        return traced

    monkeypatch.setattr(trace, "load_tracer", noted)
    mask = ellipse(*size)
    d, bbox = bitmap_to_path(mask, max_vertices=most)
    assert max(sides) <= trace.LONGEST
    assert mask_iou(mask, rasterize_relative(d, bbox, size[1], size[0])) >= 0.9


def stripes(width: int, height: int, count: int) -> np.ndarray:
    """So many diagonal stripes, as wide as the gaps between them."""
    y, x = np.mgrid[:height, :width]
    return ((x / width + y / height) * 2 * count % 2 < 1).astype(np.uint8)


@pytest.mark.parametrize("most", [None, 16])
@pytest.mark.parametrize(
    ("size", "count", "iou"), [((1500, 2000), 40, 0.97), ((3000, 4000), 20, 0.97)]
)
def test_many_diagonal_edges_are_traced_with_no_more_work_than_that_of_a_second_or_three(
    monkeypatch, size, count, iou, most
):
    load, looks = trace.load_tracer, []

    def noted(name):
        def traced(crop, *options):
            looks.append(trace_work.work(crop))
            return load(name)(crop, *options)

        return traced

    monkeypatch.setattr(trace, "load_tracer", noted)
    mask = stripes(size[1], size[0], count)
    assert trace_work.work(mask) > trace_work.MOST_WORK
    d, bbox = bitmap_to_path(mask, max_vertices=most)
    assert sum(looks) <= (2 if most else 1) * trace_work.MOST_WORK
    if most is None:
        assert mask_iou(mask, rasterize_relative(d, bbox, size[1], size[0])) >= iou


def test_work_is_that_of_the_looks_along_straight_edges():
    def least(mask: np.ndarray) -> float:
        """Without what each step counts by itself."""
        return trace_work.work(mask) - 60 * trace_work._outline_steps(mask)

    # Two diagonals of 3,000 corners each look 3,000 times 3,000 / 2 corners ahead, twice over: a
    # pixel that an outline goes through has two steps.
    y, x = np.mgrid[:3000, :3000]
    band = (np.abs(x - y) < 300).astype(np.uint8)
    expected = 2 * (2 * 2700) * (2 * 2700) / 2
    assert expected / 2 < least(band) < 2 * expected
    # Along rows and columns there are no corners.
    box = np.zeros((3000, 3000), np.uint8)
    box[10:-10, 10:-10] = 1
    assert trace_work.work(box) < trace_work.MOST_WORK / 10


@pytest.mark.parametrize("apart", [6, 8])
def test_what_halving_lost_is_not_surely_given_back(apart):
    """Whiskers on a block, one pixel of each two by two: at half the size they are gone."""
    mask = np.zeros((2600, 2600), np.uint8)
    mask[:-300] = 1
    y, x = np.mgrid[-300:0, :2600]
    mask[-300:] |= (x - y) % apart == 1
    mask = clean_mask(mask)
    halved = trace._halved(mask)
    path = trace._Tracing(load_tracer(), 2, 0.2)(halved, np.full(2, 0.5), 1.0, (2600, 2600))
    assert mask_iou(mask, rasterize(path, 2600, 2600)) < trace.FAITHFUL_IOU
    farthest = (trace.FARTHEST + 0.2) / 0.5
    assert not trace._surely_faithful(path, mask, halved, farthest)
    # The block alone loses nothing in halving.
    mask[-300:] = 0
    assert trace._surely_faithful(path, mask, trace._halved(mask), farthest)


def sine(length: int) -> np.ndarray:
    """A wire of one pixel: every smooth trace is off it by a pixel."""
    x = np.arange(length)
    points = np.stack([x, length / 6 * (1 + np.sin(20 * x / length))], 1).astype(np.int32)
    return cv2.polylines(np.zeros((length // 3 + 2, length), np.uint8), [points], False, 1)


def rings(side: int) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    for radius in range(4, side // 2 - 2, 4):
        cv2.circle(mask, (side // 2, side // 2), radius, 1, 1)
    return mask


@pytest.mark.parametrize(
    ("mask", "options", "least"),
    [
        # No trace within the budget is faithful; the first is at 0.58.
        (sine(1500), {"max_vertices": 4096}, 0.9),
        (rings(200), {"max_vertices": 3000}, 0.85),
        # The faithful trace is too long to be written; the first is at 0.61.
        (sine(400), {"limits": Limits(max_path_chars=4000)}, 0.84),
        (sine(400), {"limits": Limits(max_path_commands=1000)}, 0.84),
    ],
    ids=["wire", "rings", "characters", "commands"],
)
def test_a_worse_trace_is_not_taken_where_a_better_one_is_within_the_budget(mask, options, least):
    height, width = mask.shape
    d, bbox = bitmap_to_path(mask, **options)
    assert mask_iou(mask, rasterize_relative(d, bbox, width, height)) >= least


def test_the_sharpest_trace_is_not_thrown_away_for_being_less_than_faithful():
    """Of so few pixels each counts, and Potrace drops the one that stands alone."""
    mask = np.zeros((7, 2), np.uint8)
    mask[(0, 1, 1, 2, 3, 6), (1, 0, 1, 1, 1, 1)] = 1
    d, bbox = bitmap_to_path(mask)
    assert mask_iou(mask, rasterize_relative(d, bbox, 2, 7)) > 0.8


@pytest.mark.parametrize(
    "limits",
    [Limits(max_path_commands=3), Limits(max_path_chars=8)],
    ids=["commands", "characters"],
)
@pytest.mark.parametrize("mask", [disc(), disc()[140:141, 180:181]], ids=["disc", "pixel"])
def test_limits_that_even_one_pixel_breaks_end_without_a_path(mask, limits):
    assert bitmap_to_path(mask, turdsize=0, limits=limits) is None


def islands(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    mask = np.zeros((300, 300), np.uint8)
    for x, y in rng.integers(0, 295, (count, 2)):
        mask[y : y + 4, x : x + 4] ^= 1
    return mask


@pytest.mark.parametrize("most", [16, 50, 300, 4096])
@pytest.mark.parametrize(
    "mask",
    [disc(), target(), islands(400), np.tile(np.eye(2, dtype=np.uint8), (30, 30))],
    ids=["disc", "target", "islands", "chess"],
)
def test_a_path_keeps_to_its_vertex_budget(mask, most):
    d, bbox = bitmap_to_path(mask, max_vertices=most, turdsize=0)
    assert sum(name in "LC" for name, _ in parse_path(d).commands) <= most
    assert bbox == bitmap_to_path(mask, turdsize=0)[1]


def test_a_vertex_budget_that_is_kept_changes_nothing():
    assert bitmap_to_path(target(), max_vertices=1000) == bitmap_to_path(target())


def test_a_path_of_fewer_vertices_still_shows_the_object():
    mask = blob(600, 800)
    whole, bbox = bitmap_to_path(mask)
    few = sum(name in "LC" for name, _ in parse_path(whole).commands) // 2
    d, _ = bitmap_to_path(mask, max_vertices=few)
    assert len(d) < 0.7 * len(whole)
    assert mask_iou(mask, rasterize_relative(d, bbox, 800, 600)) > 0.95


def test_dust_that_halving_would_lose_is_still_an_object():
    mask = np.zeros((150, 150), np.uint8)
    mask[::3, ::3] = 1
    d, _ = bitmap_to_path(mask, turdsize=0, max_vertices=16)
    assert "Z" in d


@pytest.mark.parametrize("decimals", [1, 2, 5, 9])
def test_coordinates_have_as_many_decimals_as_asked(decimals):
    d, _ = bitmap_to_path(disc(), decimals=decimals)
    longest = max(len(digits) for digits in re.findall(r"\.(\d+)", d))
    assert longest == decimals
