"""Builds of Potrace (Selinger, "Potrace: a polygon-based tracing algorithm", 2003).

First that loads wins: the C library called with packed words, the ``pypotrace`` extension, and
``potracer`` in pure Python (hundreds of times slower).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from kestrel.seg_refiner.libraries import first_that_loads
from kestrel.svg import Command

log = logging.getLogger(__name__)

Tracer = Callable[[np.ndarray, int, float, float], list[Command]]
"""``(crop uint8 [h, w] 0/1, turdsize, alphamax, opttolerance) -> commands in pixels``, y down."""


class TracerMissing(ImportError):
    """No build of Potrace under the asked name; the message says how to install it."""


def load_tracer(name: str = "auto") -> Tracer:
    """The named tracer, loaded once. Raises :class:`TracerMissing`."""
    if name != "auto":
        return _TRACERS[name]()
    return _auto()


@functools.cache
def _auto() -> Tracer:
    return first_that_loads(_TRACERS, TracerMissing, "tracing", log)


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


_INT_MAX = 2**31 - 1  # of C's int
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
            # ctypes would keep the low bits; Potrace counts no area as more than this.
            param.contents.turdsize = min(turdsize, _INT_MAX)
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
    traced = bitmap.trace(
        turdsize=min(turdsize, _INT_MAX), alphamax=alphamax, opttolerance=opttolerance
    )
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
