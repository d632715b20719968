"""FlashInfer's kernels, where they load and agree with torch's on this machine.

The one module that imports ``flashinfer``. It compiles some kernels when they are first used, which
needs ninja and nvcc (``python -m kestrel doctor`` looks for them): so each is tried at the start,
and its numbers are compared with those of ``kestrel.ops.attention`` and ``kestrel.ops.sampling``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kestrel.config import ConfigError

log = logging.getLogger(__name__)

INSTALL = "pip install '.[gpu]'"
WORKSPACE_BYTES = 128 * 2**20
"""Scratch memory that FlashInfer's documentation recommends."""
HEAD_DIMS = (64, 128, 256)
"""Those that its decode kernels are compiled for."""
AGREES = 2e-2
"""Largest difference from torch in a trial; its values are of order 1, in 8 or 11 bits."""


def load() -> Any:
    """The ``flashinfer`` package; ImportError or what else its import raises."""
    import flashinfer

    return flashinfer


class PagedDecode:
    """Decode attention of a step of fixed size over paged keys and values.

    ``plan`` on the host before each step, then one call per layer, which may be captured.
    """

    def __init__(
        self, batch: int, most_pages: int, page: int, heads: tuple[int, int, int], like: Tensor
    ) -> None:
        """``heads``: query heads, kv heads, head_dim; ``like`` has the cache's device and dtype."""

        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=like.device)

        self._batch, self._page, self._heads, self._dtype = batch, page, heads, like.dtype
        self._wrapper = load().BatchDecodeWithPagedKVCacheWrapper(
            _workspace(like.device),
            "NHD",
            use_cuda_graph=True,
            paged_kv_indptr_buffer=integers(batch + 1),
            paged_kv_indices_buffer=integers(batch * most_pages),
            paged_kv_last_page_len_buffer=integers(batch),
        )

    def plan(self, held: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """``held``: pages of each row in order, of which ``lengths`` positions are attended to;
        rows that are missing read one position of page 0."""
        starts, pages, last = page_lists(held, lengths, self._batch, self._page)
        heads, kv_heads, head_dim = self._heads
        self._wrapper.plan(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(pages, dtype=torch.int32),
            torch.tensor(last, dtype=torch.int32),
            heads,
            kv_heads,
            head_dim,
            self._page,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

    def __call__(self, kv: Tensor, q: Tensor) -> Tensor:
        """``q`` [batch, heads, head_dim] over one layer's pages [pages, 2, page, kv_heads,
        head_dim]; gives [batch, heads, head_dim]."""
        return self._wrapper.run(q.contiguous(), kv)


def page_lists(
    held: Sequence[Sequence[int]], lengths: Sequence[int], batch: int, page: int
) -> tuple[list[int], list[int], list[int]]:
    """Where each row's pages start in one list of them all, that list, and how many positions of
    each row's last page count. Rows beyond ``held`` count one position of page 0."""
    starts, last = [0], []
    pages: list[int] = []
    for row in range(batch):
        length = lengths[row] if row < len(held) else 1
        count = -(-length // page)
        pages += held[row][:count] if row < len(held) else [0]
        last.append(length - (count - 1) * page)
        starts.append(len(pages))
    return starts, pages, last


_workspaces: dict[torch.device, Tensor] = {}


def _workspace(device: torch.device) -> Tensor:
    if device not in _workspaces:
        _workspaces[device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _workspaces[device]


LEAST_TOP_P = 1e-6
"""The kernel is given no smaller ``top_p``."""


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """``kestrel.ops.sampling.by_rank`` without its sort; what it keeps adds up to 1."""
    kept = load().sampling.top_p_renorm_probs(probs, top_p[:, 0].clamp(min=LEAST_TOP_P))
    # Where the likeliest candidate is enough it is kept alone, whatever the kernel makes of it.
    most, likeliest = probs.max(dim=-1, keepdim=True)
    alone = torch.zeros_like(probs).scatter_(-1, likeliest, 1.0)
    return torch.where(most >= top_p, alone, kept)


def wanted(kernels: str, like: Tensor, heads: tuple[int, int, int], page: int) -> bool:
    """Whether to use FlashInfer: ``kernels`` is ``auto``, ``torch`` or ``flashinfer``.

    ``auto`` takes torch where FlashInfer does not load, run or agree, and says why in the log;
    ``flashinfer`` then raises ``ConfigError``.
    """
    if kernels == "torch" or (kernels == "auto" and like.device.type != "cuda"):
        return False
    reason = _reason_against(like, heads, page)
    if reason is None:
        return True
    if kernels == "flashinfer":
        raise ConfigError(f"kernels is flashinfer, but {reason}; see python -m kestrel doctor")
    log.warning("torch's kernels are used: %s", reason)
    return False


def _reason_against(like: Tensor, heads: tuple[int, int, int], page: int) -> str | None:
    if like.device.type != "cuda":
        return "FlashInfer needs CUDA"
    if like.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer's decode takes bfloat16 or float16, not {like.dtype}"
    if heads[2] not in HEAD_DIMS:
        return f"FlashInfer's decode has no kernel for heads of {heads[2]}"
    try:
        load()
    except Exception as error:  # it looks for the GPU while it is imported
        return f"FlashInfer does not load ({type(error).__name__}: {error}); {INSTALL}"
    try:
        trials = _trial_attention(like, heads, page), _trial_nucleus(like)
    except Exception as error:  # compilers, drivers, versions
        return f"FlashInfer fails ({type(error).__name__}: {error})"
    # A number that is none does not agree either.
    wrong = [differs for differs in trials if not differs <= AGREES]
    return f"FlashInfer differs from torch by {wrong[0]:.3f}" if wrong else None


def _trial_attention(like: Tensor, heads: tuple[int, int, int], page: int) -> float:
    """Largest difference of two rows of unequal length, a third being padding."""
    from kestrel.ops.attention import attend

    q_heads, kv_heads, head_dim = heads
    chance = torch.Generator(like.device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=chance, device=like.device)
        return drawn.to(like.dtype)

    kv, q = numbers(6, 2, page, kv_heads, head_dim), numbers(3, q_heads, head_dim)
    held, lengths = [[4, 2, 5], [1]], [2 * page + 3, page]
    decode = PagedDecode(3, 3, page, heads, like)
    decode.plan(held, lengths)
    got = decode(kv, q)
    worst = 0.0
    for row, (pages, length) in enumerate(zip(held, lengths, strict=True)):
        # [n, 2, page, heads, D] -> [2, 1, heads, length, D]
        k, v = kv[pages].transpose(0, 1).flatten(1, 2)[:, :length].transpose(1, 2).unsqueeze(1)
        expected = attend(q[row][None, :, None], k, v)[0, :, 0]
        worst = max(worst, float((got[row].float() - expected.float()).abs().max()))
    return worst


def _trial_nucleus(like: Tensor) -> float:
    from kestrel.ops.sampling import by_rank

    chance = torch.Generator(like.device).manual_seed(0)
    probs = torch.rand(5, 300, generator=chance, device=like.device).pow(6)
    probs /= probs.sum(-1, keepdim=True)
    top_p = torch.tensor([[0.0], [0.2], [0.5], [0.9], [1.0]], device=like.device)
    expected = by_rank(probs, top_p)
    expected = expected / expected.sum(-1, keepdim=True)
    return float((nucleus(probs, top_p) - expected).abs().max())
