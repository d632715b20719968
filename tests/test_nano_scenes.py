"""Training scenes: truth that is not where the object is, scenes that depend on who drew them.

The drawings here are the test's own, in archives laid out like the packages that training fetches.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kestrel.moondream.model import Moondream

TOOLS = Path(__file__).parents[1] / "tools"
STYLES, NOUNS = ("noto", "flat"), ("dog", "banana", "key", "house", "cactus")
INK = "#c03020"
SHAPES = {
    "dog": f'<circle cx="32" cy="32" r="28" fill="{INK}"/>',
    "banana": f'<ellipse cx="32" cy="32" rx="30" ry="14" fill="{INK}"/>',
    "key": f'<path d="M4 60L32 4L60 60Z" fill="{INK}"/>',
    "house": f'<rect x="8" y="14" width="48" height="36" fill="{INK}"/>',
    "cactus": f'<rect x="20" y="6" width="22" height="52" rx="9" fill="{INK}"/>',
    "spoon": f'<rect x="28" y="4" width="8" height="56" fill="{INK}"/>',
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The modules of ``tools``, over a cache with these drawings and nothing to download."""
    cache = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANO_ASSETS", str(cache))
        patch.syspath_prepend(str(TOOLS))
        import assets
        import grounds
        import nano_checkpoint
        import nano_questions
        import nano_start
        import nano_training
        import outlines
        import scene_store
        import scenes

        patch.setattr(assets, "CACHE", cache)
        (cache / "downloads").mkdir()
        icons = {"width": 64, "height": 64, "icons": {n: {"body": b} for n, b in SHAPES.items()}}
        content = json.dumps(icons).encode()
        for style, source in assets.SOURCES.items():
            if style == "stamps":
                continue
            name = source.package.lstrip("@").replace("/", "-")
            file = tarfile.TarInfo("package/icons.json")
            file.size = len(content)
            with tarfile.open(cache / f"downloads/{name}-{source.version}.tgz", "w:gz") as archive:
                archive.addfile(file, io.BytesIO(content))
        for package, below in (
            ("tuxpaint-stamps-default", "tuxpaint/stamps"),
            *((p, f"backgrounds/{p.split('-')[0]}") for p in assets.BACKGROUND_PACKAGES),
        ):
            (cache / "debian" / package / "usr/share" / below).mkdir(parents=True)
        scenes._packs.cache_clear()
        grounds.photos.cache_clear()
        yield {
            module.__name__: module
            for module in (
                *(assets, grounds, nano_checkpoint, nano_questions, nano_start, nano_training),
                *(outlines, scene_store, scenes),
            )
        }
        scenes._packs.cache_clear()
        grounds.photos.cache_clear()
        for name in list(sys.modules):
            if str(TOOLS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def generator(tools: dict[str, Any], **options: Any) -> Any:
    return tools["scenes"].SceneGenerator(
        "train", 3, styles=STYLES, nouns=NOUNS, photos=0.0, **options
    )


def test_a_number_is_one_scene_and_another_number_another(tools):
    first, again = (generator(tools).scene(5) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert [o.noun for o in first.objects] == [o.noun for o in again.objects]
    assert not np.array_equal(first.image, generator(tools).scene(6).image)


def test_masks_do_not_overlap_and_outlines_follow_them(tools):
    follow = []
    for index in range(30):
        scene = generator(tools).scene(index)
        height, width = scene.image.shape[:2]
        covered = np.zeros((height, width), int)
        for found in scene.objects:
            covered += found.mask
            points = tools["outlines"].outline(tools["outlines"].contour(found.mask))
            drawn = tools["outlines"].polygon_mask(points, height, width)
            follow.append((drawn & found.mask).sum() / (drawn | found.mask).sum())
        assert covered.max(initial=0) <= 1
    # Rays meet what hides a part of another object, too: that costs some.
    assert len(follow) > 30 and np.mean(follow) > 0.9


def test_a_scene_is_the_same_at_another_size(tools):
    seen = 0
    for index in range(12):
        described = generator(tools, clean=True).describe(index)
        small, large = (generator(tools).render(described, *s) for s in ((126, 126), (504, 378)))
        for a, b in zip(small.objects, large.objects, strict=True):
            assert a.noun == b.noun
            shrunk = cv2.resize(b.mask.astype(np.uint8) * 255, (126, 126), None, 0, 0, 3) > 127
            assert (a.mask & shrunk).sum() / (a.mask | shrunk).sum() > 0.9
            seen += 1
    assert seen > 12


def test_truth_is_where_the_ink_is(tools):
    described = generator(tools, clean=True, max_objects=1).describe(1)
    placement = next(p for p in described.placements if p.noun is not None)
    plain = type(placement)(**{**vars(placement), "colour": np.eye(4, dtype=np.float32)})
    alone = type(described)(**{**vars(described), "placements": [plain]})
    scene = generator(tools).render(alone, 300, 300)
    ink = np.abs(scene.image.astype(int) - [0xC0, 0x30, 0x20]).sum(2) < 12
    mask = scene.objects[0].mask
    inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert inner.any() and ink[inner].mean() > 0.99
    assert ink[~mask].mean() < 0.05


def test_a_store_teaches_a_step(tools, tmp_path):
    store = tools["scene_store"].build_store(tmp_path, count=8, seed=1, nouns=NOUNS, styles=STYLES)
    assert (store.nouns[:, 0] >= 0).all() and np.isfinite(store.outlines).all()
    tokenizer = tools["nano_checkpoint"].build_tokenizer(list(NOUNS))
    questions = tools["nano_questions"].SceneQuestions(tokenizer, NOUNS)
    maker = tools["nano_questions"].BatchMaker(
        store, questions, scenes=4, questions=2, boxes_only=False, seed=0
    )
    torch.manual_seed(0)
    model = Moondream(tools["nano_checkpoint"].nano_config(tokenizer))
    numbers = [tokenizer.token_to_id(str(value)) for value in range(961)]
    patches = tools["nano_start"].picture_patches(store.images, 14)
    tools["nano_start"].initialise(model, numbers, patches)
    losses = tools["nano_training"].Losses(model, questions.noun_ids, numbers)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = next(iter(maker))
    # What is fed errs as the model does, in its numbers only.
    fed, said = batch.tokens[..., 1:], batch.target[..., :-1]
    number = losses.level_of[said.clamp(min=0)] >= 0
    command = (said > 0) & ~number & (batch.kind[..., 1:] == 0)
    assert (fed[command] == said[command]).all() and command.any()
    assert 0.3 < (fed[number] != said[number]).float().mean() < 1
    totals = []
    for _ in range(4):
        total, parts = losses(batch)
        assert all(np.isfinite(part) for part in parts.values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
