"""Products in the processor's own order compute something else than plain ones, hold weights twice,
or keep a machine without that order from serving."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY_2, random_model
from torch import nn

from kestrel.moondream.vision import VisionEncoder
from kestrel.ops import linear
from kestrel.ops.linear import FinalLinear, Product, finalize, gelu_of
from kestrel.ops.rows import compiled

TYPES = [torch.float32, torch.bfloat16]


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}


def layer(out: int, inner: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, out, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 200])
@torch.inference_mode()
def test_a_product_differs_from_the_plain_one(rows, dtype):
    plain = layer(72, 40, dtype)
    product = Product(plain.weight, plain.bias, reorder=True)
    # A part of wider rows, as attention hands it on.
    x = torch.randn(rows, 3, 40).to(dtype)[:, 1]
    rest = torch.randn(rows, 72).to(dtype)
    expected = F.linear(x, plain.weight, plain.bias)
    torch.testing.assert_close(product(x), expected, **close(dtype))
    gelu = F.gelu(expected, approximate="tanh")
    torch.testing.assert_close(product.gelu(x), gelu, **close(dtype))
    torch.testing.assert_close(product.plus(x, rest), rest + expected, **close(dtype))
    bare = Product(plain.weight, None, reorder=True)
    torch.testing.assert_close(bare.plus(x, rest), rest + F.linear(x, plain.weight), **close(dtype))


@pytest.mark.parametrize("rows", [1, 7, 200])
@torch.inference_mode()
def test_our_own_gelu_is_far_from_its_formula(monkeypatch, rows):
    """Wherever it runs, not only on processors for which it is meant."""
    kernel = compiled(lambda made: made.gelu_all())
    assert kernel is not None
    monkeypatch.setattr(linear, "_narrow_gelu", lambda: kernel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plain = layer(72, 40)
    x = 4 * torch.randn(rows, 40)
    expected = F.gelu(
        F.linear(x.double(), plain.weight.double(), plain.bias.double()), approximate="tanh"
    )
    assert float(expected.max()) > 3
    for reorder in (False, True):
        product = Product(plain.weight, plain.bias, reorder=reorder)
        found = product.gelu(x)
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)
        assert torch.equal(product.gelu(x[:1]), found[:1]) or not reorder
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.testing.assert_close(product.gelu(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(72, 40), (576, 192), (192, 960), (1100, 1000)])
@torch.inference_mode()
def test_a_row_comes_out_otherwise_among_others(shape):
    plain = layer(*shape)
    if not linear.reorders(plain.weight):
        pytest.skip("this processor has no order of its own")
    product = Product(plain.weight, plain.bias, reorder=True)
    x, rest = torch.randn(48, shape[1]), torch.randn(48, shape[0])
    alone = torch.cat([product(x[i : i + 1]) for i in range(48)])
    added = torch.cat([product.plus(x[i : i + 1], rest[i : i + 1]) for i in range(48)])
    for rows in (2, 3, 7, 16, 48):
        assert torch.equal(product(x[:rows]), alone[:rows])
        assert torch.equal(product.plus(x[:rows], rest[:rows]), added[:rows])


@torch.inference_mode()
def test_large_weights_are_held_twice_and_small_ones_lost(monkeypatch):
    monkeypatch.setattr(linear, "SMALL", 72 * 40)
    large, small = layer(72, 40), layer(71, 40)
    if not linear.reorders(large.weight):
        pytest.skip("this processor has no order of its own")
    x = torch.randn(1, 40)
    wanted = large(x)
    model = nn.Sequential(large, nn.Sequential(small))
    finalize(model)
    assert model[0].weight.is_meta and model[0].weight.shape == (72, 40)
    assert torch.equal(model[1][0].weight, small.weight)
    torch.testing.assert_close(model[0](x), wanted)
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.0.weight",
        "1.0.bias",
    ]


@torch.inference_mode()
def test_a_model_whose_large_weights_are_in_another_order_answers_otherwise(monkeypatch):
    plain = random_model(TINY_2)
    monkeypatch.setattr(linear, "SMALL", 1)
    fast = random_model(TINY_2)
    fast.fuse()
    crops = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(fast.vision.features(crops), plain.vision.features(crops))
    x = torch.randn(9, 32)
    prefix, expected = fast.cached.prefix(x), plain.cached.prefix(x)
    torch.testing.assert_close(prefix, expected, atol=1e-4, rtol=1e-4)
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(fast.logits(hidden), plain.logits(hidden), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.size_logits(hidden), plain.size_logits(hidden))


@pytest.mark.parametrize("broken", ["missing", "wrong"])
@torch.inference_mode()
def test_a_machine_without_that_order_does_not_serve(monkeypatch, broken, caplog):
    def trial(dtype: torch.dtype) -> float:
        if broken == "missing":
            raise AttributeError("no such call")
        return float("nan")

    monkeypatch.setattr(linear, "_trial", trial)
    linear._agrees.cache_clear()
    try:
        vision = VisionEncoder(TINY_2.vision)
        finalize(vision)
        assert not any(isinstance(module, FinalLinear) for module in vision.modules())
        plain = layer(5, 4)
        x = torch.randn(2, 4)
        product = Product(plain.weight, plain.bias, reorder=True)
        assert torch.equal(product(x), plain(x))
        assert torch.equal(gelu_of(plain, x), product.gelu(x))
    finally:
        linear._agrees.cache_clear()
    assert "torch's order" in caplog.text
