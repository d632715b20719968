"""What the model half of a request gives: events as they come, the result at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

Bbox = dict[str, float]
"""``{"x_min", "y_min", "x_max", "y_max"}``, normalised to the image, 0..1."""


@dataclass
class ModelMetrics:
    """What the model half of one request cost."""

    input_tokens: int = 0
    """Prompt positions, image included."""
    output_tokens: int = 0
    prefill_time_ms: float = 0.0
    decode_time_ms: float = 0.0
    ttft_ms: float = 0.0
    """From submission to the first token."""


@dataclass
class ModelResult:
    """What the model half gives: the path before refinement, and the tokens behind it."""

    request_id: str
    finish_reason: str
    """``stop`` or ``length``."""
    object: str
    path: str
    """SVG path data in 0..1 relative to ``bbox``: what could be read, empty when nothing was."""
    bbox: Bbox | None
    metrics: ModelMetrics
    parse_error: str | None = None
    text: str = ""
    """The path as the model spelled it, on its own grid."""
    token_ids: list[int] = field(default_factory=list)
    path_tokens: list[str] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)

    @property
    def refinable(self) -> bool:
        """Whether there is a whole path to refine."""
        return bool(self.path) and self.bbox is not None and self.parse_error is None


@dataclass
class BboxEvent:
    """The model's own box."""

    bbox: Bbox


@dataclass
class PathDelta:
    """One whole path command; the chunks of a request joined are the model's path."""

    chunk: str
    token_index: int
    """Number of generated tokens up to and including the chunk's last."""


@dataclass
class ModelDone:
    """The end of the model half."""

    result: ModelResult


ModelEvent = BboxEvent | PathDelta | ModelDone
