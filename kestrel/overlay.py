"""Masks drawn on their picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngImageFile

UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

COARSE_RGB = (255, 140, 0)
REFINED_RGB = (0, 200, 255)
FILL = 0.25
"""Share of the mask's colour inside the outline."""
LARGEST_SIDE = 16_384
"""Pixels that an overlay's sides have at most. It is to be looked at: viewers refuse much larger
pictures, and libpng those of over 1,000,000 pixels a side."""


def decode_mask(mask_base64: str) -> BoolArray:
    """The mask behind one of the contract's base64 PNGs: bool [H, W]. ValueError if it is none."""
    encoded = io.BytesIO(base64.b64decode(mask_base64, validate=True))
    # Not OpenCV's reader, nor ``Image.open``: both refuse sizes that a request may have.
    try:
        with PngImageFile(encoded) as mask:
            inside = np.asarray(mask.convert("L")) > 127 if mask.mode in ("1", "L") else None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the mask is no PNG: {error}") from error
    if inside is None:
        raise ValueError("the mask is not a PNG of one channel of 8 bits")
    return inside


def overlay(
    image: UInt8Array, coarse: npt.ArrayLike | None, refined: npt.ArrayLike | None
) -> UInt8Array:
    """Picture, coarse mask and refined mask side by side, each under a caption.

    ``image``: uint8 [H, W, 3] RGB. Masks: [H, W], non-zero inside; None says so in its caption.
    Gives uint8 [H + c, 3 W + 2 g, 3] RGB, c and g the caption's height and the gap; where a side of
    that would be over ``LARGEST_SIDE``, H and W are the image's shrunk until none is. ValueError
    for a mask that is not the image's size.
    """
    masks = [_inside(mask, image) for mask in (coarse, refined)]
    height, width = image.shape[:2]
    # The gaps take a 32nd of a panel, or 4 pixels; the caption at most 56.
    shrink = max((3 + 1 / 32) * width / (LARGEST_SIDE - 4), height / (LARGEST_SIDE - 56))
    if shrink > 1:
        size = (max(1, int(width / shrink)), max(1, int(height / shrink)))
        image = _shrunk(image, size)
        # Whatever a pixel holds of a mask shows: thin objects are not to be lost.
        masks = [
            None if mask is None else _shrunk(mask.astype(np.uint8) * 255, size) > 0
            for mask in masks
        ]
    panels = [_captioned(image, "image")]
    for name, mask, rgb in zip(
        ("coarse", "refined"), masks, (COARSE_RGB, REFINED_RGB), strict=True
    ):
        panels.append(_captioned(_masked(image, mask, rgb), _caption(name, mask)))
    gap = np.full((panels[0].shape[0], max(2, image.shape[1] // 64), 3), 255, np.uint8)
    return np.hstack([panels[0], gap, panels[1], gap, panels[2]])


def _inside(mask: npt.ArrayLike | None, image: UInt8Array) -> BoolArray | None:
    if mask is None:
        return None
    inside = np.asarray(mask) != 0
    if inside.shape != image.shape[:2]:
        raise ValueError(f"mask is {inside.shape}, the image {image.shape[:2]}")
    return inside


def _shrunk(picture: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _caption(name: str, mask: npt.ArrayLike | None) -> str:
    return name if mask is not None else f"{name}: none"


def _masked(image: UInt8Array, inside: BoolArray | None, rgb: Sequence[int]) -> UInt8Array:
    if inside is None:
        return image
    drawn = image.copy()
    drawn[inside] = (image[inside] * (1 - FILL) + np.array(rgb) * FILL).astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(image.shape[:2]) / 300))
    # A dark rim below the colour keeps the outline visible on every background.
    cv2.drawContours(drawn, outlines, -1, (0, 0, 0), width + 2, cv2.LINE_AA)
    cv2.drawContours(drawn, outlines, -1, tuple(rgb), width, cv2.LINE_AA)
    return drawn


def _captioned(image: UInt8Array, text: str) -> UInt8Array:
    width = image.shape[1]
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, min(2.0, max(0.35, width / 700))
    (text_width, text_height), below = cv2.getTextSize(text, font, scale, 1)
    if text_width + 8 > width:  # a narrow picture: shrink the words to its width
        scale *= max(0.1, (width - 8) / text_width)
        (text_width, text_height), below = cv2.getTextSize(text, font, scale, 1)
    strip = np.full((text_height + below + 8, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (4, text_height + 4), font, scale, (40, 40, 40), 1, cv2.LINE_AA)
    # One height for every caption, whatever its letters.
    height = max(14, round(24 * min(2.0, max(0.35, width / 700)) + 8))
    strip = strip[:height]
    pad = np.full((height - strip.shape[0], width, 3), 255, np.uint8)
    return np.vstack([strip, pad, image])
