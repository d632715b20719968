"""Keys and values of running requests: a stretch of memory for each slot, or pages for all.

Both forms give the decoder the same three things: where a step writes, what it reads, and slots
that begin with a prefix. Slots are read as they lie, which is what a CPU wants. Pages are taken as
a request needs them, so that memory bounds the positions of all requests together and not the
longest one times the slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
"""Positions of one page."""

Write = Callable[[int, Tensor], None]
"""Stores keys and values [N, 2 * kv_heads, head_dim] of one layer."""
Read = Callable[[int], Tensor]
"""Keys and values of one layer, [2, B, kv_heads, span, head_dim]."""


@dataclass
class SlotKV:
    """A stretch for every slot: [layers, 2, slots, max_context, kv_heads, head_dim], in which the
    keys of all heads, then their values, lie position after position as attention reads them.

    What lies beyond a request's position is never read, so a slot needs no clearing before it is
    used again.
    """

    kv: Tensor

    @property
    def slots(self) -> int:
        return self.kv.shape[2]

    @property
    def positions(self) -> int:
        """Positions of a request at most."""
        return self.kv.shape[3]

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one request."""
        return self.kv[:, :, 0, 0].numel() * self.kv.element_size()

    @property
    def room(self) -> int:
        """Positions of all requests together."""
        return self.slots * self.positions

    def cost(self, positions: int) -> int:
        """What a request of so many positions takes of ``room``: its slot."""
        return self.positions

    def reserve(self, slot: int, positions: int) -> None:
        """Make a free slot ready for a request that will have so many positions."""

    def free(self, slot: int) -> None:
        """Take back what a slot holds."""

    def put(self, slot: int, prefix: Tensor) -> None:
        """Begin a slot with a prefix [layers, 2, positions, kv_heads, head_dim]."""
        self.kv[:, :, slot, : prefix.shape[2]] = prefix

    def move(self, source: int, target: int, positions: int) -> None:
        """Give the first ``positions`` of one slot to another, which is free."""
        self.kv[:, :, target, :positions] = self.kv[:, :, source, :positions]

    def clear(self) -> None:
        """All slots free, nothing left in them."""
        self.kv.zero_()

    def writer(self, slots: Tensor, positions: Tensor) -> Write:
        """Writes at ``positions`` of ``slots``, int64 [N] both."""
        keys = slots * self.positions + positions
        rows = torch.stack([keys, keys + self.slots * self.positions], dim=1).flatten()
        width = self.kv.shape[4] * self.kv.shape[5]

        def write(layer: int, kv: Tensor) -> None:
            # A view [2 * slots * max_context, kv_heads * head_dim].
            self.kv[layer].view(-1, width).index_copy_(
                0, rows, kv.reshape(-1, width).to(self.kv.dtype)
            )

        return write

    def reader(self, slots: Tensor | slice, span: int) -> Read:
        """Reads the first ``span`` positions of ``slots`` int64 [B], or of a stretch of them."""

        def read(layer: int) -> Tensor:
            kv = self.kv[layer, :, :, :span]
            kv = kv[:, slots] if isinstance(slots, slice) else kv.index_select(1, slots)
            return kv.transpose(2, 3)

        return read


class PagedKV:
    """Pages for all slots: [layers, pages, 2, ``PAGE``, kv_heads, head_dim], the order that paged
    attention kernels call NHD.

    Page 0 is nobody's: what is written beyond a request's pages, or by the padding of a step of
    fixed size, lands there and is never read as anything.
    """

    def __init__(self, kv: Tensor, slots: int, positions: int) -> None:
        """``kv`` zeroed pages, ``positions`` those of a request at most."""
        self.kv = kv
        self.slots = slots
        self.positions = positions
        self.held: list[list[int]] = [[] for _ in range(slots)]
        """Pages of every slot, in order of position."""
        self._free = list(range(kv.shape[1] - 1, 0, -1))
        each = -(-positions // PAGE)
        self.table = torch.zeros(slots, each, dtype=torch.int64, device=kv.device)
        """Pages of every slot for the device, 0 where there is none."""

    @property
    def position_bytes(self) -> int:
        return self.kv[:, 0, :, 0].numel() * self.kv.element_size()

    @property
    def room(self) -> int:
        return (self.kv.shape[1] - 1) * PAGE

    def cost(self, positions: int) -> int:
        """What a request of so many positions takes of ``room``: whole pages."""
        return -(-min(positions, self.positions) // PAGE) * PAGE

    def reserve(self, slot: int, positions: int) -> None:
        assert not self.held[slot], "the slot is not free"
        count = self.cost(positions) // PAGE
        assert count <= len(self._free), "admitted without room for it"
        self.held[slot] = [self._free.pop() for _ in range(count)]
        self._enter(slot)

    def free(self, slot: int) -> None:
        self._free += reversed(self.held[slot])
        self.held[slot] = []
        self.table[slot] = 0

    def put(self, slot: int, prefix: Tensor) -> None:
        positions = torch.arange(prefix.shape[2], device=self.kv.device)
        write = self.writer(torch.full_like(positions, slot), positions)
        for layer, kv in enumerate(prefix):
            write(layer, kv.transpose(0, 1).flatten(1, 2))

    def move(self, source: int, target: int, positions: int) -> None:
        self.held[target], self.held[source] = self.held[source], []
        self._enter(target)
        self.table[source] = 0

    def clear(self) -> None:
        for slot in range(self.slots):
            self.free(slot)
        self.kv.zero_()

    def _enter(self, slot: int) -> None:
        pages = self.held[slot]
        self.table[slot] = 0
        self.table[slot, : len(pages)] = torch.tensor(pages, device=self.kv.device)

    def writer(self, slots: Tensor, positions: Tensor) -> Write:
        rows = self._rows(slots, positions).flatten()

        def write(layer: int, kv: Tensor) -> None:
            flat = self.kv[layer].view(-1, *self.kv.shape[-2:])
            kv = kv.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
            flat.index_copy_(0, rows, kv.to(self.kv.dtype))

        return write

    def reader(self, slots: Tensor | slice, span: int) -> Read:
        if isinstance(slots, slice):
            slots = torch.arange(self.slots, device=self.kv.device)[slots]
        rows = self._rows(slots[:, None], torch.arange(span, device=self.kv.device))

        def read(layer: int) -> Tensor:
            flat = self.kv[layer].view(-1, *self.kv.shape[-2:])
            return flat.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(2, 3)

        return read

    def _rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the keys, and after them the values, of positions lie among the rows of a layer:
        [2, ...]."""
        pages = self.table[slots, positions // PAGE]
        keys = pages * (2 * PAGE) + positions % PAGE
        return torch.stack([keys, keys + PAGE])


KVCache = SlotKV | PagedKV
