"""Prefix-LM text decoder: parallel pre-norm blocks. ``CachedText`` serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.moondream.config import TextConfig
from kestrel.moondream.initial import normal_weights
from kestrel.moondream.moe import MixtureOfExperts
from kestrel.moondream.rope import rotary_table, rotate
from kestrel.ops.attention import attend
from kestrel.ops.linear import FinalLinear, gelu_of


class Tau(nn.Module):
    """Token- and position-dependent scale of queries and values, one number per head.

    ``tanh(gelu(qkv) @ w^T) + 1 + (sigmoid(alpha * log(position + 1)) - 0.5)`` with the tanh GELU
    (the model author's correction of the earlier erf form).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        packed = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.wq = nn.Parameter(torch.zeros(config.n_heads, packed))
        self.wv = nn.Parameter(torch.zeros(config.n_heads, packed))
        self.alpha = nn.Parameter(torch.zeros(config.n_heads))

    def forward(self, qkv: Tensor, log_positions: Tensor) -> tuple[Tensor, Tensor]:
        """``qkv`` [B, T, packed], ``log_positions`` log(position + 1) broadcastable to [B, T].

        Gives the scales of q and of v, each [B, heads, T, 1].
        """
        gate = F.gelu(qkv, approximate="tanh")
        by_position = self.by_position(log_positions).to(qkv.dtype)
        tok_q, tok_v = torch.tanh(F.linear(gate, torch.cat([self.wq, self.wv]))).chunk(2, dim=-1)
        scale_q, scale_v = tok_q + by_position, tok_v + by_position
        return scale_q.transpose(1, 2)[..., None], scale_v.transpose(1, 2)[..., None]

    def by_position(self, log_positions: Tensor) -> Tensor:
        """The part that depends on the position alone, float32 [..., heads]."""
        return 0.5 + torch.sigmoid(self.alpha.float() * log_positions.float()[..., None])


class Attention(nn.Module):
    """Self-attention on a packed qkv projection, rotary, optionally tau."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        packed = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, packed)
        self.proj = nn.Linear(config.dim, config.dim)
        self.tau = Tau(config) if config.tau_attn else None

    def project(
        self, x: Tensor, table: Tensor, log_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, dim] -> rotated q [B, H, T, D] and k, v [B, Hkv, T, D].

        ``table`` rotary rows broadcastable to [B, 1, T, 2, rot / 2].
        """
        c = self.config
        batch, length, _ = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.split(
            [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim], dim=-1
        )
        q = q.view(batch, length, c.n_heads, c.head_dim).transpose(1, 2)
        k = k.view(batch, length, c.n_kv_heads, c.head_dim).transpose(1, 2)
        v = v.view(batch, length, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if self.tau is not None:
            scale_q, scale_v = self.tau(qkv, log_positions)
            q, v = q * scale_q, v * scale_v
        return rotate(q, table), rotate(k, table), v

    def merge(self, out: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, T, dim] through the output projection."""
        return self.proj(out.transpose(1, 2).flatten(2))


class DenseMlp(nn.Module):
    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner_dim)
        self.fc2 = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_of(self.fc1, x))


class Block(nn.Module):
    """``x + attn(ln(x)) + mlp(ln(x))``."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.dim, eps=1e-5)
        self.attn = Attention(config)
        moe = config.moe
        self.mlp: nn.Module
        if moe is not None and layer >= moe.start_layer:
            self.mlp = MixtureOfExperts(
                config.dim, moe.expert_inner_dim, moe.num_experts, moe.experts_per_token
            )
        else:
            self.mlp = DenseMlp(config.dim, config.ff_dim)


class TextDecoder(nn.Module):
    """Embedding, blocks, head. Hidden states are those before the final LayerNorm."""

    rotary: Tensor
    log_positions: Tensor
    blocks: Sequence[Block]

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = normal_weights(config.vocab_size, config.dim, std=0.02)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(config, i) for i in range(config.n_layers)
        )
        self.post_ln = nn.LayerNorm(config.dim, eps=1e-5)
        self.lm_head: nn.Linear | FinalLinear = nn.Linear(config.dim, config.vocab_size)
        self.reset_tables()

    def reset_tables(self) -> None:
        """(Re)compute the tables that no checkpoint holds, on the device of the embedding."""
        config, device = self.config, self.wte.device
        # Not on the meta device, whose arange imports torch's compiler too.
        with torch.device("cpu" if device.type == "meta" else device):
            table = rotary_table(config.rotary_dim, config.max_context, config.rope_theta)
            logs = torch.arange(1, config.max_context + 1, dtype=torch.float32).log()
        self.register_buffer("rotary", table.to(device), persistent=False)
        self.register_buffer("log_positions", logs.to(device), persistent=False)

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        """Whole sequences, without a cache: the plain form of what ``CachedText`` computes.

        ``x`` [B, T, dim], of which the first ``prefix`` positions all see each other and the
        others what comes before them. Gives hidden states [B, T, dim].
        """
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril_()
        mask[:prefix, :prefix] = True
        positions = torch.arange(length, device=x.device)
        table = self.rotary[positions]
        logs = self.log_positions[positions]
        for block in self.blocks:
            normed = block.ln(x)
            q, k, v = block.attn.project(normed, table, logs)
            x = x + block.attn.merge(attend(q, k, v, mask)) + block.mlp(normed)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        return self.lm_head(self.post_ln(hidden))
