"""What happens to a drawn scene: shadows, light, blur, noise, JPEG."""

from __future__ import annotations

import cv2
import numpy as np

SIDE = 336
"""Side of the model's input, px."""
BLUR_SIDE = 126
"""Side of a picture for which blur is given, px."""


def shade(canvas: np.ndarray, alpha: np.ndarray, x0: int, y0: int, darkness: float) -> None:
    """Darken the canvas with a blurred copy of ``alpha`` a little down and right, in place."""
    height, width = canvas.shape[:2]
    step = max(1, round(0.02 * min(width, height)))
    spread = 3 * step
    edges = [spread] * 4
    soft = cv2.copyMakeBorder(alpha, *edges, cv2.BORDER_CONSTANT, value=0.0)
    soft = cv2.GaussianBlur(soft, (0, 0), 0.7 * step + 0.5)
    left, top = x0 + step - spread, y0 + step - spread
    soft = soft[max(0, -top) :, max(0, -left) :]
    left, top = max(0, left), max(0, top)
    part = canvas[top : top + soft.shape[0], left : left + soft.shape[1]]
    part *= 1 - darkness * soft[: part.shape[0], : part.shape[1], None]


def finish(canvas: np.ndarray, effects: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """Effects on the whole picture, and the way to uint8."""
    height, width = canvas.shape[:2]
    canvas *= 255 * effects.get("gain", 1.0)
    if "bias" in effects:
        canvas += effects["bias"]
    if "blur" in effects:
        sigma = effects["blur"] * min(width, height) / BLUR_SIDE
        canvas = cv2.GaussianBlur(canvas, (0, 0), sigma)
    if "noise" in effects:
        noise = np.empty(canvas.shape, np.int16)
        cv2.setRNGSeed(int(rng.integers(1 << 31)))
        cv2.randn(noise, 0, effects["noise"])  # a tenth of numpy's time
        canvas += noise
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    if "jpeg" in effects:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(effects["jpeg"])])
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return image
