"""Attention and GELU of training, with their gradients, made for CPUs with AVX512-BF16 or AMX.

Torch's operators write every score to memory, several times: two thirds of a step; and a third of
what is left is ``tanh``. ``nano_kernels.cpp`` is compiled when :func:`fuse` is called (a C++
compiler and ``ninja``) and from then on takes what is bfloat16, in heads of 32 numbers. What is
not, and everything on other CPUs, is left to torch.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HEAD = 32
"""Numbers of a head that the compiled attention takes."""
_VECTORS = {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"}
_MATRICES = {"amx_bf16", "amx_tile"}
_FLAGS = ["-O3", "-march=x86-64-v4", "-mavx512bf16", "-fopenmp"]
_log = logging.getLogger(__name__)

_fused = False
"""Whether what is compiled is taken where it fits; :func:`fuse` says."""


@functools.cache
def compiled() -> ModuleType | None:
    """What is compiled; None on a CPU without AVX512-BF16, or where it cannot be compiled."""
    if not _abilities() >= _VECTORS:
        return None
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_suffix(".cpp")
    try:
        return load("nano_kernels", [str(source)], extra_cflags=_FLAGS)
    except (OSError, RuntimeError) as error:
        _log.warning("nothing is compiled, training will take longer: %s", error)
        return None


def fuse(*, amx: bool = True) -> bool:
    """Take what is compiled from now on, where it can be had; says whether it can.

    ``amx``: products by the CPU's matrix unit, where it has one; else by its vectors.
    """
    global _fused
    module = compiled()
    _fused = module is not None
    if module is not None:
        module.take_amx(amx and has_amx())
    return _fused


def has_amx() -> bool:
    """Whether the CPU has the matrix unit."""
    return _abilities() >= _MATRICES


@functools.cache
def _abilities() -> set[str]:
    """What Linux says that the CPU can do; empty on other systems."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(told.partition("flags")[2].partition("\n")[0].split())


def attention(q: Tensor, k: Tensor, v: Tensor, prefix: int, questions: int) -> Tensor:
    """Scaled queries, keys and values [B, H, N, D] -> [B, N, H, D].

    The first ``prefix`` positions all see each other; the others are ``questions`` of one length,
    which see the prefix and, causally, themselves.
    """
    fits = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] == HEAD
    if _fused and fits:
        return torch.ops.nano.attend(q, k, v, prefix, questions)[0]
    return plain_attention(q, k, v, prefix, questions)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, prefix: int, questions: int) -> Tensor:
    """As :func:`attention`, of torch's operators."""
    scores = (q @ k[:, :, :prefix].transpose(-1, -2)).float()
    if not questions:
        heard = scores.softmax(-1).to(v.dtype) @ v
        return heard.transpose(1, 2)
    length = (q.shape[2] - prefix) // questions
    own_q, own_k, own_v = (t[:, :, prefix:].unflatten(2, (questions, length)) for t in (q, k, v))
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    own = (own_q @ own_k.transpose(-1, -2)).float().masked_fill(later, float("-inf"))
    # One softmax over both, taken apart: put together in one tensor first, the scores of the
    # questions make the compiled loops a third slower.
    most = scores.detach().amax(-1, keepdim=True)
    most_own = own.detach().amax(-1, keepdim=True).flatten(2, 3)
    most = torch.cat([most[:, :, :prefix], torch.maximum(most[:, :, prefix:], most_own)], dim=2)
    shares = (scores - most).exp()
    own_shares = (own - most[:, :, prefix:].unflatten(2, (questions, length))).exp()
    total = shares.sum(-1, keepdim=True)
    own_total = own_shares.sum(-1, keepdim=True).flatten(2, 3)
    total = torch.cat([total[:, :, :prefix], total[:, :, prefix:] + own_total], dim=2)
    heard = shares.to(v.dtype) @ v[:, :, :prefix]
    own_heard = (own_shares.to(v.dtype) @ own_v).flatten(2, 3)
    heard = torch.cat([heard[:, :, :prefix], heard[:, :, prefix:] + own_heard], dim=2) / total
    return heard.to(v.dtype).transpose(1, 2)


@torch.library.custom_op("nano::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, prefix: int, questions: int) -> tuple[Tensor, Tensor]:
    out, lse = compiled().attend(q, k, v, prefix, questions)
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, prefix: int, questions: int) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d), q.new_empty(b, h, n, dtype=torch.float32)


@torch.library.custom_op("nano::attend_backwards", mutates_args=())
def _attend_backwards(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix: int,
    questions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    made = compiled().attend_backwards(grad, q, k, v, out, lse, prefix, questions)
    return made[0], made[1], made[2]


@_attend_backwards.register_fake
def _(grad, q, k, v, out, lse, prefix, questions):  # type: ignore[no-untyped-def]
    b, h, n, d = q.shape
    return tuple(q.new_empty(b, n, h, d) for _ in range(3))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.prefix, ctx.questions = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, out, lse = ctx.saved_tensors
    made = torch.ops.nano.attend_backwards(grad, q, k, v, out, lse, ctx.prefix, ctx.questions)
    return (*(part.transpose(1, 2) for part in made), None, None)


_attend.register_autograd(_gradients, setup_context=_keep)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """GELU in its tanh form, as ``torch.nn.functional.gelu`` is called."""
    if _fused and approximate == "tanh" and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return torch.ops.nano.gelu(x)
    return _torch_gelu(x, approximate=approximate)


_torch_gelu = torch.nn.functional.gelu


@torch.library.custom_op("nano::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    return compiled().gelu(x)


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nano::gelu_backwards", mutates_args=())
def _gelu_backwards(grad: Tensor, x: Tensor) -> Tensor:
    return compiled().gelu_backwards(grad, x)


@_gelu_backwards.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_gelu.register_autograd(
    lambda ctx, grad: torch.ops.nano.gelu_backwards(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
