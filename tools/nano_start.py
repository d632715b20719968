"""Starting weights of the shipped model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kestrel.moondream.model import Moondream
from kestrel.moondream.text import Block


def initialise(model: Moondream, integer_ids: list[int], patches: Tensor) -> None:
    """Starting weights that spare training the slow beginnings.

    ``patches`` float32 [N, 588] of training pictures, as ``patch_emb`` sees them: its rows become
    their principal components, nearly whitened. Positions are sines over the grid, attention looks
    for what is alike (content and place), and numbers read and written are Fourier features of
    their value, so that near values are alike from the first step.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "features" not in name and "tau" not in name:
            torch.nn.init.normal_(parameter, std=min(0.04, parameter.shape[-1] ** -0.5))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    depth = len(model.text.blocks) + len(model.vision.blocks)
    vision, text, region = model.vision, model.text, model.region
    dim = model.config.text.dim
    with torch.no_grad():
        for block in [*text.blocks, *vision.blocks]:
            block.attn.proj.weight.mul_(depth**-0.5)
            block.mlp.fc2.weight.mul_(depth**-0.5)
        _principal_components(vision.patch_emb, patches)
        vision.pos_emb.copy_(grid_sines(vision.config.grid, vision.config.enc_dim))
        for block in vision.blocks:
            _match_content(block.attn.qkv.weight, block.attn.n_heads, 0, 0.06)
        for block in text.blocks[:2]:
            rotary = model.config.text.rotary_dim
            _match_content(block.attn.qkv.weight, model.config.text.n_heads, rotary, 0.11)
        levels = torch.arange(961) / 960
        text.wte[torch.tensor(integer_ids)] = _waves(levels, dim) * 0.04
        text.lm_head.weight[torch.tensor(integer_ids)] = _waves(levels, dim) * 0.04
        bins = model.config.region.coord_out_dim
        region.coord_decoder.weight.copy_(_waves(torch.arange(bins) / bins, dim) * 0.04)
        bins = model.config.region.size_out_dim // 2
        # Width and height are told at once: each in its half of the dimensions.
        half = _waves(torch.arange(bins) / bins, dim // 2) * 0.04
        region.size_decoder.weight.zero_()
        region.size_decoder.weight[:bins, : dim // 2] = half
        region.size_decoder.weight[bins:, dim // 2 :] = half
        region.coord_features.copy_(_bands(1, region.coord_features.shape[1]))
        region.size_features.copy_(_bands(2, region.size_features.shape[1]))


def pass_through(blocks: Iterable[Block]) -> None:
    """Let blocks add nothing, so that a model that has grown answers as it did before."""
    for block in blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions [1, n², dim] of patches for a grid of another size, [1, grid², dim]."""
    side = math.isqrt(positions.shape[1])
    if side == grid:
        return positions
    square = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)


def picture_patches(images: np.ndarray, patch: int) -> Tensor:
    """Pictures uint8 [N, S, S, 3] -> ``patch_emb``'s rows float32 [N · patches, 3 · patch²]."""
    n, size = images.shape[:2]
    grid = size // patch
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.view(n, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n * grid * grid, 3 * patch * patch)


def _principal_components(patch_emb: torch.nn.Linear, patches: Tensor) -> None:
    centred = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rows = patch_emb.out_features
    # Directions of little variance are mostly noise: they are not blown up to full size.
    scale = (values[:rows] + values[rows // 3]).rsqrt()
    patch_emb.weight.copy_((vectors[:, :rows] * scale).T)
    patch_emb.bias.copy_(-(patch_emb.weight @ patches.mean(0)))


def grid_sines(grid: int, dim: int) -> Tensor:
    """Positions of patches, [1, grid², dim]: half the dimensions tell the row, half the column."""
    places = (torch.arange(grid) + 0.5) / grid
    waves = _waves(places, dim // 2, octaves=2.5) * 0.7
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([waves[row.flatten()], waves[column.flatten()]], dim=-1)[None]


def _waves(values: Tensor, dim: int, octaves: float = 7.0) -> Tensor:
    """Fourier features of values in 0..1 [n] -> [n, dim], each of unit mean square."""
    bands = 2.0 ** torch.linspace(-1, octaves - 1, dim // 2) * math.pi
    angles = values[:, None] * bands[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * math.sqrt(2)


def _match_content(qkv: Tensor, n_heads: int, first: int, std: float) -> None:
    """Let queries look for keys like themselves: a noun for the patches that the dense loss draws
    to its embedding, a patch for its neighbours. In the ``first`` dimensions of each head, which
    may rotate, attention stays free."""
    dim = qkv.shape[1]
    q, k, _ = qkv.split(dim)
    q, k = (w.view(n_heads, dim // n_heads, -1) for w in (q, k))
    shared = torch.randn_like(q[:, first:]) * std
    q[:, first:] = shared
    k[:, first:] = shared


def _bands(inputs: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    directions = F.normalize(torch.randn(inputs, count, generator=generator), dim=0)
    return directions * 2.0 ** torch.linspace(-1, 5, count)
