"""Training scenes: truth that is not where the object is, scenes that depend on who drew them.

The drawings here are the test's own, in archives laid out like the packages that training fetches.
"""

from __future__ import annotations

import io
import json
import os
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
GRID, CELLS = 24, 7
"""Patches along a picture's side, and cells along a patch's."""
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
        import nano_looks
        import nano_questions
        import nano_start
        import nano_training
        import outlines
        import scene_store
        import scenes
        import words

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
                *(assets, grounds, nano_checkpoint, nano_looks, nano_questions, nano_start),
                *(nano_training, outlines, scene_store, scenes, words),
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


def test_a_package_that_could_not_be_fetched_is_asked_for_again(tools, monkeypatch, tmp_path):
    assets = tools["assets"]
    shared = {"tuxpaint-stamps-default": "tuxpaint/stamps"}
    shared |= {p: f"backgrounds/{p.split('-')[0]}" for p in assets.BACKGROUND_PACKAGES}
    if any(Path("/usr/share", below).exists() for below in shared.values()):
        pytest.skip("these packages are installed here")
    monkeypatch.setattr(assets, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get there
    assert assets.Pack("stamps", set()).sprites == assets.backgrounds() == []
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 4), np.uint8)
    pixels[..., 3] = 255
    for package, below in shared.items():
        folder = tmp_path / "debian" / package / "usr/share" / below
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "apple.png"), pixels)
    assert [sprite["name"] for sprite in assets.Pack("stamps", set()).sprites] == ["apple"]
    assert len(assets.backgrounds()) == len(assets.BACKGROUND_PACKAGES)


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


def test_an_outline_along_the_contour_goes_into_every_bay_from_the_top_of_the_middle(tools):
    """Legs, a bay that hides the middle of the box, and a ring cut open: none is star-shaped."""
    outlines = tools["outlines"]
    legs = np.zeros((120, 150), np.uint8)
    legs[20:60, 20:130] = 1
    for left in (20, 50, 80, 115):
        legs[60:110, left : left + 15] = 1
    bay = cv2.ellipse(np.zeros((120, 150), np.uint8), (75, 60), (50, 50), 0, 40, 320, 1, 16)
    for mask in (legs, bay):
        mask = mask.astype(bool)
        points = outlines.outline_along(outlines.contour(mask))
        drawn = outlines.polygon_mask(points, *mask.shape)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
        rows, columns = np.nonzero(mask)
        middle = (columns.min() + columns.max() + 1) / 2
        top = rows[columns == int(middle)].min()
        assert np.abs(points[0] - [middle, top]).max() < 3
        x, y = points.T
        assert np.dot(x, np.roll(y, -1)) > np.dot(y, np.roll(x, -1))  # clockwise, y down
        # Seen in a mirror, the vertices are the same in the other order.
        mirrored = outlines.outline_along(outlines.contour(mask[:, ::-1]))
        back = np.roll(mirrored[::-1], 1, axis=0)
        assert np.abs([mask.shape[1], 0] - back * [1, -1] - points).max() < 2
        # The first of several polygons is that one; the others begin further on, and the last
        # just before the first one's second vertex.
        several = outlines.outline_along(outlines.contour(mask), 32, 4).reshape(32, 4, 2)
        assert np.array_equal(several[:, 0], points)
        ways = np.linalg.norm(several[0] - points[0], axis=1)
        assert (np.diff(ways) > 0).all()
        assert np.linalg.norm(several[0, 3] - points[1]) < ways[1] * 1.5
        for start in range(4):
            drawn = outlines.polygon_mask(several[:, start], *mask.shape)
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9


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


@pytest.fixture(scope="module")
def made(tools, tmp_path_factory) -> tuple[Any, Any]:
    """Scenes of a store, and the questions of a vocabulary."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        # One process draws so few; others would load all that it needs, and end.
        for counts in ("cpu_count", "process_cpu_count"):
            patch.setattr(os, counts, lambda: 1, raising=False)
        store = tools["scene_store"].build_store(
            folder, count=8, seed=1, nouns=NOUNS, styles=STYLES
        )
    tokenizer = tools["nano_checkpoint"].build_tokenizer(tools["words"].vocabulary_words())
    return store, tools["nano_questions"].SceneQuestions(tokenizer, NOUNS)


def maker_of(tools: dict[str, Any], made: tuple[Any, Any], **options: Any) -> Any:
    asked = {"scenes": 4, "questions": 2, "boxes_only": False, "seed": 0} | options
    return tools["nano_questions"].BatchMaker(*made, **asked)


def test_a_question_is_what_the_engine_asks_and_what_it_is_to_answer(tools, made):
    _, asker = made
    words = asker.tokenizer
    batch = maker_of(tools, made, scenes=64, questions=3).batch(torch.arange(64) % 8)
    ignore, special = tools["nano_training"].IGNORE, asker.prompt_ids
    path, kinds = 2 * 32 + 3, set()
    for tokens, kind, target in zip(
        *(t.flatten(0, 1).tolist() for t in (batch.tokens, batch.kind, batch.target)), strict=True
    ):
        asks = tokens.index(special.answer_id)
        refs = [k for k in kind[:asks] if k]
        assert refs in ([], [1, 1], [1, 1, 2]) and kind[3 : 3 + len(refs)] == refs
        said = words.decode(tokens[3 + len(refs) : asks])
        plain = tokens[:3] + tokens[3 + len(refs) : asks + 1]
        assert plain == asker.prompt(said)
        told = target[asks:]
        assert set(target[:asks]) == {ignore}
        if told[0] == special.eos_id:
            kinds.add("absent")
            assert set(told[1:]) == {ignore} and not any(kind[asks:])
            continue
        kinds.add((len(refs), said.split()[-1]))
        answer = told[: told.index(special.eos_id)]
        assert answer[:3] == [special.coord_id] * 2 + [special.size_id] and len(answer) == 3 + path
        assert set(told[len(answer) + 1 :]) == {ignore}
        # It is fed what it is to say, but for numbers, which err as its own do.
        fed = tokens[asks + 1 : asks + 1 + len(answer)]
        spelt = [words.id_to_token(i) for i in answer[3:]]
        assert [spelt[0], spelt[3], spelt[-1]] == ["M", "L", "Z"]
        assert all(a == b for a, b in zip(fed, answer, strict=True) if b not in asker.level_ids)
        assert kind[asks + 1 : asks + 4] == [1, 1, 2] and not any(kind[asks + 4 :])
    assert "absent" in kinds
    told, words = (set(column) for column in zip(*kinds - {"absent"}, strict=True))
    assert told == {0, 2, 3} and words & set(NOUNS) and words - set(NOUNS)


def test_from_a_vertex_that_is_ahead_the_next_is_wanted_ahead_and_a_little_less(tools, made):
    questions = tools["nano_questions"]
    maker = maker_of(tools, made, questions=3)
    # A circle, where being ahead is an angle; each polygon of it has 32 vertices.
    turn = torch.arange(4 * 32) * (2 * torch.pi / (4 * 32))
    circle = torch.stack([0.5 + 0.4 * turn.sin(), 0.5 - 0.4 * turn.cos()], 1)
    box = torch.tensor([0.5, 0.5, 0.8, 0.8])
    wanted, fed = maker._going_on(circle.expand(40, 3, -1, -1), box.expand(40, 3, -1))

    def ahead(points):
        at = torch.atan2(points[..., 0] - 0.5, 0.5 - points[..., 1]) / (2 * torch.pi / 32)
        return (at - torch.arange(32) + 16) % 32 - 16

    assert ((wanted - 0.5).norm(dim=-1) - 0.4).abs().max() < 1e-3
    assert ahead(wanted)[..., 0].abs().max() < 1e-3
    # What is fed is also off the contour, which moves it along a little where it is far off.
    off = ahead(wanted)[..., 1:] - questions.KEPT * ahead(fed)[..., :-1]
    assert off.abs().median() < 0.1 and ahead(wanted).std() > 0.15
    exact = (fed - wanted).abs().amax((2, 3)) < 1e-6
    assert 0 < exact.float().mean() < 0.25 and ahead(wanted)[exact].abs().max() < 1e-3
    near = ((fed - 0.5).norm(dim=-1) - 0.4).abs()
    assert 0.002 < near.median() < 0.02


def test_labels_are_those_of_the_scene_or_of_its_mirror_image(tools, made):
    store, _ = made
    grid, maker = tools["scene_store"].GRID, maker_of(tools, made, questions=0)
    plain = {name: array[:8] for name, array in store.arrays.items()}
    seen = set()
    for _ in range(4):
        batch = maker.batch(torch.arange(8))
        for row in range(8):
            shown = batch.patches[row, :, :-1].sum(1).view(grid, grid)
            truth = plain["shares"][row].float().sum(0).view(grid, grid) / 255
            flipped = not torch.allclose(shown, truth.clamp(max=1), atol=0.02)
            if flipped:
                assert torch.allclose(shown, truth.flip(1).clamp(max=1), atol=0.02)
            seen.add(flipped)
            covered = batch.cells[row].nan_to_num(0).mean(1).view(grid, grid)
            # The outlines follow what is seen, so their cells do.
            both = torch.minimum(covered, shown).sum() / torch.maximum(covered, shown).sum()
            assert both > 0.7
            boxes = batch.boxes[row][~batch.boxes[row, :, 0].isnan()]
            mine = plain["boxes"][row][plain["nouns"][row] >= 0]
            if flipped:
                mine = torch.cat([1 - mine[:, :1], mine[:, 1:]], 1)
            off = (boxes[:, None] - mine).abs().amax(-1)
            assert (off.min(1).values < 1e-5).all()
    assert seen == {False, True}


def test_cells_are_covered_as_opencv_fills_the_polygon(tools):
    questions, side = tools["nano_questions"], GRID * CELLS * 8
    turn = torch.arange(32) * (2 * torch.pi / 32)
    reach = 0.3 + 0.1 * torch.rand(32, generator=torch.Generator().manual_seed(0))
    polygon = torch.stack([0.5 + reach * turn.sin(), 0.45 - reach * turn.cos()], 1)
    found = questions.covered_cells(
        polygon.expand(1, GRID**2, -1, -1), questions._cell_samples()
    ).view(GRID, GRID, CELLS, CELLS)
    filled = np.zeros((side, side), np.uint8)
    cv2.fillPoly(
        filled, [np.rint((polygon.numpy() * side - 0.5) * 16).astype(np.int32)], 1, shift=4
    )
    share = torch.from_numpy(filled).float().view(GRID * CELLS, 8, GRID * CELLS, 8).mean((1, 3))
    found = found.permute(0, 2, 1, 3).reshape(GRID * CELLS, GRID * CELLS)
    assert (found - share).abs().max() <= 0.5 and (found - share).abs().mean() < 0.01


def test_a_look_fetches_the_vertex_on_the_average_and_the_edge_where_the_object_touches_it(tools):
    nano_looks, grid = tools["nano_looks"], GRID
    turn = torch.arange(32) * (2 * torch.pi / 32)
    outline = torch.stack([0.45 + 0.2 * turn.sin(), 0.55 - 0.3 * turn.cos()], 1)[None]
    box = torch.tensor([[0.45, 0.55, 0.4, 0.6]])
    middles = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    inside = ((x - 0.45) / 0.2) ** 2 + ((y - 0.55) / 0.3) ** 2 <= 1
    where = nano_looks.looks(box, outline, inside.float().view(1, -1))[0]
    assert where.shape == (36, grid * grid)
    assert torch.allclose(where.sum(-1), torch.ones(36), atol=1e-5)
    places = torch.stack([x, y], -1).view(-1, 2)
    found = where @ places
    assert (found[4:] - outline[0]).abs().max() < 0.1 / grid
    # Left, top, right, bottom: where the ellipse comes near, in patches whose middle it covers.
    edges = torch.tensor([[0.25, 0.55], [0.45, 0.25], [0.65, 0.55], [0.45, 0.85]])
    assert (found[:4] - edges).abs().max() < 1.1 / grid
    marks = nano_looks.patch_marks(
        box[:, None].expand(-1, grid * grid, -1), outline[:, None].expand(-1, grid * grid, -1, -1)
    )[0]
    assert marks.shape == (grid * grid, 36) and marks.min() >= 0 and marks.max() <= 1
    assert torch.equal(marks[:, 4:].argmax(0), where[4:].argmax(-1))


def test_patches_know_where_the_vertices_near_them_are(tools):
    nano_looks, grid = tools["nano_looks"], GRID
    outline = torch.tensor([[0.5, 0.25], [0.75, 0.5], [0.26, 0.51]])
    offsets = nano_looks.patch_offsets(outline.expand(1, grid * grid, -1, -1))[0]
    middles = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    places = torch.stack([x, y], -1).view(-1, 1, 2) + offsets / grid
    near = ~offsets[..., 0].isnan()
    assert torch.equal(near, ~offsets[..., 1].isnan())
    assert near.sum(0).tolist() == [4, 4, 4]
    assert torch.allclose(places[near], outline.expand_as(places)[near], atol=1e-6)


@pytest.mark.parametrize("boxes_only", [False, True], ids=["paths", "boxes"])
def test_heads_that_look_where_the_answer_is_have_no_loss(tools, made, boxes_only):
    nano_looks, heads = tools["nano_looks"], (1, 0)
    batch = next(iter(maker_of(tools, made, boxes_only=boxes_only)))
    b, q, s = batch.tokens.shape
    p = GRID * GRID + 1
    # Every position is a direction of its own: a query that sums up the log of what is wanted,
    # position by position, gives just these scores.
    keys = torch.eye(p + s)[None, None].expand(b, 2, -1, -1)
    keys = torch.cat([keys[:, :, :p], *[keys[:, :, p:]] * q], 2)
    queries = torch.full((b, 2, q, s, p + s), -40.0)
    is_coord = batch.target == 5
    starts = (is_coord & ~torch.nn.functional.pad(is_coord, (1, 0))[..., :-1]).nonzero()
    assert len(starts) > 1
    for scene, question, start in starts.tolist():
        numbers = 0
        for place in range(start, start + 3):
            mark = place - start
            for head, shown in zip(heads, ((0, 2), (1, 3), (2, 3))[mark], strict=True):
                queries[scene, head, question, place, 1:p] = batch.looks[
                    scene, question, shown
                ].log()
        for place in range(start + 3, s):
            if int(batch.target[scene, question, place]) not in made[1].level_ids:
                continue
            shown = 4 + numbers // 2
            queries[scene, :, question, place, 1:p] = batch.looks[scene, question, shown].log()
            numbers += 1
        assert numbers == (0 if boxes_only else 64)
    fed = torch.cat([torch.zeros(b, 2, p, p + s), queries.flatten(2, 3)], 2)
    asked = tuple(starts.T)
    assert nano_looks.look_loss(fed, keys, heads, asked, batch.looks) < 1e-3
    assert nano_looks.look_loss(fed, keys, (0, 1), asked, batch.looks) > (1 if boxes_only else 0.05)
    assert nano_looks.look_loss(fed * 0, keys, heads, asked, batch.looks) > 1


def test_a_store_teaches_a_step(tools, made):
    store, questions = made
    assert (store.arrays["nouns"][:, 0] >= 0).all() and store.arrays["outlines"].isfinite().all()
    torch.manual_seed(0)
    model = Moondream(tools["nano_checkpoint"].nano_config(questions.tokenizer))
    numbers = [questions.tokenizer.token_to_id(str(value)) for value in range(961)]
    patches = tools["nano_start"].picture_patches(store.arrays["images"].numpy(), 14)
    tools["nano_start"].initialise(model, numbers, patches)
    losses = tools["nano_training"].Losses(model, questions.noun_ids, questions.level_ids)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-4)
    batch = next(iter(maker_of(tools, made, scenes=2)))
    totals = []
    for _ in range(3):
        total, parts = losses(batch)
        assert all(part.isfinite() for part in parts.values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


def test_heads_of_an_outline_with_fewer_vertices_begin_between_them(tools, made):
    training = tools["nano_training"]
    model = Moondream(tools["nano_checkpoint"].nano_config(made[1].tokenizer))
    losses = training.Losses(model, list(range(4)), list(range(training.LEVELS)))
    turn = torch.arange(16) * (2 * torch.pi / 16)
    circle = torch.stack([turn.sin(), -turn.cos()], 1)
    known = {name: head.detach().clone() for name, head in losses.heads().items()}
    known["answer_outline_head.bias"] = circle.flatten()
    known["answer_outline_head.weight"] = known["answer_outline_head.weight"][:32]
    known["mark_head.bias"] = torch.cat([torch.tensor([5.0, 6.0, 7.0, 8.0]), circle[:, 0]])
    known["mark_head.weight"] = known["mark_head.weight"][:20]
    known["place_head.bias"], known["place_head.weight"] = torch.ones(32), torch.ones(32, 192)
    del known["box_head.bias"]
    losses.set_heads(known)
    finer = torch.arange(32) * (2 * torch.pi / 32)
    wanted = torch.stack([finer.sin(), -finer.cos()], 1)
    assert (losses.answer_outline_head.bias.view(32, 2) - wanted).abs().max() < 0.03
    assert losses.mark_head.bias[:4].tolist() == [5, 6, 7, 8]
    assert (losses.mark_head.bias[4:] - wanted[:, 0]).abs().max() < 0.03
    # A number's place among 32 says nothing of its place among 64.
    assert not losses.place_head.weight.any() and not losses.box_head.bias.any()


def test_a_pool_holds_the_scenes_of_a_store(tools, made):
    store, _ = made
    pool = tools["scene_store"].grow_pool(
        torch.device("cpu"), count=8, first=8, workers=1, seed=1, nouns=NOUNS, styles=STYLES
    )
    assert len(pool) == 8
    for name, array in pool.take(torch.arange(8)).items():
        assert torch.equal(array, store.arrays[name])
