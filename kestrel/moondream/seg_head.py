"""Moondream's neural mask refiner: image features and a mask in, better masks and scores out.

The layout and the names of the parameters are those of the public checkpoint
(``moondream/SegHeadRefiner``, key ``head``).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kestrel.config import ConfigError

EARLY_BLOCK = 8
"""Block of the vision tower, from 0, whose output is the early feature map."""
ROUNDS = 5
"""Times that the best mask is fed back."""
HEADS = 8
HEADS_UP = 4
"""Attention heads at full resolution."""
MLP_RATIO = 8


@dataclass(frozen=True)
class SegHeadConfig:
    """Sizes of the head; the published ones."""

    enc_dim: int = 1152
    dim: int = 256
    grid: int = 27
    masks: int = 4
    layers: int = 2


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def _group_norm(dim: int, most: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(min(most, dim), dim)


class MaskEncoder(nn.Module):
    """Four strided convolutions: [1, 1, S, S] -> [1, dim, grid, grid]."""

    def __init__(self, config: SegHeadConfig) -> None:
        super().__init__()
        self.grid = config.grid
        channels = (1, config.dim // 16, config.dim // 8, config.dim // 4, config.dim)
        for i, groups in enumerate((1, 8, 16, 32)):
            stage = nn.Sequential(
                nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1),
                _group_norm(channels[i + 1], groups),
                nn.GELU(),
            )
            self.add_module(f"conv{i + 1}", stage)

    def forward(self, mask: Tensor) -> Tensor:
        for stage in self.children():
            mask = stage(mask)
        return F.interpolate(mask, size=(self.grid, self.grid), mode="bilinear")


class FeatureFusion(nn.Module):
    """Early features [1, patches, enc_dim] and final ones [1, dim, grid, grid] as one map."""

    def __init__(self, config: SegHeadConfig) -> None:
        super().__init__()
        dim = config.dim
        self.early_proj = nn.Sequential(
            nn.Linear(config.enc_dim, dim), nn.LayerNorm(dim), nn.GELU()
        )
        self.fusion = nn.Sequential(
            nn.Conv2d(2 * dim, dim, 1),
            _group_norm(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            _group_norm(dim),
            nn.GELU(),
        )

    def forward(self, early: Tensor, final: Tensor) -> Tensor:
        early = self.early_proj(early).mT.reshape(final.shape)
        return self.fusion(torch.cat([early, final], dim=1))


class TwoWayBlock(nn.Module):
    """Tokens look at each other and at the image, then the image at the tokens (post-norm)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output_self_attn = _attention(dim, HEADS)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = _attention(dim, HEADS)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim)
        )
        self.norm3 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = _attention(dim, HEADS)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        placed = tokens + token_pe
        tokens = self.norm1(tokens + _attend(self.output_self_attn, placed, placed, tokens))
        seen = _attend(self.cross_attn_token_to_image, tokens + token_pe, image + image_pe, image)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        seen = _attend(self.cross_attn_image_to_token, image + image_pe, tokens + token_pe, tokens)
        return tokens, self.norm4(image + seen)


def _attention(dim: int, heads: int) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(dim, heads, batch_first=True)


def _attend(layer: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layer(q, k, v, need_weights=False)[0]


class SegHead(nn.Module):
    """The head. Masks have the side of the vision tower's crop, S."""

    def __init__(self, config: SegHeadConfig) -> None:
        super().__init__()
        dim, up = config.dim, config.dim // 8
        self.config = config
        self.image_proj = nn.Conv2d(config.enc_dim, dim, 1)
        self.image_pe = nn.Parameter(torch.zeros(1, dim, config.grid, config.grid))
        self.hq_fusion = FeatureFusion(config)
        self.mask_encoder = MaskEncoder(config)
        self.mask_tokens = nn.Parameter(torch.zeros(config.masks, dim))
        self.iou_token = nn.Parameter(torch.zeros(1, dim))
        self.output_pe = nn.Parameter(torch.zeros(config.masks + 1, dim))
        self.transformer_blocks = nn.ModuleList(TwoWayBlock(dim) for _ in range(config.layers))
        self.final_token_to_image = _attention(dim, HEADS)
        self.final_norm = nn.LayerNorm(dim)
        self.upsample = nn.Sequential(
            *(
                layer
                for wide, narrow in ((dim, dim // 2), (dim // 2, dim // 4), (dim // 4, up))
                for layer in (
                    nn.ConvTranspose2d(wide, narrow, 2, stride=2),
                    ChannelNorm(narrow),
                    nn.GELU(),
                    nn.Conv2d(narrow, narrow, 3, padding=1),
                    ChannelNorm(narrow),
                    nn.GELU(),
                )
            )
        )
        self.final_q_proj = nn.Linear(dim, up)
        self.final_attn_up = _attention(up, HEADS_UP)
        self.final_norm_up = nn.LayerNorm(up)
        self.mask_mlps = nn.ModuleList(_mlp(up, up) for _ in range(config.masks))
        self.iou_head = _mlp(dim, config.masks)

    def fuse(self, final: Tensor, early: Tensor) -> Tensor:
        """Features [1, patches, enc_dim] -> [1, dim, grid, grid]: what no mask changes."""
        grid = self.config.grid
        return self.hq_fusion(early, self.image_proj(final.mT.unflatten(2, (grid, grid))))

    def predict(self, fused: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One round: ``fuse``'s map and a mask [1, 1, S, S] in 0..1 -> logits [masks, 8 grid,
        8 grid] and a score of each [masks]."""
        count = self.config.masks
        image = (fused + self.mask_encoder(mask)).flatten(2).mT
        image_pe = self.image_pe.flatten(2).mT
        tokens = torch.cat([self.mask_tokens, self.iou_token])[None]
        for block in self.transformer_blocks:
            tokens, image = block(tokens, image, self.output_pe, image_pe)
        seen = _attend(self.final_token_to_image, tokens + self.output_pe, image + image_pe, image)
        tokens = self.final_norm(tokens + seen)

        pixels = self.upsample(image.mT.reshape(fused.shape))
        queries = self.final_q_proj(tokens[:, :count])
        flat = pixels.flatten(2).mT
        queries = queries + _attend(self.final_attn_up, self.final_norm_up(queries), flat, flat)
        weights = torch.stack([mlp(queries[0, i]) for i, mlp in enumerate(self.mask_mlps)])
        logits = torch.einsum("mc,chw->mhw", weights, pixels[0])
        return logits, self.iou_head(tokens[0, count])

    def refine(self, final: Tensor, early: Tensor, mask: Tensor) -> Tensor:
        """Features [1, patches, enc_dim] and a mask [1, 1, S, S], 0 and 1 -> the mask after
        ``ROUNDS`` rounds, alike, soft."""
        fused = self.fuse(final, early)
        for _ in range(ROUNDS):
            logits, scores = self.predict(fused, mask)
            best = logits[scores.argmax()][None, None]
            mask = torch.sigmoid(F.interpolate(best, size=mask.shape[2:], mode="bilinear"))
        return mask


def _mlp(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out)
    )


def load_seg_head(file: Path, device: torch.device, dtype: torch.dtype) -> SegHead:
    """The head of a ``.pt`` file (key ``head``) or a ``.safetensors`` one (``head.`` + name).

    Its sizes are read off the tensors; its parameters are its own, no views of the file. Raises
    ``ConfigError`` that names the file, and what in it does not fit.
    """
    tensors = _tensors(file)
    try:
        (dim, enc_dim), grid = tensors["image_proj.weight"].shape[:2], tensors["image_pe"].shape[2]
        masks = len(tensors["mask_tokens"])
        blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
        with torch.device("meta"):
            head = SegHead(SegHeadConfig(enc_dim, dim, grid, masks, len(blocks))).to(dtype)
    except Exception as error:  # whatever a layer says of sizes that it cannot have
        raise ConfigError(f"seghead_weights: {file} holds no mask refiner's head") from error
    head.to_empty(device=device)
    try:
        # Copied: a mapped tensor would change, or be gone, with its file.
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(f"seghead_weights: {file} does not fit: {error}") from error
    for name, numbers in head.named_parameters():
        # Its masks would be empty, and every path the model's own.
        if not numbers.isfinite().all():
            raise ConfigError(f"seghead_weights: {file} {name} holds NaN or infinity")
    return head.eval().requires_grad_(False)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            stored = load_file(file)
            return {name.removeprefix("head."): tensor for name, tensor in stored.items()}
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(loaded["head"])
    except KeyError as error:
        raise ConfigError(f"seghead_weights: {file} has no key head") from error
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"seghead_weights: {file} cannot be read: {error}") from error
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(f"seghead_weights: {file} is no weights file: {error}") from error
