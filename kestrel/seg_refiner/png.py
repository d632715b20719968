"""Masks as base64 PNGs: 8-bit grey, 0 or 255."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _encode_mask_png_base64(mask: np.ndarray) -> str:
    """Raw base64 (no ``data:`` prefix) of an 8-bit single-channel PNG, pixels 0 or 255.

    ``mask``: [H, W], bool, or uint8 holding 0 and 1, or 0 and 255; H and W at least 1. Raises
    ValueError for anything else.
    """
    if not isinstance(mask, np.ndarray) or mask.ndim != 2:
        shape = getattr(mask, "shape", type(mask).__name__)
        raise ValueError(f"mask must be a 2-D array [H, W], not {shape}")
    if mask.size == 0:
        raise ValueError(f"mask must have at least one pixel, not shape {mask.shape}")
    if mask.dtype == np.bool_:
        mask = mask.view(np.uint8)
    elif mask.dtype != np.uint8:
        raise ValueError(f"mask must be bool or uint8, not {mask.dtype}")
    top = int(mask.max())
    if top not in (0, 1, 255) or (top == 255 and _has_between(mask)):
        raise ValueError("mask must hold only 0 and 1, or only 0 and 255")
    return base64.b64encode(encode_png(mask, 1 if top == 255 else 255)).decode("ascii")


def _has_between(mask: np.ndarray) -> bool:
    # 0 and 255 are the only bytes that adding 1 turns into 1 and 0.
    return bool((mask + np.uint8(1)).max() > 1)


def encode_png(mask: np.ndarray, gain: int) -> bytes:
    """PNG bytes of ``mask * gain``, uint8 [H, W].

    Rows unfiltered and run-length deflate (zlib's Z_RLE): for two-valued pictures that is both
    smaller and faster than the filters that PNG offers for photographs.
    """
    height, width = mask.shape
    rows = np.empty((height, width + 1), np.uint8)
    rows[:, 0] = 0  # filter type None
    np.multiply(mask, np.uint8(gain), out=rows[:, 1:])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    packed = packer.compress(rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        (_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", packed), _chunk(b"IEND", b""))
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
