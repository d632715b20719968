"""An image as one global and several overlapping local crops, and their features stitched back."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kestrel.moondream.config import VisionConfig
from kestrel.ops.lanczos import resized

UInt8Array = npt.NDArray[np.uint8]
DETAIL = 2
"""Pixels for each of a crop from which on more of them change it by a few levels at most."""


def select_tiling(height: int, width: int, crop: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of local crops for an image of ``height`` x ``width`` pixels.

    ``crop`` is the side in pixels that one crop adds (its side less both margins), the image size
    is likewise without margins; at most ``max_crops`` crops. The rule is the published model's but
    for strips of which one side takes over ``max_crops`` times the other's crops: its code cuts
    those into more, 21 where 12 are the most for 400 x 20 000 pixels.
    """
    if height <= crop or width <= crop:
        return 1, 1
    need_h, need_w = math.ceil(height / crop), math.ceil(width / crop)
    if need_h * need_w > max_crops:
        shrink = math.sqrt(max_crops / (need_h * need_w))
        rows, columns = math.floor(need_h * shrink), math.floor(need_w * shrink)
        # Where one would be 0 and is 1, the other alone may be over the bound.
        return min(max(1, rows), max_crops), min(max(1, columns), max_crops)
    rows = max(need_h, math.floor(math.sqrt(max_crops * height / width)))
    columns = max(need_w, math.floor(math.sqrt(max_crops * width / height)))
    if rows * columns > max_crops:
        if columns > rows:
            columns = max_crops // rows
        else:
            rows = max_crops // columns
    return max(1, rows), max(1, columns)


def crop_reduction(width: int, height: int, largest: int, config: VisionConfig) -> int:
    """By what the sides of an image may be divided before it is cropped: a power of two up to
    ``largest``.

    Only where the model sees nothing but the whole image, shrunk: what is left is then still
    ``DETAIL`` times as wide and high as that. Local crops show detail, and are cut from all pixels.
    """
    reduction = 1
    if config.max_crops == 0:
        least = DETAIL * config.crop_size
        while 2 * reduction <= largest and min(width, height) >= 2 * reduction * least:
            reduction *= 2
    return reduction


def overlap_crops(
    image: UInt8Array, config: VisionConfig, extent: tuple[float, float] | None = None
) -> tuple[UInt8Array, tuple[int, int]]:
    """Cut ``image`` uint8 [H, W, 3] into crops uint8 [1 + rows * columns, S, S, 3] and the grid.

    Crop 0 is the whole image resized (Lanczos); the others cover the image resized to the grid,
    neighbours sharing ``overlap_margin`` patches on each side. ``extent``, of an image that
    ``crop_reduction`` made smaller: its rows and columns without those that lie outside, which need
    not be whole.
    """
    side = config.crop_size
    whole = resized(image, side, side, extent)
    if config.max_crops == 0:
        return whole[None], (1, 1)
    margin = config.enc_patch_size * config.overlap_margin
    step = side - 2 * margin
    rows, columns = select_tiling(
        image.shape[0] - 2 * margin, image.shape[1] - 2 * margin, step, config.max_crops
    )
    if (rows, columns) == (1, 1):
        return np.stack([whole, whole]), (1, 1)
    grid = resized(image, rows * step + 2 * margin, columns * step + 2 * margin)
    local = [
        grid[y : y + side, x : x + side]
        for y in range(0, rows * step, step)
        for x in range(0, columns * step, step)
    ]
    return np.stack([whole, *local]), (rows, columns)


def stitch(features: Tensor, tiling: tuple[int, int], margin: int) -> Tensor:
    """Join local features [rows * columns, g, g, C] into one map [h, w, C], margins trimmed.

    Shared margins are cut in two places: each crop keeps its inside, and its margin only where it
    lies on the border of the image.
    """
    rows, columns = tiling
    lines = []
    for row in range(rows):
        cells = []
        for column in range(columns):
            cell = features[row * columns + column]
            top = 0 if row == 0 else margin
            bottom = cell.shape[0] - (0 if row == rows - 1 else margin)
            left = 0 if column == 0 else margin
            right = cell.shape[1] - (0 if column == columns - 1 else margin)
            cells.append(cell[top:bottom, left:right])
        lines.append(torch.cat(cells, dim=1))
    return torch.cat(lines, dim=0)
