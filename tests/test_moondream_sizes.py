"""The published models have a parameter too many, too few, or of another shape."""

from __future__ import annotations

import pytest
import torch

from kestrel.moondream.config import MOONDREAM_2, MOONDREAM_3, MoondreamConfig
from kestrel.moondream.model import Moondream

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def vision() -> Shapes:
    """Both models see alike: 27 layers of 1152 over 729 patches of 14 x 14 x 3."""
    shapes = {"vision.pos_emb": (1, 729, 1152)}
    shapes |= linear("vision.patch_emb", 1152, 588) | norm("vision.post_ln", 1152)
    shapes |= linear("vision.proj_mlp.fc1", 8192, 2304) | linear("vision.proj_mlp.fc2", 2048, 8192)
    for layer in range(27):
        block = f"vision.blocks.{layer}"
        shapes |= norm(f"{block}.ln1", 1152) | norm(f"{block}.ln2", 1152)
        shapes |= linear(f"{block}.attn.qkv", 3456, 1152)
        shapes |= linear(f"{block}.attn.proj", 1152, 1152)
        shapes |= linear(f"{block}.mlp.fc1", 4304, 1152) | linear(f"{block}.mlp.fc2", 1152, 4304)
    return shapes


def text(*, tau: bool, mixed_from: int) -> Shapes:
    """24 layers of 2048; those from ``mixed_from`` have 64 experts of 1024 and a router."""
    shapes: Shapes = {"text.wte": (51200, 2048)}
    shapes |= norm("text.post_ln", 2048) | linear("text.lm_head", 51200, 2048)
    for layer in range(24):
        block = f"text.blocks.{layer}"
        shapes |= norm(f"{block}.ln", 2048)
        shapes |= linear(f"{block}.attn.qkv", 6144, 2048)
        shapes |= linear(f"{block}.attn.proj", 2048, 2048)
        if tau:
            shapes |= dict.fromkeys((f"{block}.attn.tau.{w}" for w in ("wq", "wv")), (32, 6144))
            shapes[f"{block}.attn.tau.alpha"] = (32,)
        if layer < mixed_from:
            shapes |= linear(f"{block}.mlp.fc1", 8192, 2048)
            shapes |= linear(f"{block}.mlp.fc2", 2048, 8192)
        else:
            shapes |= linear(f"{block}.mlp.router", 64, 2048)
            shapes[f"{block}.mlp.fc1.weight"] = (64, 2 * 1024, 2048)
            shapes[f"{block}.mlp.fc2.weight"] = (64, 2048, 1024)
    return shapes


def region(*, decoders: Shapes) -> Shapes:
    shapes: Shapes = {"region.coord_features": (1, 128), "region.size_features": (2, 256)}
    shapes |= linear("region.coord_encoder", 2048, 256)
    return shapes | linear("region.size_encoder", 2048, 512) | decoders


DECODERS_2 = (
    linear("region.coord_decoder.fc1", 8192, 2048)
    | linear("region.coord_decoder.fc2", 1024, 8192)
    | linear("region.size_decoder.fc1", 8192, 2048)
    | linear("region.size_decoder.fc2", 2048, 8192)
)
DECODERS_3 = (
    norm("region.ln", 2048)
    | linear("region.coord_decoder", 1024, 2048)
    | linear("region.size_decoder", 2048, 2048)
)
PUBLISHED = [
    (MOONDREAM_2, text(tau=False, mixed_from=24) | region(decoders=DECODERS_2), 1.93e9),
    (MOONDREAM_3, text(tau=True, mixed_from=4) | region(decoders=DECODERS_3), 9.27e9),
]


@pytest.mark.parametrize(("config", "expected", "count"), PUBLISHED, ids=["md2", "md3"])
def test_a_parameter_of_a_published_model_is_not_accounted_for(
    config: MoondreamConfig, expected: Shapes, count: float
) -> None:
    with torch.device("meta"):
        model = Moondream(config)
    # Buffers are tables that are computed: 9 billion numbers are described, none is held.
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    got = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert got == expected | vision()
    assert round(sum(p.numel() for p in model.parameters()) / 1e7) == round(count / 1e7)
