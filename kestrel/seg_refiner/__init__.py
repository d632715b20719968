"""The CPU half: a model's path in; a refined path, its box and two masks out. No torch."""

from kestrel.seg_refiner.backends import BACKENDS
from kestrel.seg_refiner.png import _encode_mask_png_base64
from kestrel.seg_refiner.raster import render_svg_to_soft_mask, svg_from_path
from kestrel.seg_refiner.refiner import SegmentRefiner
from kestrel.seg_refiner.result import REASONS, SegmentRefineBitmapsResult
from kestrel.seg_refiner.trace import bitmap_to_path

__all__ = [
    "BACKENDS",
    "REASONS",
    "SegmentRefineBitmapsResult",
    "SegmentRefiner",
    "_encode_mask_png_base64",
    "bitmap_to_path",
    "render_svg_to_soft_mask",
    "svg_from_path",
]
