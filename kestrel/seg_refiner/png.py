"""Masks as base64 PNGs: 8-bit grey, 0 or 255."""

from __future__ import annotations

import base64
import functools
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
    smaller and faster than the filters that PNG offers for photographs. Blank rows above and
    below the object are not even scanned.
    """
    height, width = mask.shape
    set_rows = np.flatnonzero(mask.max(axis=1))
    top, bottom = (int(set_rows[0]), int(set_rows[-1]) + 1) if set_rows.size else (0, 0)
    rows = np.empty((bottom - top, width + 1), np.uint8)
    rows[:, 0] = 0  # filter type None
    np.multiply(mask[top:bottom], np.uint8(gain), out=rows[:, 1:])
    packed = _zlib_stream(top * (width + 1), rows, (height - bottom) * (width + 1))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        (_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", packed), _chunk(b"IEND", b""))
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


_BLANK_RUN = 1 << 18
_ADLER_MODULUS = 65521  # RFC 1950


def _deflate(content: bytes | memoryview, flush: int) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return packer.compress(content) + packer.flush(flush)


@functools.cache
def _blank_run() -> bytes:
    # A full flush ends on a byte and refers to nothing before it: such pieces can be chained.
    return _deflate(bytes(_BLANK_RUN), zlib.Z_FULL_FLUSH)


def _zlib_stream(zeros_before: int, rows: np.ndarray, zeros_after: int) -> bytes:
    """zlib stream (RFC 1950) of zero bytes, ``rows`` and zero bytes again."""

    def blank(count: int, flush: int) -> bytes:
        runs, rest = divmod(count, _BLANK_RUN)
        return _blank_run() * runs + _deflate(bytes(rest), flush)

    middle = rows.data.cast("B") if rows.size else memoryview(b"")
    body = (
        b"\x78\x01",
        blank(zeros_before, zlib.Z_FULL_FLUSH),
        _deflate(middle, zlib.Z_FULL_FLUSH),
        blank(zeros_after, zlib.Z_FINISH),
    )
    checksum = zlib.adler32(middle, _adler_of_zeros(1, zeros_before))
    return b"".join((*body, struct.pack(">I", _adler_of_zeros(checksum, zeros_after))))


def _adler_of_zeros(checksum: int, count: int) -> int:
    """Adler-32 after ``count`` zero bytes: each adds the low sum to the high one."""
    low, high = checksum & 0xFFFF, checksum >> 16
    return ((high + count * low) % _ADLER_MODULUS) << 16 | low
