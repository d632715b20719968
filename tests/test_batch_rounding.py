"""A request's numbers that change, to the last bit, with what else is in the batch.

Near ties would then be answered otherwise in a batch than alone. On one thread, as replicas run:
more of them share one row's attention between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY_3, random_model

from kestrel.config import SHIPPED_MODELS
from kestrel.moondream.config import MoeConfig
from kestrel.moondream.model import Moondream, load
from kestrel.ops import linear


def mixed_experts() -> Moondream:
    """A random model of 16 experts, of which each token takes four."""
    moe = MoeConfig(num_experts=16, start_layer=1, experts_per_token=4, expert_inner_dim=32)
    text = replace(TINY_3.text, dim=64, n_heads=4, n_kv_heads=4, max_context=288, moe=moe)
    vision, region = replace(TINY_3.vision, proj_out_dim=64), replace(TINY_3.region, dim=64)
    model = random_model(replace(TINY_3, text=text, vision=vision, region=region))
    model.fuse()
    return model


@pytest.fixture(scope="module", params=["nano", "experts"])
def model(request: pytest.FixtureRequest) -> Iterator[Moondream]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not linear.reorders(torch.zeros(1, 1)):
        pytest.skip("without oneDNN's order products depend on the batch")
    if request.param == "nano":
        yield load(SHIPPED_MODELS / "nano", torch.device("cpu"), torch.float32)
    else:
        yield mixed_experts()
    torch.set_num_threads(threads)


def alone_and_among(model: Moondream, length: int, at: list[int]) -> tuple[torch.Tensor, ...]:
    """Hidden states [length, dim] of slot 0 at ``at[0]``, by itself and beside the other slots."""
    chance = torch.Generator().manual_seed(1)
    filled = model.new_cache(len(at))
    filled.kv.copy_(torch.randn(filled.kv.shape, generator=chance))
    x = torch.randn(len(at), length, model.config.text.dim, generator=chance)
    found = []
    for rows in (1, len(at)):
        cache = model.new_cache(len(at))
        cache.kv.copy_(filled.kv)
        starts, span = torch.tensor(at[:rows]), max(at[:rows]) + length
        with torch.inference_mode():
            if length == 1:
                out = model.cached.decode(x[:rows, 0], starts, cache, None, span, level=rows == 1)
                found.append(out[:1])
            else:
                out = model.cached.extend(x[:rows], starts, cache, torch.arange(rows), span)
                found.append(out[0])
    return tuple(found)


@pytest.mark.parametrize("length", [1, 5], ids=["decode", "prompt"])
@pytest.mark.parametrize(
    "at", [[82, 97], [83, 120, 90], [100, 131, 99, 257], [*range(127, 134)]], ids=str
)
def test_a_step_differs_among_others(model, at, length):
    alone, among = alone_and_among(model, length, at)
    assert torch.equal(alone, among)
