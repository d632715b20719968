"""Scenes: named pictures composited on a background, with the visible part of each as truth.

A scene is described in coordinates of the picture (0..1), so the same scene renders at 126 x 126
for training and at any size for evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from assets import CACHE, HELD_OUT_STYLE, Sprite, load_sprites

PHOTOS = Path("/usr/share/backgrounds")
MIN_VISIBLE = 0.4
"""Share of an object that must show for it to count as present."""
MIN_AREA = 0.004
"""Share of the picture that must show it."""
HELD_OUT_STAMPS = 7
"""Every n-th photographic stamp with a noun is kept for evaluation."""


@dataclass
class SceneObject:
    """A named object: ``mask`` bool [H, W], its visible part."""

    noun: str
    mask: np.ndarray
    style: str


@dataclass
class Scene:
    """``image`` uint8 [H, W, 3] RGB and the named objects that show, back to front."""

    image: np.ndarray
    objects: list[SceneObject]
    aspect: float


@dataclass
class Placement:
    """A sprite in a scene: centre in 0..1, size as a share of the picture's geometric mean side."""

    sprite: Sprite
    x: float
    y: float
    size: float
    angle: float
    flip: bool
    gain: np.ndarray


def _mips(rgba: np.ndarray) -> list[np.ndarray]:
    """Premultiplied float32 levels, each half the one before."""
    level = rgba.astype(np.float32)
    level[..., :3] *= level[..., 3:] / 255
    levels = [level]
    while min(levels[-1].shape[:2]) > 16:
        h, w = levels[-1].shape[:2]
        levels.append(
            cv2.resize(levels[-1], (-(-w // 2), -(-h // 2)), interpolation=cv2.INTER_AREA)
        )
    return levels


class SceneGenerator:
    """Scenes by index, the same for the same (split, seed, index).

    ``split`` ``train`` or ``eval``: the streams never meet, and the held-out style and stamps
    appear in ``eval`` only. ``styles`` narrows the named objects to some styles.
    """

    def __init__(
        self,
        split: str,
        seed: int,
        styles: tuple[str, ...] | None = None,
        objects: tuple[int, int] = (1, 5),
        photos: float = 0.3,
    ) -> None:
        self.split, self.seed, self.objects, self.photos = split, seed, objects, photos
        named: dict[str, list[Sprite]] = {}
        self.clutter: list[Sprite] = []
        stamp = 0
        for sprite in load_sprites():
            held_out = sprite.style == HELD_OUT_STYLE
            if sprite.style == "stamps" and sprite.noun:
                stamp += 1
                held_out = stamp % HELD_OUT_STAMPS == 0
            wanted = sprite.style in styles if styles else sprite.style != HELD_OUT_STYLE
            if not wanted or (held_out and split == "train"):
                continue
            if sprite.noun is None:
                self.clutter.append(sprite)
            else:
                named.setdefault(sprite.noun, []).append(sprite)
        self.named = named
        self.nouns = sorted(named)
        self._levels: dict[int, list[np.ndarray]] = {}
        self._backgrounds = _photo_backgrounds() if photos else []

    def scene(self, index: int, width: int = 126, height: int = 126) -> Scene:
        """Scene ``index`` rendered at ``width`` x ``height``.

        A scene has an aspect ratio of its own; rendering it at another squashes it, as the model's
        input does.
        """
        key = (self.split == "eval", self.seed, index)
        rng = np.random.default_rng([int(k) for k in key])
        aspect = float(np.exp(rng.uniform(np.log(0.62), np.log(1.7))))
        placements = self._arrange(rng)
        image = self._background(rng, width, height)
        return self._compose(image, placements, aspect, rng)

    def _arrange(self, rng: np.random.Generator) -> list[Placement]:
        count = int(rng.integers(self.objects[0], self.objects[1] + 1))
        nouns = list(rng.choice(self.nouns, min(count, len(self.nouns)), replace=False))
        if count > 1 and rng.random() < 0.12:
            nouns[-1] = nouns[0]
        crowd = max(0, count - 2)
        placements = []
        for noun in nouns:
            choices = self.named[noun]
            sprite = choices[rng.integers(len(choices))]
            high = 0.95 if count == 1 else 0.72 - 0.07 * crowd
            placements.append(self._place(rng, sprite, 0.18, high))
        if self.clutter and rng.random() < 0.45:
            for _ in range(int(rng.integers(1, 4))):
                sprite = self.clutter[rng.integers(len(self.clutter))]
                spot = int(rng.integers(len(placements) + 1))
                placements.insert(spot, self._place(rng, sprite, 0.12, 0.45))
        self._spread(rng, placements)
        return placements

    def _place(
        self, rng: np.random.Generator, sprite: Sprite, low: float, high: float
    ) -> Placement:
        size = float(rng.uniform(low, high))
        angle = float(rng.normal(0, 14) if rng.random() < 0.85 else rng.uniform(-180, 180))
        gain = rng.normal(1.0, 0.08, 3) * rng.normal(1.0, 0.08)
        return Placement(sprite, 0.5, 0.5, size, angle, bool(rng.random() < 0.5), gain)

    def _spread(self, rng: np.random.Generator, placements: list[Placement]) -> None:
        """Positions: of some random ones, that which overlaps the others least."""
        done: list[Placement] = []
        for placement in placements:
            reach = placement.size * 0.38
            best, best_cost = (0.5, 0.5), np.inf
            for _ in range(6):
                x, y = rng.uniform(min(reach, 0.5), max(1 - reach, 0.5), 2)
                cost = sum(
                    max(0.0, 0.48 * (placement.size + p.size) - np.hypot(x - p.x, y - p.y))
                    for p in done
                )
                if cost < best_cost:
                    best, best_cost = (float(x), float(y)), cost
                if cost == 0:
                    break
            placement.x, placement.y = best
            done.append(placement)

    def _background(self, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
        if self._backgrounds and rng.random() < self.photos:
            photo = self._backgrounds[rng.integers(len(self._backgrounds))]
            share = rng.uniform(0.3, 1.0)
            h, w = (int(s * share) for s in photo.shape[:2])
            y, x = rng.integers(photo.shape[0] - h + 1), rng.integers(photo.shape[1] - w + 1)
            cut = photo[y : y + h, x : x + w]
            if rng.random() < 0.5:
                cut = cut[:, ::-1]
            shrink = width < w
            return cv2.resize(
                cut,
                (width, height),
                interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR,
            ).astype(np.float32)
        return _procedural(rng, width, height)

    def _compose(
        self,
        image: np.ndarray,
        placements: list[Placement],
        aspect: float,
        rng: np.random.Generator,
    ) -> Scene:
        height, width = image.shape[:2]
        masks: list[np.ndarray | None] = []
        areas = []
        for placement in placements:
            patch = self._warped(placement, width, height, aspect)
            if patch is None:
                masks.append(None)
                areas.append(0.0)
                continue
            x, y, layer, full_area = patch
            h, w = layer.shape[:2]
            alpha = layer[..., 3:] / 255
            region = image[y : y + h, x : x + w]
            region *= 1 - alpha
            region += np.minimum(layer[..., :3] * placement.gain.astype(np.float32), 255 * alpha)
            opaque = alpha[..., 0] > 0.5
            for below in masks:
                if below is not None:
                    below[y : y + h, x : x + w] &= ~opaque
            mask = np.zeros((height, width), bool)
            mask[y : y + h, x : x + w] = opaque
            masks.append(mask)
            areas.append(full_area)
        objects = []
        for placement, mask, area in zip(placements, masks, areas, strict=True):
            if mask is None or placement.sprite.noun is None:
                continue
            shown = int(mask.sum())
            if shown >= MIN_VISIBLE * area and shown >= MIN_AREA * width * height:
                objects.append(SceneObject(placement.sprite.noun, mask, placement.sprite.style))
        return Scene(_finish(image, rng), objects, aspect)

    def _warped(
        self, placement: Placement, width: int, height: int, aspect: float
    ) -> tuple[int, int, np.ndarray, float] | None:
        """Sprite as seen in the picture: x, y, premultiplied float32 [h, w, 4], its full area."""
        rgba = placement.sprite.rgba
        # Picture of aspect w/h with area 1 in virtual units: sides sqrt(aspect), 1/sqrt(aspect).
        unit_x, unit_y = width / aspect**0.5, height * aspect**0.5
        scale = placement.size / max(rgba.shape[:2])
        levels = self._levels.get(id(placement.sprite))
        if levels is None:
            levels = self._levels[id(placement.sprite)] = _mips(rgba)
        pixel = scale * (unit_x * unit_y) ** 0.5
        level = int(np.clip(np.round(-np.log2(pixel)), 0, len(levels) - 1))
        source = levels[level]
        zoom = max(rgba.shape[:2]) / max(source.shape[:2]) * scale
        cos, sin = np.cos(np.radians(placement.angle)), np.sin(np.radians(placement.angle))
        mirror = -1.0 if placement.flip else 1.0
        matrix = np.array(
            [
                [unit_x * zoom * cos * mirror, -unit_x * zoom * sin],
                [unit_y * zoom * sin * mirror, unit_y * zoom * cos],
            ]
        )
        h, w = source.shape[:2]
        corners = (np.array([[0, 0], [w, 0], [0, h], [w, h]]) - [w / 2, h / 2]) @ matrix.T
        centre = np.array([placement.x * width, placement.y * height])
        low = np.floor(np.maximum(corners.min(0) + centre, 0)).astype(int)
        high = np.ceil(np.minimum(corners.max(0) + centre, [width, height])).astype(int)
        if (high - low < 2).any():
            return None
        # warpAffine works on pixel centres: shift by a half on both sides.
        offset = centre - low - matrix @ [w / 2 - 0.5, h / 2 - 0.5] - 0.5
        affine = np.hstack([matrix, offset[:, None]])
        size = (int(high[0] - low[0]), int(high[1] - low[1]))
        layer = cv2.warpAffine(source, affine, size, flags=cv2.INTER_LINEAR)
        solid = float((source[..., 3] > 127).sum()) * abs(float(np.linalg.det(matrix)))
        return int(low[0]), int(low[1]), layer, solid


def _photo_backgrounds() -> list[np.ndarray]:
    """Debian wallpaper photographs, longer side 640, cached; empty where none is installed."""
    packed = CACHE / "photos.npz"
    if not packed.exists():
        photos = []
        for file in sorted(PHOTOS.rglob("*")):
            if file.suffix.lower() not in (".jpg", ".jpeg", ".webp", ".png"):
                continue
            photo = cv2.imread(str(file), cv2.IMREAD_COLOR)
            if photo is None:
                continue
            scale = 640 / max(photo.shape[:2])
            photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            photos.append(photo[..., ::-1])
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(packed, *photos)
    with np.load(packed) as saved:
        return [saved[name] for name in saved.files]


def _procedural(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A painted background, float32 [H, W, 3] in 0..255."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x /= width
    y /= height
    colours = rng.uniform(0, 255, (3, 3)).astype(np.float32)
    if rng.random() < 0.4:
        colours = 255 - (255 - colours) * 0.35
    kind = rng.integers(6)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) + 0.5
    if kind == 0:
        image = np.broadcast_to(colours[0], (height, width, 3)).copy()
    elif kind == 1:
        image = colours[0] + (colours[1] - colours[0]) * np.clip(ramp, 0, 1)[..., None]
    elif kind == 2:
        waves = 0.5 + 0.5 * np.sin(ramp * rng.uniform(10, 60))
        if rng.random() < 0.5:
            waves = (waves > 0.5).astype(np.float32)
        image = colours[0] + (colours[1] - colours[0]) * waves[..., None]
    elif kind == 3:
        cells = rng.integers(3, 14)
        checks = ((np.floor(x * cells) + np.floor(y * cells)) % 2)[..., None]
        image = colours[0] + (colours[1] - colours[0]) * checks
    else:
        image = np.broadcast_to(colours[0], (height, width, 3)).copy()
        for octave in range(int(rng.integers(1, 4))):
            cells = 3 * 3**octave
            noise = rng.normal(0, 45 / (octave + 1), (cells, cells, 3)).astype(np.float32)
            image = image + cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    if kind in (1, 5):
        for _ in range(int(rng.integers(0, 9))):
            colour = rng.uniform(0, 255, 3).tolist()
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            radius = max(1, int(rng.uniform(0.02, 0.25) * width))
            canvas = np.ascontiguousarray(image, np.float32)
            if rng.random() < 0.5:
                cv2.circle(canvas, centre, radius, colour, -1, cv2.LINE_AA)
            else:
                other = (int(rng.integers(width)), int(rng.integers(height)))
                thick = max(1, int(radius * 0.2))
                cv2.line(canvas, centre, other, colour, thick, cv2.LINE_AA)
            image = canvas
    return np.ascontiguousarray(np.clip(image, 0, 255), np.float32)


def _finish(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Camera and codec: contrast, blur, noise, JPEG; gives uint8."""
    image = (image - 127) * rng.uniform(0.75, 1.15) + 127 + rng.normal(0, 12)
    scale = image.shape[1] / 126
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.8) * scale)
    if rng.random() < 0.3:
        noise = rng.normal(0, rng.uniform(2, 10), image.shape)
        image = image + noise
    image = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        quality = int(rng.integers(40, 95))
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return image


def outline(mask: np.ndarray, vertices: int = 24) -> np.ndarray:
    """Outer contour of the largest piece of ``mask`` bool [H, W] as a polygon [vertices, 2].

    Coordinates are pixel edges (a mask of all ones gives 0 and W). Starts at the point straight
    above the centre of the box, runs clockwise, vertices evenly spread along the contour.
    """
    up = max(1, int(np.ceil(256 / max(mask.shape))))
    smooth = cv2.resize(mask.astype(np.float32), None, fx=up, fy=up, interpolation=cv2.INTER_LINEAR)
    fine = np.pad((smooth > 0.5).astype(np.uint8), 1)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=cv2.contourArea)[:, 0].astype(np.float64)
    if len(contour) < 3:
        contour = contour[:1] + np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5]])
    # Contours run through pixel centres: push each point out by half a fine pixel.
    low, high = contour.min(0), contour.max(0)
    centre, extent = (low + high) / 2, np.maximum(high - low, 1e-6)
    contour = (contour - centre) * (1 + 1 / extent) + centre
    points = (contour - 0.5) / up
    area = 0.5 * np.sum(
        points[:, 0] * np.roll(points[:, 1], -1) - np.roll(points[:, 0], -1) * points[:, 1]
    )
    if area < 0:  # y runs down: a positive shoelace sum is clockwise on screen
        points = points[::-1]
    top = (points.min(0) + points.max(0)) / 2
    top[1] = points[:, 1].min()
    above = np.abs(points[:, 0] - top[0]) * 2 + (points[:, 1] - top[1])
    points = np.roll(points, -int(above.argmin()), axis=0)
    closed = np.vstack([points, points[:1]])
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    where = np.arange(vertices) / vertices * along[-1]
    return np.stack([np.interp(where, along, closed[:, i]) for i in (0, 1)], axis=1)
