"""The whole model as one object, and how it is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kestrel.config import ConfigError
from kestrel.moondream.cached import CachedText
from kestrel.moondream.checkpoint import Checkpoint, local_checkpoint
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.crops import UInt8Array
from kestrel.moondream.kv import KVCache, SlotKV
from kestrel.moondream.moe import MixtureOfExperts
from kestrel.moondream.region import Region
from kestrel.moondream.text import TextDecoder
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.moondream.vision import VisionEncoder
from kestrel.moondream.weights import load_weights
from kestrel.ops.linear import final, finalize
from kestrel.ops.routing import precompiled

log = logging.getLogger(__name__)


class Moondream(nn.Module):
    """Vision tower, text decoder and region heads of one Moondream-architecture model."""

    tokenizer: SegmentTokenizer

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = TextDecoder(config.text)
        self.region = Region(config.region)
        self._cached: CachedText | None = None

    @property
    def device(self) -> torch.device:
        return self.text.wte.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text.wte.dtype

    def encode_image(self, image: UInt8Array) -> Tensor:
        """Image uint8 [H, W, 3] RGB -> embeddings [patches, dim]."""
        return self.vision.encode(image)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids int64 [...] -> embeddings [..., dim]."""
        return self.text.wte[ids]

    def encode_coord(self, values: Tensor) -> Tensor:
        """Coordinates in 0..1 [...] -> embeddings [..., dim]."""
        return self.region.encode_coord(values)

    def encode_size(self, values: Tensor) -> Tensor:
        """Widths and heights in 0..1 [..., 2] -> embeddings [..., dim]."""
        return self.region.encode_size(values)

    @property
    def cached(self) -> CachedText:
        """The text decoder over a KV cache; made anew each time until ``fuse``."""
        return self._cached or CachedText(self.text, fuse=False)

    def fuse(self, *, half_images: bool = False, half_kv: bool = False) -> None:
        """Make the model ready to serve: faster, and its weights final. ``half_images``: images are
        encoded in bfloat16; ``half_kv``: keys and values are kept in it."""
        self._cached = CachedText(self.text, fuse=True, half_prefix=half_images, half_kv=half_kv)
        if half_images:
            self.vision.bfloat16()
        self.text.lm_head = final(self.text.lm_head)
        finalize(self.vision)
        finalize(self.region)

    def use_kestrel_kernels(self) -> None:
        """Have kestrel-kernels choose each token's experts; raises ``ConfigError`` where there are
        none to choose, or where they do not load, run or agree with torch."""
        moe = self.config.text.moe
        if moe is None:
            raise ConfigError(
                "kestrel_kernels is on, but the model has no experts to choose; turn it off"
            )
        choose = precompiled(moe.num_experts, moe.experts_per_token, self.text.wte)
        for block in self.text.blocks:
            if isinstance(block.mlp, MixtureOfExperts):
                block.mlp.choose = choose

    def new_cache(self, slots: int) -> SlotKV:
        """KV cache with one slot per running request."""
        return self.cached.new_cache(slots)

    def prefill(
        self, embeds: Tensor, lengths: Tensor, prefix: int, cache: KVCache, slots: Tensor
    ) -> Tensor:
        """Run right-padded prompts [B, T, dim] from their first position and store their keys and
        values; the first ``prefix`` positions see each other in both directions.

        ``lengths`` and ``slots`` int64 [B]. Gives the hidden state of each prompt's last position,
        [B, dim].
        """
        starts = torch.zeros_like(lengths)
        hidden = self.cached.extend(embeds, starts, cache, slots, embeds.shape[1], prefix)
        return hidden[torch.arange(len(embeds), device=hidden.device), lengths - 1]

    def decode(self, embeds: Tensor, positions: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        """One decode step for a batch [B, dim] at ``positions``, ``slots`` int64 [B]. Gives
        [B, dim]."""
        return self.cached.decode(embeds, positions, cache, slots, int(positions.max()) + 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, dim] -> [B, vocab]."""
        return self.text.logits(hidden) if self._cached is None else self._cached.logits(hidden)

    def coord_logits(self, hidden: Tensor) -> Tensor:
        """[B, dim] -> [B, coord bins]."""
        return self.region.coord_logits(hidden)

    def size_logits(self, hidden: Tensor) -> Tensor:
        """[B, dim] -> [B, 2, size bins]."""
        return self.region.size_logits(hidden)


def load_vision(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    """The vision tower alone of a checkpoint; raises ``ConfigError`` as :func:`load` does."""
    holder = nn.Module()
    with torch.device("meta"):
        vision = VisionEncoder(checkpoint.architecture().vision)
    holder.vision = vision
    load_weights(holder, checkpoint.weights, device, dtype, "vision.", checkpoint.ties)
    return vision.eval().requires_grad_(False)


def load(
    source: Path | Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    max_context: int | None = None,
    *,
    half_images: bool = False,
    half_kv: bool = False,
) -> Moondream:
    """Load a checkpoint (a folder, a weights file with its other files beside it, or one found).

    ``max_context``: positions of a request are bounded by it where the model would take more.
    ``half_images``: a float32 model encodes images in bfloat16; ``half_kv``: it keeps keys and
    values in it.
    Raises ``ConfigError`` naming the missing file or the tensors that do not fit.
    """
    checkpoint = local_checkpoint(source) if isinstance(source, Path) else source
    config = checkpoint.architecture()
    if max_context is not None and max_context < config.text.max_context:
        if max_context <= config.text.prefix_attn:
            raise ConfigError(
                f"max_context must be larger than the {config.text.prefix_attn} positions that BOS "
                f"and an image take, not {max_context}"
            )
        config = replace(config, text=replace(config.text, max_context=max_context))
    with torch.device("meta"):
        model = Moondream(config)
    load_weights(model, checkpoint.weights, device, dtype, ties=checkpoint.ties)
    model.text.reset_tables()
    whole = dtype == torch.float32
    model.fuse(half_images=half_images and whole, half_kv=half_kv and whole)
    model.tokenizer = SegmentTokenizer.from_file(checkpoint.tokenizer, config.prompt)
    if model.tokenizer.size > config.text.vocab_size:
        # Most nouns may still be read: those that cannot are refused one by one.
        log.warning(
            "%s has %d ids, and text.vocab_size of the model is %d: nouns with others are refused",
            checkpoint.tokenizer,
            model.tokenizer.size,
            config.text.vocab_size,
        )
    return model.eval().requires_grad_(False)
