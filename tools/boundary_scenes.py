"""Objects on photographs with exact outlines, for the boundary refiner, and coarse masks of them.

Nothing here has a name: an object is a photographic cut-out, a drawing, or an outline filled with
a piece of a photograph, harmonised with what is behind it, shaded, blurred and compressed, among
neighbours of its own kind; or a region of a photograph or an animal in it, left where it is.

    python tools/boundary_scenes.py --sheet sheet.png
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from assets import Pack, held_out
from boundary_coarse import coarsened
from boundary_outlined import Outlined, outlined_objects
from boundary_outlines import random_outline
from boundary_photos import photographs
from boundary_regions import Region, regions
from grounds import octaves
from nouns import wanted_names

from kestrel.seg_refiner.clean import close_cracks

STYLES = ("noto", "fluent", "emojione")
KINDS = ("stamp", "drawing", "fill", "same")
"""A cut-out, a drawing, an outline filled from another photograph or from the one behind it."""
KIND_SHARES = (0.3, 0.05, 0.3, 0.35)
NEIGHBOUR_SHARES = (0.4, 0.1, 0.3, 0.2)
REGIONS, OUTLINED = 0.2, 0.5
"""Shares of samples with nothing pasted: regions of a photograph, objects outlined by hand."""

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1), pixels."""


@dataclass
class Sample:
    """``image`` uint8 [h, w, 3] RGB; ``truth`` and ``coarse`` uint8 [h, w], 0/1."""

    image: np.ndarray
    truth: np.ndarray
    coarse: np.ndarray


# ---- pieces -------------------------------------------------------------------------------------


def _patch(rng: np.random.Generator, photo: np.ndarray, h: int, w: int) -> np.ndarray:
    """float32 [h, w, 3] in 0..1: a piece of the photograph, turned and scaled."""
    ph, pw = photo.shape[:2]
    scale = rng.uniform(0.45, 1.6)
    scale = min(scale, 0.98 * min(ph / h, pw / w))
    if rng.random() < 0.2:
        scale = 0.98 * min(ph / h, pw / w)
    ch, cw = max(8, int(h * scale)), max(8, int(w * scale))
    top, left = int(rng.integers(0, ph - ch + 1)), int(rng.integers(0, pw - cw + 1))
    cut = photo[top : top + ch, left : left + cw]
    if rng.random() < 0.5:
        cut = cut[:, ::-1]
    kind = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    out = cv2.resize(np.ascontiguousarray(cut), (w, h), interpolation=kind).astype(np.float32)
    out *= 1 / 255
    return out


def _tinted(rng: np.random.Generator, picture: np.ndarray, strength: float) -> np.ndarray:
    gain = np.exp(rng.normal(0, strength, 3) * 0.5 + rng.normal(0, strength)).astype(np.float32)
    return picture * gain + np.float32(rng.normal(0, strength * 0.15))


class BoundaryScenes:
    """Draws samples; ``held`` draws from the stamps that training does not see, all pasted."""

    def __init__(self, seed: int, held: bool = False) -> None:
        self.held = held
        self.rng = np.random.default_rng(seed)
        self.photos = list(photographs().values())
        self.outlined = [] if held else outlined_objects()
        found: dict[int, list[Region]] = {}
        for region in () if held else regions(self.photos):
            found.setdefault(region.photo, []).append(region)
        self.regions = list(found.values())
        stamps = Pack("stamps", wanted_names("stamps"))
        self.stamps = [
            (stamps, s["name"])
            for s in stamps.sprites
            if held_out(s["name"]) == held
            and max(s["sizes"][0]) >= 100
            and not s["name"].endswith("svg")
            and "cartoon" not in s["name"]
        ]
        self.drawings = [
            (pack, s["name"])
            for style in STYLES
            for pack in [Pack(style, wanted_names(style))]
            for s in pack.sprites
            if held_out(s["name"]) == held
        ]

    def photo(self) -> np.ndarray:
        return self.photos[int(self.rng.integers(len(self.photos)))]

    def _warp(self, sprite: np.ndarray, h: int, w: int, box: Box) -> np.ndarray:
        """Premultiplied RGBA float32 [h, w, 4]: the sprite turned and fitted into the box (px)."""
        rng = self.rng
        sh, sw = sprite.shape[:2]
        turn = rng.normal(0, 0.25) if rng.random() < 0.6 else rng.uniform(-np.pi, np.pi)
        c, s = math.cos(turn), math.sin(turn)
        flip = -1.0 if rng.random() < 0.5 else 1.0
        stretch = math.exp(rng.normal(0, 0.12 if rng.random() < 0.6 else 0.4))
        matrix = np.array([[c, -s], [s, c]]) @ np.diag([flip * stretch, 1 / stretch])
        corners = np.array([[-sw, -sh], [sw, -sh], [sw, sh], [-sw, sh]]).T / 2
        extent = np.ptp(matrix @ corners, axis=1)
        x0, y0, x1, y1 = box
        scale = min((x1 - x0) / extent[0], (y1 - y0) / extent[1])
        matrix *= scale
        move = np.array([(x0 + x1) / 2, (y0 + y1) / 2]) - matrix @ np.array([sw / 2, sh / 2])
        if scale < 0.6:
            sprite = cv2.resize(sprite, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            matrix = matrix * 2
        layer = cv2.warpAffine(sprite, np.c_[matrix, move].astype(np.float32), (w, h))
        return layer.astype(np.float32) * np.float32(1 / 255)

    def _silhouette(self, h: int, w: int, box: Box) -> np.ndarray:
        rng = self.rng
        if rng.random() < 0.55:
            pool = self.stamps if rng.random() < 0.7 else self.drawings
            pack, name = pool[int(rng.integers(len(pool)))]
            return self._warp(pack.image(name), h, w, box)[..., 3]
        x0, y0, x1, y1 = (round(v) for v in box)
        shape = np.zeros((h, w), np.float32)
        bh, bw = max(8, y1 - y0), max(8, x1 - x0)
        aspect = math.exp(rng.normal(0, 0.35))
        if aspect > 1:
            bh = max(8, int(bh / aspect))
        else:
            bw = max(8, int(bw * aspect))
        outline = random_outline(rng, bh, bw)
        top, left = (y0 + y1 - bh) // 2, (x0 + x1 - bw) // 2
        ys, xs = max(0, top), max(0, left)
        part = outline[ys - top :, xs - left :][: max(0, h - ys), : max(0, w - xs)]
        shape[ys : ys + part.shape[0], xs : xs + part.shape[1]] = part
        return shape

    def _thing(
        self, h: int, w: int, box: Box, kind: str, photo: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Colour float32 [h, w, 3] (straight) and alpha float32 [h, w] of an object."""
        rng = self.rng
        if kind in ("stamp", "drawing"):
            pool = self.stamps if kind == "stamp" else self.drawings
            pack, name = pool[int(rng.integers(len(pool)))]
            layer = self._warp(pack.image(name), h, w, box)
            alpha = layer[..., 3]
            colour = layer[..., :3] / np.maximum(alpha, 1e-3)[..., None]
            return colour, alpha
        alpha = self._silhouette(h, w, box)
        colour = _tinted(rng, _patch(rng, photo, h, w), rng.uniform(0, 0.4))
        for _ in range(int(rng.choice([0, 0, 1, 2, 3]))):
            # Parts with a texture of their own: edges inside the object that are not its outline.
            source = photo if rng.random() < 0.5 else self.photo()
            other = _tinted(rng, _patch(rng, source, h, w), rng.uniform(0, 0.4))
            share = np.clip(
                (octaves(rng, w, h) - rng.uniform(0.35, 0.6)) * rng.uniform(4, 40), 0, 1
            )
            if rng.random() < 0.5:
                share = self._silhouette(h, w, box)
            colour += share[..., None] * (other - colour)
        return colour, alpha

    def sample(self, h: int, w: int) -> Sample:
        """A picture of ``h`` x ``w`` px of which the object fills two thirds each way."""
        for _ in range(20):
            drawn = self._draw(h, w) if self.held else self._any(h, w)
            if drawn is None:
                continue
            image, truth = drawn
            coarse = coarsened(truth, self.rng)
            both = int((truth & coarse).sum())
            if coarse.any() and both > 0.5 * int((truth | coarse).sum()):
                return Sample(image, truth, coarse)
        raise RuntimeError("no sample in 20 draws")

    def _any(self, h: int, w: int) -> tuple[np.ndarray, np.ndarray] | None:
        rng = self.rng
        kind = rng.random()
        if kind < OUTLINED:
            one = self.outlined[int(rng.integers(len(self.outlined)))]
            return self._in_place(one.photo, one, h, w)
        if kind < OUTLINED + REGIONS:
            # Every photograph as often.
            of_one = self.regions[int(rng.integers(len(self.regions)))]
            region = of_one[int(rng.integers(len(of_one)))]
            return self._in_place(self.photos[region.photo], region, h, w)
        return self._draw(h, w)

    def _ground(self, photo: np.ndarray, h: int, w: int) -> np.ndarray:
        """What is behind the object: a photograph, or several with a line between them."""
        rng = self.rng
        canvas = _patch(rng, photo, h, w)
        for _ in range(int(rng.choice([0, 0, 1, 2]))):
            other = _tinted(rng, _patch(rng, self.photo(), h, w), 0.2)
            sharp = rng.uniform(3, 60)
            share = np.clip((octaves(rng, w, h) - rng.uniform(0.4, 0.6)) * sharp + 0.5, 0, 1)
            canvas += share[..., None] * (other - canvas)
        return _tinted(rng, canvas, 0.2)

    def _in_place(
        self, photo: np.ndarray, region: Region | Outlined, h: int, w: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A part of a photograph where it is, turned a little."""
        rng = self.rng
        rh, rw = region.mask.shape
        reach = max(rh, rw)
        x0, y0 = max(0, region.left - reach), max(0, region.top - reach)
        around = photo[y0 : region.top + rh + reach, x0 : region.left + rw + reach]
        canvas = around.astype(np.float32) * np.float32(1 / 255)
        truth = np.zeros(canvas.shape[:2], np.uint8)
        top, left = region.top - y0, region.left - x0
        truth[top : top + rh, left : left + rw] = region.mask
        if rng.random() < 0.5:
            canvas, truth = canvas[:, ::-1], truth[:, ::-1]
        grow = 1 + 2 * rng.uniform(0.18, 0.34)
        scale = min(w / (rw * grow), h / (rh * grow), 1.7)
        if scale < 0.75:
            size = (round(canvas.shape[1] * scale), round(canvas.shape[0] * scale))
            canvas = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)
            truth = cv2.resize(truth * np.uint8(255), size, interpolation=cv2.INTER_AREA)
        else:
            truth = truth * np.uint8(255)
            canvas = np.ascontiguousarray(canvas)
        canvas = _tinted(rng, canvas, 0.2)
        turn = float(np.degrees(rng.normal(0, 0.2)))
        move = cv2.getRotationMatrix2D((canvas.shape[1] / 2, canvas.shape[0] / 2), turn, 1.0)
        size = canvas.shape[1::-1]
        canvas = cv2.warpAffine(canvas, move, size, borderMode=cv2.BORDER_REFLECT_101)
        solid = cv2.warpAffine(np.ascontiguousarray(truth), move, size) > 127
        if not solid.any():
            return None
        canvas, truth = _centred(rng, canvas, solid.astype(np.uint8), h, w)
        return _finished(rng, canvas), truth

    def _draw(self, h: int, w: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Picture and true mask; None when too little of the object is seen, or not in one."""
        rng = self.rng
        photo = self.photo()
        canvas = self._ground(photo, h, w)
        grow = rng.uniform(0.14, 0.2)
        box = (w * grow, h * grow, w * (1 - grow), h * (1 - grow))
        shift = rng.normal(0, 0.02, 2) * (w, h)
        box = (box[0] + shift[0], box[1] + shift[1], box[2] + shift[0], box[3] + shift[1])
        kind = str(rng.choice(KINDS, p=KIND_SHARES))
        own = photo if kind == "same" else self.photo()
        for _ in range(int(rng.choice([0, 0, 1, 2, 3, 4]))):
            self._neighbour(canvas, box, kind, own)
        colour, alpha = self._thing(h, w, box, kind, own)
        if alpha.max() < 0.6:
            return None
        solid = alpha > 0.5
        colour = self._harmonised(colour, solid, canvas)
        colour = self._shaded(colour)
        self._cast(canvas, alpha)
        if rng.random() < 0.7:
            sigma = rng.uniform(0.3, 1.0) if rng.random() < 0.8 else rng.uniform(1, 2.5)
            alpha = cv2.GaussianBlur(alpha, (0, 0), sigma)
        canvas += alpha[..., None] * (colour - canvas)
        if rng.random() < 0.15:
            solid &= ~self._neighbour(canvas, box, kind, own)
        truth = _largest(solid)
        if truth is None or truth.sum() < 0.06 * h * w or truth.sum() < 0.75 * solid.sum():
            return None
        # As the refiner's own clean-up does, which does not grow along the edge of the picture.
        close_cracks(truth)
        if rng.random() < 0.6:
            truth = _filled(truth)
        canvas, truth = _centred(rng, canvas, truth, h, w)
        return _finished(rng, canvas), truth

    def _neighbour(
        self,
        canvas: np.ndarray,
        box: Box,
        kind: str,
        photo: np.ndarray,
    ) -> np.ndarray:
        """Another object beside the first, of its kind half of the time; bool [h, w], where."""
        rng = self.rng
        h, w = canvas.shape[:2]
        if rng.random() < 0.5:
            kind = str(rng.choice(KINDS, p=NEIGHBOUR_SHARES))
            photo = self.photo()
        bw, bh = box[2] - box[0], box[3] - box[1]
        size = rng.uniform(0.4, 1.1)
        angle = rng.uniform(0, 2 * np.pi)
        reach = rng.uniform(0.6, 0.9)
        cx = w / 2 + math.cos(angle) * bw * reach
        cy = h / 2 + math.sin(angle) * bh * reach
        place = (cx - bw * size / 2, cy - bh * size / 2, cx + bw * size / 2, cy + bh * size / 2)
        colour, alpha = self._thing(h, w, place, kind, photo)
        colour = self._shaded(colour)
        if rng.random() < 0.5:
            alpha = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.3, 2.0))
        canvas += alpha[..., None] * (colour - canvas)
        return alpha > 0.5

    def _harmonised(self, colour: np.ndarray, solid: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        """Mean and spread of the object's colours drawn towards those of what is behind it."""
        rng = self.rng
        if rng.random() < 0.25 or not solid.any():
            return colour
        mine, behind = colour[solid], canvas[solid]
        share = rng.uniform(0, 1) ** 0.7 * 0.9
        mean, spread = mine.mean(0), mine.std(0) + 0.01
        to_mean = mean + share * (behind.mean(0) - mean)
        to_spread = spread * np.clip((behind.std(0) + 0.01) / spread, 0.4, 2.5) ** share
        return (colour - mean) * (to_spread / spread).astype(np.float32) + to_mean

    def _shaded(self, colour: np.ndarray) -> np.ndarray:
        """Light from one side, and patches of it."""
        rng = self.rng
        if rng.random() < 0.4:
            return colour
        h, w = colour.shape[:2]
        y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j].astype(np.float32)
        turn = rng.uniform(0, 2 * np.pi)
        light = rng.uniform(0, 0.6) * (math.cos(turn) * x + math.sin(turn) * y)
        if rng.random() < 0.5:
            light = light + rng.uniform(0, 0.8) * (octaves(rng, w, h) - 0.5)
        if rng.random() < 0.25:
            edge = np.clip((light - rng.uniform(-0.2, 0.2)) * rng.uniform(5, 40), 0, 1)
            light = light - rng.uniform(0.1, 0.8) * edge
        return colour * np.exp(light.astype(np.float32))[..., None]

    def _cast(self, canvas: np.ndarray, alpha: np.ndarray) -> None:
        """A shadow beside the object."""
        rng = self.rng
        if rng.random() < 0.5:
            return
        h, w = alpha.shape
        size = min(h, w)
        dx, dy = rng.normal(0, 0.07, 2) * size
        squash = rng.uniform(0.3, 1.0) if rng.random() < 0.4 else 1.0
        centre = h * rng.uniform(0.6, 0.9)
        move = np.float32(
            [[1, rng.normal(0, 0.2) * (squash < 1), dx], [0, squash, dy + centre * (1 - squash)]]
        )
        shadow = cv2.warpAffine(alpha, move, (w, h))
        shadow = cv2.GaussianBlur(shadow, (0, 0), rng.uniform(0.006, 0.05) * size + 0.3)
        canvas *= 1 - rng.uniform(0.2, 0.8) * shadow[..., None]


def _largest(solid: np.ndarray) -> np.ndarray | None:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(solid.astype(np.uint8))
    if count < 2:
        return None
    return (labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)


def _centred(
    rng: np.random.Generator, canvas: np.ndarray, truth: np.ndarray, h: int, w: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled and moved so that the object fills as much of [h, w] as when it is refined."""
    x, y, bw, bh = cv2.boundingRect(truth)
    grow = 1 + 2 * rng.uniform(0.18, 0.34)
    scale = min(w / (bw * grow), h / (bh * grow), 1.7)
    cx, cy = x + bw / 2 + rng.normal(0, 0.02) * bw, y + bh / 2 + rng.normal(0, 0.02) * bh
    move = np.float32([[scale, 0, w / 2 - scale * cx], [0, scale, h / 2 - scale * cy]])
    canvas = cv2.warpAffine(canvas, move, (w, h), borderMode=cv2.BORDER_REFLECT_101)
    truth = cv2.warpAffine(truth * np.uint8(255), move, (w, h))
    return canvas, (truth > 127).astype(np.uint8)


def _filled(truth: np.ndarray) -> np.ndarray:
    outlines, _ = cv2.findContours(truth, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(truth), outlines, -1, 1, cv2.FILLED)


def _finished(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a camera and a codec do; to uint8."""
    h, w = canvas.shape[:2]
    if rng.random() < 0.4:
        canvas = canvas * np.exp(0.8 * (octaves(rng, w, h) - 0.5))[..., None]
    canvas = np.clip(canvas, 0, 1)
    if rng.random() < 0.35:
        # Small objects are enlarged to be refined.
        share = 1 / rng.uniform(1.1, 2.0)
        canvas = cv2.resize(canvas, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        canvas = np.clip(cv2.resize(canvas, (w, h), interpolation=cv2.INTER_CUBIC), 0, 1)
    if rng.random() < 0.4:
        canvas = canvas ** np.float32(math.exp(rng.normal(0, 0.35)))
    if rng.random() < 0.35:
        grey = canvas.mean(2, keepdims=True)
        canvas = grey + rng.uniform(0, 1) * (canvas - grey)
    if rng.random() < 0.4:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.4))
    elif rng.random() < 0.3:
        canvas = canvas + rng.uniform(0.2, 1.0) * (canvas - cv2.GaussianBlur(canvas, (0, 0), 1.0))
    canvas = canvas * np.float32(255)
    if rng.random() < 0.5:
        noise = np.empty(canvas.shape, np.int16)
        cv2.setRNGSeed(int(rng.integers(1 << 31)))
        cv2.randn(noise, 0, rng.uniform(1, 10))
        canvas = canvas + noise
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 96))])
        image = cv2.imdecode(code, cv2.IMREAD_COLOR)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sheet", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scenes = BoundaryScenes(args.seed)
    cells = []
    for _ in range(48):
        sample = scenes.sample(160, 160)
        marked = sample.image.copy()
        for mask, colour in ((sample.coarse, (255, 60, 60)), (sample.truth, (60, 255, 60))):
            outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(marked, outlines, -1, colour, 1)
        cells.append(np.vstack([sample.image, marked]))
    rows = [np.hstack(cells[i : i + 12]) for i in range(0, 48, 12)]
    cv2.imwrite(str(args.sheet), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
