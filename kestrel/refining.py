"""The engine's refiner: made where its libraries are, and called in a worker thread."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kestrel.api import ModelResult, SegmentRequest
from kestrel.config import RuntimeConfig
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

if TYPE_CHECKING:
    import numpy as np

    from kestrel.seg_refiner import SegmentRefiner

log = logging.getLogger(__name__)


def make_refiner(config: RuntimeConfig) -> SegmentRefiner | None:
    """The configured refiner; None without one or without its libraries. ``ConfigError`` for an
    unknown backend."""
    if config.refiner is None:
        return None
    try:
        from kestrel.seg_refiner import SegmentRefiner
    except ImportError:
        log.warning("the refiner's libraries are missing, paths stay coarse", exc_info=True)
        return None
    return SegmentRefiner(config.refiner.served_with(config), limits=config.limits)


def refined_by(
    refiner: SegmentRefiner,
    image: bytes | np.ndarray,
    model: ModelResult,
    request: SegmentRequest,
) -> SegmentRefineBitmapsResult:
    """Refine in a worker thread; the refiner logs what it could not do."""
    from kestrel.seg_refiner.refiner import ASKING

    refine: Any = (
        refiner.refine_encoded if isinstance(image, bytes) else refiner.refine_with_bitmaps
    )
    asking = ASKING.set(model.request_id)
    try:
        return refine(
            image,
            model.path,
            model.bbox,
            return_base64=request.return_base64,
            refiner=request.settings.refiner,
        )
    except Exception:
        log.exception("request %s: refinement failed", model.request_id)
        return SegmentRefineBitmapsResult(reason="refine_failed")
    finally:
        ASKING.reset(asking)
