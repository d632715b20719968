"""Masks to outlines, faithful and no longer than they may be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from kestrel.config import Limits
from kestrel.seg_refiner.box import mask_box, mask_iou
from kestrel.seg_refiner.raster import Painter, load_rasterizer, points_of
from kestrel.seg_refiner.trace_work import MOST_WORK, work
from kestrel.seg_refiner.tracers import Tracer, load_tracer
from kestrel.svg import Command, Path, path_to_string, transform

QUANTUM = 0.05
"""Unless told how many decimals, coordinates are written to within this many pixels."""

FAITHFUL_IOU = 0.99
"""A trace that gives the mask back less well than this is made again with sharper corners."""

FARTHEST = 1.0
"""Pixels between a mask's outline and Potrace's before curves are joined (by ``opttolerance``):
half of one for its polygon, half of one for a corner rounded within a unit square (sections 2.2
and 2.3 of the paper)."""

HALVED_FROM = 2048
"""Masks whose box has a side of this many pixels are traced at half their size first: what
Potrace takes grows with the square of a straight edge."""

THIN = 4
"""Times that the thinner side is stretched for the sharpest trace of what may not be doubled:
Potrace draws a strip of one pixel along its middle, as an outline of no area."""

SPECKED = 2**22
"""Pixels of the largest mask whose specks are looked for, which takes 6 bytes a pixel."""

LONGEST = 16_384
"""No trace is of a crop with a longer side, which is halved by itself until it is not. A native
call cannot be cancelled, and its work (``trace_work``) grows with the square of a straight edge.
Twice the size of masks up to half this length is still traced, and the whole of a 12,000 x 8,000
photograph, where they are within ``MOST_WORK``."""


def bitmap_to_path(
    mask: np.ndarray,
    *,
    turdsize: int = 2,
    alphamax: float = 1.0,
    opttolerance: float = 0.2,
    decimals: int | None = None,
    max_vertices: int | None = None,
    limits: Limits | None = None,
    tracer: str = "auto",
    rasterizer: str = "auto",
) -> tuple[str, dict[str, float]] | None:
    """Trace a mask.

    ``mask``: [H, W], bool or uint8, non-zero is inside. ``turdsize`` in pixels of area,
    ``alphamax`` 0..4/3, ``opttolerance`` in pixels, as Potrace defines them. ``decimals`` of the
    written coordinates; None: as many as ``QUANTUM`` takes. ``max_vertices``: lines and curves
    that the path may have, at least ``kestrel.config.FEWEST_VERTICES``. ``limits``: the
    characters and commands within which the path is to be (``Limits.max_path_chars``,
    ``max_path_commands``), so that it is read wherever paths are; None: whatever it takes.
    ``tracer``: ``libpotrace``, ``pypotrace``, ``potracer`` or ``auto``. ``rasterizer`` paints the
    path again, to see whether it gives the mask back.

    Gives SVG path data in 0..1 relative to the box of the mask, and that box normalised to the
    image; None when there is nothing to trace (no pixel, or specks within ``turdsize`` only),
    or where even the outline of one pixel would break ``limits``. Holes run against their
    outlines: the path means the same under both fill rules.

    Rounding a corner costs about a pixel: nothing for a large object, a tenth of a small one.
    Where the path would not give the mask back (``FAITHFUL_IOU``), corners are kept instead, and
    if need be every step of the outline; where none of these does, the smoothest is given of those
    about as good as the best. Where all have too many vertices or are too long, the mask is halved
    until its path is not. Sides over ``LONGEST`` are halved first, and so are masks with so many
    long diagonal edges that the trace alone would take more than ``MOST_WORK``: their paths may be
    some pixels off. Traces with sharper corners that would are left out.

    Raises ``TracerMissing`` or ``RasterizerMissing`` (ImportErrors), ValueError for a mask
    that is not 2-D.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must be [H, W], not {mask.shape}")
    if mask.dtype == np.bool_:
        mask = mask.view(np.uint8)
    box = mask_box(mask)
    if box is None:
        return None
    x0, y0, x1, y1 = box
    crop = mask[y0:y1, x0:x1]
    if crop.max() > 1:
        crop = (crop != 0).view(np.uint8)
    tracing = _Tracing(load_tracer(tracer), turdsize, opttolerance)
    most = math.inf if max_vertices is None else max_vertices
    paths = _faithful(tracing, load_rasterizer(rasterizer), crop, alphamax, most)
    if paths and _vertices(paths[0]) > most:
        paths = _within_budget(tracing, crop, alphamax, most)
    height, width = crop.shape
    if decimals is None:
        decimals = max(1, math.ceil(math.log10(max(width, height) / QUANTUM / 2)))
    image_height, image_width = mask.shape
    bbox = {
        "x_min": x0 / image_width,
        "y_min": y0 / image_height,
        "x_max": x1 / image_width,
        "y_max": y1 / image_height,
    }
    while paths:
        for path in paths:
            written = path_to_string(transform(path, 1 / width, 1 / height), decimals)
            if limits is None or (excess := _excess(path, written, limits)) <= 1:
                return written, bbox
        shorter = _within_budget(tracing, crop, alphamax, _vertices(path) / excess)
        # The outline of one pixel gets no shorter.
        paths = [found for found in shorter if _vertices(found) < _vertices(path)]
    return None


def _without_specks(crop: np.ndarray, turdsize: int) -> np.ndarray:
    """The crop without islands, and without holes, of up to so many pixels; as it is where it has
    more than ``SPECKED`` itself."""
    if not turdsize or crop.size > SPECKED:
        return crop
    for value, connectivity in ((1, 8), (0, 4)):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(
            (crop == value).view(np.uint8), connectivity=connectivity
        )
        specks = stats[:, cv2.CC_STAT_AREA] <= turdsize
        specks[0] = False  # what is not of the value, of which there may be little
        if specks.any():
            crop = np.where(specks[labels], np.uint8(1 - value), crop)
    return crop


@dataclass(frozen=True)
class _Tracing:
    """A tracer with the options that all traces of a mask share: ``turdsize`` in pixels of the
    mask, ``opttolerance`` in those of what is traced."""

    tracer: Tracer
    turdsize: int
    opttolerance: float

    def __call__(
        self, crop: np.ndarray, scale: np.ndarray, alphamax: float, size: tuple[int, int]
    ) -> Path | None:
        """Trace a crop of ``scale`` (x, y) times the mask's size; pixels of the mask, within
        ``size``."""
        turdsize = int(self.turdsize * scale.prod())
        commands = self.tracer(crop, turdsize, alphamax, self.opttolerance)
        return _within(commands, size, scale) if commands else None


def _faithful(
    tracing: _Tracing, paint: Painter, crop: np.ndarray, alphamax: float, most: float
) -> list[Path]:
    """Traces from the smoothest to the first that gives the crop back, those with at most so many
    vertices, best first; the smoothest alone where it has more, none where nothing is traced."""
    height, width = crop.shape
    found: list[tuple[float, Path]] = []
    wanted: np.ndarray | None = None
    left = MOST_WORK
    for zoomed, scale, corners in _attempts(crop, alphamax):
        looks = work(zoomed, left / 2)
        if looks > left and found:
            break
        while looks > left:
            zoomed, scale = _halved(zoomed), scale / 2
            looks = work(zoomed, left / 2)
        left -= looks
        path = tracing(zoomed, scale, corners, (width, height))
        if path is None:
            break
        if _vertices(path) > most:
            found = found or [(0.0, path)]
            break
        sure = _surely_faithful(path, crop, zoomed, (FARTHEST + tracing.opttolerance) / scale.min())
        iou = 1.0
        if not sure:
            # No trace gives specks back: they are no reason for a jagged one.
            wanted = _without_specks(crop, tracing.turdsize) if wanted is None else wanted
            iou = mask_iou(wanted, paint(path, width, height))
        found.append((iou, path))
        if found[-1][0] >= FAITHFUL_IOU:
            break
    enough = max((iou for iou, _ in found), default=0.0)
    if enough < FAITHFUL_IOU:
        # What no trace gives back is no reason for a jagged one.
        enough -= 1 - FAITHFUL_IOU
    # Sorting keeps the order of equals, the smoother before the sharper.
    return [path for _, path in sorted(found, key=lambda pair: -min(pair[0], enough))]


def _attempts(crop: np.ndarray, alphamax: float) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Crop, its scale (x, y) and ``alphamax`` of traces from the smoothest to the sharpest."""
    crop, scale = _traceable(crop)
    if max(crop.shape) >= HALVED_FROM:
        yield _halved(crop), scale / 2, alphamax
    for corners in (alphamax, alphamax / 2, 0.0):
        yield crop, scale, corners
    if 2 * max(crop.shape) <= LONGEST:
        yield crop.repeat(2, axis=0).repeat(2, axis=1), 2 * scale, 0.0
    elif THIN * crop.size <= LONGEST**2:
        thin = int(np.argmin(crop.shape))
        stretched = np.ones(2)
        stretched[1 - thin] = THIN
        yield crop.repeat(THIN, axis=thin), stretched * scale, 0.0


def _within_budget(tracing: _Tracing, crop: np.ndarray, alphamax: float, most: float) -> list[Path]:
    """The trace of the largest of crop, half crop, quarter crop, ... with so few vertices, or that
    of one pixel; none where nothing is traced."""
    height, width = crop.shape
    crop, scale = _traceable(crop)
    while work(crop, MOST_WORK) > MOST_WORK:
        crop, scale = _halved(crop), scale / 2
    while True:
        path = tracing(crop, scale, alphamax, (width, height))
        if path is None:
            return []
        if _vertices(path) <= most or crop.size == 1:
            return [path]
        crop, scale = _halved(crop), scale / 2


def _traceable(crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The crop, sides over ``LONGEST`` halved until none is, and its scale (x, y): pixels of which
    at least half is set; dust stays dust."""
    # Not the other side with it: of a strip of a few pixels' width too much would be lost.
    times = [_doubled(1, -(-side // LONGEST)) for side in crop.shape]
    if times == [1, 1]:
        return crop, np.ones(2)
    below, right = (-side % t for side, t in zip(crop.shape, times, strict=True))
    padded = cv2.copyMakeBorder(crop, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    size = (padded.shape[1] // times[1], padded.shape[0] // times[0])
    fewer = cv2.resize(padded * np.uint8(255), size, interpolation=cv2.INTER_AREA)
    fewer = (fewer > 127).view(np.uint8)
    if not fewer.any():
        fewer = padded.reshape(size[1], times[0], size[0], times[1]).max(axis=(1, 3))
    return fewer, 1 / np.array(times[::-1], float)


def _halved(crop: np.ndarray) -> np.ndarray:
    """Half the size, rounded up: pixels of which at least half is set; dust stays dust."""
    height, width = crop.shape
    halved = np.zeros((-(-height // 2), -(-width // 2)), np.uint8)
    rows, columns = height // 2, width // 2
    even = crop[: 2 * rows, : 2 * columns]
    if even.size:
        halved[:rows, :columns] = cv2.resize(even, (columns, rows), interpolation=cv2.INTER_AREA)
    # What an odd side leaves over is half of a pixel, or a quarter: too little by itself.
    if height % 2:
        halved[rows, :columns] = crop[-1, 0 : 2 * columns : 2] & crop[-1, 1 : 2 * columns : 2]
    if width % 2:
        halved[:rows, columns] = crop[0 : 2 * rows : 2, -1] & crop[1 : 2 * rows : 2, -1]
    if not halved.any():
        halved = cv2.dilate(crop, np.ones((2, 2), np.uint8), anchor=(0, 0))[::2, ::2].copy()
    return halved


def _excess(path: Path, written: str, limits: Limits) -> float:
    """How many times as long as it may be a path is; at most 1 where it is not too long."""
    commands = len(path.commands) / limits.max_path_commands
    return max(commands, len(written) / limits.max_path_chars)


def _vertices(path: Path) -> int:
    """Lines and curves of a path."""
    return sum(name not in "MZ" for name, _ in path.commands)


def _surely_faithful(path: Path, crop: np.ndarray, traced: np.ndarray, farthest: float) -> bool:
    """Whether a path that stays within ``farthest`` pixels of the outline of ``traced``, the crop
    or what became of it in halving, surely gives the crop back: the object is so large for its
    outline that painting can be left out."""
    points = points_of(path.commands)
    # Steps between control points are no shorter than the curve; moves to the next piece only add.
    length = float(np.hypot(*np.diff(points, axis=0).T).sum())
    wrong = length * farthest
    allowed = (1 - FAITHFUL_IOU) * cv2.countNonZero(crop)
    if wrong > allowed:
        return False
    height, width = crop.shape
    if len(traced) < height or traced.shape[1] < width:
        # What halving lost or added has no outline in the path.
        size = (_doubled(traced.shape[1], width), _doubled(len(traced), height))
        again = cv2.resize(traced, size, interpolation=cv2.INTER_NEAREST)[:height, :width]
        wrong += cv2.countNonZero(cv2.absdiff(crop, again))
    return bool(wrong <= allowed)


def _doubled(side: int, least: int) -> int:
    while side < least:
        side *= 2
    return side


def _within(commands: Sequence[Command], size: tuple[int, int], scale: np.ndarray) -> Path:
    """Unscaled, and cut at the box: Potrace may fit a vertex up to half a pixel outside it."""
    points = np.clip(points_of(commands) / scale, 0.0, size)
    values = iter(points.ravel().tolist())
    return Path(
        tuple((name, tuple(itertools.islice(values, len(coords)))) for name, coords in commands)
    )
