"""Vision tower: patches to features, global and stitched local features to text embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.moondream.config import VisionConfig
from kestrel.moondream.crops import UInt8Array, overlap_crops, stitch
from kestrel.moondream.text import DenseMlp
from kestrel.ops.attention import attend, by_query
from kestrel.ops.linear import reorders
from kestrel.ops.shares import Share


class VisionAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, share: Share | None = None) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.n_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if share is not None:
            k, v = share.gathered(heads[:, :, 1:], 1).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.enc_dim, eps=1e-5)
        self.attn = VisionAttention(config.enc_dim, config.enc_n_heads)
        self.ln2 = nn.LayerNorm(config.enc_dim, eps=1e-5)
        self.mlp = DenseMlp(config.enc_dim, config.enc_ff_dim)

    def forward(self, x: Tensor, share: Share | None = None) -> Tensor:
        x = x + self.attn(self.ln1(x), share)
        return x + self.mlp(self.ln2(x))


class VisionEncoder(nn.Module):
    """SigLIP-style ViT and the projection of two feature maps into the text model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.enc_patch_size**2 * config.in_channels
        self.patch_emb = nn.Linear(patch, config.enc_dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.n_patches, config.enc_dim))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.enc_n_layers))
        self.post_ln = nn.LayerNorm(config.enc_dim, eps=1e-5)
        self.proj_mlp = DenseMlp(2 * config.enc_dim, config.proj_inner_dim)
        self.proj_mlp.fc2 = nn.Linear(config.proj_inner_dim, config.proj_out_dim)

    @property
    def shares_features(self) -> bool:
        """Whether ``features`` gives the same numbers by shares, on a CPU and ready to serve."""
        config = self.config
        head_dim = config.enc_dim // config.enc_n_heads
        return reorders(self.pos_emb) and by_query(self.pos_emb.dtype, head_dim)

    def features(self, crops: Tensor, share: Share | None = None) -> Tensor:
        """Crops uint8 [N, 3, S, S] -> final features [N, patches, enc_dim]; of a share's patches
        alone where there is one."""
        x = self._patches(crops, slice(None) if share is None else share.part)
        for block in self.blocks:
            x = block(x, share)
        return self.post_ln(x)

    def features_with_early(self, crops: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """As ``features``, and what the ``block``-th block (from 0) gives, of the same shape."""
        x = early = self._patches(crops)
        for i, layer in enumerate(self.blocks):
            x = layer(x)
            if i == block:
                early = x
        return self.post_ln(x), early

    def _patches(self, crops: Tensor, part: slice = slice(None)) -> Tensor:
        config = self.config
        n, channels, size, _ = crops.shape
        p, grid = config.enc_patch_size, size // config.enc_patch_size
        x = (crops.to(self.pos_emb.dtype) / 255.0 - 0.5) / 0.5
        x = x.view(n, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(n, grid * grid, channels * p * p)[:, part]
        return self.patch_emb(x) + self.pos_emb[:, part]

    def project(self, whole: Tensor, local: Tensor) -> Tensor:
        """Global features [..., patches, enc_dim] and local ones alike -> [..., patches, dim]."""
        return self.proj_mlp(torch.cat([whole, local], dim=-1))

    def embed(self, crops: Tensor, tiling: tuple[int, int]) -> Tensor:
        """Crops uint8 [N, 3, S, S] of one image and their grid -> embeddings [patches, dim]."""
        # Where the one local crop is the global crop, it is encoded once.
        return self.join(self.features(crops[:1] if tiling == (1, 1) else crops), tiling)

    def join(self, features: Tensor, tiling: tuple[int, int]) -> Tensor:
        """Features [N, patches, enc_dim] of all crops, the global one first, to embeddings
        [patches, dim]; with the grid (1, 1) the first stands for both."""
        config = self.config
        if tiling == (1, 1):
            return self.project(features[0], features[0])
        local = features[1:].unflatten(1, (config.grid, config.grid))
        whole_map = stitch(local, tiling, config.overlap_margin).permute(2, 0, 1)
        pooled = F.adaptive_avg_pool2d(whole_map, (config.grid, config.grid))
        return self.project(features[0], pooled.flatten(1).T)

    def encode(self, image: UInt8Array) -> Tensor:
        """Image uint8 [H, W, 3] -> embeddings [patches, dim] on the model's device."""
        crops, tiling = overlap_crops(image, self.config)
        tensor = torch.from_numpy(crops).permute(0, 3, 1, 2).to(self.pos_emb.device)
        return self.embed(tensor, tiling)
