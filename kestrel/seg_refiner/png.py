"""Masks as base64 PNGs: 8-bit grey, 0 or 255."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pybase64

from kestrel.seg_refiner.deflate import zlib_of_runs

RUNS_WORTH_IT = 64
"""Bytes per edge from which on writing runs is faster than zlib's scan of every byte."""

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
    png = encode_png(mask, 1 if top == 255 else 255, top)
    return pybase64.b64encode(png).decode("ascii")


def _has_between(mask: np.ndarray) -> bool:
    # 0 and 255 are the only bytes that adding 1 turns into 1 and 0.
    return bool((mask + np.uint8(1)).max() > 1)


def encode_png(mask: np.ndarray, gain: int, top: int) -> bytes:
    """PNG bytes of ``mask * gain``, uint8 [H, W], mask of 0 and ``top`` alone.

    Rows unfiltered and run-length deflate: for two-valued pictures that is both smaller and faster
    than the filters that PNG offers for photographs.
    """
    height, width = mask.shape
    edges = _edges(mask)
    size = height * (width + 1)
    if len(edges) < size // RUNS_WORTH_IT:
        packed = zlib_of_runs(edges, size, top * gain)
    else:
        packed = _deflated_rows(mask, gain)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        (_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", packed), _chunk(b"IEND", b""))
    )


def _edges(mask: np.ndarray) -> np.ndarray:
    """Begin and end of each run of set pixels, int64, in bytes of the PNG's rows.

    A row there is a filter byte and its pixels. Runs end with their row.
    """
    # Eight pixels a byte: everything after the first pass reads an eighth of the picture.
    bits = np.packbits(mask, axis=1)
    rows = np.flatnonzero(bits.max(axis=1))
    if rows.size == 0:
        return np.zeros(0, np.int64)
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    width = mask.shape[1]
    # At least one bit more than the row has pixels: a run at the row's end has its end there.
    padded = np.zeros((y1 - y0, width // 8 + 1), np.uint8)
    padded[:, : bits.shape[1]] = bits[y0:y1]
    changes = padded ^ (padded >> 1)
    changes[:, 1:] ^= padded[:, :-1] << 7
    changed = np.flatnonzero(changes.ravel() != 0)
    within = np.flatnonzero(np.unpackbits(changes.ravel()[changed]).view(np.bool_))
    y, x = np.divmod(changed[within >> 3] * 8 + (within & 7), padded.shape[1] * 8)
    return (y + y0) * (width + 1) + 1 + x


def _deflated_rows(mask: np.ndarray, gain: int) -> bytes:
    height, width = mask.shape
    rows = np.empty((height, width + 1), np.uint8)
    rows[:, 0] = 0  # filter type None
    np.multiply(mask, np.uint8(gain), out=rows[:, 1:])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return packer.compress(rows.data) + packer.flush()


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
