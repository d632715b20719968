"""The text decoder over a KV cache: what serving runs, layer by layer, with few and large calls.

It computes what ``TextDecoder`` computes. The projections that read one input are one matrix, those
that add to one output are another, tau's positions and the rotation come from tables: a decode step
of a small model on a CPU is otherwise mostly the cost of calling operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.moondream.kv import PAGE, KVCache, PagedKV, SlotKV, Write
from kestrel.moondream.moe import MixtureOfExperts
from kestrel.moondream.stacked import StackedLayers, stackable
from kestrel.moondream.text import Block, DenseMlp, TextDecoder
from kestrel.ops.attention import attend, by_query
from kestrel.ops.bits import bits_of, numpy_name
from kestrel.ops.linear import Product, shape_of
from kestrel.ops.rows import compiled
from kestrel.ops.shares import Share

LANES = 16
"""Attention reads this many positions, or a multiple: the CPU's kernel adds up what is left over
from its vectors in another order, so that a request's last bits would depend on how far the others
of its batch have come. Positions that nobody sees add exact zeros."""

ONE_THREAD = 2**20
"""Products in the attention of a layer up to which one thread has done it, compiled, before several
have by torch's operators."""

Attention = Callable[[int, Tensor], Tensor]
"""Attention of one layer's queries [B, heads, head_dim] over the cache, alike in shape."""


@dataclass(slots=True)
class _Layer:
    """One block as a few matrices."""

    ln_weight: Tensor
    ln_bias: Tensor
    into: list[Product]
    """What reads the normed input: qkv and fc1, as one where fused."""
    out: list[Product]
    """What adds to the residual: proj and fc2, as one where fused."""
    tau: Product | None
    """[heads + 2 * kv_heads, packed]: token weights of q, zeros for k, those of v."""
    mixture: nn.Module | None


class CachedText:
    """A text decoder's layers, made ready for serving.

    With ``fuse`` its weights are joined once and the decoder's own parameters become views of them,
    or mere shapes where they are large and the CPU reads them in another order: no large weight is
    held twice. The decoder may then no longer be trained.
    """

    def __init__(
        self, text: TextDecoder, *, fuse: bool, half_prefix: bool = False, half_kv: bool = False
    ) -> None:
        """Where what lies between products is compiled: ``half_prefix``: those of prefixes are in
        bfloat16, from a copy of the weights; ``half_kv``: keys and values are kept in it."""
        c = text.config
        self.text, self.config = text, c
        self.kv_dtype = torch.bfloat16 if half_kv else text.wte.dtype
        """Type of keys and values."""
        self._kv_heads = c.n_heads + c.n_kv_heads
        self._all_heads = c.n_heads + 2 * c.n_kv_heads
        self._packed = self._all_heads * c.head_dim
        half = c.rotary_dim // 2
        cos, sin = text.rotary.unbind(1)
        rest = cos.new_ones(len(cos), c.head_dim - 2 * half)
        # A head times cos plus its halves exchanged times sin; the rest of it passes through.
        self._cos = torch.cat([cos, cos, rest], dim=1)[:, None]
        self._sin = torch.cat([-sin, sin, 0 * rest], dim=1)[:, None]
        swap = torch.arange(c.head_dim, device=cos.device)
        self._swap = torch.cat([swap[half : 2 * half], swap[:half], swap[2 * half :]])
        self._tau_table = self._position_scales() if c.tau_attn else None
        plain = text.wte.device.type == "cpu" and text.wte.dtype == torch.float32
        self.stacked: StackedLayers | None = None
        """Where ``decode`` is one compiled call."""
        self._rows: Callable[..., None] | None = None
        """What a layer does between its products, compiled."""
        self._prefix_rows: Callable[..., None] | None = None
        """The same for a prefix, as far as attention."""
        if fuse and plain:
            kept = numpy_name(self.kv_dtype)
            tables = [self._numbers(number, block) for number, block in enumerate(text.blocks)]
            if stackable(text):
                self.stacked = compiled(
                    lambda made: StackedLayers(text, made, tables, self.kv_dtype)
                )
            else:
                self._rows = compiled(lambda made: made.layer_rows(kept))
            kind = "uint16" if half_prefix else "float32"
            self._prefix_rows = compiled(lambda made: made.prefix_rows(kind, kept))
            self._tables = tables
        if self.stacked is None and self._rows is None:
            # Torch's operators would widen all that they read.
            self.kv_dtype = text.wte.dtype
        self._half = []
        """Of each layer what reads its input and what adds to its output, in bfloat16."""
        if half_prefix and self._prefix_rows is not None:
            self._half = [_halved(block) for block in text.blocks]
        self._layers = [self._layer(block, fuse) for block in text.blocks]

    def compiles(self, cache: KVCache, rows: int, span: int) -> bool:
        """Whether ``decode`` of so many rows, of ``span`` positions at most, runs compiled, on one
        thread. A slot may then have several rows in one step, in order of position."""
        if not isinstance(cache, SlotKV):
            return False
        if self.stacked is not None or self._rows is None:
            return self.stacked is not None
        products = 2 * rows * span * self.config.n_heads * self.config.head_dim
        return products <= ONE_THREAD or torch.get_num_threads() == 1

    def _layer(self, block: Block, fuse: bool) -> _Layer:
        attention, mlp = block.attn, block.mlp
        if fuse and isinstance(mlp, MixtureOfExperts):
            mlp.finalize()
        into, out = [attention.qkv], [attention.proj]
        if isinstance(mlp, DenseMlp):
            into.append(mlp.fc1)
            out.append(mlp.fc2)
        tau = None
        if attention.tau is not None:
            wq, wv = attention.tau.wq, attention.tau.wv
            both = torch.cat([wq, wq.new_zeros(self.config.n_kv_heads, wq.shape[1]), wv])
            tau = Product(both.detach(), None, reorder=fuse)
        return _Layer(
            block.ln.weight,
            block.ln.bias,
            [_joined(into, 0)] if fuse else [_as_it_is(linear) for linear in into],
            [_joined(out, 1)] if fuse else [_as_it_is(linear) for linear in out],
            tau,
            None if isinstance(mlp, DenseMlp) else mlp,
        )

    def _position_scales(self) -> Tensor:
        """Tau by position, [layers, max_context, heads + 2 * kv_heads, 1]; 1 for keys."""
        text, c = self.text, self.config
        scales = []
        for block in text.blocks:
            assert block.attn.tau is not None
            by_position = block.attn.tau.by_position(text.log_positions).to(text.wte.dtype)
            keys = by_position.new_ones(len(by_position), c.n_kv_heads)
            scales.append(torch.cat([by_position, keys, by_position], dim=1))
        return torch.stack(scales)[..., None]

    def _numbers(self, number: int, block: Block) -> list[np.ndarray]:
        """What ``kestrel.ops.compiled`` reads of a layer: tau's weights and its rows by
        position, cosines and sines."""
        c, half = self.config, self.config.rotary_dim // 2
        weights, by_position = torch.empty(0, self._packed), torch.empty(0, 0)
        if block.attn.tau is not None:
            assert self._tau_table is not None
            weights = torch.cat([block.attn.tau.wq, block.attn.tau.wv])
            scales = self._tau_table[number, ..., 0]
            by_position = torch.cat([scales[:, : c.n_heads], scales[:, self._kv_heads :]], dim=1)
        tables = [weights, by_position, self._cos[:, 0, :half], self._sin[:, 0, half : 2 * half]]
        return [table.detach().contiguous().numpy() for table in tables]

    def new_cache(self, slots: int) -> SlotKV:
        """Zeroed cache for ``slots`` running requests, on the model's device and dtype."""
        c = self.config
        shape = (c.n_layers, 2, slots, c.max_context, c.n_kv_heads, c.head_dim)
        return SlotKV(self.text.wte.new_zeros(shape, dtype=self.kv_dtype))

    def new_pages(self, slots: int, nbytes: int | None = None) -> PagedKV:
        """The same in pages, of ``nbytes`` in all or enough for every slot to be full."""
        c = self.config
        page = (2, PAGE, c.n_kv_heads, c.head_dim)
        each = c.n_layers * torch.Size(page).numel() * self.kv_dtype.itemsize
        full = slots * -(-c.max_context // PAGE)
        pages = 1 + (full if nbytes is None else min(full, nbytes // each))
        zeros = self.text.wte.new_zeros(c.n_layers, pages, *page, dtype=self.kv_dtype)
        return PagedKV(zeros, slots, c.max_context)

    @property
    def shares_prefixes(self) -> bool:
        """Whether ``prefix`` takes shares, and gives the same numbers by them."""
        kind = torch.bfloat16 if self._half else self.text.wte.dtype
        return self._prefix_rows is not None and by_query(kind, self.config.head_dim)

    def prefix(self, x: Tensor, share: Share | None = None, start: int = 0) -> Tensor:
        """Keys and values of positions that all see each other: BOS and image.

        ``x`` [P, dim] embeddings of positions 0..P-1; gives [layers, 2, P, kv_heads, head_dim].
        With a share (``shares_prefixes``), both are of its positions alone, from ``start`` on.
        """
        # Several threads do as much of a large model operator by operator.
        several = self.stacked is None and torch.get_num_threads() > 1
        if self._prefix_rows is not None and (self._half or not several):
            return self._prefix_compiled(x, self._prefix_rows, share, start)
        assert share is None
        length = len(x)
        kept = []
        step = self._step(torch.arange(length, device=x.device))
        for number, layer in enumerate(self._layers):
            normed, heads, hidden = self._project(layer, number, x, step)
            q, k, v = self._split(heads[None])
            kept.append(heads[:, self.config.n_heads :].unflatten(1, (2, -1)).transpose(0, 1))
            if number + 1 < len(self._layers):  # the last layer's output is nobody's input
                x = self._residual(layer, x, normed, attend(q, k, v), hidden)
        return torch.stack(kept).to(self.kv_dtype)

    def _prefix_compiled(
        self, x: Tensor, rows: Callable[..., None], share: Share | None, start: int
    ) -> Tensor:
        """``prefix`` with products and attention alone left to torch."""
        c, length = self.config, len(x)
        kind = torch.bfloat16 if self._half else x.dtype
        shape = (c.n_layers, 2, length, c.n_kv_heads, c.head_dim)
        kept = x.new_empty(shape, dtype=self.kv_dtype)
        q = x.new_empty(length, c.n_heads, c.head_dim, dtype=kind)
        for number, (layer, tables) in enumerate(zip(self._layers, self._tables, strict=True)):
            into, out = self._half[number] if self._half else (*layer.into, *layer.out)
            normed = F.layer_norm(x, x.shape[-1:], layer.ln_weight, layer.ln_bias, 1e-5)
            joined = into(normed.to(kind))
            seen = q.new_empty(length, joined.shape[1] - self._packed + q[0].numel())
            written = bits_of(kept[number]), c.n_heads, bits_of(q.flatten(1)), bits_of(seen)
            weights, *by_position = tables
            rows(bits_of(joined), weights, *(table[start:] for table in by_position), *written)
            if number + 1 == c.n_layers:  # its output is nobody's input
                break
            both = kept[number] if share is None else share.gathered(kept[number], 1)
            # One image, heads before positions.
            asking, keys, values = (t.transpose(0, 1)[None] for t in (q, *both.to(kind)))
            attended = attend(asking, keys, values)[0].transpose(0, 1)
            seen[:, : q[0].numel()].unflatten(1, (c.n_heads, -1)).copy_(attended)
            if layer.mixture is not None:
                x = x + layer.mixture(normed)
            x = x + out(seen) if self._half else out.plus(seen, x)
        return kept

    def extend(
        self,
        x: Tensor,
        starts: Tensor,
        cache: KVCache,
        slots: Tensor,
        span: int,
        prefix: int = 0,
        *,
        stretch: slice | None = None,
    ) -> Tensor:
        """Run the next positions of several requests, each seeing all that its slot holds.

        ``x`` [B, T, dim] right-padded embeddings of positions ``starts`` int64 [B] onwards,
        ``slots`` int64 [B]; ``span`` is at least the largest position + 1. The first ``prefix``
        positions of a request see each other in both directions (they must come at once).
        ``stretch``: the same slots where they lie in a row, which are then read in their place.
        Gives hidden states [B, T, dim].
        """
        batch, length, dim = x.shape
        # Padding is written where a request goes on, or to the context's last position: nobody
        # reads it before it is written again.
        offsets = torch.arange(length, device=x.device)
        positions = (starts[:, None] + offsets).clamp_(max=cache.positions - 1)
        where = slots[:, None].expand_as(positions).flatten()
        if not prefix and self.compiles(cache, batch * length, span):
            flat = x.reshape(-1, dim), positions.flatten(), cache, where
            return self._decode_compiled(*flat).view(batch, length, dim)
        span = _whole_lanes(span, cache)
        keys = torch.arange(span, device=x.device)
        seen = keys <= positions[..., None]
        if prefix:
            seen |= (keys < prefix) & (positions[..., None] < prefix)
        mask = seen[:, None]
        write = cache.writer(where, positions.flatten())
        read = cache.reader(stretch or slots, span)
        step = self._step(positions.flatten())
        x = x.reshape(-1, dim)
        for number, layer in enumerate(self._layers):
            normed, heads, hidden = self._project(layer, number, x, step)
            self._write(write, number, heads)
            q = heads[:, : self.config.n_heads].unflatten(0, (batch, length)).transpose(1, 2)
            k, v = read(number).to(q.dtype)
            x = self._residual(layer, x, normed, attend(q, k, v, mask), hidden)
        return x.view(batch, length, dim)

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KVCache,
        slots: Tensor | None,
        span: int,
        *,
        level: bool = False,
        attention: Attention | None = None,
    ) -> Tensor:
        """One step for several requests.

        ``x`` [B, dim] embeddings at ``positions`` int64 [B] of ``slots`` int64 [B], or of slots
        0..B-1 (None: nothing is gathered); ``span`` is at least the largest position + 1.
        ``level``: every position is ``span - 1``, so that no mask is needed. ``attention`` takes
        the place of reading the cache and ``attend``. Gives hidden states [B, dim].
        """
        batch = len(x)
        if attention is None and self.compiles(cache, batch, span):
            where = torch.arange(batch) if slots is None else slots
            return self._decode_compiled(x, positions, cache, where)
        level = level and span % LANES == 0
        span = _whole_lanes(span, cache)
        where = torch.arange(batch, device=x.device) if slots is None else slots
        write = cache.writer(where, positions)
        read = None
        if attention is None:
            read = cache.reader(slice(batch) if slots is None else slots, span)
        step = self._step(positions)
        mask = None
        if not level and read is not None:
            unseen = torch.arange(span, device=x.device) > positions[:, None]
            mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill_(unseen, -torch.inf)
            mask = mask[:, None, None]
        for number, layer in enumerate(self._layers):
            normed, heads, hidden = self._project(layer, number, x, step)
            self._write(write, number, heads)
            q = heads[:, : self.config.n_heads]
            if read is None:
                assert attention is not None
                seen = attention(number, q)[:, :, None]
            else:
                k, v = read(number).to(q.dtype)
                seen = attend(q[:, :, None], k, v, mask)
            x = self._residual(layer, x, normed, seen, hidden)
        return x

    def _decode_compiled(
        self, x: Tensor, positions: Tensor, cache: KVCache, slots: Tensor
    ) -> Tensor:
        """``decode`` in one call, or with the products alone left to torch."""
        if self.stacked is not None:
            rows = np.array(x.numpy(), order="C")
            where, at = slots.contiguous().numpy(), positions.contiguous().numpy()
            return torch.from_numpy(self.stacked(rows, at, cache.kv, where))
        assert self._rows is not None
        kv = bits_of(cache.kv)
        where, at = slots.contiguous().numpy(), positions.contiguous().numpy()
        heads = self.config.n_heads
        for layer, tables, stretch in zip(self._layers, self._tables, kv, strict=True):
            (into,), (out,) = layer.into, layer.out
            normed = F.layer_norm(x, x.shape[-1:], layer.ln_weight, layer.ln_bias, 1e-5)
            joined = into(normed)
            width = joined.shape[1] - self._packed + heads * self.config.head_dim
            seen = joined.new_empty(len(x), width)
            self._rows(joined.numpy(), *tables, stretch, where, at, heads, seen.numpy())
            if layer.mixture is not None:
                x = x + layer.mixture(normed)
            x = out.plus(seen, x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, dim] -> [N, vocabulary]."""
        if self.stacked is not None:
            return torch.from_numpy(self.stacked.logits(hidden.numpy()))
        return self.text.logits(hidden)

    # One layer.

    def _step(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rotation and tau of positions [N]: cos and sin [N, 1, head_dim], tau by layer."""
        tau = None if self._tau_table is None else self._tau_table[:, positions]
        return self._cos[positions], self._sin[positions], tau

    def _project(
        self, layer: _Layer, number: int, x: Tensor, step: tuple[Tensor, Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x`` [N, dim] -> normed [N, dim], scaled and rotated heads [N, all heads, head_dim]
        (q, k, v) and the MLP's inner values before their GELU [N, ff]."""
        cos, sin, tau = step
        normed = F.layer_norm(x, x.shape[-1:], layer.ln_weight, layer.ln_bias, 1e-5)
        packed, *rest = [product(normed) for product in layer.into]
        hidden = rest[0] if rest else None
        if packed.shape[1] > self._packed:
            packed, hidden = packed.split([self._packed, packed.shape[1] - self._packed], dim=1)
        heads = packed.unflatten(1, (self._all_heads, -1))
        if tau is not None:
            assert layer.tau is not None
            scale = layer.tau(F.gelu(packed, approximate="tanh")).tanh_()
            heads.mul_(scale[..., None].add_(tau[number]))
        qk = heads[:, : self._kv_heads]
        if qk.dtype == torch.float32:
            turned = qk.index_select(2, self._swap)
            qk.mul_(cos).addcmul_(turned, sin)
        else:
            exact = qk.float()
            qk.copy_((exact * cos).addcmul_(exact.index_select(2, self._swap), sin))
        return normed, heads, hidden

    def _split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, all heads, D] -> q [B, H, T, D], k and v [B, Hkv, T, D]."""
        c = self.config
        q, k, v = heads.transpose(1, 2).split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        return q, k, v

    def _write(self, write: Write, number: int, heads: Tensor) -> None:
        """Store the keys and values among the heads of one layer."""
        write(number, heads[:, self.config.n_heads :])

    def _residual(
        self, layer: _Layer, x: Tensor, normed: Tensor, seen: Tensor, hidden: Tensor | None
    ) -> Tensor:
        """``x`` plus attention's output ``seen`` [B, H, T, D] and the MLP's, projected."""
        seen = seen.transpose(1, 2).reshape(len(x), -1)
        if hidden is None:
            assert layer.mixture is not None
            x = x + layer.mixture(normed)
            parts = [seen]
        else:
            parts = [seen, F.gelu(hidden, approximate="tanh")]
        if len(layer.out) < len(parts):
            parts = [torch.cat(parts, dim=1)]
        for part, product in zip(parts, layer.out, strict=True):
            x = product.plus(part, x)
        return x


def _as_it_is(linear: nn.Linear) -> Product:
    return Product(linear.weight, linear.bias, reorder=False)


def _halved(block: Block) -> tuple[Product, Product]:
    """The products of a block's input and of its output in bfloat16, mixtures left out."""
    into, out = [block.attn.qkv], [block.attn.proj]
    if isinstance(block.mlp, DenseMlp):
        into.append(block.mlp.fc1)
        out.append(block.mlp.fc2)
    weights = torch.cat([linear.weight.detach() for linear in into])
    back = torch.cat([linear.weight.detach() for linear in out], dim=1)
    biases = torch.cat([linear.bias.detach() for linear in into])
    added = torch.stack([linear.bias.detach() for linear in out]).sum(0)
    return (
        Product(weights.bfloat16(), biases.bfloat16(), reorder=True),
        Product(back.bfloat16(), added.bfloat16(), reorder=True),
    )


def _whole_lanes(span: int, cache: KVCache) -> int:
    """``span`` rounded up to a multiple of ``LANES``, at most what the cache holds."""
    return min(cache.positions, -(-span // LANES) * LANES)


def _joined(linears: list[nn.Linear], dim: int) -> Product:
    """One product of several layers that read the same input (``dim`` 0) or add to the same output
    (1). Their weights become views of its own, or mere shapes where it holds them in its order."""
    biases = [linear.bias.detach() for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears], dim=dim)
    product = Product(
        weight, torch.stack(biases).sum(0) if dim else torch.cat(biases), reorder=True
    )
    sizes = [linear.weight.shape[dim] for linear in linears]
    for linear, part in zip(linears, weight.split(sizes, dim=dim), strict=True):
        view = nn.Parameter(part, requires_grad=False)
        linear.weight = view if product.weight is not None else shape_of(part)
    return product
