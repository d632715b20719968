"""What one refinement gives."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SegmentRefineBitmapsResult:
    """Refined outline and, when they were asked for, the two masks.

    ``refined_svg_path`` is SVG path data in 0..1 coordinates relative to ``refined_bbox``
    (``{"x_min", "y_min", "x_max", "y_max"}``, normalised to the image); both are None when the
    caller is to keep the model's own. Masks are base64 PNGs, 8-bit grey, 0 or 255, image size.
    """

    refined_svg_path: str | None = None
    refined_bbox: dict[str, float] | None = None
    coarse_mask_base64: str | None = None
    refined_mask_base64: str | None = None
    reason: str = "refined"
    """``refined``, or why something is missing: see ``REASONS``."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds per stage (decode, raster, refine, clean, encode, trace), in the order in which
    they ended."""


REASONS = (
    "refined",
    "no_image",
    "no_path",
    "raster_failed",
    "empty_coarse",
    "refine_failed",
    "empty_refined",
    "rejected",
    "trace_failed",
    "unavailable",
)
