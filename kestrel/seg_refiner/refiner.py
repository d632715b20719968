"""Rasterise, refine, clean, trace, encode: one request through the CPU half."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from kestrel.config import ConfigError, Limits, RefinerConfig
from kestrel.seg_refiner import png, raster, trace
from kestrel.seg_refiner.backends import Reduced, Refine, build_backend, find_backend
from kestrel.seg_refiner.box import PixelBox, grown_box, joined_box, mask_box, mask_iou, reduced_box
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.svg import parse_path, place_path

log = logging.getLogger(__name__)

Bbox = dict[str, float]

ASKING: ContextVar[str] = ContextVar("asking", default="")
"""The request that a thread refines for, named in log lines where the caller sets it."""
UNWANTED: ContextVar[Callable[[], bool]] = ContextVar("unwanted", default=lambda: False)
"""Whether nobody waits any more for what a thread refines; asked before each stage."""


class Unwanted(Exception):
    """``UNWANTED`` said so, and what was left of the refinement is not done. Not an outcome."""


class _Stopped(Exception):
    """A stage ended the refinement; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SegmentRefiner:
    """Turns a model's path into a mask that follows the picture's edges, and that into a path.

    Safe to call from several threads. ``outcomes`` counts results by reason since construction.
    Raises :class:`kestrel.config.ConfigError` for a backend that is not registered or whose parts
    are missing, and for a rasteriser that is asked for by name and does not load. Other missing
    libraries raise nothing here: requests then end with the reason ``unavailable``, and
    :meth:`self_check` says what to install. Where the caller sets ``UNWANTED``, calls may raise
    :class:`Unwanted` too.
    """

    def __init__(
        self, config: RefinerConfig | None = None, *, limits: Limits | None = None
    ) -> None:
        self.config = config or RefinerConfig()
        self.limits = limits or Limits()
        for name in self.config.loaded:
            find_backend(name)
        if self.config.rasterizer != "auto":
            try:
                raster.load_rasterizer(self.config.rasterizer)
            except raster.RasterizerMissing as error:
                raise ConfigError(f"rasterizer {self.config.rasterizer}: {error}") from error
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._backends: dict[str, Refine] = {}
        for name in self.config.loaded:
            # Without OpenCV and the like there is still the model's own path.
            with contextlib.suppress(ImportError):
                self._backend(name)

    def __call__(
        self, image: np.ndarray, svg_path: str, bbox: Mapping[str, float] | None
    ) -> tuple[str | None, Bbox | None]:
        """Refined path and box, or ``(None, None)``: see :meth:`refine_with_bitmaps`."""
        result = self.refine_with_bitmaps(image, svg_path, bbox)
        return result.refined_svg_path, result.refined_bbox

    def refine_encoded(
        self,
        image_bytes: bytes,
        svg_path: str,
        bbox: Mapping[str, float] | None,
        *,
        return_base64: bool = False,
        refiner: str | None = None,
    ) -> SegmentRefineBitmapsResult:
        """:meth:`refine_with_bitmaps` of a JPEG, PNG or WebP file.

        A JPEG is decoded at a half, a quarter or an eighth of its sides where the backend can do
        with it; masks keep the file's. Raises what ``kestrel.image.decode`` raises for bytes that
        are no picture.
        """
        return self._counted(
            _File(image_bytes, self.limits), svg_path, bbox, return_base64, refiner
        )

    def refine_with_bitmaps(
        self,
        image: np.ndarray | None,
        svg_path: str,
        bbox: Mapping[str, float] | None,
        *,
        return_base64: bool = False,
        refiner: str | None = None,
    ) -> SegmentRefineBitmapsResult:
        """Refine one object.

        ``image``: uint8 [H, W, 3] RGB. ``svg_path``: SVG path data, 0..1 relative to ``bbox``;
        ``bbox``: ``x_min, y_min, x_max, y_max`` normalised to the image. ``refiner``: a backend of
        ``RefinerConfig.loaded``; None: the configured one.

        Path and box of the result are both set, or both None: then the model's own are to be
        used and ``reason`` says why. Masks are set only with ``return_base64``; without it no
        mask is encoded at all. Raises ValueError for an image that is not such an array or a
        backend that is not loaded, and for nothing else.
        """
        picture = None if image is None else _Array(image)
        return self._counted(picture, svg_path, bbox, return_base64, refiner)

    def _counted(
        self,
        picture: _Picture | None,
        svg_path: str,
        bbox: Mapping[str, float] | None,
        return_base64: bool,
        refiner: str | None,
    ) -> SegmentRefineBitmapsResult:
        name = self.config.refiner if refiner is None else refiner
        if name not in self.config.loaded:
            loaded = ", ".join(self.config.loaded)
            raise ValueError(f"refiner {name!r} is not loaded; loaded are {loaded}")
        result = self._outcome(picture, svg_path, bbox, return_base64, name)
        with self._lock:
            self.outcomes[result.reason] += 1
        return result

    def _outcome(
        self,
        picture: _Picture | None,
        svg_path: str,
        bbox: Mapping[str, float] | None,
        return_base64: bool,
        name: str,
    ) -> SegmentRefineBitmapsResult:
        result, stop = self._attempt(picture, svg_path, bbox, return_base64, name)
        if stop is not None:
            # The cause's traceback says where; a stop without a cause needs none.
            whose = ASKING.get()
            log.warning(
                "%snot refined (%s): %s",
                f"request {whose}: " if whose else "",
                stop.reason,
                stop,
                exc_info=stop.__cause__,
            )
            # Its traceback leads back to this frame: that loop would hold the picture for long.
            del stop
        return result

    def _attempt(
        self,
        picture: _Picture | None,
        svg_path: str,
        bbox: Mapping[str, float] | None,
        return_base64: bool,
        name: str,
    ) -> tuple[SegmentRefineBitmapsResult, _Stopped | None]:
        """The result, and what stopped the refinement, whose ``reason`` the result has."""
        result = SegmentRefineBitmapsResult()
        try:
            if picture is None:
                raise _Stopped("no_image", "there is no image to refine on")
            self._run(picture, svg_path, bbox, return_base64, name, result)
        except _Stopped as stop:
            if picture is not None:
                # A broken file is refused even where nothing came to look at its pixels.
                picture.check(result.timings_ms)
            result.reason = stop.reason
            return result, stop
        return result, None

    def _run(
        self,
        picture: _Picture,
        svg_path: str,
        bbox: Mapping[str, float] | None,
        return_base64: bool,
        name: str,
        result: SegmentRefineBitmapsResult,
    ) -> None:
        height, width = picture.height, picture.width
        timings = result.timings_ms

        # First of all: without its libraries there is to be no mask either.
        with _stage("refine", "refine_failed", timings):
            backend = self._backend(name)
        # Where all pixels are needed they come first: decoding takes the most memory.
        less = backend if isinstance(backend, Reduced) and picture.reduction > 1 else None
        whole = picture.pixels(timings) if less is None else None
        with _stage("raster", "raster_failed", timings):
            coarse = self._rasterize(svg_path, bbox, width, height)
        if return_base64:
            with _stage("encode", "raster_failed", timings):
                result.coarse_mask_base64 = png._encode_mask_png_base64(coarse)
        coarse_box = mask_box(coarse)
        if coarse_box is None:
            raise _Stopped("empty_coarse", "the model's path covers no pixel")

        if less is not None:
            refined = self._refined_less(less, picture, coarse, coarse_box, name, timings)
        else:
            assert whole is not None
            with _stage("refine", "refine_failed", timings, missing="refine_failed"):
                refined = _mask_of(backend, whole, coarse, name)
        if name != "none":
            with _stage("clean", "refine_failed", timings):
                from kestrel.seg_refiner.clean import clean_mask

                refined = clean_mask(refined, coarse)
        refined_box = mask_box(refined)
        if refined_box is None:
            raise _Stopped("empty_refined", "nothing is left of the mask after refinement")
        x0, y0, x1, y1 = joined_box(coarse_box, refined_box)
        agreement = mask_iou(coarse[y0:y1, x0:x1], refined[y0:y1, x0:x1])
        if agreement < self.config.min_agreement:
            raise _Stopped(
                "rejected",
                f"IoU of refined and coarse mask is {agreement:.2f}, "
                f"under min_agreement {self.config.min_agreement:.2f}",
            )

        if return_base64:
            with _stage("encode", "refine_failed", timings):
                result.refined_mask_base64 = png._encode_mask_png_base64(refined)
        with _stage("trace", "trace_failed", timings, missing="trace_failed"):
            traced = self._trace(refined)
        if traced is None:
            raise _Stopped(
                "trace_failed",
                "the refined mask holds only specks, or no outline of it is short enough: raise "
                "limits.max_path_chars and max_path_commands",
            )
        result.refined_svg_path, result.refined_bbox = traced

    def _refined_less(
        self,
        backend: Reduced,
        picture: _Picture,
        coarse: np.ndarray,
        coarse_box: PixelBox,
        name: str,
        timings: dict[str, float],
    ) -> np.ndarray:
        """The refined mask by a backend that works without some of the picture's pixels."""
        box = x0, y0, x1, y1 = grown_box(coarse_box, picture.width, picture.height)
        with _stage("refine", "refine_failed", timings, missing="refine_failed"):
            asked = backend.reduction((x1 - x0, y1 - y0), (picture.width, picture.height))
            reduction = min(picture.reduction, asked)
        box = reduced_box(box, reduction)
        image = picture.pixels(timings, box, reduction)
        x0, y0, x1, y1 = (side * reduction for side in box)
        with _stage("refine", "refine_failed", timings, missing="refine_failed"):
            refine = functools.partial(backend, reduction=reduction)
            refined = np.zeros(coarse.shape, np.uint8)
            refined[y0:y1, x0:x1] = _mask_of(refine, image, coarse[y0:y1, x0:x1], name)
        return refined

    def _rasterize(
        self, svg_path: str, bbox: Mapping[str, float] | None, width: int, height: int
    ) -> np.ndarray:
        try:
            path = parse_path(svg_path, self.limits)
        except ValueError as error:
            raise _Stopped("no_path", f"the model gave no SVG path: {error}") from error
        if path.is_empty:
            raise _Stopped("no_path", "the model gave an empty path")
        if bbox is None:
            raise _Stopped("no_path", "the model gave a path without a box")
        placed = place_path(path, bbox, width, height)
        raster.check_length(placed, width, height, self.limits)
        return raster.rasterize(placed, width, height, self.config.rasterizer)

    def _backend(self, name: str) -> Refine:
        with self._lock:
            if name not in self._backends:
                self._backends[name] = build_backend(name, self.config)
            return self._backends[name]

    def _trace(self, mask: np.ndarray) -> tuple[str, Bbox] | None:
        config = self.config
        return trace.bitmap_to_path(
            mask,
            turdsize=config.turdsize,
            alphamax=config.alphamax,
            opttolerance=config.opttolerance,
            decimals=config.decimals,
            max_vertices=config.max_vertices,
            limits=self.limits,
            tracer=config.tracer,
            rasterizer=config.rasterizer,
        )

    def self_check(self) -> None:
        """Refine a disc on a built-in picture with every loaded backend.

        Raises RuntimeError that says what does not work and why. What a network thinks of a disc is
        its own affair: a mask that it gives counts as work, even one that is then rejected.
        """
        try:
            raster.load_rasterizer(self.config.rasterizer)
        except raster.RasterizerMissing as error:
            raise RuntimeError(f"the refiner does not work: {error}") from error
        size = 64
        y, x = np.mgrid[:size, :size]
        disc = (x - 31.5) ** 2 + (y - 31.5) ** 2 < 20**2
        image = np.where(disc[..., None], np.uint8(200), np.uint8(50)).repeat(3, axis=2)
        box = {"x_min": 0.2, "y_min": 0.2, "x_max": 0.8, "y_max": 0.8}
        for name in self.config.loaded:
            path = "M.5 0A.5.5 0 1 1 .49 0Z"
            result, stop = self._attempt(_Array(image), path, box, True, name)
            if result.reason not in ("refined", "rejected", "empty_refined"):
                raise RuntimeError(
                    f"the refiner {name} does not work: {result.reason} ({stop})"
                ) from stop


class _Array:
    """A picture that is there already: uint8 [H, W, 3] RGB."""

    reduction = 1

    def __init__(self, image: np.ndarray) -> None:
        check_image(image)
        self.height, self.width = image.shape[:2]
        self._image = image

    def pixels(
        self, timings: dict[str, float], box: PixelBox | None = None, reduction: int = 1
    ) -> np.ndarray:
        return self._image

    def check(self, timings: dict[str, float]) -> None:
        pass


class _File:
    """A picture whose header is read; its pixels are decoded when they are asked for, once."""

    def __init__(self, content: bytes, limits: Limits) -> None:
        from kestrel.image import probe

        header = probe(content, limits)
        self.width, self.height, self.reduction = header.width, header.height, header.reduction
        self._content, self._limits, self._asked = content, limits, False

    def pixels(
        self, timings: dict[str, float], box: PixelBox | None = None, reduction: int = 1
    ) -> np.ndarray:
        """All, or what lies in a box of the reduced ones; ``timings["decode"]``: milliseconds."""
        from kestrel.image import decode
        from kestrel.seg_refiner.jpeg_box import decode_box

        started = time.perf_counter()
        self._asked = True
        try:
            if box is None:
                return decode(self._content, self._limits, reduction=reduction)
            return decode_box(self._content, box, self._limits, reduction)
        except MemoryError as error:  # which is no fault of the file
            raise _Stopped("refine_failed", f"decode: out of memory ({error})") from error
        finally:
            timings["decode"] = (time.perf_counter() - started) * 1e3

    def check(self, timings: dict[str, float]) -> None:
        """Raises what ``decode`` raises for a file, if it has not been called."""
        if not self._asked:
            with contextlib.suppress(_Stopped):
                self.pixels(timings, reduction=self.reduction)


_Picture = _Array | _File


def _mask_of(backend: Refine, image: np.ndarray, coarse: np.ndarray, name: str) -> np.ndarray:
    refined = backend(image, coarse)
    if refined.shape != coarse.shape or refined.dtype != np.uint8:
        raise ValueError(
            f"refiner {name!r} gave {refined.dtype} {refined.shape}, not uint8 {coarse.shape}"
        )
    # Other values are counted wrongly, and a mask is then rejected, or not, by chance.
    if (top := int(refined.max())) > 1:
        raise ValueError(f"refiner {name!r} gave values up to {top}, not 0 and 1")
    return refined


def check_image(image: Any) -> None:
    """Raises ValueError unless ``image`` is a uint8 array [H, W, 3] with H and W at least 1."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be a numpy array, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image must be uint8 with shape [H, W, 3], not {image.dtype} {list(image.shape)}"
        )
    if image.size == 0:
        raise ValueError(f"image has no pixels: shape {list(image.shape)}")


@contextmanager
def _stage(
    name: str, reason: str, timings: dict[str, float], missing: str = "unavailable"
) -> Iterator[None]:
    """Add the block's milliseconds to ``timings[name]``, the last entry then; turn what it raises
    into ``_Stopped``.

    ``missing`` is the reason when a library is not installed. Raises :class:`Unwanted` before it.
    """
    if UNWANTED.get()():
        raise Unwanted()
    started = time.perf_counter()
    try:
        yield
    except _Stopped:
        raise
    except ImportError as error:
        raise _Stopped(missing, f"{name}: {error}") from error
    except Exception as error:
        raise _Stopped(reason, f"{name}: {error}") from error
    finally:
        # Put last: in a trace stages follow each other in this order, and one of several parts
        # (looking for the backend is one of refining) would stand before what it worked on.
        timings[name] = timings.pop(name, 0.0) + (time.perf_counter() - started) * 1e3
