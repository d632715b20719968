"""SVG path data: the whole SVG 1.1 path grammar in, five absolute commands out.

A parsed path holds only ``M``, ``L``, ``C``, ``Q`` and ``Z`` in absolute coordinates, so that a
rasteriser needs no more than those. Grammar: https://www.w3.org/TR/SVG11/paths.html#PathDataBNF
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kestrel.config import Limits

MAX_COORDINATE = 1e6
"""Largest magnitude of a coordinate that :func:`parse_path` accepts, path units."""
MAX_PIXEL = 1e9
"""Largest magnitude of a placed coordinate, pixels: beyond it float32 rasterisers overflow."""
MIN_RADIUS = 1e-12
"""Arc radii below it count as zero (a straight line, SVG 1.1 F.6.2)."""

Command = tuple[str, tuple[float, ...]]
"""``("M", (x, y))``, ``("L", (x, y))``, ``("C", (x1, y1, x2, y2, x, y))``,
``("Q", (x1, y1, x, y))`` or ``("Z", ())``."""


class SvgPathError(ValueError):
    """Path data breaks the grammar or a limit; the message gives the character offset."""


@dataclass(frozen=True, slots=True)
class Path:
    """Absolute path commands.

    ``error`` is None, or what stopped a partial parse (then ``commands`` is what came before).
    """

    commands: tuple[Command, ...] = ()
    error: str | None = None

    @property
    def is_empty(self) -> bool:
        """True when nothing is drawn: no command, or only moves and closes."""
        return all(name in "MZ" for name, _ in self.commands)


# Each pattern is matched at one position only and no two neighbouring parts can take the same
# character, so that hostile input costs linear time. A number takes its trailing separator along.
_SPACE = re.compile(r"[ \t\r\n\f]*")
_NAME = re.compile(r"([MmZzLlHhVvCcSsQqTtAa])[ \t\r\n\f]*")
_NUMBER = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)[ \t\r\n\f]*(?:(,)[ \t\r\n\f]*)?"
)
_FLAG = re.compile(r"([01])[ \t\r\n\f]*(?:(,)[ \t\r\n\f]*)?")

ARITY = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}
"""Numbers that one segment of each command takes."""


def parse_path(d: str, limits: Limits | None = None, *, partial: bool = False) -> Path:
    """Read SVG path data.

    ``d``: path data, any command of SVG 1.1; ``""`` is a valid empty path. ``limits`` bounds the
    characters (``max_path_chars``) and the segments (``max_path_commands``, implicit repeats and
    the cubics of an arc counted). Coordinates are limited to ``MAX_COORDINATE``.

    Raises :class:`SvgPathError`. With ``partial`` it raises nothing for path data: per SVG 1.1's
    error rule it gives every segment before the first error, and the error's text in
    ``Path.error`` (for output of a model that was cut off).
    """
    limits = limits or Limits()
    builder = _Builder(limits.max_path_commands)
    try:
        if not isinstance(d, str):
            raise SvgPathError(f"path data must be a string, not {type(d).__name__}")
        if len(d) > limits.max_path_chars:
            raise SvgPathError(
                f"path data has {len(d)} characters, over the limit of {limits.max_path_chars}"
            )
        _read(d, builder)
    except SvgPathError as error:
        if not partial:
            raise
        return Path(tuple(builder.out), str(error))
    return Path(tuple(builder.out))


def _read(d: str, builder: _Builder) -> None:
    at = _SPACE.match(d).end()  # type: ignore[union-attr]
    first = True
    while at < len(d):
        match = _NAME.match(d, at)
        if match is None:
            raise SvgPathError(f"expected a path command at character {at}, not {d[at]!r}")
        name = match[1]
        if first and name not in "Mm":
            raise SvgPathError(f"path data must begin with M or m, not {name!r}")
        first = False
        at = match.end()
        if name in "Zz":
            builder.segment(name, ())
            continue
        at = _read_arguments(d, at, name, builder)


def _read_arguments(d: str, at: int, name: str, builder: _Builder) -> int:
    """Read one command's argument groups (at least one, then implicit repeats)."""
    patterns = [_NUMBER] * ARITY[name.upper()]
    if name in "Aa":
        patterns[3] = patterns[4] = _FLAG
    comma = False
    groups = 0
    while True:
        values: list[float] = []
        for pattern in patterns:
            match = pattern.match(d, at)
            if match is None:
                if not values and groups and not comma:
                    return at
                found = repr(d[at]) if at < len(d) else "the end"
                raise SvgPathError(
                    f"command {name!r} wants a number at character {at}, not {found}"
                )
            values.append(float(match[1]))
            at = match.end()
            comma = match[2] is not None
        builder.segment(name, values)
        groups += 1
        # A move's further pairs are lines.
        name = {"M": "L", "m": "l"}.get(name, name)


class _Builder:
    """Turns commands as written into absolute M, L, C, Q, Z."""

    def __init__(self, max_commands: int) -> None:
        self.out: list[Command] = []
        self.max_commands = max_commands
        self.x = self.y = 0.0
        self.start = (0.0, 0.0)
        self.control: tuple[float, float] | None = None  # of the previous curve, for S and T
        self.previous = ""
        self.closed = False

    def _emit(self, name: str, coords: tuple[float, ...]) -> None:
        if len(self.out) >= self.max_commands:
            raise SvgPathError(f"path has more than {self.max_commands} segments")
        for value in coords:
            if not -MAX_COORDINATE <= value <= MAX_COORDINATE:  # also refuses NaN
                raise SvgPathError(f"coordinate {value:g} is beyond {MAX_COORDINATE:g}")
        self.out.append((name, coords))
        if coords:
            self.x, self.y = coords[-2:]

    def segment(self, name: str, args: Sequence[float]) -> None:
        """Append one segment; ``args`` are exactly the command's arguments."""
        upper = name.upper()
        ox, oy = (self.x, self.y) if name != upper else (0.0, 0.0)
        if upper == "Z":
            self._emit("Z", ())
            self.x, self.y = self.start
            self.closed = True
            self.previous, self.control = upper, None
            return
        if self.closed and upper != "M":
            # A subpath that begins without a move starts where the closed one did.
            self._emit("M", self.start)
        self.closed = False
        control: tuple[float, float] | None = None
        if upper == "M":
            self._emit("M", (ox + args[0], oy + args[1]))
            self.start = (self.x, self.y)
        elif upper == "L":
            self._emit("L", (ox + args[0], oy + args[1]))
        elif upper == "H":
            self._emit("L", (ox + args[0], self.y))
        elif upper == "V":
            self._emit("L", (self.x, oy + args[0]))
        elif upper == "A":
            self._arc(args, ox, oy)
        else:
            points = [value + (oy if i % 2 else ox) for i, value in enumerate(args)]
            if upper in "ST":
                points[:0] = self._reflected("CS" if upper == "S" else "QT")
            control = (points[-4], points[-3])
            self._emit("C" if upper in "CS" else "Q", tuple(points))
        self.previous, self.control = upper, control

    def _reflected(self, family: str) -> tuple[float, float]:
        """First control point of S or T: the last one mirrored, or the current point."""
        if self.control is None or self.previous not in family:
            return (self.x, self.y)
        return (2 * self.x - self.control[0], 2 * self.y - self.control[1])

    def _arc(self, args: Sequence[float], ox: float, oy: float) -> None:
        rx, ry, rotation, large, sweep = args[:5]
        x, y = ox + args[5], oy + args[6]
        # The end point is checked first: arc maths with an infinite end would only give NaN.
        if not (abs(x) <= MAX_COORDINATE and abs(y) <= MAX_COORDINATE):
            raise SvgPathError(f"arc ends beyond {MAX_COORDINATE:g}")
        if not all(abs(value) <= MAX_COORDINATE for value in (rx, ry, rotation)):
            raise SvgPathError(f"arc radius or rotation beyond {MAX_COORDINATE:g}")
        if (x, y) == (self.x, self.y):
            return
        if min(abs(rx), abs(ry)) < MIN_RADIUS:
            self._emit("L", (x, y))
            return
        for curve in _arc_to_cubics(
            (self.x, self.y), abs(rx), abs(ry), rotation, bool(large), bool(sweep), (x, y)
        ):
            self._emit("C", curve)


def _arc_to_cubics(
    start: tuple[float, float],
    rx: float,
    ry: float,
    rotation: float,
    large: bool,
    sweep: bool,
    end: tuple[float, float],
) -> list[tuple[float, ...]]:
    """Elliptical arc as cubics of at most 90 degrees each (radial error under 0.03 %).

    End-point to centre form: SVG 1.1 F.6.5 and F.6.6; ``rotation`` in degrees. Control length
    4/3 tan(angle / 4): the standard cubic approximation of a circular arc.
    """
    phi = math.radians(rotation % 360.0)
    cos, sin = math.cos(phi), math.sin(phi)
    hx, hy = (start[0] - end[0]) / 2, (start[1] - end[1]) / 2
    # Half chord on the unit circle: every later step is then a circle's.
    ux, uy = (cos * hx + sin * hy) / rx, (cos * hy - sin * hx) / ry
    half = math.hypot(ux, uy)
    if half > 1:  # radii too small to reach: scaled up until they just do
        rx, ry, ux, uy, half = rx * half, ry * half, ux / half, uy / half, 1.0
    if half == 0:  # the chord underflows against the radii
        return [(*start, *end, *end)]
    reach = math.sqrt(max(0.0, 1 - half * half)) / half
    if large == sweep:
        reach = -reach
    cx, cy = reach * uy, -reach * ux
    angle = math.atan2(uy - cy, ux - cx)
    span = math.atan2(-uy - cy, -ux - cx) - angle
    if sweep and span < 0:
        span += 2 * math.pi
    elif not sweep and span > 0:
        span -= 2 * math.pi
    mx, my = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2

    def at(px: float, py: float) -> tuple[float, float]:
        px, py = (px + cx) * rx, (py + cy) * ry
        return mx + cos * px - sin * py, my + sin * px + cos * py

    pieces = max(1, math.ceil(abs(span) / (math.pi / 2) - 1e-9))
    step = span / pieces
    k = 4 / 3 * math.tan(step / 4)
    curves: list[tuple[float, ...]] = []
    for i in range(pieces):
        a, b = angle + i * step, angle + (i + 1) * step
        c1 = at(math.cos(a) - k * math.sin(a), math.sin(a) + k * math.cos(a))
        c2 = at(math.cos(b) + k * math.sin(b), math.sin(b) - k * math.cos(b))
        stop = end if i == pieces - 1 else at(math.cos(b), math.sin(b))
        curves.append((*c1, *c2, *stop))
    return curves


def transform(
    path: Path, scale_x: float, scale_y: float, offset_x: float = 0.0, offset_y: float = 0.0
) -> Path:
    """The path with every point at ``(x * scale_x + offset_x, y * scale_y + offset_y)``."""
    scale, offset = (scale_x, scale_y), (offset_x, offset_y)
    return Path(
        tuple(
            (name, tuple(v * scale[i & 1] + offset[i & 1] for i, v in enumerate(coords)))
            for name, coords in path.commands
        ),
        path.error,
    )


BBOX_KEYS = ("x_min", "y_min", "x_max", "y_max")


def place_path(path: Path, bbox: Mapping[str, float], width: int, height: int) -> Path:
    """From 0..1 relative to ``bbox`` to pixels of a ``width`` x ``height`` image.

    ``bbox``: ``x_min, y_min, x_max, y_max``, normalised to the image; it may reach outside. Pixel
    ``(0, 0)`` covers 0..1 in both directions, so x = 1 of a full box is the image's right edge.
    Raises ValueError when the box lacks a key, is not finite or puts points beyond ``MAX_PIXEL``.
    """
    try:
        x_min, y_min, x_max, y_max = (float(bbox[key]) for key in BBOX_KEYS)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"bbox must map {', '.join(BBOX_KEYS)} to numbers: {error}") from error
    if not all(map(math.isfinite, (x_min, y_min, x_max, y_max))):
        raise ValueError("bbox must be finite")
    placed = transform(
        path, (x_max - x_min) * width, (y_max - y_min) * height, x_min * width, y_min * height
    )
    for _, coords in placed.commands:
        for value in coords:
            if not -MAX_PIXEL <= value <= MAX_PIXEL:
                raise ValueError("bbox puts the path too far outside the image")
    return placed


def path_to_string(path: Path, decimals: int = 4) -> str:
    """Path data with ``decimals`` digits after the point and no character that can be left out.

    Raises ValueError when a coordinate is not finite.
    """
    number = f"%.{decimals}f,"
    template = {name: f"{name}," + number * count for name, count in ARITY.items()}
    text = "".join([template[name] for name, _ in path.commands])
    text %= tuple(itertools.chain.from_iterable([coords for _, coords in path.commands]))
    if "n" in text:
        raise ValueError("cannot write a coordinate that is not finite")
    # Whole-text replacements: a loop over numbers would take most of a trace's time.
    for _ in range(decimals):
        text = text.replace("0,", ",")
    # A number that has lost its point is marked until it is known what follows it.
    text = text.replace(".,", "i,") if decimals else text.replace(",", "i,")
    text = text.replace(",-0i", ",0i").replace(",0.", ",.").replace(",-0.", ",-.")
    text = text.replace("i,.", "i .").replace(",.", ".").replace(",-", "-").replace("i", "")
    for name in {name for name, _ in path.commands}:
        text = text.replace(f",{name}", name).replace(f"{name},", name)
    return text.rstrip(",").replace(",", " ")
