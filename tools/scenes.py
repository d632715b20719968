"""Generated scenes with truth: named pictures on backgrounds, and outlines of their visible parts.

A scene is sampled as a description in units of the shorter side of a virtual canvas, which may be
wider or taller than the rendered image: the model squashes every aspect to a square, so training
images are rendered squashed. The same description renders at any size.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
from assets import LEVELS, SIDE, SOURCES, Pack, held_out
from effects import SIDE as INPUT_SIDE
from effects import finish, shade
from grounds import background, photos
from nouns import NOUNS, wanted_names
from words import LOOKALIKES

MIN_VISIBLE = 0.35
"""Objects of which less can be seen are taken out of the scene."""
MIN_PIXELS = 0.0038
"""Smallest visible area of an object, share of the image."""
MIN_WHOLE = 0.8
"""Objects whose largest visible piece is a smaller share of what is visible are taken out."""
LARGE_SIDE = 336
"""Larger scenes are drawn from larger pictures than the packs hold."""
HELD_OUT_STYLE = "twemoji"


@dataclass
class SceneObject:
    """A named object as seen: ``mask`` bool [H, W], its visible part."""

    noun: str
    mask: np.ndarray
    style: str
    name: str = ""


@dataclass
class Scene:
    """``image`` uint8 [H, W, 3] RGB and its named objects, back to front."""

    image: np.ndarray
    objects: list[SceneObject]
    description: Description


@dataclass(frozen=True)
class Placement:
    """One sprite: centre and longer side in units of the canvas's shorter side."""

    style: str
    name: str
    noun: str | None
    x: float
    y: float
    size: float
    rotation: float
    """Degrees, clockwise."""
    flip: bool
    stretch: float
    """Width over height, relative to the sprite's own."""
    colour: np.ndarray
    """float32 [4, 4]: premultiplied RGBA in, RGBA out."""
    shadow: float
    """Darkness 0..1 of a soft shadow."""


@dataclass(frozen=True)
class Description:
    """A scene before it is rendered."""

    seed: tuple[int, ...]
    aspect: float
    """Width over height of the virtual canvas."""
    placements: list[Placement]
    photo: bool = False
    effects: dict[str, float] = field(default_factory=dict)

    @property
    def canvas(self) -> tuple[float, float]:
        """Width and height in units of the shorter side."""
        return max(1.0, self.aspect), max(1.0, 1 / self.aspect)


@lru_cache(maxsize=1)
def _packs() -> dict[str, Pack]:
    return {style: Pack(style, wanted_names(style)) for style in SOURCES}


@lru_cache(maxsize=len(SOURCES))
def _clutter(style: str) -> tuple[str, ...]:
    """Pictures that may stand in a scene unnamed: nothing that a noun could mean."""
    wanted = wanted_names(style)
    names = (sprite["name"] for sprite in _packs()[style].sprites)
    return tuple(n for n in names if n not in wanted and not LOOKALIKES.search(n.lower()))


class SceneGenerator:
    """Scenes by number: the same (split, seed, index) is the same scene on any machine.

    ``nouns`` limits what is named (all of the table by default), ``styles`` where pictures come
    from; by default training sees every style but
    ``twemoji`` and 85 % of the stamps, evaluation sees all. ``size`` is (width, height) px; without
    it images are 336 × 336 with a random aspect squashed.
    """

    def __init__(
        self,
        split: str,
        seed: int,
        styles: Sequence[str] | None = None,
        nouns: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        max_objects: int = 5,
        photos: float = 0.35,
        clean: bool = False,
        large_sprites: bool | None = None,
    ) -> None:
        """``photos`` is the share of photographic backgrounds, ``clean`` leaves noise out."""
        if split not in ("train", "eval"):
            raise ValueError(f"split must be train or eval, not {split!r}")
        self.split, self.seed, self.size = split, seed, size
        self.max_objects, self.photos, self.clean = max_objects, photos, clean
        longer = max(size) if size else INPUT_SIDE
        self.large = longer > LARGE_SIDE if large_sprites is None else large_sprites
        if styles is None:
            styles = [s for s in SOURCES if split == "eval" or s != HELD_OUT_STYLE]
        self.styles = list(styles)
        packs = _packs()
        self.sprites: dict[str, dict[str, list[str]]] = {}
        for noun in nouns or NOUNS:
            pictures = NOUNS[noun]
            by_style = {
                style: [
                    n
                    for n in pictures.names(style)
                    if n in packs[style].number and self._allowed(style, n)
                ]
                for style in styles
            }
            by_style = {style: names for style, names in by_style.items() if names}
            if by_style:
                self.sprites[noun] = by_style
        self.nouns = list(self.sprites)
        self.clutter = [
            (style, name)
            for style in styles
            for name in _clutter(style)
            if self._allowed(style, name)
        ]

    def _allowed(self, style: str, name: str) -> bool:
        return self.split == "eval" or style != "stamps" or not held_out(name)

    def scene(self, index: int) -> Scene:
        """The scene of this number, rendered at the generator's size."""
        width, height = self.size or (INPUT_SIDE, INPUT_SIDE)
        return self.render(self.describe(index), width, height)

    def describe(self, index: int) -> Description:
        """Sample a scene without rendering it."""
        seed = (zlib.crc32(self.split.encode()), self.seed, index)
        rng = np.random.default_rng(seed)
        if self.size:
            aspect = self.size[0] / self.size[1]
        else:
            aspect = float(np.exp(np.clip(rng.normal(0.1, 0.3), -0.5, 0.53)))
        weights = np.array([0.24, 0.27, 0.22, 0.16, 0.11])[: self.max_objects]
        count = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
        nouns = [self.nouns[i] for i in rng.choice(len(self.nouns), count, replace=False)]
        if count > 1 and rng.random() < 0.1:
            nouns[1] = nouns[0]
        favourite = None
        if rng.random() < 0.3:
            favourite = self.styles[rng.integers(len(self.styles))]
        placements: list[Placement] = []
        limits = [(0.34, 0.92), (0.28, 0.75), (0.25, 0.62), (0.23, 0.55), (0.22, 0.5)]
        low, high = limits[min(count, len(limits)) - 1]
        for noun in nouns:
            by_style = self.sprites[noun]
            styles = list(by_style)
            style = styles[rng.integers(len(styles))]
            if favourite in by_style:
                style = favourite
            names = by_style[style]
            size = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            placements.append(
                self._placement(
                    rng, style, names[rng.integers(len(names))], noun, size, aspect, placements
                )
            )
        for _ in range(int(rng.choice([0, 1, 2, 3, 4], p=[0.35, 0.25, 0.2, 0.12, 0.08]))):
            style, name = self.clutter[rng.integers(len(self.clutter))]
            size = float(np.exp(rng.uniform(np.log(0.08), np.log(0.45))))
            placements.append(self._placement(rng, style, name, None, size, aspect, placements))
        if rng.random() < 0.65:
            placements.sort(key=lambda p: -p.size)
        else:
            rng.shuffle(placements)  # type: ignore[arg-type]
        effects = {} if self.clean else self._effects(rng)
        return Description(seed, aspect, placements, rng.random() < self.photos, effects)

    def _placement(
        self,
        rng: np.random.Generator,
        style: str,
        name: str,
        noun: str | None,
        size: float,
        aspect: float,
        others: list[Placement],
    ) -> Placement:
        width, height = max(1.0, aspect), max(1.0, 1 / aspect)
        # Most objects look for room; the rest land where they land and may be hidden in part.
        tries = 8 if rng.random() < 0.72 else 1
        best, best_cost = (0.5, 0.5), np.inf
        for _ in range(tries):
            # Near the rim an object is cut: allowed, but not the rule.
            margin = 0.42 * size if rng.random() < 0.85 else 0.15 * size
            x = rng.uniform(min(margin, width / 2), max(width - margin, width / 2))
            y = rng.uniform(min(margin, height / 2), max(height - margin, height / 2))
            cost = 0.0
            for other in others:
                reach = 0.4 * (size + other.size)
                near = max(0.0, 1 - np.hypot(x - other.x, y - other.y) / reach)
                cost += near * min(size, other.size)
            if cost < best_cost:
                best, best_cost = (float(x), float(y)), cost
            if cost == 0:
                break
        pick = rng.random()
        if pick < 0.3:
            rotation = rng.normal(0, 4)
        elif pick < 0.86:
            rotation = float(np.clip(rng.normal(0, 15), -35, 35))
        else:
            rotation = rng.uniform(-180, 180)
        return Placement(
            style,
            name,
            noun,
            *best,
            size,
            float(rotation),
            bool(rng.random() < 0.5),
            float(np.exp(rng.normal(0, 0.06))),
            self._colour(rng),
            float(rng.uniform(0.15, 0.5)) if rng.random() < 0.2 else 0.0,
        )

    @staticmethod
    def _colour(rng: np.random.Generator) -> np.ndarray:
        """Gain, contrast, saturation and a little hue, as one matrix on premultiplied RGBA."""
        matrix = np.eye(4, dtype=np.float32)
        if rng.random() < 0.15:
            return matrix
        gain = np.exp(rng.normal(0, 0.1)) * np.exp(rng.normal(0, 0.05, 3))
        saturation = np.exp(rng.normal(0, 0.15)) if rng.random() > 0.04 else 0.1
        luma = np.array([0.299, 0.587, 0.114])
        colour = saturation * np.eye(3) + (1 - saturation) * luma[None, :]
        angle = rng.normal(0, 0.08)
        axis = np.full(3, 1 / np.sqrt(3))
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        hue = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
        contrast = np.exp(rng.normal(0, 0.08))
        matrix[:3, :3] = contrast * gain[:, None] * (hue @ colour)
        matrix[:3, 3] = 0.5 * (1 - contrast) + rng.normal(0, 0.04)
        return matrix

    @staticmethod
    def _effects(rng: np.random.Generator) -> dict[str, float]:
        """What happens to the whole picture; blur in px of a 126 px side, noise in grey levels."""
        effects: dict[str, float] = {}
        if rng.random() < 0.5:
            effects["gain"] = float(np.exp(rng.normal(0, 0.12)))
            effects["bias"] = float(rng.normal(0, 8))
        if rng.random() < 0.3:
            effects["blur"] = float(rng.uniform(0.3, 0.9))
        if rng.random() < 0.4:
            effects["noise"] = float(rng.uniform(1, 11))
        if rng.random() < 0.2:
            effects["jpeg"] = float(rng.integers(40, 92))
        return effects

    def render(self, scene: Description, width: int, height: int) -> Scene:
        """Draw a described scene at (width, height) px; the truth is exact for that size."""
        rng = np.random.default_rng((*scene.seed, 1))
        warped = [self._warp(p, scene.canvas, width, height) for p in scene.placements]
        kept = self._kept(scene.placements, warped, width, height)
        canvas = background(rng, width, height, scene.photo and bool(photos()))
        owner = np.full((height, width), -1, np.int16)
        for number in kept:
            placement = scene.placements[number]
            pixels, (x0, y0), _ = warped[number]
            h, w = pixels.shape[:2]
            if placement.shadow:
                shade(canvas, pixels[..., 3], x0, y0, placement.shadow)
            part = canvas[y0 : y0 + h, x0 : x0 + w]
            alpha = pixels[..., 3:]
            coloured = cv2.transform(pixels, placement.colour)[..., :3]
            np.clip(coloured, 0, alpha, out=coloured)
            part *= 1 - alpha
            part += coloured
            owner[y0 : y0 + h, x0 : x0 + w][pixels[..., 3] >= 0.5] = number
        objects = []
        for number in kept:
            placement = scene.placements[number]
            if placement.noun is None:
                continue
            objects.append(
                SceneObject(placement.noun, owner == number, placement.style, placement.name)
            )
        return Scene(finish(canvas, scene.effects, rng), objects, scene)

    def _warp(
        self, placement: Placement, canvas: tuple[float, float], width: int, height: int
    ) -> tuple[np.ndarray, tuple[int, int], float]:
        """Sprite on the pixel grid: float32 [h, w, 4] in 0..1, its corner, its whole area (px)."""
        pack = _packs()[placement.style]
        across, down = width / canvas[0], height / canvas[1]
        longest = placement.size * max(across, down)
        if self.large and longest > SIDE:
            sprite = pack.large(placement.name, int(min(1024, np.ceil(longest / 64) * 64)))
        else:
            level = int(np.clip(np.floor(np.log2(SIDE / max(longest, 1.0)) + 0.15), 0, LEVELS - 1))
            sprite = pack.image(placement.name, level)
        h, w = sprite.shape[:2]
        scale = placement.size / max(h, w)
        angle = np.deg2rad(placement.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shape = np.diag([scale * np.sqrt(placement.stretch), scale / np.sqrt(placement.stretch)])
        if placement.flip:
            shape[0, 0] *= -1
        linear = np.diag([across, down]) @ turn @ shape
        centre = np.array([placement.x * across, placement.y * down])
        reach = np.abs(linear) @ np.array([w, h]) / 2 + 1
        low = np.clip(np.floor(centre - reach), 0, [width - 1, height - 1]).astype(int)
        high = np.clip(np.ceil(centre + reach), low + 1, [width, height]).astype(int)
        # Coordinates are of pixel edges; OpenCV counts pixel centres.
        shift = centre - low - 0.5 - linear @ (np.array([w, h]) / 2 - 0.5)
        pixels = cv2.warpAffine(
            sprite,
            np.column_stack([linear, shift]),
            (int(high[0] - low[0]), int(high[1] - low[1])),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
        ).astype(np.float32)
        pixels *= 1 / 255
        small = pack.image(placement.name, LEVELS - 1)[..., 3]
        solid = float((small >= 128).mean()) * w * h
        return pixels, (int(low[0]), int(low[1])), solid * abs(float(np.linalg.det(linear)))

    @staticmethod
    def _kept(
        placements: list[Placement],
        warped: list[tuple[np.ndarray, tuple[int, int], float]],
        width: int,
        height: int,
    ) -> list[int]:
        """Numbers of the placements to draw: named ones must be seen well, or they go."""
        kept = list(range(len(placements)))
        while True:
            owner = np.full((height, width), -1, np.int16)
            solid = {}
            for number in kept:
                pixels, (x0, y0), _ = warped[number]
                inside = solid[number] = pixels[..., 3] >= 0.5
                h, w = inside.shape
                owner[y0 : y0 + h, x0 : x0 + w][inside] = number
            worst, worst_share = -1, np.inf
            for number in kept:
                if placements[number].noun is None:
                    continue
                _, (x0, y0), area = warped[number]
                h, w = solid[number].shape
                seen = owner[y0 : y0 + h, x0 : x0 + w] == number
                count = int(seen.sum())
                share = count / max(area, 1.0)
                if count < solid[number].sum() and count:
                    _, _, stats, _ = cv2.connectedComponentsWithStats(seen.view(np.uint8))
                    if stats[1:, cv2.CC_STAT_AREA].max() < MIN_WHOLE * count:
                        share = 0.0
                if count < MIN_PIXELS * width * height:
                    share = 0.0
                if share < MIN_VISIBLE and share < worst_share:
                    worst, worst_share = number, share
            if worst < 0:
                return kept
            kept.remove(worst)
