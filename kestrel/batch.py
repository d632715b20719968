"""Requests that decode together: what one engine step runs on the model."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kestrel.api import SegmentSettings
from kestrel.moondream.kv import PAGE, KVCache, SlotKV
from kestrel.moondream.model import Moondream
from kestrel.moondream.steps import DecodeSteps
from kestrel.ops import fast
from kestrel.ops.attention import FEW
from kestrel.ops.sampling import Nucleus, is_greedy, sample
from kestrel.ops.shares import Share, Team
from kestrel.skills.segment import Coord, Phase, Prompt, SegmentDecode, Size, Token

log = logging.getLogger(__name__)

Part = TypeVar("Part")

MANY = 4
"""Rows of a compiled step from which on two threads are faster than one."""
SHARES = 4
"""Threads that encode one picture, at most: each reads the keys and values of all of it."""
AHEAD = 8
"""Steps that one call may take."""
AHEAD_ROWS = 32
"""Rows times steps that it may take, so that who joins waits for a few milliseconds."""


@dataclass(eq=False)
class Row:
    """One request in the batch."""

    prompt: Prompt
    decode: SegmentDecode
    settings: SegmentSettings
    draws: random.Random
    """The request's own source of chance: its outcome does not depend on its neighbours."""
    slot: int = field(default=-1, kw_only=True)
    """Its place in ``Batch.rows`` and in the cache; -1: none."""
    position: int = field(default=0, kw_only=True)
    """Where the next token goes."""
    fed: int = field(default=0, kw_only=True)
    """Tokens of the prompt's text that the cache holds."""
    token: Token | None = field(default=None, kw_only=True)
    """The last sampled token, not yet fed; None while the prompt is not fed whole."""
    watched: bool = field(default=False, kw_only=True)
    """Whether ``finite`` is looked after: each look waits for the device."""
    finite: bool = field(default=True, kw_only=True)
    """False once a score of its first or region tokens was NaN or infinity."""
    given: list[Token] = field(default_factory=list, kw_only=True)
    """What the last step sampled for it, in order; its end is ``token``."""

    @property
    def unfed(self) -> int:
        """Positions of the prompt's text that are left."""
        return len(self.prompt.tokens) - self.fed

    @property
    def longest(self) -> int:
        """Positions of prompt and answer at most."""
        return self.prompt.length + self.decode.max_tokens


class Batch:
    """The running rows and their KV slots. Used by one thread, under ``torch.inference_mode``.

    Row i holds slot i: a row that leaves gives its place to the last one, whose keys and values
    move there, so that a decode step on a CPU reads the cache as it lies and gathers nothing. On
    CUDA, and where their bytes are bounded, keys and values are in pages.
    """

    def __init__(
        self,
        model: Moondream,
        slots: int,
        *,
        kv_bytes: int | None = None,
        kernels: str = "auto",
        kestrel_kernels: bool = False,
    ) -> None:
        """``kv_bytes``, ``kernels``, ``kestrel_kernels``: ``kv_cache_bytes`` and the others of
        ``RuntimeConfig``."""
        self.model = model
        if kestrel_kernels:  # before steps are captured
            model.use_kestrel_kernels()
        self.rows: list[Row] = []
        self._text = model.cached
        self._stacked = self._text.stacked
        config, device = model.config, model.device
        self.cache: KVCache
        self._steps: DecodeSteps | None = None
        self._nucleus: Nucleus | None = None
        if device.type == "cuda" or kv_bytes is not None or kernels == "flashinfer":
            self.cache = pages = self._text.new_pages(slots, kv_bytes)
            text = config.text
            heads = (text.n_heads, text.n_kv_heads, text.head_dim)
            flashinfer = fast.wanted(kernels, pages.kv, heads, PAGE)
            self._steps = DecodeSteps(self._text, pages, flashinfer=flashinfer)
            self._nucleus = fast.nucleus if flashinfer else None
        else:
            self.cache = self._text.new_cache(slots)
        self._device = device
        self._bos = model.embed_tokens(torch.tensor([config.prompt.bos_id], device=device))
        # What a request without an image begins with: BOS alone.
        self._bare = self._text.prefix(self._bos)
        self._regions = np.array([config.prompt.coord_id, config.prompt.size_id])
        self._eos_id = config.prompt.eos_id
        self._region_ids = torch.tensor(self._regions, device=device)
        self._first_ids = [config.prompt.coord_id, config.prompt.eos_id]
        self._coord_id = config.prompt.coord_id
        self.two_threads = False
        """Whether a core is free that may take half of a step's rows."""
        self.run_on = False
        """Whether a step may give rows more than one token each, where only their paths go on."""
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._team = Team(SHARES - 1)
        self._alike: dict[int, bool] = {}
        """Whether a picture came out the same by so many threads as by one."""
        region = config.region
        coords = torch.arange(region.coord_out_dim, device=device)
        sizes = torch.arange(region.size_out_dim // 2, device=device)
        # Bins become values on the host by table: the same numbers, without a second transfer.
        self._coords: list[float] = model.region.coord_value(coords).tolist()
        self._sizes: list[float] = model.region.size_value(sizes).tolist()

    @property
    def free(self) -> int:
        """Slots that no row holds."""
        return self.cache.slots - len(self.rows)

    def features(self, crops: np.ndarray, share: Share | None = None) -> Tensor:
        """Crops uint8 [N, S, S, 3] -> features [N, patches, enc_dim], of a share's patches alone
        where there is one."""
        tensor = torch.from_numpy(crops).permute(0, 3, 1, 2).to(self._device)
        return self.model.vision.features(tensor, share)

    def prefix(
        self, features: Tensor, tiling: tuple[int, int], share: Share | None = None
    ) -> Tensor:
        """Features of all crops of an image -> keys and values of BOS and image, as
        ``CachedText.prefix`` gives them; a share's features give those of its patches, BOS with
        the first."""
        image = self.model.vision.join(features, tiling).to(self._bos.dtype)
        if share is not None and share.number:
            return self._text.prefix(image, share, 1 + share.part.start)
        return self._text.prefix(torch.cat([self._bos, image]), share)

    def encode(self, crops: np.ndarray, tiling: tuple[int, int], threads: int = 1) -> Tensor:
        """Crops uint8 [N, S, S, 3] of an image -> its ``prefix``, on a CPU, by so many threads
        where it is one crop and they give the same numbers as one. The first picture for so many is
        encoded by one besides. May be called by any thread."""
        vision = self.model.vision
        if len(crops) > 1 or not (vision.shares_features and self._text.shares_prefixes):
            threads = 1
        # ``attend`` takes fewer queries otherwise.
        threads = min(threads, SHARES, vision.config.n_patches // FEW)

        def some(share: Share | None) -> Tensor:
            return self.prefix(self.features(crops, share), tiling, share)

        if not self._alike.get(threads, True):
            threads = 1
        parts = self._team.by_shares(vision.config.n_patches, threads, some)
        if len(parts) == 1:
            return parts[0]
        shared = torch.cat(parts, dim=2)
        if threads in self._alike:
            return shared
        # The first time it is tried: products are another library's.
        (alone,) = self._team.by_shares(vision.config.n_patches, 1, some)
        self._alike[threads] = torch.equal(shared, alone)
        if not self._alike[threads]:
            log.warning("cores do not share pictures: %d threads gave other numbers", threads)
        return alone

    def join(self, row: Row, prefix: Tensor | None) -> None:
        """Give a row a slot that begins with ``prefix`` (None: no image). Needs a free slot, and
        room for it in the cache."""
        prefix = self._bare if prefix is None else prefix
        row.slot = len(self.rows)
        self.cache.reserve(row.slot, row.longest)
        self.cache.put(row.slot, prefix)
        row.position, row.fed, row.token = prefix.shape[2], 0, None
        self.rows.append(row)

    def release(self, row: Row) -> None:
        """Take a row out; the last row moves to its slot."""
        last = self.rows.pop()
        self.cache.free(row.slot)
        if last is not row:
            self.cache.move(last.slot, row.slot, last.position)
            self.rows[row.slot] = last
            last.slot = row.slot
        row.slot = -1

    def reset(self) -> None:
        """After a failed step: no rows, all slots free, nothing left of it in the cache."""
        for row in self.rows:
            row.slot = -1
        self.rows = []
        self.cache.clear()

    def close(self) -> None:
        """End the threads that it may have."""
        self._helper.shutdown()
        self._team.close()

    def step(self, chunks: Sequence[tuple[Row, int]] = ()) -> list[Row]:
        """Feed the last token of every row that has one and, for each of ``chunks``, so many
        tokens of a row's prompt; sample once for all that have nothing left to feed.

        Gives the rows that have a new ``token``, ``given`` with those before it.
        """
        decoding = [row for row in self.rows if row.token is not None]
        if not decoding and not chunks:
            return []
        if not chunks and (steps := self._steps_at_once(decoding)) > 1:
            self._run_on(decoding, steps)
            return decoding
        fed = sum(count for _, count in chunks)
        span = 1 + max(row.position for row in self.rows) + fed
        if self._text.compiles(self.cache, len(decoding) + fed, span):
            parts = [self._advance(decoding, chunks)]
        else:
            parts = [self._decode(decoding)] if decoding else []
            if chunks:
                parts.append(self._feed(chunks))
        sampled = decoding + [row for row, _ in chunks if not row.unfed]
        if sampled:
            self._sample(sampled, parts[0] if len(parts) == 1 else torch.cat(parts))
        for row in sampled:
            assert row.token is not None
            row.given = [row.token]
        return sampled

    def _steps_at_once(self, rows: list[Row]) -> int:
        """Steps that one call may take: only paths go on, none over its end, each row takes the
        likeliest token."""
        if not self.run_on or self._stacked is None or self._steps is not None:
            return 1
        # The first step of a path feeds the box's size, which has another encoder.
        if not all(isinstance(r.token, int) and self._takes_likeliest_text(r) for r in rows):
            return 1
        left = min(row.decode.max_tokens - row.decode.output_tokens for row in rows)
        return min(AHEAD, AHEAD_ROWS // len(rows), left)

    def _takes_likeliest_text(self, row: Row) -> bool:
        return row.decode.phase is Phase.TEXT and is_greedy(row.settings.temperature)

    def _run_on(self, rows: list[Row], steps: int) -> None:
        """Several steps in one call; half of many rows by another thread, if it may be."""
        stacked, cache = self._stacked, self.cache
        assert stacked is not None
        assert isinstance(cache, SlotKV)
        tokens = np.array([row.token for row in rows])
        positions = np.array([row.position for row in rows])
        slots = np.array([row.slot for row in rows])

        def some(part: slice) -> np.ndarray:
            return stacked.run_on(
                tokens[part], positions[part], cache.kv, slots[part], steps,
                barred=self._regions, last=self._eos_id,
            )  # fmt: skip

        cut = len(rows) // 2 if self.two_threads and len(rows) >= MANY else 0
        chosen = self._by_two(some, cut, len(rows))
        for row, given in zip(rows, (column for part in chosen for column in part.T), strict=True):
            row.given = given.tolist()
            row.token = row.given[-1]
            row.position += len(given)

    def _by_two(self, some: Callable[[slice], Part], cut: int, count: int) -> list[Part]:
        """What ``some`` makes of the lines before ``cut`` and, by another thread, of those from
        there on; of all ``count`` at once where it is 0."""
        if not cut:
            return [some(slice(count))]
        other = self._helper.submit(some, slice(cut, count))
        try:
            first = some(slice(cut))
        finally:
            rest = other.result()
        return [first, rest]

    def _advance(self, rows: list[Row], chunks: Sequence[tuple[Row, int]]) -> Tensor:
        """Feed every row's token and parts of prompts as rows of one step, each after those that it
        sees; hidden states of ``rows``, then of the prompts that are whole."""
        tokens: list[Token] = [row.token for row in rows if row.token is not None]
        slots, positions = [row.slot for row in rows], [row.position for row in rows]
        kept = list(range(len(rows)))
        for row in rows:
            row.position += 1
        for row, count in chunks:
            tokens += row.prompt.tokens[row.fed : row.fed + count]
            slots += [row.slot] * count
            positions += range(row.position, row.position + count)
            row.position += count
            row.fed += count
            if not row.unfed:
                kept.append(len(tokens) - 1)
        embeds = self._embed(tokens)
        if self._stacked is not None:
            at, where = np.array(positions), np.array(slots)
            hidden = torch.from_numpy(self._layers(embeds.numpy(), at, where))
        else:
            span = 1 + max(positions)
            hidden = self._text.decode(
                embeds, torch.tensor(positions), self.cache, torch.tensor(slots), span
            )
        return hidden if len(kept) == len(tokens) else hidden[torch.tensor(kept, dtype=torch.int64)]

    def _layers(self, x: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Every layer of rows ``x`` [N, dim], in place; half of many by another thread, if it may
        be. Rows of one slot lie together, and see each other: they are not parted."""
        assert self._stacked is not None
        stacked, kv = self._stacked, self.cache.kv
        cut = len(x) // 2
        while cut < len(x) and slots[cut] == slots[cut - 1]:
            cut += 1
        if not self.two_threads or len(x) < MANY or cut == len(x):
            cut = 0
        self._by_two(lambda part: stacked(x[part], positions[part], kv, slots[part]), cut, len(x))
        return x

    def _decode(self, rows: list[Row]) -> Tensor:
        """Feed every row's token; hidden states [rows, dim]."""
        # Up to the last of them the slots are taken as they lie, in a step of fixed size all that
        # are held. What is written for a row whose prompt is not fed whole lies where its next
        # token goes, which overwrites it.
        stop = len(self.rows) if self._steps is not None else 1 + max(row.slot for row in rows)
        filled = [row.position for row in self.rows[:stop]]
        tokens: list[Token] = [0 if row.token is None else row.token for row in self.rows[:stop]]
        embeds = self._embed(tokens)
        if self._steps is not None:
            hidden = self._steps(embeds, filled)
        else:
            hidden = self._text.decode(
                embeds,
                torch.tensor(filled, device=self._device),
                self.cache,
                None,
                1 + max(filled),
                level=min(filled) == max(filled),
            )
        for row in rows:
            row.position += 1
        return hidden if len(rows) == stop else hidden[[row.slot for row in rows]]

    def _feed(self, chunks: Sequence[tuple[Row, int]]) -> Tensor:
        """Feed parts of prompts; hidden states of those that are then whole."""
        tokens: list[Token] = []
        for row, count in chunks:
            tokens += row.prompt.tokens[row.fed : row.fed + count]
        counts = [count for _, count in chunks]
        embeds = self._embed(tokens)
        padded = (
            embeds[None]
            if len(chunks) == 1
            else pad_sequence(embeds.split(counts), batch_first=True)
        )
        slots = [row.slot for row, _ in chunks]
        where = torch.tensor([[row.position for row, _ in chunks], slots], device=self._device)
        stretch = slice(slots[0], slots[-1] + 1)
        for row, count in chunks:
            row.position += count
            row.fed += count
        span = max(row.position for row, _ in chunks)
        in_a_row = slots == list(range(stretch.start, stretch.stop))
        hidden = self._text.extend(
            padded, where[0], self.cache, where[1], span, stretch=stretch if in_a_row else None
        )
        whole = [n for n, (row, _) in enumerate(chunks) if not row.unfed]
        return hidden[whole, [counts[n] - 1 for n in whole]]

    def _embed(self, tokens: list[Token]) -> Tensor:
        """Embeddings [n, dim]; region tokens by their encoders."""
        ids = [token if isinstance(token, int) else 0 for token in tokens]
        if self._stacked is not None:
            embeds = torch.from_numpy(self._stacked.embed(ids))
        else:
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

    def _sample(self, rows: list[Row], hidden: Tensor) -> None:
        """Set every row's ``token`` from ``hidden`` [rows, dim], with one transfer to the host."""
        texts = [i for i, r in enumerate(rows) if r.decode.phase in (Phase.TEXT, Phase.FIRST)]
        coords = [i for i, r in enumerate(rows) if r.decode.phase in (Phase.FIRST, Phase.CENTRE_Y)]
        sizes = [i for i, r in enumerate(rows) if r.decode.phase is Phase.SIZE]
        parts = []
        if texts:
            asking = [rows[i] for i in texts]
            likely = self._likely(asking, hidden, texts)
            if likely is None:
                likely = self._choose(self._token_logits(rows, hidden, texts), asking)
            parts.append(likely)
        if coords:
            logits = self.model.coord_logits(self._pick(hidden, coords))
            _look_over([rows[i] for i in coords], logits)
            parts.append(self._choose(logits, [rows[i] for i in coords]))
        if sizes:
            logits = self.model.size_logits(self._pick(hidden, sizes)).flatten(0, 1)
            twice = [rows[i] for i in sizes for _ in range(2)]
            _look_over(twice, logits)
            parts.append(self._choose(logits, twice))
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

    def _likely(self, rows: list[Row], hidden: Tensor, which: list[int]) -> Tensor | None:
        """The likeliest tokens of ``rows``, lines ``which`` of ``hidden``, all within their
        paths, without an operator of torch; None: not so simple."""
        if self._stacked is None or not all(map(self._takes_likeliest_text, rows)):
            return None
        logits = self._stacked.logits(self._pick(hidden, which).numpy())
        logits[:, self._regions] = -np.inf
        return torch.from_numpy(logits.argmax(-1))

    def _token_logits(self, rows: list[Row], hidden: Tensor, which: list[int]) -> Tensor:
        """Token logits [rows, vocab] with -inf where the grammar allows no token."""
        logits = self.model.logits(self._pick(hidden, which))
        first = [n for n, i in enumerate(which) if rows[i].decode.phase is Phase.FIRST]
        opening = None
        if first:
            scores = logits[first]
            _look_over([rows[which[n]] for n in first], scores)
            opening = scores[:, self._first_ids]
        logits.index_fill_(1, self._region_ids, -torch.inf)
        if opening is not None:
            logits[first] = -torch.inf
            for column, token_id in enumerate(self._first_ids):
                logits[first, token_id] = opening[:, column]
        return logits

    def _choose(self, logits: Tensor, rows: list[Row]) -> Tensor:
        """``sample`` with the settings of ``rows``, one for each line of ``logits``."""
        temperatures = [row.settings.temperature for row in rows]
        if all(map(is_greedy, temperatures)):
            return logits.argmax(dim=-1)
        draws = [row.draws.random() for row in rows]
        top_ps = [row.settings.top_p for row in rows]
        return sample(logits, temperatures, top_ps, draws, self._nucleus)


def _look_over(rows: list[Row], scores: Tensor) -> None:
    """Note for the watched ones of ``rows`` whether their lines of ``scores`` [rows, bins] are
    numbers. The likeliest of NaNs is an id like any other, often that of EOS: the answer does not
    show them."""
    for n, row in enumerate(rows):
        if row.watched:
            row.finite = row.finite and bool((scores[n] < torch.inf).all())
