"""What training computes by itself, against the same in torch's operators and double precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

TOOLS = Path(__file__).parents[1] / "tools"
SHAPES = [(257, 3, 80), (256, 0, 0), (33, 2, 17), (5, 1, 1), (64, 1, 64), (31, 4, 33)]
"""Positions of the prefix, questions, positions of each: whole blocks of 32 and others."""


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import nano_kernels
        import nano_training

        yield {"kernels": nano_kernels, "training": nano_training}
        for name in list(sys.modules):
            if str(TOOLS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.fixture(params=["AVX512-BF16", "AMX"])
def kernels(tools: dict[str, ModuleType], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The kernels, taken where they fit, with products by vectors and by the matrix unit."""
    kernels, amx = tools["kernels"], request.param == "AMX"
    if amx and not kernels.has_amx():
        pytest.skip("needs a CPU with AMX")
    if not kernels.fuse(amx=amx):
        pytest.skip("needs a CPU with AVX512-BF16, a C++ compiler and ninja")
    yield kernels
    kernels._fused = False


def heads(shape: tuple[int, int, int], *, seed: int = 0) -> list[Tensor]:
    """Scaled queries, keys, values [2, 3, N, 32], and a gradient [2, N, 3, 32]: bfloat16."""
    prefix, questions, length = shape
    rng = torch.Generator().manual_seed(seed)
    positions = prefix + questions * length
    made = [torch.randn(2, positions, 3, 32, generator=rng).bfloat16() for _ in range(4)]
    return [*(part.transpose(1, 2) for part in made[:3]), made[3]]


def masked(q: Tensor, k: Tensor, v: Tensor, prefix: int, questions: int) -> Tensor:
    """Attention by a mask of who sees whom, [B, N, H, D]."""
    positions = torch.arange(q.shape[2])
    length = max(1, (q.shape[2] - prefix) // max(1, questions))
    question = torch.where(positions < prefix, -1, (positions - prefix) // length)
    same = question[:, None] == question
    sees = (question < 0) | (same & (positions[:, None] >= positions))
    scores = (q @ k.transpose(-1, -2)).masked_fill(~sees, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def answers(call: Any, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What ``call`` gives and the gradients of its inputs, in double precision."""
    taken = [part.detach().to(dtype).requires_grad_() for part in inputs]
    made = call(*taken)
    made.backward(grad.to(dtype))
    return [made.detach().double(), *(part.grad.double() for part in taken)]  # type: ignore[union-attr]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_attention_sees_the_prefix_and_what_came_before(tools, shape):
    *inputs, grad = heads(shape)
    plain = tools["kernels"].plain_attention
    found = answers(lambda *t: plain(*t, *shape[:2]), inputs, grad, torch.float32)
    wanted = answers(lambda *t: masked(*t, *shape[:2]), inputs, grad, torch.float64)
    assert max(map(off, found, wanted)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_attention_is_as_near_as_bfloat16_allows(kernels, shape):
    *inputs, grad = heads(shape)
    found = answers(lambda *t: kernels.attention(*t, *shape[:2]), inputs, grad, torch.bfloat16)
    wanted = answers(lambda *t: masked(*t, *shape[:2]), inputs, grad, torch.float64)
    plain = kernels.plain_attention
    torchs = answers(lambda *t: plain(*t, *shape[:2]), inputs, grad, torch.bfloat16)
    for mine, theirs, true in zip(found, torchs, wanted, strict=True):
        assert off(mine, true) <= min(0.02, off(theirs, true))


def test_compiled_attention_bears_large_scores(kernels):
    *inputs, grad = heads((40, 1, 9))
    inputs[0] = inputs[0] * 60
    found = answers(lambda *t: kernels.attention(*t, 40, 1), inputs, grad, torch.bfloat16)
    wanted = answers(lambda *t: masked(*t, 40, 1), inputs, grad, torch.float64)
    assert all(part.isfinite().all() for part in found)
    assert off(found[0], wanted[0]) < 0.01


def test_compiled_attention_refuses_positions_that_are_no_questions(kernels):
    q, k, v, _ = heads((40, 1, 9))
    with pytest.raises(RuntimeError, match="questions of one length"):
        kernels.attention(q, k, v, 40, 2)


@pytest.mark.parametrize("count", [1, 31, 32, 50_021])
def test_compiled_gelu_is_as_near_as_bfloat16_allows(kernels, count):
    rng = torch.Generator().manual_seed(1)
    x = (torch.randn(count, generator=rng) * 3).bfloat16()
    x[:1], x[-1:] = 100.0, -100.0
    grad = torch.randn(count, generator=rng).bfloat16()
    found = answers(kernels.gelu, [x], grad, torch.bfloat16)
    wanted = answers(lambda x: F.gelu(x, approximate="tanh"), [x], grad, torch.float64)
    for mine, true in zip(found, wanted, strict=True):
        assert torch.allclose(mine, true, rtol=0.004, atol=1e-4)


def test_token_loss_is_the_cross_entropy_with_what_is_wanted(tools):
    training, rng = tools["training"], torch.Generator().manual_seed(2)
    vocab, levels = 300, 20
    level_ids = torch.arange(levels) * 8 + 40
    spread = training.soft_bins(torch.arange(levels), levels, 3.0)
    level_of = torch.full((vocab,), -1)
    level_of[level_ids] = torch.arange(levels)
    wanted = torch.eye(vocab).double()
    wanted[level_ids[:, None], level_ids] = spread.double()
    target = torch.cat([level_ids, torch.randint(vocab, (30,), generator=rng)])
    logits = torch.randn(50, vocab, generator=rng) * 20
    mine, true = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = training.TokenLoss.apply(mine, target, level_ids, level_of[target], spread)
    (2 * loss).backward()
    same = F.cross_entropy(true, wanted[target])
    (2 * same).backward()
    assert loss.item() == pytest.approx(same.item(), rel=1e-5)
    assert mine.grad is not None and true.grad is not None
    assert off(mine.grad.double(), true.grad) < 1e-5
