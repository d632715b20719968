"""Attention without a mask, compiled, against its formula in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kestrel.ops.attention import attend
from kestrel.ops.device import has_matrix_unit
from kestrel.ops.unmasked import unmasked

SHAPES = [
    (257, 257, 6, 6, 32),
    (33, 64, 4, 2, 64),
    (4, 1, 2, 1, 96),
    (7, 31, 3, 3, 32),
    (64, 5, 2, 2, 32),
]
"""Queries, positions, heads, key heads, numbers of a head: whole vectors, stretches and others."""
OFF = {torch.float32: 3e-6, torch.bfloat16: 0.01}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Queries [2, H, T, D], keys and values [2, G, S, D] as a product leaves them: not in a row."""
    count, length, heads, groups, dim = shape
    chance = torch.Generator().manual_seed(3)
    q = torch.randn(2, count, heads, dim, generator=chance)
    both = torch.randn(2, length, 2, groups, dim, generator=chance)
    return [t.transpose(1, 2).to(dtype) for t in (2 * q, both[:, :, 0], both[:, :, 1])]


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v)


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_kernel_gives_attention(one_thread, shape, dtype):
    q, k, v = drawn(shape, dtype)
    out = torch.full((2, shape[0], *q.shape[1::2]), torch.nan, dtype=dtype)
    numbers = [q, k, v, out.transpose(1, 2)]
    name = "float32"
    if dtype == torch.bfloat16:
        numbers, name = [t.view(torch.uint16) for t in numbers], "uint16"
    for n in range(2):
        unmasked(name)(*(t[n].transpose(0, 1).numpy() for t in numbers))
    torch.testing.assert_close(
        out.transpose(1, 2).double(), wanted(q, k, v), atol=OFF[dtype], rtol=OFF[dtype]
    )
    if dtype == torch.float32 or not has_matrix_unit():
        assert torch.equal(attend(q, k, v), out.transpose(1, 2)), "it is not what attend takes"


@torch.inference_mode()
def test_large_scores_stay_numbers(one_thread):
    q, k, v = drawn(SHAPES[0], torch.float32)
    found = attend(40 * q, k, v)
    torch.testing.assert_close(found.double(), wanted(40 * q, k, v), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 40, 2, 2, 32), (8, 40, 2, 2, 48)])
@torch.inference_mode()
def test_few_queries_and_other_heads_are_torchs(one_thread, shape):
    q, k, v = drawn(shape, torch.float32)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(attend(q, k, v).double(), wanted(q, k, v), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_formula(one_thread):
    q, k, v = (t.requires_grad_() for t in drawn(SHAPES[1], torch.float32))
    attend(q, k, v).sum().backward()
    found = q.grad
    q.grad = None
    wanted(q, k, v).sum().backward()
    torch.testing.assert_close(found, q.grad, atol=1e-4, rtol=1e-4)
