"""Decode steps of a few fixed sizes over paged keys and values: what a GPU runs.

A step is padded to the next size; its inputs lie in the same memory each time, so that it can be
captured once and launched as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kestrel.moondream.cached import CachedText
from kestrel.moondream.kv import PAGE, PagedKV
from kestrel.ops.fast import PagedDecode
from kestrel.ops.graphs import Captured, Pool

FIRST_SPAN = 512
"""Without FlashInfer a step reads a power of two times so many positions of every row."""


class DecodeSteps:
    """The decode steps of one cache. Used by one thread, under ``torch.inference_mode``."""

    def __init__(self, text: CachedText, cache: PagedKV, *, flashinfer: bool) -> None:
        """``flashinfer``: attention by FlashInfer, which ``kestrel.ops.fast.wanted`` vouches for.
        On CUDA every step is captured here, which takes a moment and memory of its own, and writes
        into the first position of each slot: ``cache`` must not hold anything yet."""
        if any(cache.held):
            raise ValueError("steps are made before any slot holds pages")
        self._text, self._cache = text, cache
        c, device = text.config, cache.kv.device
        self._x = text.text.wte.new_zeros(cache.slots, c.dim)
        self._positions = torch.zeros(cache.slots, dtype=torch.int64, device=device)
        self._sizes = _doublings(1, cache.slots)
        self._spans = [c.max_context] if flashinfer else _doublings(FIRST_SPAN, c.max_context)
        self._attention: dict[int, PagedDecode] = {}
        if flashinfer:
            heads = (c.n_heads, c.n_kv_heads, c.head_dim)
            pages = cache.table.shape[1]
            for size in self._sizes:
                self._attention[size] = PagedDecode(size, pages, PAGE, heads, cache.kv)
                self._attention[size].plan([], [])
        pool = Pool()
        # The largest first: the others then fit into its memory.
        self._steps = {
            (size, span): Captured(self._step(size, span), device, pool)
            for size in reversed(self._sizes)
            for span in reversed(self._spans)
        }

    def _step(self, size: int, span: int) -> Callable[[], Tensor]:
        text, cache, kernel = self._text, self._cache, self._attention.get(size)

        def attention(layer: int, q: Tensor) -> Tensor:
            assert kernel is not None
            return kernel(cache.kv[layer], q)

        def run() -> Tensor:
            return text.decode(
                self._x[:size],
                self._positions[:size],
                cache,
                None,
                span,
                attention=None if kernel is None else attention,
            )

        return run

    def __call__(self, x: Tensor, filled: Sequence[int]) -> Tensor:
        """One step of slots 0..B-1, all that are held: ``x`` [B, dim] embeddings at positions
        ``filled``. Gives hidden states [B, dim], overwritten by the next step."""
        rows = len(x)
        size = next(size for size in self._sizes if size >= rows)
        span = next(span for span in self._spans if span > max(filled))
        # Rows of padding are of free slots: what is written for them lands in nobody's page.
        places = [*filled, *([0] * (size - rows))]
        self._x[:rows] = x
        self._positions[:size] = torch.tensor(places, device=self._positions.device)
        if size in self._attention:
            lengths = [position + 1 for position in filled]
            self._attention[size].plan(self._cache.held[:rows], lengths)
        return self._steps[size, span]()[:rows]


def _doublings(first: int, last: int) -> list[int]:
    """``first``, twice that and so on while under ``last``, and ``last``."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]
