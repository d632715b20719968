"""The fast rasteriser paints what the reference does, and only where the path is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kestrel.config import Limits
from kestrel.seg_refiner import SegmentRefiner, render_svg_to_soft_mask, svg_from_path
from kestrel.seg_refiner.raster import (
    RasterizerMissing,
    _within_reach,
    check_length,
    load_rasterizer,
    rasterize,
    rasterize_relative,
)
from kestrel.svg import Path, SvgPathError, parse_path, place_path

WHOLE = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}


def have_skia() -> bool:
    try:
        load_rasterizer("skia")
    except RasterizerMissing:
        return False
    return True


# The reference compared with itself would say nothing.
needs_skia = pytest.mark.skipif(not have_skia(), reason="Skia does not load here")


def polygon(seed: int, vertices: int = 32) -> str:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, vertices))
    radius = 0.3 + 0.2 * rng.random(vertices)
    points = zip(0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle), strict=True)
    return "M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in points) + "Z"


def disagreement(a: np.ndarray, b: np.ndarray) -> float:
    """Differing pixels per pixel of outline."""
    outline = np.count_nonzero(a[:, 1:] != a[:, :-1]) + np.count_nonzero(a[1:] != a[:-1])
    return np.count_nonzero(a != b) / max(1, outline)


@needs_skia
@pytest.mark.parametrize("size", [(320, 240), (1546, 1213), (9000, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_skia_and_resvg_differ_on_few_outline_pixels(size, seed):
    width, height = size
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.7, "y_max": 0.95}
    fast = rasterize_relative(polygon(seed), box, width, height, "skia")
    reference = rasterize_relative(polygon(seed), box, width, height, "resvg")
    assert fast.dtype == reference.dtype == np.uint8
    assert fast.shape == reference.shape == (height, width)
    assert set(np.unique(fast)) == {0, 1}
    assert disagreement(reference, fast) < 0.08


@needs_skia
@pytest.mark.parametrize(
    "d",
    [
        "M.1.1H.9V.9H.1z",
        "m.2.2q.5-.3.6.2t-.1.5-.5-.7z",
        "M.1.5C.1.1.9.1.9.5S.1.9.1.5",
        "M.1.5s.3-.8.8 0-.2.4-.8 0",
        "M.5.1a.3.2 30 11-.1.7z",
        "M.5.1A.3.2 30 0 0 .4.8z",
        "M.5.1A.3.2-60 1 0 .4.8z",
        "M.5.1A.3.2 0 0 1 .4.8z",
        "M.2.5a.01.02 20 0 1 .6 0z",
        "M.1.1L.9.1.9.9.1.9ZM.3.3L.7.3.7.7.3.7Z",
        "M.1.1L.9.1.9.9.1.9ZM.3.3L.3.7.7.7.7.3Z",
        "M.5.05L.8.95.02.4H.98L.2.95Z",
        "M.1.1L.9.5.1.9zl.3.4L.9.9",
    ],
)
def test_every_kind_of_command_is_painted_as_the_reference_reads_it(d):
    """The reference parses the text itself: this checks the grammar as well."""
    size = 400
    document = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
        f'viewBox="0 0 1 1"><path fill="#fff" d="{d}"/></svg>'
    )
    reference = render_svg_to_soft_mask(document, size, size) > 0.5
    fast = rasterize_relative(d, WHOLE, size, size, "skia")
    assert reference.sum() > 1000
    assert disagreement(reference, fast.astype(bool)) < 0.12


@pytest.mark.parametrize("painter", [pytest.param("skia", marks=needs_skia), "resvg"])
def test_the_threshold_is_more_than_half_a_pixel(painter):
    half = {"x_min": 0.0, "y_min": 0.0, "x_max": 0.5, "y_max": 1.0}
    more = {"x_min": 0.0, "y_min": 0.0, "x_max": 0.53, "y_max": 1.0}
    square = "M0 0H1V1H0Z"
    for box, row in ((half, [1, 1, 0, 0, 0]), (more, [1, 1, 1, 0, 0])):
        assert rasterize_relative(square, box, 5, 4, painter).tolist() == [row] * 4


def test_winding_is_non_zero_as_svg_has_it():
    same = "M0 0H1V1H0ZM.25.25H.75V.75H.25Z"
    against = "M0 0H1V1H0ZM.25.25V.75H.75V.25Z"
    assert rasterize_relative(same, WHOLE, 40, 40).sum() == 1600
    assert rasterize_relative(against, WHOLE, 40, 40).sum() == 1200


@pytest.mark.parametrize(
    ("box", "covered"),
    [
        ({"x_min": -0.5, "y_min": -0.5, "x_max": 0.5, "y_max": 0.5}, 25),
        ({"x_min": 0.5, "y_min": 0.5, "x_max": 9.5, "y_max": 9.5}, 25),
        ({"x_min": -5.0, "y_min": -5.0, "x_max": 5.0, "y_max": 5.0}, 100),
        ({"x_min": 2.0, "y_min": 2.0, "x_max": 3.0, "y_max": 3.0}, 0),
        ({"x_min": 0.5, "y_min": 0.0, "x_max": 0.5, "y_max": 1.0}, 0),
        # Turned inside out it is still the same square.
        ({"x_min": 1.0, "y_min": 1.0, "x_max": 0.0, "y_max": 0.0}, 100),
        ({"x_min": -1e6, "y_min": -1e6, "x_max": 1e6, "y_max": 1e6}, 100),
    ],
)
def test_boxes_outside_the_image_are_cut_at_its_rim(box, covered):
    assert rasterize_relative("M0 0H1V1H0Z", box, 10, 10).sum() == covered


@needs_skia
@pytest.mark.parametrize("size", [(9000, 90), (90, 9000), (40_000, 60)])
def test_pictures_wider_than_skia_s_anti_aliasing_are_painted_in_tiles(size):
    width, height = size
    mask = rasterize_relative("M0 0L1 1H0Z", WHOLE, width, height, "skia")
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    assert np.mean((mask > 0) != (x < y)) < 0.01


def by_samples(path: Path, width: int, height: int) -> np.ndarray:
    """The mask by winding numbers of 4 x 4 samples a pixel, curves as 20,000 lines: no painter."""
    winding = np.zeros((4 * height, 4 * width + 1), np.int32)
    t = np.linspace(0, 1, 20_001)[1:, None]
    points = [np.array(path.commands[0][1])[None]]
    for _, coords in path.commands[1:]:
        control = [points[-1][-1], *np.reshape(coords, (-1, 2))]
        while len(control) > 1:
            control = [a + (b - a) * t for a, b in itertools.pairwise(control)]
        points.append(control[0])
    outline = 4 * np.concatenate([*points, points[0]])
    rows = np.clip(np.ceil(outline[:, 1] - 0.5), 0, 4 * height).astype(int)
    for i in np.flatnonzero(np.diff(rows)):
        (x0, y0), (x1, y1) = outline[i], outline[i + 1]
        crossed = np.arange(*sorted(rows[i : i + 2]))
        x = x0 + (crossed + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        at = np.clip(np.ceil(x - 0.5), 0, 4 * width).astype(int)
        np.add.at(winding, (crossed, at), 1 if y0 < y1 else -1)
    inside = np.cumsum(winding, axis=1)[:, :-1] != 0
    return (inside.reshape(height, 4, width, 4).mean((1, 3)) > 0.5).astype(np.uint8)


@pytest.mark.parametrize("painter", [pytest.param("skia", marks=needs_skia), "resvg"])
@pytest.mark.parametrize("size", [(200, 160), (90, 700)])
@pytest.mark.parametrize(
    "d",
    [
        "M.1 .1C.5 .2 3000 .8 .1 .9",
        "M.1 .1C.5 .2 900000 .8 .1 .9",
        "M.9 .3L.5 .1L.2-.1C.7 1 3028 95 .5 .3",
        "M.1 .1Q400000 .2 .1 .9",
        "M.1 .1C.5 9000-200000-.3 .9 .8L.2 .9",
        # Lines of both ends afar, the last of them unsaid.
        "M-799999.7-449999.6L800000.3 450000.4L-600000 900000",
        "M-9e5-9e5C-3e5 4e5 300000.8-399999.2 900000.8 900000.8L9e5-9e5",
    ],
)
def test_what_reaches_far_beyond_the_image_is_painted_where_it_is(d, size, painter):
    width, height = size
    path = place_path(parse_path(d), WHOLE, width, height)
    mask = rasterize(path, width, height, painter)
    truth = by_samples(path, width, height)
    assert 0 < truth.sum() < truth.size
    assert np.count_nonzero(mask != truth) <= 0.01 * truth.sum() + 0.2 * (width + height)


def test_a_path_within_reach_is_painted_as_it_is():
    path = place_path(parse_path("M.1.1C300-300 .2.4.8.9L-90 5"), WHOLE, 90, 90)
    assert _within_reach(path, 90, 90) is path
    far = place_path(parse_path("M.1.1C3000-3000 .2.4.8.9L-90 5"), WHOLE, 90, 90)
    pieces = _within_reach(far, 90, 90).commands
    assert len(pieces) < 60
    assert pieces[0] == ("M", (9.0, 9.0)) and pieces[-1] == ("Z", ())


@pytest.mark.parametrize("path", [Path(), parse_path("M1 1"), parse_path("M1 1ZM5 5Z")])
def test_a_path_that_draws_nothing_gives_a_blank_mask(path):
    assert not rasterize(path, 8, 8).any()


def test_a_mask_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0x5"):
        rasterize(parse_path("M0 0L1 1"), 0, 5)


def test_limits_reach_the_parser():
    with pytest.raises(SvgPathError):
        rasterize_relative("M0 0L1 1L2 2", WHOLE, 8, 8, limits=Limits(max_path_commands=2))


def test_svg_document_is_in_pixels_of_the_image():
    svg = svg_from_path("M0 0H1V1H0Z", 200, 100, (0.5, 0.5, 0.5, 0.5))
    assert 'width="200" height="100"' in svg
    soft = render_svg_to_soft_mask(svg, 200, 100)
    assert soft.shape == (100, 200)
    assert soft.dtype == np.float32
    assert (soft[25:75, 50:150] == 1).all()
    assert soft.sum() == 5000


def test_soft_mask_is_the_covered_part_of_each_pixel():
    svg = svg_from_path("M0 0H1V1H0Z", 4, 4, (0.3125, 0.5, 0.625, 1.0))
    for scale in (1, 2, 4):
        soft = render_svg_to_soft_mask(svg, 4, 4, scale=scale)
        assert soft[0] == pytest.approx([1, 1, 0.5, 0], abs=0.01)


@pytest.mark.parametrize("svg", ["", "<svg", "not a picture"])
def test_a_document_that_is_no_svg_is_a_value_error_not_a_panic(svg):
    with pytest.raises(ValueError, match="resvg"):
        render_svg_to_soft_mask(svg, 8, 8)


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_soft_mask_scale_is_a_positive_integer(scale):
    with pytest.raises(ValueError, match="scale"):
        render_svg_to_soft_mask(svg_from_path("M0 0H1V1Z", 8, 8, (0.5, 0.5, 1, 1)), 8, 8, scale)


@pytest.mark.parametrize("box", [(0.5, 0.5, 1), (0.5, 0.5, 1, float("nan"))])
def test_svg_from_path_refuses_a_box_that_is_none(box):
    with pytest.raises(ValueError):
        svg_from_path("M0 0H1V1Z", 8, 8, box)


@needs_skia
@pytest.mark.parametrize(("vertices", "share"), [(8, 0.001), (32, 0.001), (200, 0.002)])
@pytest.mark.parametrize("side", [20, 60, 150, 400])
def test_a_small_object_is_the_reference_s_to_the_pixel(side, vertices, share):
    """A small object is mostly outline, and a star of 200 spikes is nothing else."""
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.93, "y_max": 0.95}
    fast = rasterize_relative(polygon(vertices, vertices), box, side, side, "skia")
    reference = rasterize_relative(polygon(vertices, vertices), box, side, side, "resvg")
    assert np.count_nonzero(fast != reference) <= share * np.count_nonzero(reference) + 2


def strokes(count: int) -> Path:
    ends = (f"{x} {i}" for i in range(count) for x in ((0, 100) if i % 2 else (100, 0)))
    return parse_path("M" + "L".join(ends))


def test_a_path_that_runs_to_and_fro_without_end_is_refused():
    limits = Limits(max_path_length=20)
    check_length(strokes(39), 100, 100, limits)
    with pytest.raises(ValueError, match=r"the path is \d+ times as long .* the limit is 20"):
        check_length(strokes(42), 100, 100, limits)


@pytest.mark.parametrize(
    "path",
    [
        # Outside the picture nothing is painted.
        "M-9000 5" + "L9000 5L-9000 6" * 5,
        # A move paints nothing.
        "M0 0L1 1" + "M99 99M0 0" * 50 + "L5 5",
        "M0 0" * 50,
    ],
)
def test_only_what_is_drawn_within_the_picture_counts(path):
    check_length(parse_path(path), 100, 100, Limits(max_path_length=6))


def test_curves_count_by_their_control_points():
    curls = "M0 0" + "C100 0 0 100 100 100C0 100 100 0 0 0" * 20
    with pytest.raises(ValueError, match="limit"):
        check_length(parse_path(curls), 100, 100, Limits(max_path_length=20))


def test_a_request_beyond_the_length_keeps_the_model_s_path():
    refiner = SegmentRefiner(limits=Limits(max_path_length=3))
    image = np.zeros((60, 60, 3), np.uint8)
    to_and_fro = "M0 0" + "L1 .5L0 .6" * 10 + "Z"
    assert refiner.refine_with_bitmaps(image, to_and_fro, WHOLE).reason == "raster_failed"
    assert refiner.refine_with_bitmaps(image, "M0 0H1V1H0Z", WHOLE).reason == "refined"
