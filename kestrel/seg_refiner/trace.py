"""Masks to outlines with Potrace (Selinger, "Potrace: a polygon-based tracing algorithm", 2003).

Three builds of the same algorithm, first that loads wins: the C library called with packed words,
the ``pypotrace`` extension, and ``potracer`` in pure Python (hundreds of times slower).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from kestrel.seg_refiner.box import mask_box, mask_iou
from kestrel.seg_refiner.raster import Painter, load_rasterizer, points_of
from kestrel.svg import Command, Path, path_to_string, transform

log = logging.getLogger(__name__)

QUANTUM = 0.05
"""Coordinates are written to within this many pixels."""

FAITHFUL_IOU = 0.99
"""A trace that gives the mask back less well than this is made again with sharper corners."""

FARTHEST = 1.0
"""Pixels between a mask's outline and Potrace's before curves are joined (by ``opttolerance``):
half of one for its polygon, half of one for a corner rounded within a unit square (sections 2.2
and 2.3 of the paper)."""

Tracer = Callable[[np.ndarray, int, float, float], list[Command]]
"""``(crop uint8 [h, w] 0/1, turdsize, alphamax, opttolerance) -> commands in pixels``, y down."""


class TracerMissing(ImportError):
    """No build of Potrace under the asked name; the message says how to install it."""


def bitmap_to_path(
    mask: np.ndarray,
    *,
    turdsize: int = 2,
    alphamax: float = 1.0,
    opttolerance: float = 0.2,
    tracer: str = "auto",
    rasterizer: str = "auto",
) -> tuple[str, dict[str, float]] | None:
    """Trace a mask.

    ``mask``: [H, W], bool or uint8, non-zero is inside. ``turdsize`` in pixels of area,
    ``alphamax`` 0..4/3, ``opttolerance`` in pixels, as Potrace defines them. ``tracer``:
    ``libpotrace``, ``pypotrace``, ``potracer`` or ``auto``. ``rasterizer`` paints the path again,
    to see whether it gives the mask back.

    Gives SVG path data in 0..1 relative to the box of the mask, and that box normalised to the
    image; None when there is nothing to trace (no pixel, or specks within ``turdsize`` only).
    Holes run against their outlines: the path means the same under both fill rules.

    Rounding a corner costs about a pixel: nothing for a large object, a tenth of a small one.
    Where the path would not give the mask back (``FAITHFUL_IOU``), corners are kept instead, and
    if need be every step of the outline.

    Raises :class:`TracerMissing` or ``RasterizerMissing`` (ImportErrors), ValueError for a mask
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
    crop = np.ascontiguousarray(mask[y0:y1, x0:x1] != 0).view(np.uint8)
    paint = load_rasterizer(rasterizer)
    path = _faithful_trace(load_tracer(tracer), paint, crop, turdsize, alphamax, opttolerance)
    if path is None:
        return None
    height, width = crop.shape
    decimals = max(1, math.ceil(math.log10(max(width, height) / QUANTUM / 2)))
    image_height, image_width = mask.shape
    bbox = {
        "x_min": x0 / image_width,
        "y_min": y0 / image_height,
        "x_max": x1 / image_width,
        "y_max": y1 / image_height,
    }
    return path_to_string(transform(path, 1 / width, 1 / height), decimals), bbox


def _faithful_trace(
    tracer: Tracer,
    paint: Painter,
    crop: np.ndarray,
    turdsize: int,
    alphamax: float,
    opttolerance: float,
) -> Path | None:
    """The smoothest of four traces that gives the crop back; the first if none does."""
    height, width = crop.shape
    first = None
    for zoom, corners in ((1, alphamax), (1, alphamax / 2), (1, 0.0), (2, 0.0)):
        zoomed = crop if zoom == 1 else crop.repeat(zoom, axis=0).repeat(zoom, axis=1)
        commands = tracer(zoomed, turdsize * zoom**2, corners, opttolerance)
        if not commands:
            return first
        path = _within(commands, width, height, zoom)
        first = first or path
        if _surely_faithful(path, crop, opttolerance):
            return path
        if mask_iou(crop, paint(path, width, height)) >= FAITHFUL_IOU:
            return path
    return first


def _surely_faithful(path: Path, crop: np.ndarray, opttolerance: float) -> bool:
    """Whether the object is so large for its outline that painting the path can be left out."""
    points = points_of(path.commands)
    # Steps between control points are no shorter than the curve; moves to the next piece only add.
    length = float(np.hypot(*np.diff(points, axis=0).T).sum())
    return bool(length * (FARTHEST + opttolerance) <= (1 - FAITHFUL_IOU) * np.count_nonzero(crop))


def _within(commands: Sequence[Command], width: int, height: int, zoom: int) -> Path:
    """Unzoomed, and cut at the box: Potrace may fit a vertex up to half a pixel outside it."""
    points = np.clip(points_of(commands) / zoom, 0.0, (width, height))
    values = iter(points.ravel().tolist())
    return Path(
        tuple((name, tuple(itertools.islice(values, len(coords)))) for name, coords in commands)
    )


def load_tracer(name: str = "auto") -> Tracer:
    """The named tracer, loaded once. Raises :class:`TracerMissing`."""
    if name != "auto":
        return _TRACERS[name]()
    return _auto()


@functools.cache
def _auto() -> Tracer:
    reasons = []
    for name in ("libpotrace", "pypotrace", "potracer"):
        try:
            tracer = _TRACERS[name]()
        except TracerMissing as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("tracing with %s: %s", name, "; ".join(reasons))
        return tracer
    raise TracerMissing("; ".join(reasons))


# --- libpotrace ------------------------------------------------------------------------------
# Layouts of potracelib.h, API version 1.x (unchanged from 1.8 to 1.16).


class _Progress(ctypes.Structure):
    _fields_ = (
        ("callback", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("min", ctypes.c_double),
        ("max", ctypes.c_double),
        ("epsilon", ctypes.c_double),
    )


class _Param(ctypes.Structure):
    _fields_ = (
        ("turdsize", ctypes.c_int),
        ("turnpolicy", ctypes.c_int),
        ("alphamax", ctypes.c_double),
        ("opticurve", ctypes.c_int),
        ("opttolerance", ctypes.c_double),
        ("progress", _Progress),
    )


class _Bitmap(ctypes.Structure):
    _fields_ = (
        ("w", ctypes.c_int),
        ("h", ctypes.c_int),
        ("dy", ctypes.c_int),
        ("map", ctypes.c_void_p),
    )


class _Curve(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int),
        ("tag", ctypes.POINTER(ctypes.c_int)),
        ("c", ctypes.POINTER(ctypes.c_double)),
    )


class _TracedPath(ctypes.Structure):
    pass


_TracedPath._fields_ = (
    ("area", ctypes.c_int),
    ("sign", ctypes.c_int),
    ("curve", _Curve),
    ("next", ctypes.POINTER(_TracedPath)),
    ("childlist", ctypes.POINTER(_TracedPath)),
    ("sibling", ctypes.POINTER(_TracedPath)),
    ("priv", ctypes.c_void_p),
)


class _State(ctypes.Structure):
    _fields_ = (
        ("status", ctypes.c_int),
        ("plist", ctypes.POINTER(_TracedPath)),
        ("priv", ctypes.c_void_p),
    )


_CORNER = 2  # POTRACE_CORNER; the other tag is a curve
_WORD = np.dtype(ctypes.c_ulong)
_NAMES = ("libpotrace.so.0", "libpotrace.so", "libpotrace.0.dylib", "libpotrace.dylib")


@functools.cache
def _libpotrace() -> Tracer:
    library = _open_library()
    library.potrace_version.restype = ctypes.c_char_p
    version = (library.potrace_version() or b"").decode("ascii", "replace")
    if not version.startswith("potracelib 1."):
        raise TracerMissing(f"{version!r} is not the Potrace library 1.x that is known here")
    library.potrace_param_default.restype = ctypes.POINTER(_Param)
    library.potrace_param_free.argtypes = (ctypes.POINTER(_Param),)
    library.potrace_param_free.restype = None
    library.potrace_trace.argtypes = (ctypes.POINTER(_Param), ctypes.POINTER(_Bitmap))
    library.potrace_trace.restype = ctypes.POINTER(_State)
    library.potrace_state_free.argtypes = (ctypes.POINTER(_State),)
    library.potrace_state_free.restype = None

    def trace(
        crop: np.ndarray, turdsize: int, alphamax: float, opttolerance: float
    ) -> list[Command]:
        words = pack_words(crop)
        height, width = crop.shape
        bitmap = _Bitmap(width, height, words.shape[1], words.ctypes.data)
        param = library.potrace_param_default()
        if not param:
            raise MemoryError("Potrace could not allocate its parameters")
        try:
            param.contents.turdsize = turdsize
            param.contents.alphamax = alphamax
            param.contents.opttolerance = opttolerance
            state = library.potrace_trace(param, ctypes.byref(bitmap))
        finally:
            library.potrace_param_free(param)
        if not state:
            raise MemoryError(f"Potrace could not trace a {width}x{height} mask")
        try:
            if state.contents.status != 0:
                raise RuntimeError("Potrace gave an incomplete trace")
            return list(_walk(state.contents.plist))
        finally:
            library.potrace_state_free(state)

    return trace


def _open_library() -> ctypes.CDLL:
    # The plain names first: find_library starts processes.
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    found = ctypes.util.find_library("potrace")
    if found:
        try:
            return ctypes.CDLL(found)
        except OSError as error:
            raise TracerMissing(f"{found} does not load: {error}") from error
    raise TracerMissing(
        "libpotrace is not installed: apt-get install libpotrace0 (macOS: brew install potrace)"
    )


def pack_words(crop: np.ndarray) -> np.ndarray:
    """Potrace's bitmap: [h, words] of native words, leftmost pixel the most significant bit.

    ``crop``: uint8 [h, w], 0/1. Row 0 stays first, so that traced y runs down as the image's.
    """
    bits = np.packbits(crop, axis=1)
    words = np.zeros((crop.shape[0], -(-crop.shape[1] // (8 * _WORD.itemsize))), _WORD)
    words.view(np.uint8)[:, : bits.shape[1]] = bits
    return words.byteswap(inplace=True) if sys.byteorder == "little" else words


def _walk(node: Any) -> Iterator[Command]:
    while node:
        curve = node.contents.curve
        tags = curve.tag[: curve.n]
        points = np.ctypeslib.as_array(curve.c, (curve.n, 6)).tolist()
        yield "M", (points[-1][4], points[-1][5])
        for tag, point in zip(tags, points, strict=True):
            if tag == _CORNER:
                yield "L", (point[2], point[3])
                yield "L", (point[4], point[5])
            else:
                yield "C", tuple(point)
        yield "Z", ()
        node = node.contents.next


# --- the two modules named potrace -----------------------------------------------------------


def _potrace_module() -> ModuleType | None:
    try:
        import potrace
    except ImportError:
        return None
    return potrace


def _is_pure_python(module: ModuleType) -> bool:
    """potracer keeps its algorithm in Python; pypotrace's ``_potrace`` is an extension module."""
    return "potrace._potrace" not in sys.modules and not hasattr(module, "_potrace")


@functools.cache
def _pypotrace() -> Tracer:
    module = _potrace_module()
    if module is None or _is_pure_python(module):
        raise TracerMissing(
            "pypotrace is not installed: apt-get install libagg-dev libpotrace-dev, then "
            "pip install pypotrace (it shares its module name with potracer: uninstall that)"
        )
    return functools.partial(_trace_module, module, False)


@functools.cache
def _potracer() -> Tracer:
    module = _potrace_module()
    if module is None or not _is_pure_python(module):
        raise TracerMissing("potracer is not installed: pip install potracer")
    return functools.partial(_trace_module, module, True)


def _trace_module(
    module: ModuleType,
    pure: bool,
    crop: np.ndarray,
    turdsize: int,
    alphamax: float,
    opttolerance: float,
) -> list[Command]:
    # potracer traces what is False in a boolean array; pypotrace what is non-zero.
    bitmap = module.Bitmap(crop == 0 if pure else crop.astype(np.uint32))
    traced = bitmap.trace(turdsize=turdsize, alphamax=alphamax, opttolerance=opttolerance)
    commands: list[Command] = []
    for curve in traced:
        commands.append(("M", _xy(curve.start_point)))
        for segment in curve.segments:
            if segment.is_corner:
                commands.append(("L", _xy(segment.c)))
                commands.append(("L", _xy(segment.end_point)))
            else:
                points = (segment.c1, segment.c2, segment.end_point)
                commands.append(("C", tuple(v for point in points for v in _xy(point))))
        commands.append(("Z", ()))
    return commands


def _xy(point: Any) -> tuple[float, float]:
    """potracer's points have ``x`` and ``y``, pypotrace's are pairs."""
    if hasattr(point, "x"):
        return float(point.x), float(point.y)
    x, y = point
    return float(x), float(y)


_TRACERS: dict[str, Callable[[], Tracer]] = {
    "libpotrace": _libpotrace,
    "pypotrace": _pypotrace,
    "potracer": _potracer,
}
