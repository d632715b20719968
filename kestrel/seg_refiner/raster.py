"""Path data to masks: Skia for serving, resvg as the reference and where Skia does not load.

Both paint with the non-zero winding rule (SVG's default ``fill-rule``).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from kestrel.config import Limits
from kestrel.seg_refiner.box import PixelBox
from kestrel.seg_refiner.libraries import first_that_loads
from kestrel.svg import Command, Path, parse_path, path_to_string, place_path

log = logging.getLogger(__name__)

SVG_DECIMALS = 3
"""Digits of pixel coordinates in a written SVG: a thousandth of a pixel."""

Point = tuple[float, float]

Painter = Callable[[Path, int, int], np.ndarray]
"""``(path in pixels, width, height) -> mask uint8 [height, width], 0/1``."""


class RasterizerMissing(ImportError):
    """The asked rasteriser does not load; the message says how to install it."""


def load_rasterizer(name: str = "auto") -> Painter:
    """The painter ``skia``, ``resvg`` or ``auto``, the first of them that loads.

    Raises :class:`RasterizerMissing` (an ImportError).
    """
    return _PAINTERS[name]() if name != "auto" else _auto()


@functools.cache
def _auto() -> Painter:
    return first_that_loads(_PAINTERS, RasterizerMissing, "rasterising", log)


def load_skia() -> ModuleType:
    try:
        import skia
    except ModuleNotFoundError as error:
        raise RasterizerMissing("Skia is not installed: pip install skia-python") from error
    except ImportError as error:  # the wheel links to libraries that slim systems lack
        raise RasterizerMissing(
            f"Skia does not load ({error}): apt-get install libgl1 libegl1 libexpat1"
        ) from error
    return skia


def _resvg() -> ModuleType:
    try:
        import resvg
    except ImportError as error:
        raise RasterizerMissing(
            f'resvg does not load ({error}): pip install "resvg>=0.2,<0.3"'
        ) from error
    return resvg


def svg_from_path(svg_path: str, width: int, height: int, bbox_cxcywh: Sequence[float]) -> str:
    """A whole SVG document that paints the path white on nothing, in pixels.

    ``svg_path`` is relative to the box, 0..1; ``bbox_cxcywh`` is the box's centre, width and
    height, normalised to the ``width`` x ``height`` image. Raises ``SvgPathError`` (a ValueError)
    for path data out of grammar, ValueError for a box that is not four finite numbers.
    """
    if len(bbox_cxcywh) != 4:
        raise ValueError(f"bbox_cxcywh must be four numbers, not {len(bbox_cxcywh)}")
    cx, cy, w, h = map(float, bbox_cxcywh)
    bbox = {"x_min": cx - w / 2, "y_min": cy - h / 2, "x_max": cx + w / 2, "y_max": cy + h / 2}
    return svg_document(place_path(parse_path(svg_path), bbox, width, height), width, height)


def svg_document(path: Path, width: int, height: int) -> str:
    """A whole SVG document that paints ``path`` (pixels) white on nothing."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><path fill="#fff" fill-rule="nonzero" '
        f'd="{path_to_string(path, SVG_DECIMALS)}"/></svg>'
    )


def render_svg_to_soft_mask(svg: str, width: int, height: int, scale: int = 2) -> np.ndarray:
    """Coverage float32 [height, width], 0..1: resvg at ``scale`` times the size, area-averaged.

    The document's own size must be ``width`` x ``height``. Raises ValueError when it is no SVG or
    when ``scale`` is not a positive integer, :class:`RasterizerMissing` without resvg.
    """
    import cv2

    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a positive integer, not {scale!r}")
    resvg = _resvg()
    try:
        tree = resvg.usvg.Tree.from_str(svg, resvg.usvg.Options.default())
        # Row-major 2x3 matrix; bg_size is the canvas, which would else keep the document's size.
        png = resvg.render(
            tree, (scale, 0, 0, 0, scale, 0), bg_size=(width * scale, height * scale)
        )
    except BaseException as error:
        # resvg 0.2 reports bad documents as a Rust panic, which is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"resvg cannot render this SVG: {error}") from error
        raise
    rgba = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if rgba is None:
        raise ValueError("resvg gave no picture")
    alpha = np.multiply(rgba[..., 3], np.float32(1 / 255), dtype=np.float32)
    if scale == 1:
        return alpha
    return cv2.resize(alpha, (width, height), interpolation=cv2.INTER_AREA)


def rasterize(path: Path, width: int, height: int, rasterizer: str = "auto") -> np.ndarray:
    """Mask uint8 [height, width], 0/1: pixels that ``path`` (pixels) covers by more than half.

    ``rasterizer``: ``auto``, ``skia`` or ``resvg``. Raises ValueError for a size that is not
    positive, :class:`RasterizerMissing` where it does not load.
    """
    if width < 1 or height < 1:
        raise ValueError(f"cannot rasterise at {width}x{height}")
    return load_rasterizer(rasterizer)(_within_reach(path, width, height), width, height)


def rasterize_relative(
    svg_path: str,
    bbox: Mapping[str, float],
    width: int,
    height: int,
    rasterizer: str = "auto",
    limits: Limits | None = None,
) -> np.ndarray:
    """:func:`rasterize` for path data relative to a normalised box."""
    path = place_path(parse_path(svg_path, limits), bbox, width, height)
    return rasterize(path, width, height, rasterizer)


def _resvg_mask(path: Path, width: int, height: int) -> np.ndarray:
    soft = render_svg_to_soft_mask(svg_document(path, width, height), width, height)
    return (soft > 0.5).astype(np.uint8)


def points_of(commands: Sequence[Command]) -> np.ndarray:
    """Every point of the commands, control points included: float64 [n, 2]."""
    values = itertools.chain.from_iterable(coords for _, coords in commands)
    return np.fromiter(values, np.float64).reshape(-1, 2)


REACH = 65_536.0
"""Longest side of a line or curve that is painted in one piece, pixels: from some hundred thousand
on, painters put it in the wrong place or leave it out."""


def _within_reach(path: Path, width: int, height: int) -> Path:
    """A path that paints the same on the image, without lines and curves that reach too far; unsaid
    closings are then said."""
    points = points_of(path.commands)
    if not len(points) or np.ptp(points, axis=0).max() <= REACH:
        return path
    commands: list[Command] = []
    start = at = (0.0, 0.0)
    # A close more ends the last piece; after another it draws nothing.
    for name, coords in (*path.commands, ("Z", ())):
        if name in "MZ":
            if at != start:
                commands += _pieces([at, start], width, height)
            if name == "M":
                start = (coords[0], coords[1])
            commands.append((name, coords))
            at = start
        else:
            control = [at, *zip(coords[::2], coords[1::2], strict=True)]
            commands += _pieces(control, width, height)
            at = control[-1]
    # What lies beyond stays on the same sides of the image when it is drawn nearer.
    most = (width + REACH, height + REACH)
    nearer = [
        (name, tuple(min(max(v, -REACH), most[i & 1]) for i, v in enumerate(coords)))
        for name, coords in commands
    ]
    return Path(tuple(nearer), path.error)


def _pieces(control: list[Point], width: int, height: int) -> Iterator[Command]:
    """A line or Bezier curve by its control points, cut where it reaches too far."""
    waiting = [control]
    while waiting:
        piece = waiting.pop()
        xs, ys = zip(*piece, strict=True)
        if max(xs) <= 0 or min(xs) >= width or max(ys) <= 0 or min(ys) >= height:
            # All on one side of the image, so that its chord winds around the same pixels.
            yield "L", piece[-1]
        elif max(max(xs) - min(xs), max(ys) - min(ys)) <= REACH:
            yield "MLQC"[len(piece) - 1], tuple(itertools.chain.from_iterable(piece[1:]))
        else:
            waiting += reversed(_halves(piece))


def _halves(control: list[Point]) -> tuple[list[Point], list[Point]]:
    """Both halves of a Bezier curve (de Casteljau)."""
    first, second = [control[0]], [control[-1]]
    while len(control) > 1:
        control = [
            ((ax + bx) / 2, (ay + by) / 2) for (ax, ay), (bx, by) in itertools.pairwise(control)
        ]
        first.append(control[0])
        second.append(control[-1])
    return first, second[::-1]


def check_length(path: Path, width: int, height: int, limits: Limits) -> None:
    """Raises ValueError for a path (pixels) that runs to and fro beyond ``max_path_length``.

    What painting and tracing take grows with the pixels that the outline crosses, and few
    segments can cross all of them. A curve crosses no line more often than its control polygon.
    """
    drawn = _length(path, width, height)
    if drawn > limits.max_path_length * (width + height):
        raise ValueError(
            f"the path is {drawn / (width + height):.0f} times as long as the image is wide and "
            f"high; the limit is {limits.max_path_length}"
        )


def _length(path: Path, width: float = math.inf, height: float = math.inf) -> float:
    """Steps between a path's points, cut at the image: by rows and columns that they cross.

    Moves to the next piece are left out; what closes a piece unsaid, too.
    """
    starts = np.cumsum([len(coords) // 2 for _, coords in path.commands])
    moves = [
        start - 1 for start, (name, _) in zip(starts, path.commands, strict=True) if name == "M"
    ]
    steps = np.abs(np.diff(np.clip(points_of(path.commands), 0, (width, height)), axis=0)).sum(1)
    return float(steps.sum() - steps[[move - 1 for move in moves if move]].sum())


TILE = 4096
"""Skia draws without anti-aliasing where 4 x the coordinate overflows 32767: tiles stay below."""
OUTLINE_DOUBT = 0.07
"""Pixels per pixel of outline that exact coverage (Skia) and 8 x 8 samples (resvg at twice the
size) put on different sides of one half, at most, in ``benchmarks/refiner.py``."""
SAMPLED_PIXELS = 512 * 512
"""Objects whose box is larger are not sampled: it takes 64 bytes a pixel, in bands."""
BAND = 64
"""Rows of pixels that are sampled at once."""


def _skia_mask(skia: ModuleType, path: Path, width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    box = _pixel_bounds(path, width, height)
    if box is None:
        return mask
    outline = _skia_path(skia, path)
    x0, y0, x1, y1 = box
    for top in range(y0, y1, TILE):
        for left in range(x0, x1, TILE):
            tile = mask[top : min(y1, top + TILE), left : min(x1, left + TILE)]
            coverage = np.zeros(tile.shape, np.uint8)
            _draw(skia, outline, coverage, left, top, 1)
            # bool and uint8 share their bytes: no conversion pass over the mask.
            np.greater(coverage, 127, out=tile.view(np.bool_))
    if (x1 - x0) * (y1 - y0) <= SAMPLED_PIXELS:
        inside = mask[y0:y1, x0:x1]
        # What differs is to stay within a thousandth of the object.
        if _length(path) * OUTLINE_DOUBT > 0.001 * np.count_nonzero(inside):
            _sample(skia, outline, inside, x0, y0)
    return mask


def _draw(
    skia: ModuleType, outline: Any, canvas: np.ndarray, left: int, top: int, scale: int
) -> None:
    """Paint 255 on a contiguous uint8 [h, w] that shows ``scale`` times the picture from (left,
    top) on; anti-aliased at its own size only."""
    height, width = canvas.shape
    info = skia.ImageInfo.MakeA8(width, height)
    surface = skia.Surface.MakeRasterDirect(info, canvas, width).getCanvas()
    surface.scale(scale, scale)
    surface.translate(-left, -top)
    surface.drawPath(outline, skia.Paint(AntiAlias=scale == 1, Color=skia.ColorBLACK))


def _sample(skia: ModuleType, outline: Any, mask: np.ndarray, left: int, top: int) -> None:
    """Fill uint8 [h, w] that lies at (left, top) as resvg would at twice the size.

    There a pixel has four parts of 4 x 4 samples, and each part's opacity is 16 a sample, at most
    255; a pixel is set where they come to more than half (tiny-skia's supersampling).
    """
    for y in range(0, len(mask), BAND):
        band = mask[y : y + BAND]
        height, width = band.shape
        samples = np.zeros((height * 8, width * 8), np.uint8)
        _draw(skia, outline, samples, left, top + y, 8)
        # A byte of packed bits is a pixel's row of samples; its bits are counted by half.
        rows = np.packbits(samples).reshape(height, 2, 4, width)
        pairs = rows - (rows >> 1 & 0x55)
        halves = (pairs & 0x33) + (pairs >> 2 & 0x33)
        parts = np.stack(
            [(halves >> 4).sum(axis=2, dtype=np.int16), (halves & 15).sum(axis=2, dtype=np.int16)]
        )
        opacity = 16 * parts - (parts == 16)
        np.greater(opacity.sum(axis=(0, 2)), 2 * 255, out=band.view(np.bool_))


def _pixel_bounds(path: Path, width: int, height: int) -> PixelBox | None:
    """The part of the image that the path's control points span; None when there is none."""
    points = [coords for _, coords in path.commands if coords]
    if not points or path.is_empty:
        return None
    xs = [v for coords in points for v in coords[::2]]
    ys = [v for coords in points for v in coords[1::2]]
    x0, y0 = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
    x1, y1 = min(width, math.ceil(max(xs))), min(height, math.ceil(max(ys)))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _skia_path(skia: ModuleType, path: Path) -> Any:
    builder = skia.PathBuilder()
    draw = {
        "M": builder.moveTo,
        "L": builder.lineTo,
        "C": builder.cubicTo,
        "Q": builder.quadTo,
        "Z": builder.close,
    }
    for name, coords in path.commands:
        draw[name](*coords)
    builder.setFillType(skia.PathFillType.kWinding)
    return builder.detach()


def _skia_painter() -> Painter:
    return functools.partial(_skia_mask, load_skia())


def _resvg_painter() -> Painter:
    _resvg()
    return _resvg_mask


_PAINTERS: dict[str, Callable[[], Painter]] = {"skia": _skia_painter, "resvg": _resvg_painter}
