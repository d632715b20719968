"""Models, pictures and requests that are made from seeds, bit for bit alike everywhere.

``tools/parity_points.py`` gives them to the public implementations and records what those compute;
``test_public_points`` gives them to this one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tiny_models import TOKENIZER, VOCABULARY
from torch import Tensor

from kestrel.api import SegmentRequest
from kestrel.moondream.config import (
    MoeConfig,
    MoondreamConfig,
    PromptConfig,
    RegionConfig,
    TextConfig,
    VisionConfig,
)
from kestrel.moondream.model import Moondream
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.skills.segment import Coord, Prompt, Size, Token, build_prompt

POINTS = Path(__file__).parent / "fixtures" / "parity" / "points.safetensors"

# The public code takes heads of 64, of which 32 are rotated, and crops of 378 pixels.
MD2 = MoondreamConfig(
    text=TextConfig(dim=128, ff_dim=96, n_layers=3, vocab_size=VOCABULARY, n_heads=2, n_kv_heads=2),
    vision=VisionConfig(
        enc_dim=24,
        enc_n_layers=2,
        enc_ff_dim=40,
        enc_n_heads=2,
        proj_out_dim=128,
        proj_inner_dim=48,
    ),
    region=RegionConfig(dim=128, coord_feat_dim=16, size_feat_dim=24, inner_dim=48),
    prompt=PromptConfig(segment_prefix=(1, 1003, 2)),
    name="md2",
)
GROUPED = replace(MD2, text=replace(MD2.text, n_kv_heads=1), name="grouped")
"""Two heads that share one head's keys and values."""
MD3 = replace(
    MD2,
    text=replace(
        MD2.text,
        rope_theta=1_500_000.0,
        tau_attn=True,
        moe=MoeConfig(num_experts=7, start_layer=1, experts_per_token=3, expert_inner_dim=40),
    ),
    region=replace(MD2.region, decoder_arch="linear", use_ln=True),
    name="md3",
)
MODELS = {config.name: config for config in (MD2, GROUPED, MD3)}


def numbers(name: str, *shape: int) -> Tensor:
    """Uniform in -1..1, float32, by NumPy's frozen generator, seeded with the name."""
    chance = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(2 * chance.random_sample(shape) - 1).float()


def parameter(name: str, shape: torch.Size) -> Tensor:
    """One weight, of the size that a trained one would have."""
    drawn = numbers(name, *shape)
    if name.endswith("_features"):
        return 2 * drawn
    if name.endswith((".alpha", "wte", "pos_emb")):
        return drawn
    if len(shape) == 1:
        return 0.2 * drawn + (1 if "ln" in name.split(".")[-2] and "weight" in name else 0)
    return drawn * (3 / shape[-1]) ** 0.5


def seeded_model(config: MoondreamConfig) -> Moondream:
    """A float32 model on the CPU, its tables made, not yet fused."""
    with torch.device("meta"):
        model = Moondream(config)
    tensors = {name: parameter(name, p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(tensors, assign=True)
    model.text.reset_tables()
    model.tokenizer = SegmentTokenizer.from_file(TOKENIZER, config.prompt)
    return model.eval().requires_grad_(False)


PICTURES = {
    "dot": (1, 1),
    "low": (377, 1201),
    "strip": (379, 3001),
    "tower": (2203, 401),
    "odd": (641, 967),
}
"""Height and width. ``low`` is one pixel too low for a second row of crops."""


def picture(name: str) -> np.ndarray:
    """uint8 [H, W, 3]: patches of 7 x 9 pixels in random colours."""
    height, width = PICTURES[name]
    chance = np.random.RandomState(zlib.crc32(name.encode()))
    small = chance.randint(0, 256, (height // 7 + 1, width // 9 + 1, 3)).astype(np.uint8)
    return np.ascontiguousarray(small.repeat(7, 0).repeat(9, 1)[:height, :width])


@dataclass(frozen=True)
class Case:
    """A request: what it shows and asks for."""

    picture: str | None
    noun: str = "dog"
    refs: tuple[tuple[float, ...], ...] = ()
    ids: int = 0
    """So many ids of words in the noun's place."""

    def request(self) -> SegmentRequest:
        shown = None if self.picture is None else b""
        refs = [list(ref) for ref in self.refs] or None
        return SegmentRequest(self.noun, shown, spatial_refs=refs)

    def words(self) -> list[int]:
        """The ids that stand for ``ids``."""
        drawn = numbers("words", self.ids).abs() * (VOCABULARY - 100)
        return [100 + int(value) for value in drawn.tolist()]

    def prompt(self, model: Moondream) -> Prompt:
        made = build_prompt(self.request(), model.config, model.tokenizer)
        if not self.ids:
            return made
        tokens = [*model.config.prompt.segment_prefix, *self.words(), made.tokens[-1]]
        return Prompt(tokens, 1 + len(tokens))


LONG_NOUN = "the second smallest of the grey-striped umbrellas that lean on the wall, " * 3
CASES = {
    "blind": Case(None),
    "blind-long": Case(None, ids=900),
    "plain": Case("odd", "Übergröße, café No. 7"),
    "point": Case("low", refs=((0.125, 0.7),)),
    "box": Case("tower", "wing", refs=((0.1, 0.2, 0.65, 0.4),)),
    "all": Case(
        "odd",
        LONG_NOUN.strip(),
        refs=((0.0, 1.0), (0.0, 0.0, 1.0, 1.0), (0.3, 0.31, 0.3, 0.9), (0.5, 0.5)) * 4,
    ),
}

ANSWER: tuple[Token, ...] = (Coord(341 / 1024), Coord(1000 / 1024), Size(0.25, 2.0**-10), 40, 41, 9)
"""What is fed after every prompt, whatever the model says."""
