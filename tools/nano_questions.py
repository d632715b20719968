"""Stored scenes to training questions: prompts, answers, patch labels, batches.

All of a batch is made at once, by the device that trains on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from nano_looks import MARKS, looks, patch_marks, patch_offsets, patch_places
from nano_training import IGNORE, LEVELS, QUANTUM, Batch
from scene_store import CELLS, GRID, OBJECTS, STARTS, VERTICES, Scenes
from tokenizers import Tokenizer
from torch import Tensor
from words import KINDS, SYNONYMS

from kestrel.moondream.config import PromptConfig

ABSENT = 0.12
"""Share of the questions that ask for a noun that is not there."""
REFERRED = 0.12
"""Share of the others that point to the object although no other has its noun."""
OTHERWISE = 0.3
"""Share of the questions that use another word for the noun."""
ARTICLES = {"": 4, "a ": 1, "the ": 1}
"""What stands before the word, and how often."""
LEAST_SHARE = 8
"""An object that covers less of a patch, in 255ths, does not shape it."""
KEPT = 0.9
"""Of what a vertex is ahead or behind along the contour, how much the next is to be."""
CELL_SAMPLES = 2
"""Points per side of a cell that are tried against an outline."""
PATH = 2 * VERTICES + 3
"""Tokens of a path: the numbers, M, L and Z."""
LENGTH = 80
"""Positions per question: prompt 6, spatial ref 3, coords and size 3, path 67, and spare."""
BOX_LENGTH = 12
"""Positions per question when only the box is asked for."""


class SceneQuestions:
    """The vocabulary of the shipped model as questions use it."""

    def __init__(self, tokenizer: Tokenizer, nouns: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.nouns = list(nouns)
        self.noun_ids = [tokenizer.token_to_id(noun) for noun in self.nouns]
        self.command_ids = [tokenizer.token_to_id(command) for command in "MLZ"]
        self.level_ids = [tokenizer.token_to_id(str(v * QUANTUM)) for v in range(LEVELS)]
        self.prompt_ids = PromptConfig(segment_prefix=(1, tokenizer.token_to_id("<|segment|>"), 2))

    def prompt(self, words: str) -> list[int]:
        prompt = self.prompt_ids
        return [*prompt.segment_prefix, *self.word_ids(words), prompt.answer_id]

    def word_ids(self, words: str) -> list[int]:
        return self.tokenizer.encode(words, add_special_tokens=False).ids

    def wordings(self, noun: str) -> list[tuple[list[int], float]]:
        """The noun as somebody would type it, as ids, and how often: mostly itself, sometimes a
        synonym or a plural."""
        others = SYNONYMS.get(noun, ())
        words = {noun: 1 - OTHERWISE if others else 1.0}
        words |= {other: OTHERWISE / len(others) for other in others}
        return [
            (self.word_ids(article + word), often * share)
            for (article, often), (word, share) in itertools.product(
                ARTICLES.items(), words.items()
            )
        ]

    def kinds(self, noun: str) -> set[str]:
        """The noun and what it is a kind of: not to be called absent where it is seen."""
        return {noun, *KINDS.get(noun, ())}

    def absent(self, present: set[str], rng: np.random.Generator) -> str | None:
        """A noun that is not to be seen, not even as the kind of something seen; None without."""
        seen = set().union(*map(self.kinds, present))
        unseen = [noun for noun in self.nouns if noun not in seen]
        return unseen[rng.integers(len(unseen))] if unseen else None


@dataclass
class _Asked:
    """What each question is about: all [B, Q, ...]."""

    noun: Tensor
    """int64, index of the noun asked for."""
    present: Tensor
    """bool, whether it is there."""
    refs: Tensor
    """int64: 0 without a spatial reference, 2 with a point, 3 with a box."""
    ref: Tensor
    """float [.., 4]: the reference's (x, y, w, h)."""
    box: Tensor
    """float [.., 4]: (cx, cy, w, h) of the answer."""
    outline: Tensor
    """float [.., 32, 2]: the answer's vertices in 0..1 of the image."""
    fed: Tensor
    """float [.., 32, 2]: those that are fed in their place."""
    share: Tensor
    """float [.., 576]: how much of each patch shows the answer."""


class BatchMaker:
    """Endless training batches of the scenes that there are.

    ``scenes`` per batch, ``questions`` per scene; 0 gives images and patch labels alone,
    ``boxes_only`` leaves the paths out of the answers. ``rows`` limits which scenes are drawn from.
    """

    def __init__(
        self,
        store: Scenes,
        asker: SceneQuestions,
        *,
        scenes: int,
        questions: int,
        boxes_only: bool,
        seed: int,
        device: torch.device | str = "cpu",
        rows: int | None = None,
    ) -> None:
        if store.names != asker.nouns:
            raise ValueError("the store holds other nouns than the questions")
        self.store, self.asker, self.rows = store, asker, rows
        self.scenes, self.questions, self.boxes_only = scenes, questions, boxes_only
        self.device = torch.device(device)
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.length = BOX_LENGTH if boxes_only else LENGTH
        wordings = [asker.wordings(noun) for noun in asker.nouns]
        most, longest = max(map(len, wordings)), max(len(ids) for w in wordings for ids, _ in w)
        words = torch.zeros(len(wordings), most, longest, dtype=torch.long)
        lengths = torch.zeros(len(wordings), most, dtype=torch.long)
        often = torch.zeros(len(wordings), most)
        for row, said in enumerate(wordings):
            for column, (ids, share) in enumerate(said):
                words[row, column, : len(ids)] = torch.tensor(ids)
                lengths[row, column], often[row, column] = len(ids), share
        # Prompt, ref, words, answer, then all of the answer that is fed.
        if 3 + 3 + longest + 1 + 3 + (0 if boxes_only else PATH) > self.length:
            raise ValueError(f"a noun of {longest} tokens does not fit a question")
        self.words, self.word_lengths, self.often = (t.to(device) for t in (words, lengths, often))
        kinds = [[other in asker.kinds(noun) for other in asker.nouns] for noun in asker.nouns]
        self.kinds = torch.tensor(kinds, dtype=torch.float32, device=device)
        self.level_ids = torch.tensor(asker.level_ids, device=device)
        self.prefix = torch.tensor(asker.prompt_ids.segment_prefix, device=device)
        self.samples = _cell_samples().to(device)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            count = len(self.store) if self.rows is None else self.rows
            yield self.batch(
                torch.randint(count, (self.scenes,), generator=self.random, device=self.device)
            )

    def batch(self, rows: Tensor) -> Batch:
        """The scenes of these numbers, int64 [B], half of them seen in a mirror."""
        found = self.store.take(rows)
        flip = self._chance(len(rows)) < 0.5
        images = torch.where(_over(flip, 4), found["images"].flip(2), found["images"])
        shares = found["shares"].unflatten(-1, (GRID, GRID))
        shares = torch.where(_over(flip, 4), shares.flip(-1), shares).flatten(2)
        boxes, points, outlines = found["boxes"], found["points"], found["outlines"]
        mirror = (
            torch.tensor([-1.0, 1.0], device=self.device),
            torch.tensor([1.0, 0.0], device=self.device),
        )
        boxes = torch.where(
            _over(flip, 3), torch.cat([1 - boxes[..., :1], boxes[..., 1:]], -1), boxes
        )
        points = torch.where(_over(flip, 4), points * mirror[0] + mirror[1], points)
        # Clockwise stays clockwise, and the first vertex is still the one on the middle line.
        turned = outlines.flip(2).roll(1, dims=2) * mirror[0] + mirror[1]
        outlines = torch.where(_over(flip, 4), turned, outlines)
        nouns = found["nouns"].long()
        labels = self._patch_labels(nouns, shares, boxes, outlines[:, :, ::STARTS])
        images = self._recoloured(images).permute(0, 3, 1, 2).contiguous()
        if self.questions:
            asked = self._ask(nouns, boxes, outlines, points, shares)
            laid = (*self._lay_out(asked), looks(asked.box, asked.outline, asked.share))
        else:
            laid = self._nothing_asked(len(rows))
        return Batch(images, *laid, *labels)

    def _chance(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device)

    def _recoloured(self, images: Tensor) -> Tensor:
        """Half of the pictures under another light: each channel's gain and curve a little off."""
        count = len(images)
        curve = (self._normal(count, 1) * 0.15 + self._normal(count, 3) * 0.07).exp()
        gain = (self._normal(count, 1) * 0.1 + self._normal(count, 3) * 0.07).exp()
        curve, gain = (t[:, None, None] for t in (curve, gain))
        other = (255 * gain * (images / 255) ** curve).clamp(0, 255).to(torch.uint8)
        return torch.where(_over(self._chance(count) < 0.5, 4), images, other)

    def _patch_labels(
        self, nouns: Tensor, shares: Tensor, boxes: Tensor, outlines: Tensor
    ) -> tuple[Tensor, ...]:
        """Shares [B, 576, nouns + 1], boxes [B, 576, 4], cells [B, 576, 49], marks [B, 576, 36],
        offsets [B, 576, 32, 2] and places [B, 576, 2] of ``Batch``, float32."""
        count = len(self.asker.nouns)
        there = nouns >= 0
        part = shares / 255.0 * there[..., None]
        column = nouns.where(there, count)[..., None].expand_as(part)
        shown = torch.zeros(len(nouns), count + 1, part.shape[-1], device=self.device)
        shown = shown.scatter_add_(1, column, part).transpose(1, 2)
        shown[..., -1] = (1 - shown[..., :-1].sum(-1)).clamp(0, 1)
        shown = shown / shown.sum(-1, keepdim=True)
        most, slot = part.max(1)
        its_box, its_outline = _rows(boxes, slot), _rows(outlines.flatten(2), slot)
        of_object = its_box.where(most[..., None] > 0.5, torch.nan)
        its_outline = its_outline.unflatten(-1, (-1, 2))
        covered = covered_cells(its_outline, self.samples)
        cells = covered.where(most[..., None] >= LEAST_SHARE / 255, torch.nan)
        marks, places = patch_marks(its_box, its_outline), patch_places(its_box)
        return shown, of_object, cells, marks, patch_offsets(its_outline), places

    def _ask(
        self, nouns: Tensor, boxes: Tensor, outlines: Tensor, points: Tensor, shares: Tensor
    ) -> _Asked:
        """Present nouns by turns, ambiguous ones with a ref, some absent ones."""
        b, q = len(nouns), self.questions
        there = nouns >= 0
        order = self._chance(b, OBJECTS).masked_fill(~there, 2.0).argsort(1)
        turn = torch.arange(q, device=self.device) % there.sum(1, keepdim=True).clamp(min=1)
        slot = order.gather(1, turn)
        noun, box, outline = (
            nouns.gather(1, slot),
            _rows(boxes, slot),
            _rows(outlines.flatten(2), slot),
        )
        kinds = F.one_hot(nouns.clamp(min=0), len(self.kinds)).float() * there[..., None]
        unseen = (kinds.sum(1) @ self.kinds == 0).float()
        possible = unseen.sum(1, keepdim=True) > 0
        drawn = torch.multinomial(unseen + ~possible, q, replacement=True, generator=self.random)
        present = ~((self._chance(b, q) < ABSENT) & possible)
        twice = (noun[..., None] == nouns[:, None]).sum(-1) > 1
        refers = present & (twice | (self._chance(b, q) < REFERRED))
        by_point = self._chance(b, q) < 0.5
        pick = torch.randint(points.shape[2], (b, q, 1), generator=self.random, device=self.device)
        point = _rows(points.flatten(2), slot).unflatten(-1, (-1, 2))
        point = point.gather(2, pick[..., None].expand(-1, -1, -1, 2))[:, :, 0]
        near = box + self._normal(b, q, 4) * 0.02
        low = (near[..., :2] - near[..., 2:] / 2).clamp(0, 0.97)
        high = (near[..., :2] + near[..., 2:] / 2).maximum(low + 0.02).clamp(max=1)
        by_box = torch.cat([(low + high) / 2, high - low], -1)
        ref = torch.where(by_point[..., None], F.pad(point, (0, 2)), by_box)
        wanted, fed = self._going_on(outline.unflatten(-1, (-1, 2)), box)
        return _Asked(
            noun.where(present, drawn),
            present,
            torch.where(by_point, 2, 3) * refers,
            ref,
            box,
            wanted,
            fed,
            _rows(shares, slot) / 255,
        )

    def _lay_out(self, asked: _Asked) -> tuple[Tensor, ...]:
        """tokens, kind, value, target and target_value of ``Batch``."""
        special = self.asker.prompt_ids
        b, q = asked.noun.shape
        said = torch.multinomial(self.often[asked.noun.flatten()], 1, generator=self.random).view(
            b, q
        )
        words, count = self.words[asked.noun, said], self.word_lengths[asked.noun, said]
        refs = asked.refs
        pointer = torch.tensor([special.coord_id] * 2 + [special.size_id], device=self.device)
        fed_box = asked.box if self.boxes_only else self._missed(asked.box)
        true, fed = [pointer.expand(b, q, 3)], [pointer.expand(b, q, 3)]
        if not self.boxes_only:
            true += [self._path(asked.outline, fed_box)]
            fed += [self._path(asked.fed, fed_box)]
        ends = asked.noun.new_full((b, q, 1), special.eos_id)
        true_ids, fed_ids = torch.cat([*true, ends], -1), torch.cat(fed, -1)
        length = fed_ids.shape[-1]
        # Token after token: prefix, reference, words, the token that asks, the answer.
        place = torch.arange(self.length, device=self.device).expand(b, q, -1)
        start, after, asks = 3, 3 + refs[..., None], (3 + refs + count)[..., None]
        step = place - asks - 1
        answering = (step >= 0) & (step < length) & asked.present[..., None]
        tokens = torch.zeros_like(place)
        tokens = torch.where(place < start, _pick(self.prefix.expand(b, q, 3), place), tokens)
        referring = (place >= start) & (place < after)
        tokens = torch.where(referring, _pick(pointer.expand(b, q, 3), place - start), tokens)
        naming = (place >= after) & (place < asks)
        tokens = torch.where(naming, _pick(words, place - after), tokens)
        tokens = torch.where(place == asks, special.answer_id, tokens)
        tokens = torch.where(answering, _pick(fed_ids, step), tokens)
        numbers = referring | (answering & (step < 3))
        kind = (numbers & (tokens == special.coord_id)).to(torch.uint8)
        kind += 2 * (numbers & (tokens == special.size_id)).to(torch.uint8)
        value = (
            torch.where(
                referring[..., None],
                _pick_pair(_spelt(asked.ref), place - start),
                _pick_pair(_spelt(fed_box), step),
            )
            * (kind > 0)[..., None]
        )
        # Each position is to give what comes after it: the one that asks gives the first.
        wanted = step + 1
        last = torch.where(asked.present, 3 if self.boxes_only else length + 1, 1)[..., None]
        told = (wanted >= 0) & (wanted < last)
        target = _pick(true_ids, wanted).where(asked.present[..., None], special.eos_id)
        target_value = _pick_pair(_spelt(asked.box), wanted)
        told_box = told & asked.present[..., None] & (wanted < 3)
        return (
            tokens,
            kind,
            value,
            target.where(told, IGNORE),
            target_value * told_box[..., None],
        )

    def _nothing_asked(self, scenes: int) -> tuple[Tensor, ...]:
        none = torch.zeros(scenes, 0, 0, dtype=torch.long, device=self.device)
        pair = torch.zeros(scenes, 0, 0, 2, device=self.device)
        nowhere = torch.zeros(scenes, 0, MARKS, GRID * GRID, device=self.device)
        return none, none.to(torch.uint8), pair, none, pair, nowhere

    def _path(self, outline: Tensor, box: Tensor) -> Tensor:
        """Polygons [B, Q, 32, 2] in 0..1 of the image and boxes [B, Q, 4] -> ids [B, Q, 67]."""
        centre, size = box[..., None, :2], box[..., None, 2:]
        relative = (outline - centre + size / 2) / size.clamp(min=1e-6)
        return path_ids(relative, self.level_ids, self.asker.command_ids)

    def _missed(self, box: Tensor) -> Tensor:
        """Boxes (cx, cy, w, h) as the model would say them: a little off, within the picture."""
        centre, size = box[..., :2], box[..., 2:]
        off = torch.cat(
            [
                (centre + self._normal(*centre.shape) * 0.025 * size).clamp(0, 1),
                (size * (self._normal(*size.shape) * 0.045).exp()).clamp(0.01, 1),
            ],
            dim=-1,
        )
        return torch.where(self._chance(*box.shape[:-1], 1) < 0.25, box, off)

    def _going_on(self, outline: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        """Outlines of ``STARTS`` polygons [B, Q, 128, 2] -> the vertices that are wanted and those
        that are fed, [B, Q, 32, 2] each.

        What is fed errs as the model does: ahead or behind along the contour, mostly near it, some
        vertices far off it. From there one step further is wanted, and slowly back to where the
        vertices of the outline are: the length of what is still to come is hard to see, the next
        stretch of the edge is not. Fed with true vertices only, it learns to go on from the one
        before and not to look.
        """
        b, q, points, _ = outline.shape
        n = points // STARTS
        moved = self._chance(b, q, 1) >= 0.1
        slips = self._normal(b, q, n) * 0.12 * (self._normal(b, q, n) * 0.6).exp()
        slips[..., 0] = self._normal(b, q) * 0.3
        slips = (slips * moved).clamp(-1.0, 1.0)
        wanted, fed = [], []
        ahead = slips.new_zeros(b, q)
        for k in range(n):
            wanted.append(ahead * KEPT)
            ahead = wanted[-1] + slips[..., k]
            fed.append(ahead)
        places = torch.arange(n, device=self.device).repeat(2) + torch.stack([*wanted, *fed], -1)
        wanted, fed = _along(outline, places).split(n, 2)
        centre, size = box[..., None, :2], box[..., None, 2:]
        reach = 1 + self._normal(b, q, 1) * 0.02
        astray = (self._normal(b, q, n, 1) * 0.8).exp()
        off = self._normal(b, q, n, 2) * 0.013 * astray
        wrong = centre + (fed - centre) * reach[..., None] + off * size
        return wanted, torch.where(moved[..., None], wrong, fed)


def _along(outline: Tensor, places: Tensor) -> Tensor:
    """Where outlines of ``STARTS`` polygons [B, Q, 128, 2] are at ``places`` [B, Q, m], in steps
    from their first vertices: [B, Q, m, 2]."""
    at = (places * STARTS)[..., None].expand(*places.shape, 2)
    low = at.floor()
    before, after = (outline.gather(2, (low + end).long() % outline.shape[2]) for end in (0, 1))
    return before.lerp(after, at - low)


def path_ids(shape: Tensor, level_ids: Tensor, commands: Sequence[int]) -> Tensor:
    """Polygons [..., 32, 2] in 0..1 of their box -> ids [..., 67], ``commands`` for M, L and Z."""
    levels = (shape * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long()
    numbers = level_ids[levels].flatten(-2)
    move, line, close = (numbers.new_full((*numbers.shape[:-1], 1), i) for i in commands)
    return torch.cat([move, numbers[..., :2], line, numbers[..., 2:], close], -1)


def _over(flags: Tensor, dims: int) -> Tensor:
    """[B] -> [B, 1, ...] of that many dimensions."""
    return flags.view(-1, *[1] * (dims - 1))


def _rows(values: Tensor, slot: Tensor) -> Tensor:
    """Of values [B, objects, n] the objects of these numbers, [B, m] -> [B, m, n]."""
    return values.gather(1, slot[..., None].expand(-1, -1, values.shape[-1]))


def _pick(values: Tensor, place: Tensor) -> Tensor:
    """Values [B, Q, n] at places [B, Q, S]; places outside give one of them."""
    return values.gather(2, place.clamp(0, values.shape[2] - 1))


def _pick_pair(values: Tensor, place: Tensor) -> Tensor:
    """Pairs [B, Q, n, 2] at places [B, Q, S] -> [B, Q, S, 2]."""
    place = place.clamp(0, values.shape[2] - 1)[..., None].expand(-1, -1, -1, 2)
    return values.gather(2, place)


def _spelt(box: Tensor) -> Tensor:
    """Boxes [B, Q, 4] as three values are fed: (x, 0), (y, 0), (w, h): [B, Q, 3, 2]."""
    x, y, size = box[..., :1], box[..., 1:2], box[..., 2:]
    return torch.stack([F.pad(x, (0, 1)), F.pad(y, (0, 1)), size], dim=2)


def _cell_samples() -> Tensor:
    """Points of each patch's cells in 0..1 of the picture, float32 [576, 49 · samples, 2]."""
    fine = CELLS * CELL_SAMPLES
    steps = (torch.arange(GRID * fine) + 0.5) / (GRID * fine)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = torch.stack([x, y], -1).view(GRID, CELLS, CELL_SAMPLES, GRID, CELLS, CELL_SAMPLES, 2)
    return points.permute(0, 3, 1, 4, 2, 5, 6).reshape(GRID * GRID, -1, 2)


def covered_cells(polygons: Tensor, samples: Tensor) -> Tensor:
    """Each patch's polygon [B, 576, n, 2] -> the share of its cells within, float32 [B, 576, 49].

    ``samples`` of :func:`_cell_samples`. A point is within where a ray from it to the right crosses
    the polygon an odd number of times.
    """
    x, y = samples.unbind(-1)
    within = torch.zeros(polygons.shape[:2] + x.shape[1:], dtype=torch.bool, device=x.device)
    ends = polygons.roll(-1, dims=2)
    for (x1, y1), (x2, y2) in zip(
        (polygons[:, :, k, :, None].unbind(2) for k in range(polygons.shape[2])),
        (ends[:, :, k, :, None].unbind(2) for k in range(polygons.shape[2])),
        strict=True,
    ):
        slope = (x2 - x1) / torch.where(y2 == y1, 1.0, y2 - y1)
        within ^= ((y1 > y) != (y2 > y)) & (x < slope * (y - y1) + x1)
    return within.view(*within.shape[:2], CELLS * CELLS, -1).float().mean(-1)
