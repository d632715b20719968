"""The layers of a small model stacked, as its compiled steps read them."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kestrel.moondream.text import DenseMlp, TextDecoder
from kestrel.ops.bits import bits_of, numpy_name

SMALL = 16_000_000
"""Parameters of all layers up to which they are held once more for steps: larger ones are bound by
reading their weights, which the products of ``kestrel.ops.linear`` do as fast."""
BLOCK = 16
"""Outputs of a compiled product whose weights lie together: ``LANES`` of ``kestrel.ops.lanes``."""


def stackable(text: TextDecoder) -> bool:
    """Whether a decoder's steps can run as one compiled call: float32 on a CPU, small, layers all
    alike."""
    c = text.config
    if not all(isinstance(block.mlp, DenseMlp) for block in text.blocks):
        return False
    packed = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    sizes = [c.dim, packed + c.ff_dim, c.vocab_size]
    few = sum(weights.numel() for weights in text.blocks.parameters()) <= SMALL  # type: ignore[attr-defined]
    return few and all(size % BLOCK == 0 for size in sizes)


class StackedLayers:
    """Runs every layer, and the head, of a few rows in one call each.

    A copy of the weights, in the bits of bfloat16 where all of them are exact in it (half of what
    a step reads), else in float32. To be made while ``text`` still holds its own weights.
    """

    def __init__(
        self,
        text: TextDecoder,
        functions: ModuleType,
        tables: list[list[np.ndarray]],
        kv_dtype: torch.dtype,
    ) -> None:
        """``functions``: ``kestrel.ops.compiled``. ``tables`` by layer, as it takes them: tau's
        weights and rows, cosines, sines. ``kv_dtype``: the cache's, float32 or bfloat16."""
        self._heads = text.config.n_heads
        norms, into, into_bias, out, out_bias = [], [], [], [], []
        for block in text.blocks:
            attention, mlp = block.attn, block.mlp
            assert isinstance(mlp, DenseMlp)
            norms.append(torch.stack([block.ln.weight, block.ln.bias]))
            into.append(torch.cat([attention.qkv.weight, mlp.fc1.weight]).T)
            into_bias.append(torch.cat([attention.qkv.bias, mlp.fc1.bias]))
            out.append(torch.cat([attention.proj.weight, mlp.fc2.weight], dim=1).T)
            out_bias.append(attention.proj.bias + mlp.fc2.bias)
        matrices = [torch.stack(into), torch.stack(out), text.lm_head.weight.T]
        exact = all(torch.equal(m.bfloat16().float(), m) for m in matrices)
        read_into, read_out, self._head_weights = (_held(m, bits=exact) for m in matrices)
        kind = read_into.dtype.name
        cache = numpy_name(kv_dtype)
        self._run, self._head = functions.all_layers(kind, cache), functions.head(kind)
        self._run_on = functions.text_steps(kind, cache)
        tau_weights, tau_rows, cos, sin = (list(table) for table in zip(*tables, strict=True))
        self._layers = (
            _array(torch.stack(norms)),
            read_into,
            _array(torch.stack(into_bias)),
            read_out,
            _array(torch.stack(out_bias)),
            np.stack(tau_weights),
            np.stack(tau_rows),
            cos[0],
            sin[0],
        )
        self._table = _array(text.wte)
        self._head_norm = _array(torch.stack([text.post_ln.weight, text.post_ln.bias]))
        self._head_bias = _array(text.lm_head.bias)

    def embed(self, ids: list[int]) -> np.ndarray:
        """Embeddings [N, dim] of tokens."""
        return self._table[ids]

    def __call__(
        self, rows: np.ndarray, positions: np.ndarray, kv: Tensor, slots: np.ndarray
    ) -> np.ndarray:
        """Embeddings ``rows`` [N, dim] at ``positions`` of ``slots``, int64 [N], become hidden
        states in place; keys and values are written into ``kv`` [layers, 2, slots, max_context,
        kv_heads, head_dim]."""
        self._run(rows, *self._layers, bits_of(kv), slots, positions, self._heads)
        return rows

    def run_on(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        kv: Tensor,
        slots: np.ndarray,
        steps: int,
        *,
        barred: np.ndarray,
        last: int,
    ) -> np.ndarray:
        """Up to ``steps`` steps in one call: ``tokens`` [N] at ``positions`` of ``slots``, each
        another's, and then what each row finds likeliest, ``barred`` tokens aside.

        All int64. Gives the likeliest tokens [steps taken, N]: a step that has ``last`` among them
        ends it. Keys and values are written as by a call for each step, with the same numbers.
        """
        chosen = np.empty((steps, len(tokens)), np.int64)
        taken = self._run_on(
            tokens, steps, last, barred, self._table, *self._layers, bits_of(kv), slots, positions,
            self._heads, self._head_norm, self._head_weights, self._head_bias, chosen,
        )  # fmt: skip
        return chosen[:taken]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """[N, dim] -> [N, vocabulary]."""
        out = np.empty((len(hidden), len(self._head_bias)), np.float32)
        self._head(
            np.ascontiguousarray(hidden), self._head_norm, self._head_weights, self._head_bias, out
        )
        return out


def _array(numbers: Tensor) -> np.ndarray:
    return numbers.detach().contiguous().numpy()


def _held(matrix: Tensor, *, bits: bool) -> np.ndarray:
    """A float32 matrix [..., from, to] as [..., to / BLOCK, from, BLOCK], or its upper halves as
    uint16."""
    array = _array(matrix.unflatten(-1, (-1, BLOCK)).transpose(-3, -2))
    return (array.view(np.uint32) >> 16).astype(np.uint16) if bits else array
