"""A refiner backend that hangs on pictures that are marked, once or whenever it sees them."""

from __future__ import annotations

import io
import os
import secrets
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from kestrel.config import RefinerConfig
from kestrel.seg_refiner.backends import Refine

HANGING = "tests.e2e.hanging:build"
"""How a config names it."""
ONCE, ALWAYS = (255, 0, 255), (0, 255, 255)
"""The first pixel of a picture that hangs one replica, or every one that takes it."""


def marked(picture: bytes, how: tuple[int, int, int]) -> bytes:
    """The picture as a PNG with its mark, and a name of its own in the two pixels beside."""
    pixels = np.array(Image.open(io.BytesIO(picture)).convert("RGB"))
    pixels[0, 0] = how
    pixels[0, 1:3] = np.frombuffer(secrets.token_bytes(6), np.uint8).reshape(2, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def build(config: RefinerConfig) -> Refine:
    return refine


def refine(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask as it is, after ten minutes or at once."""
    mark = tuple(int(value) for value in image[0, 0])
    if mark == ALWAYS or (mark == ONCE and first(image[0, 1:3].tobytes().hex())):
        time.sleep(600)
    return mask


def first(name: str) -> bool:
    """Whether no other process has seen the picture of that name."""
    seen = Path(tempfile.gettempdir()) / f"segment-hung-{name}"
    try:
        os.close(os.open(seen, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        seen.unlink()
        return False
    return True
