"""Refine a mask with SAM-HQ (Ke et al., "Segment Anything in High Quality", 2023).

The only module that knows ``transformers``; it and torch are imported when a refiner is built.
Pictures are prepared here, as masks come and go as arrays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kestrel.config import ConfigError, RefinerConfig
from kestrel.seg_refiner.box import PixelBox, grown_box, mask_box

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
DEVIATION = np.array([58.395, 57.12, 57.375], np.float32)
"""Of ImageNet's RGB pixels, which SAM's input is normalised by."""
SURE_LOGIT = 10.0
"""The mask prompt takes logits: plus this inside, minus this outside."""


class HqSamRefiner:
    """Callable ``(image uint8 [H, W, 3] RGB, mask uint8 [H, W] 0/1) -> mask uint8 [H, W] 0/1``.

    The model is prompted with the mask's box and the mask. Raises ``ConfigError`` where torch,
    ``transformers`` or the model is missing.
    """

    def __init__(self, config: RefinerConfig) -> None:
        try:
            import torch
            from transformers import SamHQModel
        except ImportError as error:
            raise ConfigError(
                "refiner hq-sam needs transformers of at least 4.57: "
                f"pip install 'kestrel-segment-serve[hq-sam]' ({error})"
            ) from error
        from kestrel.ops.device import resolve_device, resolve_dtype

        if config.hq_sam_model is None:
            raise ConfigError("refiner hq-sam needs hq_sam_model: a folder or owner/name@commit")
        self._torch: Any = torch
        self._device = resolve_device(config.device)
        self._dtype = resolve_dtype("auto", self._device)
        source, options = _source(config.hq_sam_model)
        try:
            model = SamHQModel.from_pretrained(source, dtype=self._dtype, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"hq_sam_model: {config.hq_sam_model} does not load: {error}"
            ) from error
        self._model: Any = model.to(self._device).eval()
        self._side: int = model.config.vision_config.image_size
        self._mask_side: int = 4 * model.config.prompt_encoder_config.image_embedding_size

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        refined = np.zeros_like(mask)
        box = mask_box(mask)
        if box is None:
            return refined
        height, width = mask.shape
        x0, y0, x1, y1 = grown_box(box, width, height)
        within = (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)
        logits = self._logits(image[y0:y1, x0:x1], mask[y0:y1, x0:x1], within)
        np.greater(logits, 0, out=refined[y0:y1, x0:x1].view(np.bool_))
        return refined

    def _logits(self, image: np.ndarray, mask: np.ndarray, box: PixelBox) -> np.ndarray:
        """Logits float32 of the crop's size."""
        torch, side, height, width = self._torch, self._side, *mask.shape
        # The longest side fills the model's square, zeros below or on the right fill the rest.
        scale = side / max(height, width)
        fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
        # Enlarging, means over areas would repeat pixels.
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        pixels = np.zeros((side, side, 3), np.float32)
        resized = cv2.resize(image, fitted, interpolation=kind)
        pixels[: fitted[1], : fitted[0]] = (resized - MEAN) / DEVIATION
        coverage = np.zeros((side, side), np.float32)
        coverage[: fitted[1], : fitted[0]] = cv2.resize(
            mask.astype(np.float32), fitted, interpolation=kind
        )
        prompt_size = (self._mask_side, self._mask_side)
        prompt = cv2.resize(coverage, prompt_size, interpolation=cv2.INTER_AREA)
        with torch.inference_mode():
            outputs = self._model(
                pixel_values=self._tensor(pixels.transpose(2, 0, 1)[None]),
                input_boxes=self._tensor(np.array([[box]], np.float32) * scale),
                input_masks=self._tensor((2 * prompt - 1)[None, None] * SURE_LOGIT),
                multimask_output=False,
            )
        logits = outputs.pred_masks[0, 0, 0].float().cpu().numpy()
        whole = cv2.resize(logits, (side, side), interpolation=cv2.INTER_LINEAR)
        return cv2.resize(
            whole[: fitted[1], : fitted[0]], (width, height), interpolation=cv2.INTER_LINEAR
        )

    def _tensor(self, array: np.ndarray) -> Any:
        array = np.ascontiguousarray(array, np.float32)
        return self._torch.from_numpy(array).to(device=self._device, dtype=self._dtype)


def _source(named: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes: a folder, or a repository with its pinned commit."""
    if Path(named).is_dir():
        return named, {"local_files_only": True}
    from kestrel.hub import Snapshot

    # Refuses what is no commit.
    snapshot = Snapshot.named(named, "hq_sam_model")
    if snapshot is None:
        raise ConfigError(f"hq_sam_model: there is no folder {named}, and it is no repo@commit")
    return snapshot.repo, {"revision": snapshot.revision}
