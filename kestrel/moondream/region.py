"""Coordinates and sizes: values to embeddings, hidden states to binned logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kestrel.moondream.config import RegionConfig
from kestrel.moondream.initial import normal_weights
from kestrel.moondream.text import DenseMlp


def fourier_features(x: Tensor, frequencies: Tensor) -> Tensor:
    """``cat(cos(2 pi x w), sin(2 pi x w))``; ``x`` [..., n], ``frequencies`` [n, f] -> [..., 2f].

    Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions".
    """
    angles = 2 * math.pi * x @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Region(nn.Module):
    """Region encoders and decoders, bins as published: coordinates linear, sizes logarithmic."""

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.coord_features = normal_weights(1, config.coord_feat_dim // 2, std=1.0)
        self.size_features = normal_weights(2, config.size_feat_dim // 2, std=1.0)
        self.coord_encoder = nn.Linear(config.coord_feat_dim, dim)
        self.size_encoder = nn.Linear(config.size_feat_dim, dim)
        self.ln = nn.LayerNorm(dim, eps=1e-5) if config.use_ln else None
        self.coord_decoder = self._decoder(config.coord_out_dim)
        self.size_decoder = self._decoder(config.size_out_dim)

    def _decoder(self, bins: int) -> nn.Module:
        config = self.config
        if config.decoder_arch == "linear":
            return nn.Linear(config.dim, bins)
        decoder = DenseMlp(config.dim, config.inner_dim)
        decoder.fc2 = nn.Linear(config.inner_dim, bins)
        return decoder

    def encode_coord(self, values: Tensor) -> Tensor:
        """Coordinates in 0..1, [...] -> embeddings [..., dim]."""
        features = self.coord_features
        return self.coord_encoder(fourier_features(values.to(features.dtype)[..., None], features))

    def encode_size(self, values: Tensor) -> Tensor:
        """Width and height in 0..1, [..., 2] -> embeddings [..., dim]."""
        features = self.size_features
        return self.size_encoder(fourier_features(values.to(features.dtype), features))

    def _normed(self, hidden: Tensor) -> Tensor:
        return self.ln(hidden) if self.ln is not None else hidden

    def coord_logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., coord bins]."""
        return self.coord_decoder(self._normed(hidden))

    def size_logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., 2, size bins]: width, height."""
        return self.size_decoder(self._normed(hidden)).unflatten(-1, (2, -1))

    def coord_value(self, bins: Tensor) -> Tensor:
        """Bin numbers -> coordinates in 0..1: ``bin / bins``."""
        return bins.float() / self.config.coord_out_dim

    def size_value(self, bins: Tensor) -> Tensor:
        """Bin numbers -> sizes in 2^-10..1: ``2 ** (bin / (bins - 1) * 10 - 10)``."""
        return torch.exp2(bins.float() / (self.config.size_out_dim // 2 - 1) * 10 - 10)

    def size_bin(self, values: Tensor) -> Tensor:
        """Sizes in 0..1 -> the nearest bin, as a float (for soft training targets)."""
        last = self.config.size_out_dim // 2 - 1
        return (torch.log2(values.clamp(min=2.0**-10)) + 10) / 10 * last
