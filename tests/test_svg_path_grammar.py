"""The SVG 1.1 path grammar, the way models and hand-written files really use it."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.config import Limits
from kestrel.svg import (
    MAX_COORDINATE,
    Path,
    SvgPathError,
    parse_path,
    path_to_string,
    place_path,
    transform,
)


def shape(d: str) -> list[tuple]:
    return [(name, *(round(v, 6) for v in coords)) for name, coords in parse_path(d).commands]


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        ("", []),
        (" \t\r\n", []),
        ("M1 2", [("M", 1, 2)]),
        ("m1 2", [("M", 1, 2)]),
        ("M1,2L3,4", [("M", 1, 2), ("L", 3, 4)]),
        ("M 1 , 2 L 3 , 4", [("M", 1, 2), ("L", 3, 4)]),
        ("M1 2l3 4", [("M", 1, 2), ("L", 4, 6)]),
        ("M1 2H5h1V7v-2", [("M", 1, 2), ("L", 5, 2), ("L", 6, 2), ("L", 6, 7), ("L", 6, 5)]),
        # Missing separators.
        ("M.5.5-3-2", [("M", 0.5, 0.5), ("L", -3, -2)]),
        ("M1-2+3+4", [("M", 1, -2), ("L", 3, 4)]),
        ("M0 0L1.5.5.25.75", [("M", 0, 0), ("L", 1.5, 0.5), ("L", 0.25, 0.75)]),
        # SVG 1.1 lets a number end in its point.
        ("M1. 2.", [("M", 1, 2)]),
        # Exponents, and an exponent straight before the next number.
        ("M1e2 1E-1", [("M", 100, 0.1)]),
        ("M1e1-1e-1.5e1", None),
        ("M1e+1-2e0L.5e1.5e1", [("M", 10, -2), ("L", 5, 5)]),
        # Implicit repeats: of a move they are lines.
        ("M1 1 2 2 3 3", [("M", 1, 1), ("L", 2, 2), ("L", 3, 3)]),
        ("m1 1 2 2 3 3", [("M", 1, 1), ("L", 3, 3), ("L", 6, 6)]),
        ("M0 0h1 2 3", [("M", 0, 0), ("L", 1, 0), ("L", 3, 0), ("L", 6, 0)]),
        (
            "M0 0c1 1 2 2 3 3 1 1 2 2 3 3",
            [("M", 0, 0), ("C", 1, 1, 2, 2, 3, 3), ("C", 4, 4, 5, 5, 6, 6)],
        ),
        # Smooth curves mirror the last control point, of their own family only.
        (
            "M0 0C1 2 3 4 5 5S8 8 9 9",
            [("M", 0, 0), ("C", 1, 2, 3, 4, 5, 5), ("C", 7, 6, 8, 8, 9, 9)],
        ),
        ("M0 0L5 5S8 8 9 9", [("M", 0, 0), ("L", 5, 5), ("C", 5, 5, 8, 8, 9, 9)]),
        ("M0 0Q1 2 3 4S8 8 9 9", [("M", 0, 0), ("Q", 1, 2, 3, 4), ("C", 3, 4, 8, 8, 9, 9)]),
        (
            "M0 0Q1 2 3 4T5 5t1 1",
            [("M", 0, 0), ("Q", 1, 2, 3, 4), ("Q", 5, 6, 5, 5), ("Q", 5, 4, 6, 6)],
        ),
        ("M0 0C1 2 3 4 5 5T9 9", [("M", 0, 0), ("C", 1, 2, 3, 4, 5, 5), ("Q", 5, 5, 9, 9)]),
        ("M1 1s1 2 3 4", [("M", 1, 1), ("C", 1, 1, 2, 3, 4, 5)]),
        ("M1 1q1 2 3 4", [("M", 1, 1), ("Q", 2, 3, 4, 5)]),
        # After a close the current point is the subpath's start.
        ("M1 1L2 2zl3 3", [("M", 1, 1), ("L", 2, 2), ("Z",), ("M", 1, 1), ("L", 4, 4)]),
        ("M1 1L2 2Zm1 0L5 5", [("M", 1, 1), ("L", 2, 2), ("Z",), ("M", 2, 1), ("L", 5, 5)]),
        ("M1 1zz", [("M", 1, 1), ("Z",), ("Z",)]),
        # Arcs that are no arcs.
        ("M0 0A0 5 0 1 1 3 4", [("M", 0, 0), ("L", 3, 4)]),
        ("M0 0A5 0 0 0 0 3 4", [("M", 0, 0), ("L", 3, 4)]),
        ("M3 4A5 5 0 0 0 3 4L1 1", [("M", 3, 4), ("L", 1, 1)]),
    ],
)
def test_every_command_becomes_absolute(d, expected):
    if expected is None:
        with pytest.raises(SvgPathError):
            parse_path(d)
    else:
        assert shape(d) == expected


@pytest.mark.parametrize(
    "d",
    [
        "M0 0a25,25 -30 0,1 50,-25",
        "M0 0a25 25-30 0150-25",
        "M0 0a25 25 -30 01 50-25",
        "M0 0a25,25,-30,0,1,50,-25",
        "M 0 0 a 25 25 -30 0 1 50 -25",
        "M0 0a-25-25-30 0 1 50-25",
    ],
)
def test_arc_flags_need_no_separator(d):
    assert parse_path(d) == parse_path("M0 0A25 25 -30 0 1 50 -25")


def flatten(path: Path) -> np.ndarray:
    points, at = [], (0.0, 0.0)
    for name, c in path.commands:
        if name == "C":
            t = np.linspace(0, 1, 33)[:, None]
            p = np.array([at, c[0:2], c[2:4], c[4:6]])
            points.extend(
                (1 - t) ** 3 * p[0]
                + 3 * (1 - t) ** 2 * t * p[1]
                + 3 * (1 - t) * t**2 * p[2]
                + t**3 * p[3]
            )
        elif c:
            points.append(np.array(c[-2:]))
        if c:
            at = c[-2:]
    return np.array(points)


def test_arc_points_lie_on_the_circle():
    points = flatten(parse_path("M10 0A10 10 0 1 1 0 -10"))
    assert np.allclose(np.hypot(*points.T), 10, atol=0.005)
    # Large and clockwise on screen (y down): three quarters, by way of (0, 10) and (-10, 0).
    for expected in ((0, 10), (-10, 0), (0, -10)):
        assert np.hypot(*(points - expected).T).min() < 0.5


@pytest.mark.parametrize(
    ("flags", "centre", "middle"),
    [
        ("0 0", (0, 0), (7.07, -7.07)),
        ("0 1", (10, -10), (2.93, -2.93)),
        ("1 0", (10, -10), (17.07, -17.07)),
        ("1 1", (0, 0), (-7.07, 7.07)),
    ],
)
def test_arc_flags_choose_one_of_four_arcs(flags, centre, middle):
    points = flatten(parse_path(f"M10 0A10 10 0 {flags} 0 -10"))
    assert np.allclose(np.hypot(*(points - centre).T), 10, atol=0.005)
    assert np.hypot(*(points - middle).T).min() < 0.5


@pytest.mark.parametrize("degrees", [20, 100, 120, 130, 200, 250, 290, 340])
def test_an_arc_of_any_length_lies_on_its_circle(degrees):
    x, y = (10 * turn(math.radians(degrees)) for turn in (math.cos, math.sin))
    points = flatten(parse_path(f"M10 0A10 10 0 {degrees > 180:d} 1 {x!r} {y!r}"))
    assert np.abs(np.hypot(*points.T) - 10).max() < 0.003


def test_a_chord_that_is_nothing_beside_the_radii_is_a_line():
    _, curve = parse_path("M0 0A1e6 1e6 0 0 0 1e-320 0").commands
    assert curve == ("C", (0.0, 0.0, 1e-320, 0.0, 1e-320, 0.0))


def test_arc_radii_too_small_are_scaled_up_to_reach():
    points = flatten(parse_path("M0 0A1 1 0 0 1 20 0"))
    assert np.allclose(np.hypot(*(points - (10, 0)).T), 10, atol=0.01)


def test_rotated_ellipse_keeps_its_axes():
    points = flatten(parse_path("M0 0A20 10 90 1 1 0 .001"))
    assert np.ptp(points, axis=0) == pytest.approx((20, 40), abs=0.1)


@pytest.mark.parametrize(
    "d",
    [
        "L1 1",
        "z",
        "1 1",
        "M",
        "M1",
        "M1 2 3",
        "M1 2L",
        "M1 2L3",
        "M1 2,",
        "M,1 2",
        "M1,,2",
        "M1 2,L3 4",
        "M1 2 X",
        "M1 2 e5",
        "M1 2L3 4 5",
        "M1 2 z 3",
        "M1 2C1 2 3 4 5",
        "M0 0A1 1 0 2 0 1 1",
        "M0 0A1 1 0 .5 0 1 1",
        "M0 0A1 1 0 0 0 1",
        "MNaN 0",
        "Minf 0",
        "M1e999 0",
        "M1e7 0",
        "M-1e7 0",
        "M0 0A1e7 1 0 0 0 1 1",
        "M0 0A1 1 1e7 0 0 1 1",
        "M0 0" + "l1e6 0" * 2,
        "M--1 0",
        "M+-1 0",
        "M. 0",
        "M1e 0",
        "M0 0L0x10 1",
        "M٣ 1",
        "M1 2\x00",
        "<svg/>",
    ],
)
def test_bad_path_data_is_refused(d):
    with pytest.raises(SvgPathError):
        parse_path(d)
    with pytest.raises(ValueError):
        parse_path(d)


@pytest.mark.parametrize("d", [None, 5, b"M0 0", ["M0 0"]])
def test_path_data_that_is_no_string_is_refused(d):
    with pytest.raises(SvgPathError, match="string"):
        parse_path(d)


@pytest.mark.parametrize(
    ("d", "kept"),
    [
        ("M0 0L1 1L.5", "M0 0L1 1"),
        ("M0 0L1 1 2", "M0 0L1 1"),
        ("M0 0L1 1C1 1 2 2 3", "M0 0L1 1"),
        ("M0 0L1 1Zoops", "M0 0L1 1Z"),
        ("nonsense", ""),
        ("M0 0L1 1", "M0 0L1 1"),
    ],
)
def test_cut_off_output_keeps_what_came_before(d, kept):
    path = parse_path(d, partial=True)
    assert path_to_string(path) == kept
    assert (path.error is None) == (d == kept)


def test_limits_of_characters_and_segments():
    limits = Limits(max_path_chars=50, max_path_commands=4)
    with pytest.raises(SvgPathError, match="51 characters"):
        parse_path("M0 0" + " " * 47, limits)
    assert parse_path("M0 0" + " " * 46, limits) == parse_path("M0 0")
    with pytest.raises(SvgPathError, match="4 segments"):
        parse_path("M0 0 1 1 2 2 3 3 4 4", limits)
    assert len(parse_path("M0 0 1 1 2 2 3 3", limits).commands) == 4
    # An arc of a whole turn counts for the cubics it becomes.
    with pytest.raises(SvgPathError, match="4 segments"):
        parse_path("M0 0A1 1 0 1 1 .01 0L5 5", limits)


@pytest.mark.parametrize(
    "d",
    [
        "M" + " " * 65_000 + "x",
        "M" + "1" * 65_000,
        "M0 0" + "1" * 65_000 + "e",
        "M0 0" + "," * 65_000,
        "M0 0 " + "1 " * 32_000 + "x",
        "M0 0" + "z" * 65_000,
        "M0 0" + "a1 1 0 00 1 1" * 5_000,
        "M0 0" + "." * 65_000,
        "M0 0" + "-" * 65_000,
        "M0 0L1" + "e" * 65_000,
    ],
)
def test_hostile_path_data_costs_linear_time(d):
    started = time.process_time()
    parse_path(d, Limits(max_path_commands=10**6), partial=True)
    assert time.process_time() - started < 2


def test_place_path_goes_from_the_box_to_pixels():
    box = {"x_min": 0.25, "y_min": 0.5, "x_max": 0.75, "y_max": 1.0}
    placed = place_path(parse_path("M0 0L1 1Q.5 .5 0 1"), box, 200, 100)
    assert placed.commands == (
        ("M", (50, 50)),
        ("L", (150, 100)),
        ("Q", (100, 75, 50, 100)),
    )


@pytest.mark.parametrize(
    "box",
    [
        {},
        {"x_min": 0, "y_min": 0, "x_max": 1},
        {"x_min": math.nan, "y_min": 0, "x_max": 1, "y_max": 1},
        {"x_min": 0, "y_min": -math.inf, "x_max": 1, "y_max": 1},
        {"x_min": 0, "y_min": 0, "x_max": 1e300, "y_max": 1},
        {"x_min": -1e300, "y_min": 0, "x_max": 1, "y_max": 1},
        {"x_min": "a", "y_min": 0, "x_max": 1, "y_max": 1},
        {"x_min": None, "y_min": 0, "x_max": 1, "y_max": 1},
        None,
        [0, 0, 1, 1],
    ],
)
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(ValueError):
        place_path(parse_path("M0 0L1 1"), box, 10, 10)


@pytest.mark.parametrize(
    ("d", "decimals", "expected"),
    [
        ("M 0.50 -0.25 L 10.0 1.00", 4, "M.5-.25L10 1"),
        ("M0.1 0.2L0.3 0.4", 4, "M.1.2L.3.4"),
        ("M1.5 0.5", 4, "M1.5.5"),
        ("M1 0.5", 4, "M1 .5"),
        ("M0.00001 -0.00001", 4, "M0 0"),
        ("M0.999999 1.25", 2, "M1 1.25"),
        ("M1200 30", 0, "M1200 30"),
        ("M0 0H3Z", 4, "M0 0L3 0Z"),
    ],
)
def test_written_path_has_no_character_to_spare(d, decimals, expected):
    assert path_to_string(parse_path(d), decimals) == expected


def test_writer_refuses_what_no_reader_could_read():
    with pytest.raises(ValueError):
        path_to_string(Path((("M", (math.nan, 0.0)),)))


coordinate = st.floats(-1000, 1000, allow_nan=False)
commands = st.lists(
    st.one_of(
        st.tuples(st.just("L"), st.tuples(coordinate, coordinate)),
        st.tuples(st.just("Q"), st.tuples(*[coordinate] * 4)),
        st.tuples(st.just("C"), st.tuples(*[coordinate] * 6)),
        st.tuples(st.just("M"), st.tuples(coordinate, coordinate)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=300)
@given(commands, st.integers(0, 8))
def test_what_is_written_reads_back_within_the_rounding(segments, decimals):
    path = Path((("M", (0.0, 0.0)), *segments, ("Z", ())))
    again = parse_path(path_to_string(path, decimals))
    assert [name for name, _ in again.commands] == [name for name, _ in path.commands]
    for (_, before), (_, after) in zip(path.commands, again.commands, strict=True):
        assert after == pytest.approx(before, abs=0.5000001 * 10**-decimals)


@settings(deadline=None, max_examples=200)
@given(commands, st.floats(0.1, 10), st.floats(-5, 5))
def test_transform_can_be_undone(segments, scale, offset):
    path = Path((("M", (1.0, 2.0)), *segments))
    there = transform(path, scale, -scale, offset, 2 * offset)
    back = transform(there, 1 / scale, -1 / scale, -offset / scale, 2 * offset / scale)
    for (_, before), (_, after) in zip(path.commands, back.commands, strict=True):
        assert after == pytest.approx(before, abs=1e-6)


@settings(deadline=None, max_examples=500)
@given(st.text("MmZzLlHhVvCcSsQqTtAa0123456789.+-eE, \n", max_size=80))
def test_any_text_gives_a_path_or_an_svg_path_error(d):
    partial = parse_path(d, partial=True)
    try:
        path = parse_path(d)
    except SvgPathError:
        assert partial.error
    else:
        assert path == partial
    for name, coords in partial.commands:
        assert len(coords) == {"M": 2, "L": 2, "C": 6, "Q": 4, "Z": 0}[name]
        assert all(abs(v) <= MAX_COORDINATE for v in coords)


radius = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e-300, 1e-13, 1e6]))


@settings(deadline=None, max_examples=300)
@given(radius, radius, st.floats(-1e6, 1e6), st.booleans(), st.booleans(), coordinate, coordinate)
def test_any_arc_ends_where_it_says(rx, ry, rotation, large, sweep, x, y):
    d = f"M1 1A{rx!r} {ry!r} {rotation!r} {large:d} {sweep:d} {x!r} {y!r}"
    try:
        path = parse_path(d)
    except SvgPathError as error:
        assert "beyond" in str(error)
        return
    assert path.commands[-1][1][-2:] == (x, y)
