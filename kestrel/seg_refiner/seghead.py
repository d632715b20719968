"""Refine a mask with Moondream's neural head over features of its vision tower.

The only module of the CPU half that knows ``kestrel.moondream``; torch is imported when a
refiner is built.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kestrel.config import ConfigError, RefinerConfig
from kestrel.seg_refiner.box import refined_in_box

PUBLIC_HEAD = "moondream/SegHeadRefiner"
PUBLIC_FILE = "model.pt"


class SegHeadRefiner:
    """Callable ``(image uint8 [H, W, 3] RGB, mask uint8 [H, W] 0/1) -> mask uint8 [H, W] 0/1``.

    Raises ``ConfigError`` where torch, the head or the vision checkpoint is missing, or where the
    two do not belong together.
    """

    def __init__(self, config: RefinerConfig) -> None:
        try:
            import torch
        except ImportError as error:
            raise ConfigError(
                f"refiner seghead needs torch: pip install torch ({error})"
            ) from error
        from kestrel.moondream.checkpoint import locate
        from kestrel.moondream.model import load_vision
        from kestrel.moondream.seg_head import EARLY_BLOCK, load_seg_head
        from kestrel.ops.device import resolve_device, resolve_dtype

        if config.seghead_weights is None:
            raise ConfigError(
                "refiner seghead needs seghead_weights: the head's file, or "
                f"{PUBLIC_HEAD}@<commit> (hf download {PUBLIC_HEAD} {PUBLIC_FILE})"
            )
        if config.seghead_vision is None:
            raise ConfigError("refiner seghead needs seghead_vision: a Moondream checkpoint")
        self._torch: Any = torch
        self._early_block = EARLY_BLOCK
        self._device = resolve_device(config.device)
        dtype = resolve_dtype("auto", self._device)
        self._head = load_seg_head(_weights_file(config.seghead_weights), self._device, dtype)
        try:
            checkpoint = locate(config.seghead_vision)
            self._vision = load_vision(checkpoint, self._device, dtype)
        except ConfigError as error:
            # ``model.path`` and the like are keys of the served model.
            raise ConfigError(re.sub(r"^model\.", "seghead_vision.", str(error))) from error
        head, vision = self._head.config, self._vision.config
        if vision.enc_n_layers <= EARLY_BLOCK:
            raise ConfigError(
                f"the vision tower of seghead_vision has {vision.enc_n_layers} blocks; seghead "
                f"takes features of its block {EARLY_BLOCK + 1}"
            )
        if (head.enc_dim, head.grid) != (vision.enc_dim, vision.grid):
            raise ConfigError(
                f"seghead_weights want features of {head.grid} x {head.grid} patches and width "
                f"{head.enc_dim}; the tower of seghead_vision gives {vision.grid} x {vision.grid} "
                f"and {vision.enc_dim}"
            )

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return refined_in_box(
            image, mask, lambda *crops: (self._soft_crop(*crops) > 0.5).view(np.uint8)
        )

    def _soft_crop(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Soft mask float32 of the crop's size."""
        torch, side = self._torch, self._vision.config.crop_size
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
        coarse = cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
        with torch.inference_mode():
            crops = torch.from_numpy(small).to(self._device).permute(2, 0, 1)[None]
            final, early = self._vision.features_with_early(crops, self._early_block)
            given = torch.from_numpy(coarse).to(final)[None, None]
            soft = self._head.refine(final, early, given)[0, 0].float().cpu().numpy()
        return cv2.resize(soft, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _weights_file(named: str) -> Path:
    """The file that ``seghead_weights`` names, from the hub's cache or the hub where it does."""
    path = Path(named)
    if path.is_file():
        return path
    from kestrel.hub import Snapshot

    snapshot = Snapshot.named(named, "seghead_weights")
    if snapshot is None:
        raise ConfigError(f"seghead_weights: there is no file {named}, and it is no repo@commit")
    return snapshot.download(PUBLIC_FILE)
