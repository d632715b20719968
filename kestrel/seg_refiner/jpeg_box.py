"""A part of a JPEG without the rest: what lies outside is read and not turned into pixels.

Only Huffman decoding goes through the whole file, a quarter of the time. Of the libraries that are
here already Skia's codec is the one that passes libjpeg-turbo's cropping and skipping on.
"""

from __future__ import annotations

import cv2
import numpy as np

from kestrel.config import Limits
from kestrel.image import PixelBox, decode, plain_jpeg, stored_box, turned
from kestrel.seg_refiner.raster import RasterizerMissing, load_skia

BOX_SHARE = 0.5
"""A box that holds more of the picture than that is cut out of the whole one, which is faster."""
MARGIN = 32
"""Columns on either side that are decoded too: colours there are interpolated over the edge."""
CALL_PIXELS = 2**19
"""Pixels of the file's rows that one call goes through, about: Skia keeps the GIL meanwhile."""
BLOCK_ROWS = 32
"""A call goes through a multiple of so many rows: the highest row of a JPEG's blocks. What skips
part of one and then more rows misses some of them without a word."""


def decode_box(content: bytes, box: PixelBox, limits: Limits, reduction: int = 1) -> np.ndarray:
    """What lies in ``(x0, y0, x1, y1)`` of the array that ``kestrel.image.decode`` gives.

    A baseline JPEG is refused like the whole one, in as little as a third of its time.
    """
    x0, y0, x1, y1 = box
    plain = plain_jpeg(content, limits)
    if plain is not None:
        (width, height), orientation = plain
        size = -(-width // reduction), -(-height // reduction)
        if (x1 - x0) * (y1 - y0) <= BOX_SHARE * size[0] * size[1]:
            stored = stored_box(box, size, orientation)
            part = decode_stored_box(content, (width, height), stored, reduction)
            if part is not None:
                return np.ascontiguousarray(turned(part, orientation))
    return np.ascontiguousarray(decode(content, limits, reduction=reduction)[y0:y1, x0:x1])


def decode_stored_box(
    content: bytes, size: tuple[int, int], box: PixelBox, reduction: int = 1
) -> np.ndarray | None:
    """RGB uint8 [y1 - y0, x1 - x0, 3] of ``(x0, y0, x1, y1)`` within a baseline JPEG in colour of
    that width and height, as the file has its rows and columns: what libjpeg-turbo makes of the
    whole, at its sides divided by ``reduction``, cut out.

    None without Skia, and for what it does not decode to its last row.
    """
    try:
        skia = load_skia()
        codec = skia.Codec.MakeFromData(skia.Data.MakeWithoutCopy(content))
    except (RasterizerMissing, RuntimeError):  # the latter for a file that it does not open
        return None
    if (codec.dimensions().width(), codec.dimensions().height()) != size:
        return None
    width, height = -(-size[0] // reduction), -(-size[1] // reduction)
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        return None
    left, right = max(0, x0 - MARGIN), min(width, x1 + MARGIN)
    # Without a colour space it converts no colours.
    info = skia.ImageInfo.Make(
        width, height, skia.kRGBA_8888_ColorType, skia.kOpaque_AlphaType, None
    )
    # The options point to it, and the codec goes on to look: it has to outlive both.
    columns = skia.IRect.MakeLTRB(left, 0, right, height)
    options = skia.Codec.Options()
    options.fSubset = columns
    if codec.startScanlineDecode(info, options) != skia.Codec.Result.kSuccess:
        return None
    blocks = CALL_PIXELS // (size[0] * reduction * BLOCK_ROWS)
    rows = BLOCK_ROWS * max(1, blocks)
    band = np.empty((rows, right - left, 4), np.uint8)
    pixels = np.empty((y1 - y0, x1 - x0, 3), np.uint8)

    def skipped(first: int, end: int) -> bool:
        return all(codec.skipScanlines(min(rows, end - y)) for y in range(first, end, rows))

    if not skipped(0, y0):
        return None
    for y in range(y0, y1, rows):
        count = min(rows, y1 - y)
        if codec.getScanlines(band, count, band.strides[0]) != count:
            return None
        inside = band[:count, x0 - left : x1 - left]
        cv2.cvtColor(inside, cv2.COLOR_RGBA2RGB, dst=pixels[y - y0 : y - y0 + count])
    # Data may be missing below as well. Skipping to the very end would not look at it.
    if y1 < height and not (
        skipped(y1, height - 1) and codec.getScanlines(band, 1, band.strides[0]) == 1
    ):
        return None
    return pixels
