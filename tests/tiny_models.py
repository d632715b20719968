"""Random models of a few thousand parameters, as checkpoints of every public layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kestrel.config import SHIPPED_MODELS
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

TOKENIZER = SHIPPED_MODELS / "nano" / "tokenizer.json"
VOCABULARY = 1600
"""Fewer than the 1,616 ids of the shipped tokenizer: seeded weights and recorded answers hang on
it, and no test asks for the last ids of that."""

TINY_3 = MoondreamConfig(
    text=TextConfig(
        dim=32,
        ff_dim=48,
        n_layers=3,
        vocab_size=VOCABULARY,
        max_context=256,
        n_heads=2,
        n_kv_heads=2,
        prefix_attn=5,
        tau_attn=True,
        moe=MoeConfig(num_experts=4, start_layer=1, experts_per_token=2, expert_inner_dim=12),
    ),
    vision=VisionConfig(
        enc_dim=16,
        enc_patch_size=14,
        enc_n_layers=2,
        enc_ff_dim=24,
        enc_n_heads=2,
        proj_out_dim=32,
        crop_size=28,
        max_crops=4,
        overlap_margin=0,
        proj_inner_dim=24,
    ),
    region=RegionConfig(
        dim=32,
        coord_feat_dim=8,
        coord_out_dim=64,
        size_feat_dim=12,
        size_out_dim=128,
        inner_dim=20,
        decoder_arch="linear",
        use_ln=True,
    ),
    prompt=PromptConfig(segment_prefix=(1, 1003, 2)),
    name="tiny3",
)
TINY_2 = replace(
    TINY_3,
    text=replace(TINY_3.text, tau_attn=False, moe=None),
    region=replace(TINY_3.region, decoder_arch="mlp", use_ln=False),
    name="tiny2",
)


def random_model(config: MoondreamConfig = TINY_3, seed: int = 0) -> Moondream:
    """A float32 model whose every parameter is random, the tables that start at zero included."""
    torch.manual_seed(seed)
    model = Moondream(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tokenizer = SegmentTokenizer.from_file(TOKENIZER, config.prompt)
    return model


def own_tensors(model: Moondream) -> dict[str, Tensor]:
    """Parameters by their own names."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def hugging_face_tensors(model: Moondream) -> dict[str, Tensor]:
    """The same under the names of the published safetensors files."""
    return {f"model.{name}": tensor for name, tensor in own_tensors(model).items()}


_ENGINE_PARTS = [
    ("text.wte", "text_model.transformer.embd.wte.weight"),
    ("text.blocks.", "text_model.transformer.h."),
    (".attn.qkv.", ".mixer.Wqkv."),
    (".attn.proj.", ".mixer.out_proj."),
    (".attn.tau.", ".tau_"),
    (".mlp.router.", ".gate."),
    ("text.post_ln.", "text_model.lm_head.ln."),
    ("text.lm_head.", "text_model.lm_head.linear."),
    ("region.coord_features", "region_model.coordinate_features.weight"),
    ("region.size_features", "region_model.size_features.weight"),
    ("region.coord_encoder.", "region_model.coordinate_encoder."),
    ("region.", "region_model."),
]
_ENGINE_VISION = [
    ("vision.patch_emb.", "vision_encoder.encoder.model.visual.patch_embed.linear."),
    ("vision.pos_emb", "vision_encoder.encoder.model.visual.pos_embed"),
    ("vision.post_ln.", "vision_encoder.encoder.model.visual.norm."),
    ("vision.proj_mlp.", "vision_encoder.projection.mlp."),
    ("vision.blocks.", "vision_encoder.encoder.model.visual.blocks."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
]


def engine_tensors(model: Moondream) -> dict[str, Tensor]:
    """The same under the engine's names, the frequency tables transposed as it stores them."""
    linear = model.config.region.decoder_arch == "linear"
    tensors = {}
    for name, tensor in own_tensors(model).items():
        stored = name
        for own, engine in _ENGINE_VISION if name.startswith("vision.") else _ENGINE_PARTS:
            stored = stored.replace(own, engine)
        stored = stored.replace(
            "coord_decoder", "coordinate_head" if linear else "coordinate_decoder"
        )
        stored = stored.replace("size_decoder", "size_head" if linear else "size_decoder")
        if tensor.dim() == 3 and name.startswith("text."):
            stored = stored.replace("mlp.fc1.", "mlp.experts.")
            stored = stored.replace("mlp.fc2.", "mlp.output_experts.")
        tensors[stored] = tensor.T.contiguous() if name.endswith("_features") else tensor
    return tensors


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: MoondreamConfig = TINY_3
) -> Path:
    """A folder with ``model.safetensors``, ``config.json`` and the shipped tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_companions(folder, config)
    return folder


def write_companions(folder: Path, config: MoondreamConfig = TINY_3) -> None:
    """What stands beside the weights."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
