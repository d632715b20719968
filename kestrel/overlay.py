"""A picture of an answer: image, coarse mask and refined mask side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL_SIDE = 512
"""Longest side of one panel, pixels: larger images are reduced to it."""
SMALL_SIDE = 256
"""Images with a shorter longest side are enlarged by whole factors up to it."""
CAPTION = 22
"""Height of the strip above a panel, pixels."""
COLOURS = {"coarse": (255, 149, 0), "refined": (0, 214, 92)}
BOX_COLOUR = (255, 255, 255)
TINT = 0.3
"""How much of its colour a mask puts over the image inside its outline."""
OUTLINE = 2
"""Width of an outline, pixels, measured inwards."""


def draw_overlay(
    image: np.ndarray,
    coarse: np.ndarray | None,
    refined: np.ndarray | None,
    bbox: Mapping[str, float] | None,
) -> Image.Image:
    """Three panels: the image, then each mask outlined and tinted over it, with the answer's box.

    ``image``: uint8 [H, W, 3] RGB. ``coarse``, ``refined``: [H, W], anything over 0 is inside;
    None where there is no mask (its panel says so). ``bbox`` is normalised 0..1. Raises
    ValueError for a mask of another size than the image.
    """
    height, width = image.shape[:2]
    for name, mask in (("coarse", coarse), ("refined", refined)):
        if mask is not None and mask.shape != (height, width):
            raise ValueError(f"the {name} mask is {mask.shape}, the image {(height, width)}")
    size = _panel_size(width, height)
    picture = np.asarray(Image.fromarray(image).resize(size, _filter(size, width)))
    panels = [
        ("image", picture),
        ("coarse", _marked(picture, coarse, "coarse")),
        ("refined", _marked(picture, refined, "refined")),
    ]
    sheet = Image.new("RGB", (size[0] * len(panels), size[1] + CAPTION), (24, 24, 24))
    font = ImageFont.load_default(14)
    for i, (name, pixels) in enumerate(panels):
        panel = Image.fromarray(pixels)
        masked = {"coarse": coarse, "refined": refined}.get(name)
        if name != "image" and bbox is not None:
            _draw_box(panel, bbox)
        sheet.paste(panel, (i * size[0], CAPTION))
        caption = name if name == "image" or masked is not None else f"no {name} mask"
        ImageDraw.Draw(sheet).text(
            (i * size[0] + 5, 3), caption, COLOURS.get(name, BOX_COLOUR), font
        )
    return sheet


def _panel_size(width: int, height: int) -> tuple[int, int]:
    longest = max(width, height)
    if longest > PANEL_SIDE:
        scale = PANEL_SIDE / longest
        return max(1, round(width * scale)), max(1, round(height * scale))
    factor = max(1, SMALL_SIDE // longest)
    return width * factor, height * factor


def _filter(size: tuple[int, int], width: int) -> Image.Resampling:
    # Enlarged pixels stay visible as such, so that a mask can be judged against them.
    return Image.Resampling.NEAREST if size[0] >= width else Image.Resampling.BOX


def _marked(picture: np.ndarray, mask: np.ndarray | None, name: str) -> np.ndarray:
    """``picture`` (panel size) with the mask's inside tinted and its outline drawn."""
    if mask is None:
        return picture
    size = picture.shape[1], picture.shape[0]
    soft = Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8))
    inside = np.asarray(soft.resize(size, _filter(size, mask.shape[1]))) > 127
    core = inside
    for _ in range(OUTLINE):
        core = _eroded(core)
    colour = np.array(COLOURS[name], np.float32)
    marked = picture.astype(np.float32)
    marked[inside] += TINT * (colour - marked[inside])
    marked[inside & ~core] = colour
    return marked.round().astype(np.uint8)


def _eroded(inside: np.ndarray) -> np.ndarray:
    """One pixel off the inside, 4-neighbours; what is beyond the edge counts as outside."""
    padded = np.pad(inside, 1)
    return inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _draw_box(panel: Image.Image, bbox: Mapping[str, float]) -> None:
    def pixel(value: float, side: int) -> int:
        return min(max(round(value * side), 0), side - 1)

    left, right = (pixel(bbox[key], panel.width) for key in ("x_min", "x_max"))
    top, bottom = (pixel(bbox[key], panel.height) for key in ("y_min", "y_max"))
    corners = [(left, top), (max(left, right), max(top, bottom))]
    ImageDraw.Draw(panel).rectangle(corners, outline=BOX_COLOUR, width=1)
