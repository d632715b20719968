"""Requests that decode together: what one engine step runs on the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kestrel.api import SegmentSettings
from kestrel.moondream.model import Moondream
from kestrel.ops.sampling import is_greedy, sample
from kestrel.skills.segment import Coord, Phase, Prompt, SegmentDecode, Size, Token


@dataclass(eq=False)
class Row:
    """One request in the batch."""

    prompt: Prompt
    decode: SegmentDecode
    settings: SegmentSettings
    draws: random.Random
    """The request's own source of chance: its outcome does not depend on its neighbours."""
    image: Tensor | None = field(default=None, kw_only=True)
    """Embeddings [patches, dim]."""
    slot: int = field(default=-1, kw_only=True)
    position: int = field(default=0, kw_only=True)
    """Where the next token goes."""
    token: Token = field(default=0, kw_only=True)
    """The last sampled token, not yet fed."""


class Batch:
    """The running rows and their KV slots. Used by one thread, under ``torch.inference_mode``."""

    def __init__(self, model: Moondream, slots: int) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._cache = model.new_cache(slots)
        self._free = list(range(slots))
        config, device = model.config, model.device
        self._device = device
        self._bos = model.embed_tokens(torch.tensor([config.prompt.bos_id], device=device))
        self._region_ids = [config.prompt.coord_id, config.prompt.size_id]
        self._first_ids = [config.prompt.coord_id, config.prompt.eos_id]
        self._coord_id = config.prompt.coord_id
        region = config.region
        coords = torch.arange(region.coord_out_dim, device=device)
        sizes = torch.arange(region.size_out_dim // 2, device=device)
        # Bins become values on the host by table: the same numbers, without a second transfer.
        self._coords: list[float] = model.region.coord_value(coords).tolist()
        self._sizes: list[float] = model.region.size_value(sizes).tolist()

    @property
    def free(self) -> int:
        """Slots that no row holds."""
        return len(self._free)

    def encode(self, crops: np.ndarray, tiling: tuple[int, int]) -> Tensor:
        """Crops uint8 [N, S, S, 3] of one image and their grid -> embeddings [patches, dim]."""
        tensor = torch.from_numpy(crops).permute(0, 3, 1, 2).to(self._device)
        return self.model.vision.embed(tensor, tiling)

    def release(self, row: Row) -> None:
        """Take a row out and give its slot to others."""
        self.rows.remove(row)
        self._free.append(row.slot)

    def reset(self) -> None:
        """After a failed step: no rows, all slots free, nothing left of it in the cache."""
        self.rows = []
        self._free = list(range(self._cache.slots))
        self._cache.k.zero_()
        self._cache.v.zero_()

    def step(self, joining: Sequence[Row]) -> None:
        """Feed every running row's last token, prefill those that join, sample once for all.

        Afterwards each row's ``token`` is what it sampled. ``joining`` holds at most ``free`` rows.
        """
        hidden = [self._decode(self.rows)] if self.rows else []
        pictured = [row for row in joining if row.image is not None]
        for group in (pictured, [row for row in joining if row.image is None]):
            if group:
                for row in group:
                    row.slot = self._free.pop()
                self.rows += group
                hidden.append(self._prefill(group))
        self._sample(hidden[0] if len(hidden) == 1 else torch.cat(hidden))

    def _decode(self, rows: list[Row]) -> Tensor:
        where = torch.tensor(
            [[row.position for row in rows], [row.slot for row in rows]], device=self._device
        )
        span = max(row.position for row in rows) + 1
        embeds = self._embed([row.token for row in rows])
        for row in rows:
            row.position += 1
        return self.model.decode(embeds, where[0], self._cache, where[1], span)

    def _prefill(self, rows: list[Row]) -> Tensor:
        tokens = self._embed([token for row in rows for token in row.prompt.tokens])
        texts = tokens.split([len(row.prompt.tokens) for row in rows])
        prompts = [
            torch.cat([self._bos, text] if row.image is None else [self._bos, row.image, text])
            for row, text in zip(rows, texts, strict=True)
        ]
        embeds = prompts[0][None] if len(rows) == 1 else pad_sequence(prompts, batch_first=True)
        for row in rows:
            row.position = row.prompt.length
        where = torch.tensor(
            [[row.position for row in rows], [row.slot for row in rows]], device=self._device
        )
        prefix = 0 if rows[0].image is None else 1 + len(rows[0].image)
        return self.model.prefill(embeds, where[0], prefix, self._cache, where[1])

    def _embed(self, tokens: list[Token]) -> Tensor:
        """Embeddings [n, dim]; region tokens by their encoders."""
        ids = [token if isinstance(token, int) else 0 for token in tokens]
        embeds = self.model.embed_tokens(torch.tensor(ids, device=self._device))
        coords = {i: token.value for i, token in enumerate(tokens) if isinstance(token, Coord)}
        if coords:
            embeds[[*coords]] = self.model.encode_coord(self._floats([*coords.values()]))
        sizes = {i: token for i, token in enumerate(tokens) if isinstance(token, Size)}
        if sizes:
            embeds[[*sizes]] = self.model.encode_size(self._floats([*sizes.values()]))
        return embeds

    def _floats(self, values: Sequence[float | Size]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _sample(self, hidden: Tensor) -> None:
        """Set every row's ``token`` from ``hidden`` [rows, dim], with one transfer to the host."""
        rows = self.rows
        texts = [i for i, r in enumerate(rows) if r.decode.phase in (Phase.TEXT, Phase.FIRST)]
        coords = [i for i, r in enumerate(rows) if r.decode.phase in (Phase.FIRST, Phase.CENTRE_Y)]
        sizes = [i for i, r in enumerate(rows) if r.decode.phase is Phase.SIZE]
        parts = []
        if texts:
            parts.append(self._choose(self._token_logits(hidden, texts), texts))
        if coords:
            parts.append(self._choose(self.model.coord_logits(self._pick(hidden, coords)), coords))
        if sizes:
            logits = self.model.size_logits(self._pick(hidden, sizes)).flatten(0, 1)
            parts.append(self._choose(logits, [i for i in sizes for _ in range(2)]))
        chosen = iter((parts[0] if len(parts) == 1 else torch.cat(parts)).tolist())
        for i in texts:
            rows[i].token = next(chosen)
        for i in coords:
            value = Coord(self._coords[next(chosen)])
            if rows[i].decode.phase is Phase.CENTRE_Y or rows[i].token == self._coord_id:
                rows[i].token = value
        for i in sizes:
            rows[i].token = Size(self._sizes[next(chosen)], self._sizes[next(chosen)])

    def _pick(self, hidden: Tensor, which: list[int]) -> Tensor:
        return hidden if len(which) == len(hidden) else hidden[which]

    def _token_logits(self, hidden: Tensor, which: list[int]) -> Tensor:
        """Token logits [rows, vocab] with -inf where the grammar allows no token."""
        logits = self.model.logits(self._pick(hidden, which))
        first = [n for n, i in enumerate(which) if self.rows[i].decode.phase is Phase.FIRST]
        opening = logits[first][:, self._first_ids] if first else None
        logits[:, self._region_ids] = -torch.inf
        if opening is not None:
            logits[first] = -torch.inf
            for column, token_id in enumerate(self._first_ids):
                logits[first, token_id] = opening[:, column]
        return logits

    def _choose(self, logits: Tensor, which: list[int]) -> Tensor:
        """``sample`` with the settings of rows ``which``."""
        rows = [self.rows[i] for i in which]
        temperatures = [row.settings.temperature for row in rows]
        if all(map(is_greedy, temperatures)):
            return logits.argmax(dim=-1)
        draws = [row.draws.random() for row in rows]
        return sample(logits, temperatures, [row.settings.top_p for row in rows], draws)
