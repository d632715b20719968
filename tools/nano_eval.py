"""Quick figures on held-out scenes while training: batched greedy decoding, coarse masks only."""

from __future__ import annotations

import numpy as np
import torch
from nano_questions import LENGTH, SceneQuestions
from nouns import CORE_STYLES
from outlines import polygon_mask
from scenes import SceneGenerator

from kestrel.moondream.model import Moondream

EVAL_SEED = 20_000


@torch.inference_mode()
def greedy(model: Moondream, image: torch.Tensor, prompts: list[list[int]], limit: int = LENGTH):
    """Answers for prompts without refs about images already embedded.

    ``image`` [N, patches, dim], one per prompt. Gives per prompt (box (cx, cy, w, h) or None,
    grid integers of the path).
    """
    special = model.config.prompt
    n = len(prompts)
    longest = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    bos = model.embed_tokens(torch.zeros(n, 1, dtype=torch.long))
    embeds = torch.cat([bos, image, model.embed_tokens(ids)], dim=1)
    lengths = torch.tensor([len(p) for p in prompts]) + 1 + image.shape[1]
    cache, slots = model.new_cache(n), torch.arange(n)
    hidden = model.prefill(embeds, lengths, 1 + image.shape[1], cache, slots)
    positions = lengths.clone()
    values: list[list[float]] = [[] for _ in range(n)]
    texts: list[list[int]] = [[] for _ in range(n)]
    done = absent = torch.zeros(n, dtype=torch.bool)
    for step in range(limit):
        logits = model.logits(hidden)
        if step == 0:
            absent = logits[:, special.eos_id] > logits[:, special.coord_id]
            done = absent.clone()
        if step < 2:
            value = model.region.coord_value(model.coord_logits(hidden).argmax(-1))
            embeds = model.encode_coord(value)
            for row, v in enumerate(value.tolist()):
                values[row].append(v)
        elif step == 2:
            size = model.region.size_value(model.size_logits(hidden).argmax(-1))
            embeds = model.encode_size(size)
            for row, pair in enumerate(size.tolist()):
                values[row] += pair
        else:
            token = logits.argmax(-1)
            done |= token == special.eos_id
            for row in torch.nonzero(~done).flatten().tolist():
                texts[row].append(int(token[row]))
            embeds = model.embed_tokens(token)
        if bool(done.all()):
            break
        hidden = model.decode(embeds, positions, cache, slots)
        positions += 1
    boxes = [None if none else v for v, none in zip(values, absent.tolist(), strict=True)]
    return list(zip(boxes, texts, strict=True))


def path_points(model: Moondream, box: list[float], path: list[int]) -> np.ndarray:
    """Vertices [n, 2] in 0..1 of the image from path ids."""
    text = [model.tokenizer.decode_path_token(t) for t in path]
    numbers = [int(t) for t in text if t.isdigit()]
    grid = np.asarray(numbers[: len(numbers) // 2 * 2], float).reshape(-1, 2) / 960
    cx, cy, w, h = box
    return grid * [w, h] + [cx - w / 2, cy - h / 2]


def evaluate(
    model: Moondream, asker: SceneQuestions, scenes: int, boxes_only: bool = False
) -> dict[str, float]:
    """Mean coarse IoU, box IoU, share over 0.5, and share of absent nouns answered with nothing."""
    from kestrel.moondream.tokens import SegmentTokenizer

    model.eval()
    model.tokenizer = SegmentTokenizer(asker.tokenizer, model.config.prompt)
    generator = SceneGenerator(
        "eval", EVAL_SEED, styles=CORE_STYLES, nouns=asker.nouns, size=(336, 336)
    )
    rng = np.random.default_rng(EVAL_SEED)
    cases, embeddings = [], []
    for index in range(scenes):
        scene = generator.scene(index)
        with torch.inference_mode():
            embedding = model.encode_image(scene.image)
        nouns = [o.noun for o in scene.objects]
        for found in [o for o in scene.objects if nouns.count(o.noun) == 1][:2]:
            cases.append((found.noun, found.mask))
            embeddings.append(embedding)
        unseen = asker.absent(set(nouns), rng)
        if unseen is not None:
            cases.append((unseen, None))
            embeddings.append(embedding)
    ious, boxes, silent = [], [], []
    for start in range(0, len(cases), 64):
        group = cases[start : start + 64]
        image = torch.stack(embeddings[start : start + 64])
        prompts = [asker.prompt(noun) for noun, _ in group]
        answers = greedy(model, image, prompts, limit=4 if boxes_only else LENGTH)
        for (_, truth), (box, path) in zip(group, answers, strict=True):
            if truth is None:
                silent.append(box is None)
                continue
            if box is None:
                ious.append(0.0)
                boxes.append(0.0)
                continue
            height, width = truth.shape
            points = path_points(model, box, path) * [width, height]
            mask = polygon_mask(points, height, width) if len(points) > 2 else truth & False
            ious.append(float((mask & truth).sum() / max(1, (mask | truth).sum())))
            rows, columns = np.nonzero(truth)
            boxes.append(
                _box_iou(
                    (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1),
                    box,
                    width,
                    height,
                )
            )
    model.train()
    return {
        "iou": float(np.mean(ious)),
        "box_iou": float(np.mean(boxes)),
        "right": float(np.mean(np.asarray(ious) > 0.5)),
        "absent": float(np.mean(silent)),
    }


def _box_iou(truth, box, width: int, height: int) -> float:
    cx, cy, w, h = np.asarray(box) * [width, height, width, height]
    mine = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    inner_w = min(truth[2], mine[2]) - max(truth[0], mine[0])
    inner_h = min(truth[3], mine[3]) - max(truth[1], mine[1])
    inner = max(0.0, inner_w) * max(0.0, inner_h)
    total = w * h + (truth[2] - truth[0]) * (truth[3] - truth[1]) - inner
    return float(inner / total)
