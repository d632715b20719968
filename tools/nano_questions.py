"""Stored scenes to training questions: prompts, answers, patch labels, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from nano_training import QUANTUM, Batch, Question, lay_out, outline_tokens
from scene_store import CELLS, GRID, OBJECTS, SIDE, VERTICES, SceneStore, mirrored
from tokenizers import Tokenizer
from words import KINDS, SYNONYMS

from kestrel.moondream.config import PromptConfig

LENGTH = 68
"""Positions per question: prompt 5, spatial ref 3, coords and size 3, path 53, and spare."""
BOX_LENGTH = 14
"""Positions per question when only the box is asked for."""
LEAST_SHARE = 8
"""An object that covers less of a patch, in 255ths, does not shape it."""
ARTICLES = ("", "", "", "", "a ", "the ")


class SceneQuestions:
    """Turns scenes into questions with the vocabulary of the shipped model."""

    def __init__(self, tokenizer: Tokenizer, nouns: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.nouns = list(nouns)
        self.noun_ids = [tokenizer.token_to_id(noun) for noun in self.nouns]
        self.ids = {
            piece: tokenizer.token_to_id(piece)
            for piece in ["M", "L", "Z", *map(str, range(0, 961, QUANTUM))]
        }
        self.prompt_ids = PromptConfig(segment_prefix=(1, tokenizer.token_to_id("<|segment|>"), 2))

    def wording(self, noun: str, rng: np.random.Generator) -> str:
        """The noun as somebody would type it: mostly itself, sometimes a synonym or a plural."""
        words = SYNONYMS.get(noun, ())
        word = words[rng.integers(len(words))] if words and rng.random() < 0.3 else noun
        return ARTICLES[rng.integers(len(ARTICLES))] + word

    def prompt(self, words: str) -> list[int]:
        prompt = self.prompt_ids
        ids = self.tokenizer.encode(words, add_special_tokens=False).ids
        return [*prompt.segment_prefix, *ids, prompt.answer_id]

    def absent(self, present: set[str], rng: np.random.Generator) -> str | None:
        """A noun that is not to be seen, not even as the kind of something seen; None without."""
        kinds = present.union(*(KINDS.get(noun, ()) for noun in present))
        unseen = [noun for noun in self.nouns if noun not in kinds]
        return unseen[rng.integers(len(unseen))] if unseen else None


class BatchMaker:
    """Endless training batches of a store.

    ``questions`` per scene; 0 gives images and patch labels alone, ``boxes_only`` leaves the paths
    out of the answers. Only the first ``rows`` scenes are drawn from, by default all.
    """

    def __init__(
        self,
        store: SceneStore,
        asker: SceneQuestions,
        *,
        scenes: int,
        questions: int,
        boxes_only: bool,
        seed: int,
    ) -> None:
        if store.names != asker.nouns:
            raise ValueError("the store holds other nouns than the questions")
        self.store, self.asker = store, asker
        self.scenes, self.questions, self.boxes_only = scenes, questions, boxes_only
        self.rng = np.random.default_rng(seed)
        self.rows = len(store)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            order = self.rng.permutation(self.rows)
            for start in range(0, len(order) - self.scenes + 1, self.scenes):
                yield self.batch(order[start : start + self.scenes])

    def batch(self, rows: np.ndarray) -> Batch:
        images, asked, labels = [], [], []
        for row in rows:
            store = self.store
            if self.rng.random() < 0.5:
                image, shares, boxes, outlines, points = mirrored(store, row)
            else:
                image, shares, boxes = store.images[row], store.shares[row], store.boxes[row]
                outlines, points = store.outlines[row], store.points[row]
            nouns = [n for n in store.nouns[row].tolist() if n >= 0]
            images.append(self._recoloured(image))
            labels.append(self._patch_labels(nouns, shares, boxes, outlines))
            asked.append(self._ask(nouns, boxes, outlines, points))
        special = self.asker.prompt_ids
        length = 0 if not self.questions else BOX_LENGTH if self.boxes_only else LENGTH
        arrays = lay_out(asked, length, special.coord_id, special.size_id, special.eos_id)
        return Batch(
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            *(torch.from_numpy(a) for a in arrays),
            *(torch.from_numpy(np.stack(column)) for column in zip(*labels, strict=True)),
        )

    def _recoloured(self, image: np.ndarray) -> np.ndarray:
        """Half of the pictures under another light: each channel's gain and curve a little off."""
        if self.rng.random() < 0.5:
            return image
        levels = np.linspace(0, 1, 256)[:, None]
        curve = np.exp(self.rng.normal(0, 0.15) + self.rng.normal(0, 0.07, 3))
        gain = np.exp(self.rng.normal(0, 0.1) + self.rng.normal(0, 0.07, 3))
        table = np.clip(255 * gain * levels**curve, 0, 255).astype(np.uint8)
        return np.stack([table[:, c][image[..., c]] for c in range(3)], axis=-1)

    def _patch_labels(
        self, nouns: list[int], shares: np.ndarray, boxes: np.ndarray, outlines: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Shares [81, nouns + 1], boxes [81, 4], outlines [81, 48] and cells [81, 49] of ``Batch``,
        float32."""
        shown = np.zeros((GRID * GRID, len(self.asker.nouns) + 1), np.float32)
        of_object = np.full((GRID * GRID, 4), np.nan, np.float32)
        shapes = np.zeros((GRID * GRID, 2 * VERTICES), np.float32)
        cells = np.full((GRID * GRID, CELLS * CELLS), np.nan, np.float32)
        most = np.where(shares.max(0) >= LEAST_SHARE, shares.argmax(0), OBJECTS)
        for slot, noun in enumerate(nouns):
            part = shares[slot] / np.float32(255)
            shown[:, noun] += part
            of_object[part > 0.5] = boxes[slot]
            centre, size = boxes[slot, :2], boxes[slot, 2:]
            shapes[part > 0.5] = ((outlines[slot] - centre + size / 2) / size).ravel()
            cells[most == slot] = _covered(outlines[slot])[most == slot]
        shown[:, -1] = np.clip(1 - shown.sum(1), 0, 1)
        return shown / shown.sum(1, keepdims=True), of_object, shapes, cells

    def _ask(
        self, nouns: list[int], boxes: np.ndarray, outlines: np.ndarray, points: np.ndarray
    ) -> list[Question]:
        """Up to ``questions``: present nouns, ambiguous ones with a ref, some absent ones."""
        if not self.questions:
            return []
        rng, asker = self.rng, self.asker
        present = {asker.nouns[n] for n in nouns}
        questions: list[Question] = []
        for slot in rng.permutation(len(nouns)).tolist() * self.questions:
            if len(questions) == self.questions:
                break
            unseen = asker.absent(present, rng) if rng.random() < 0.12 else None
            if unseen is not None:
                words = asker.wording(unseen, rng)
                questions.append(Question(asker.prompt(words), [], None, []))
                continue
            noun, refs = nouns[slot], []
            box = tuple(boxes[slot].tolist())
            if nouns.count(noun) > 1 or rng.random() < 0.12:
                refs = [self._reference(boxes[slot], points[slot])]
            prompt = asker.prompt(asker.wording(asker.nouns[noun], rng))
            if self.boxes_only:
                questions.append(Question(prompt, refs, box, None))
                continue
            fed_box = self._missed(boxes[slot])
            path = outline_tokens(outlines[slot], fed_box, asker.ids)
            fed_path = outline_tokens(self._shaken(outlines[slot], boxes[slot]), fed_box, asker.ids)
            questions.append(Question(prompt, refs, box, path, fed_box, fed_path))
        return questions

    def _missed(self, box: np.ndarray) -> tuple[float, float, float, float]:
        """A box (cx, cy, w, h) as the model would say it: a little off, within the picture."""
        if self.rng.random() < 0.25:
            return tuple(box.tolist())
        size = box[2:]
        centre = box[:2] + self.rng.normal(0, 0.03, 2) * size
        size = size * np.exp(self.rng.normal(0, 0.05, 2))
        return (*np.clip(centre, 0, 1).tolist(), *np.clip(size, 0.01, 1).tolist())

    def _shaken(self, outline: np.ndarray, box: np.ndarray) -> np.ndarray:
        """An outline [24, 2] as the model would say it: too wide here, too narrow there.

        Fed with true vertices only, it learns to go on from the one before and not to look.
        """
        if self.rng.random() < 0.2:
            return outline
        turn = np.arange(len(outline)) * (2 * np.pi / len(outline))
        waves = self.rng.normal(0, 0.09, 3)[:, None] * np.cos(
            np.arange(1, 4)[:, None] * turn + self.rng.uniform(0, 2 * np.pi, 3)[:, None]
        )
        reach = 1 + self.rng.normal(0, 0.05) + waves.sum(0) + self.rng.normal(0, 0.04, len(turn))
        return box[:2] + (outline - box[:2]) * reach[:, None]

    def _reference(self, box: np.ndarray, points: np.ndarray) -> tuple[float, float, float, float]:
        """A point on the object, or its box a little off."""
        if self.rng.random() < 0.5:
            x, y = points[self.rng.integers(len(points))].tolist()
            return (x, y, 0.0, 0.0)
        cx, cy, w, h = box + self.rng.normal(0, 0.02, 4)
        low = np.clip([cx - w / 2, cy - h / 2], 0, 0.97)
        high = np.clip([cx + w / 2, cy + h / 2], low + 0.02, 1)
        return (*((low + high) / 2).tolist(), *(high - low).tolist())


def _covered(outline: np.ndarray) -> np.ndarray:
    """Polygon [24, 2] in 0..1 of the picture -> share of each cell within, float32 [81, 49]."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    # The middle of pixel 0 is at 0.5 of the picture's pixels and at 0 of OpenCV's.
    points = np.rint((outline * SIDE - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, shift=4)
    count = GRID * CELLS
    share = cv2.resize(mask, (count, count), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    by_patch = share.reshape(GRID, CELLS, GRID, CELLS).transpose(0, 2, 1, 3)
    return by_patch.reshape(GRID * GRID, CELLS * CELLS)
