"""Scenes to training questions: prompts, answers, patch labels, batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from nano_training import QUANTUM, Batch, Question, lay_out, outline_tokens
from nouns import NOUNS, SYNONYMS
from scenes import Scene, SceneGenerator, SceneObject, outline
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset

from kestrel.moondream.config import PromptConfig

VERTICES = 24
LENGTH = 68
"""Positions per question: prompt 5, spatial ref 3, coords and size 3, path 53, and spare."""
ARTICLES = ("", "", "", "", "a ", "the ")


class SceneQuestions:
    """Turns scenes into questions with the vocabulary of the shipped model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.nouns = list(NOUNS)
        self.index = {noun: i for i, noun in enumerate(self.nouns)}
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

    def answer(self, found: SceneObject) -> tuple[tuple[float, float, float, float], list[int]]:
        """Box (cx, cy, w, h) in 0..1 and path ids of an object of a scene."""
        height, width = found.mask.shape
        points = outline(found.mask, VERTICES) / [width, height]
        low, high = points.min(0), points.max(0)
        box = (*((low + high) / 2), *(high - low))
        return box, outline_tokens(points, box, self.ids)

    def ask(self, scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
        """Up to ``count`` questions: each present noun, ambiguous ones with a ref, absent ones."""
        present: dict[str, list[SceneObject]] = {}
        for found in scene.objects:
            present.setdefault(found.noun, []).append(found)
        candidates = list(scene.objects)
        rng.shuffle(candidates)
        questions: list[Question] = []
        for found in candidates[:count]:
            same = len(present[found.noun])
            box, path = self.answer(found)
            refs = []
            if same > 1 or rng.random() < 0.12:
                refs = [self.reference(found, box, rng)]
            questions.append(Question(self.prompt(self.wording(found.noun, rng)), refs, box, path))
        absent = [noun for noun in self.nouns if noun not in present]
        while not questions or (len(questions) < count and rng.random() < 0.5):
            noun = absent[rng.integers(len(absent))]
            questions.append(Question(self.prompt(self.wording(noun, rng)), [], None, []))
        if rng.random() < 0.2:
            noun = absent[rng.integers(len(absent))]
            question = Question(self.prompt(self.wording(noun, rng)), [], None, [])
            questions[rng.integers(len(questions))] = question
        return questions

    def reference(
        self,
        found: SceneObject,
        box: tuple[float, float, float, float],
        rng: np.random.Generator,
    ) -> tuple[float, float, float, float]:
        """A point on the object, or its box a little off."""
        if rng.random() < 0.5:
            rows, columns = np.nonzero(found.mask)
            pick = rng.integers(len(rows))
            height, width = found.mask.shape
            return ((columns[pick] + 0.5) / width, (rows[pick] + 0.5) / height, 0.0, 0.0)
        cx, cy, w, h = np.asarray(box) + rng.normal(0, 0.02, 4)
        low = np.clip([cx - w / 2, cy - h / 2], 0, 0.97)
        high = np.clip([cx + w / 2, cy + h / 2], low + 0.02, 1)
        return (*((low + high) / 2), *(high - low))

    def patch_labels(self, scene: Scene, grid: int = 9) -> tuple[np.ndarray, np.ndarray]:
        """Shares [grid², nouns + 1] and boxes [grid², 4] of ``Batch``, float32."""
        shares = np.zeros((grid * grid, len(self.nouns) + 1), np.float32)
        boxes = np.full((grid * grid, 4), np.nan, np.float32)
        row, column = np.mgrid[0:grid, 0:grid]
        centre = (np.stack([column.ravel(), row.ravel()], 1) + 0.5) / grid
        for found in scene.objects:
            height, width = found.mask.shape
            cells = found.mask.reshape(grid, height // grid, grid, width // grid).mean((1, 3))
            shares[:, self.index[found.noun]] += cells.ravel()
            rows, columns = np.nonzero(found.mask.any(1))[0], np.nonzero(found.mask.any(0))[0]
            low = np.array([columns[0] / width, rows[0] / height])
            high = np.array([(columns[-1] + 1) / width, (rows[-1] + 1) / height])
            mostly = cells.ravel() > 0.5
            boxes[mostly] = np.hstack([centre - low, high - centre])[mostly]
        shares[:, -1] = np.clip(1 - shares.sum(1), 0, 1)
        return shares / shares.sum(1, keepdims=True), boxes


class _Batches(IterableDataset):
    """Endless batches; without ``questions`` only what the vision tower learns from."""

    def __init__(self, asker: SceneQuestions, scenes: int, questions: int, seed: int) -> None:
        self.asker, self.scenes, self.questions, self.seed = asker, scenes, questions, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        number = worker.id if worker else 0
        generator = SceneGenerator("train", seed=self.seed * 16 + number)
        rng = np.random.default_rng((self.seed, number))
        prompt = self.asker.prompt_ids
        index = 0
        while True:
            images, asked, labels = [], [], []
            while len(images) < self.scenes:
                scene = generator.scene(index)
                index += 1
                if not scene.objects:
                    continue
                images.append(scene.image)
                labels.append(self.asker.patch_labels(scene))
                asked.append(self.asker.ask(scene, self.questions, rng) if self.questions else [])
            length = LENGTH if self.questions else 0
            arrays = lay_out(asked, length, prompt.coord_id, prompt.size_id, prompt.eos_id)
            yield Batch(
                torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
                *(torch.from_numpy(a) for a in arrays),
                *(torch.from_numpy(np.stack(column)) for column in zip(*labels, strict=True)),
            )


def question_batches(
    asker: SceneQuestions, *, scenes: int, questions: int, seed: int, workers: int
) -> Iterator[Batch]:
    """Endless training batches, made by ``workers`` processes."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    loader = DataLoader(
        _Batches(asker, scenes, questions, seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=6 if workers else None,
    )
    return iter(loader)
