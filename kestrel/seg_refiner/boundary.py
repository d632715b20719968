"""Move a mask's outline to where the object ends: a small network beside rules without weights.

All of them see the grown box at a bounded working size. The network reads the picture, the coarse
mask and the cues of ``cues.py``, and corrects the cues' mean; its answer is averaged with that
mean, which errs elsewhere. One more guided pass takes the result to full size. A mask that is
likely right already stays as it is (``trust.py``).
``kestrel/models/boundary/README.md`` tells how the network was trained and how good it all is.

Ideas: corrections by a network that sees any coarse mask (Cheng et al., "CascadePSP", CVPR 2020;
Tang et al., "Look Closer to Segment Better: Boundary Patch Refinement", CVPR 2021), here on top of
known filters' results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from kestrel.config import ConfigError
from kestrel.seg_refiner.box import Size, refined_in_box
from kestrel.seg_refiner.cues import Cues
from kestrel.seg_refiner.enlarge import at_full_size, planes, reduction_for
from kestrel.seg_refiner.guided import coefficients
from kestrel.seg_refiner.trust import trusted

WEIGHTS = "model.onnx"
"""The network as it was trained."""
QUANTISED = "model-int8.onnx"
"""The same in whole numbers of 8 bits: what runs, at less than half of the time."""
MODEL = Path(__file__).parents[1] / "models" / "boundary" / QUANTISED
READ_CUES = (
    "guided",
    "coarse_colour",
    "colour",
    "flooded",
    "flooded_guided",
    "guided_colour",
    "smoothed",
    "mean",
)
"""Cues that the network reads, the last of which it corrects."""
CHANNELS = 5 + len(READ_CUES)
"""Planes that the network reads: see :func:`network_planes`."""
STEP = 16
"""The network halves its maps four times: sides are multiples of this."""
WORKING_SIDE = 256
"""Longest side at which the network looks, pixels."""
LARGEST_ENLARGEMENT = 2.0
"""Small objects are enlarged by no more than this."""
SHARE = 0.9
"""Weight of the network beside the mean of the cues."""
LEAN = 0.05
"""Added to what both say: averages round corners off, and objects came out too small."""
FINE_RADIUS = 3
"""Radius of the last guided pass, working pixels."""
FINE_EPS = 1e-4
"""Regularisation of the last guided pass, squared intensity with channels in 0..1."""
LEAST_SIDE = 1024
"""Pixels that the longer side of a box keeps where the picture is decoded smaller."""

Network = Callable[[np.ndarray], np.ndarray]
"""``planes float32 [n, CHANNELS, h, w] -> probability float32 [n, h, w]``; sides are multiples of
``STEP``."""


@functools.cache
def load_network(model: Path = MODEL) -> Network:
    """The network on one thread, shared by all that ask; calls may come from several threads.

    Raises :class:`ConfigError` without ONNX Runtime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f'ONNX Runtime does not load ({error}): pip install "onnxruntime>=1.18"'
        ) from error
    options = onnxruntime.SessionOptions()
    # One request, one core: requests side by side are what keeps the other cores busy.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Shapes vary: an arena would keep the largest of each and plan for none of them.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {"planes": inputs})[0]


class View(NamedTuple):
    """A crop at working size, and shares of the object in its pixels."""

    small: np.ndarray
    """uint8 [h, w, 3]."""
    coverage: np.ndarray
    """By the coarse mask, float32 [h, w]."""
    soft: np.ndarray
    """By cues and network together, float32 [h, w], more than a half where the object is."""


class BoundaryRefiner:
    """Callable ``(image uint8 [H, W, 3] RGB, mask uint8 [H, W] 0/1) -> mask uint8 [H, W] 0/1``.

    The image may be smaller than the mask, by ``reduction``. Raises :class:`ConfigError` without
    ONNX Runtime.
    """

    def __init__(self, network: Network | None = None) -> None:
        self.cues = Cues()
        self.network = network or load_network()

    def __call__(self, image: np.ndarray, mask: np.ndarray, reduction: int = 1) -> np.ndarray:
        refine_crop = functools.partial(self._refine_crop, reduction=reduction)
        return refined_in_box(image, mask, refine_crop, reduction)

    def reduction(self, box: Size, picture: Size) -> int:
        """See :class:`kestrel.seg_refiner.backends.Reduced`."""
        return reduction_for(box, picture, LEAST_SIDE)

    def _refine_crop(self, image: np.ndarray, mask: np.ndarray, reduction: int) -> np.ndarray:
        crop = np.ascontiguousarray(image)
        view = self.look(crop, mask)
        if trusted(mask, view.coverage, view.soft):
            return mask
        return _at_full_size(crop, view, mask.shape, reduction)

    def look(self, crop: np.ndarray, mask: np.ndarray) -> View:
        """A contiguous crop uint8 [H, W, 3], or a smaller one of the same box, and its coarse mask
        uint8 [H, W] 0/1, at working size."""
        small, coverage = _at_working_size(crop, mask)
        cues = self.cues(small, coverage)
        (learned,) = self.network(network_planes(small, coverage, cues)[None])
        mean = cues["mean"]
        soft = mean + np.float32(SHARE) * (learned - mean) + np.float32(LEAN)
        return View(small, coverage, soft)


def _at_working_size(crop: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crop uint8 [h, w, 3] and coverage float32 [h, w], h and w multiples of ``STEP``."""
    height, width = mask.shape
    scale = min(WORKING_SIDE / max(height, width), LARGEST_ENLARGEMENT)
    h, w = (max(STEP, round(side * scale / STEP) * STEP) for side in (height, width))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(crop, (w, h), interpolation=kind)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    coverage = cv2.resize(mask * np.uint8(255), (w, h), interpolation=kind)
    return small, coverage.astype(np.float32) * np.float32(1 / 255)


def network_planes(
    image: np.ndarray, coverage: np.ndarray, cues: dict[str, np.ndarray]
) -> np.ndarray:
    """What the network reads, float32 [CHANNELS, h, w], all but the colours in -1..1.

    ``image``: uint8 [h, w, 3]; ``coverage``: float32 [h, w] in 0..1 of the coarse mask; ``cues``:
    those of it. The planes: three colours with the picture's mean and spread taken out, coverage,
    distance to the coarse outline, and ``READ_CUES``.
    """
    planes_read = np.empty((CHANNELS, *coverage.shape), np.float32)
    colours = planes_read[:3]
    colours[:] = planes(image)
    colours -= colours.mean(axis=(1, 2), keepdims=True)
    colours *= 1 / (colours.std() + 0.02)
    planes_read[3] = 2 * coverage - 1
    planes_read[4] = cues["distance"]
    for plane, name in zip(planes_read[5:], READ_CUES, strict=True):
        np.subtract(2 * cues[name], 1, out=plane)
    return planes_read


def _at_full_size(
    crop: np.ndarray, view: View, shape: tuple[int, int], reduction: int
) -> np.ndarray:
    """Mask uint8 [H, W] 0/1 of ``shape`` from a view of the crop, which is smaller by
    ``reduction``: a guided filter fitted at working size follows the crop's own pixels."""
    height, width = shape
    h, w = view.soft.shape
    if height <= h and width <= w:
        fine = cv2.resize(view.soft, (width, height), interpolation=cv2.INTER_AREA)
        return (fine > 0.5).astype(np.uint8)
    fitted = coefficients(planes(view.small), view.soft, FINE_RADIUS, FINE_EPS)
    return at_full_size(crop, view.soft, fitted, shape, reduction)
