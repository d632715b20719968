"""Experts of a mixture: each way to compute them against one product after another."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES, GPU

from kestrel.moondream.moe import MixtureOfExperts
from kestrel.ops import experts


@torch.inference_mode()
def mixture(dtype: torch.dtype, device: torch.device) -> MixtureOfExperts:
    torch.manual_seed(3)
    return MixtureOfExperts(64, 32, count=9, per_token=3).to(device, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("device", [torch.device("cpu"), GPU])
@pytest.mark.parametrize("way", ["_gathered", "_every", "_grouped"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_way_to_compute_experts_gives_other_numbers(way, tokens, device):
    exact = mixture(torch.float32, torch.device("cpu"))
    model = mixture(torch.bfloat16, device)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    weights, chosen = exact.choose(exact.router(x), 3)
    expected = exact._visited(x, chosen, weights)
    given = x.to(device, torch.bfloat16), chosen.to(device), weights.to(device, torch.bfloat16)
    got, plain = (getattr(model, name)(*given).float().cpu() for name in (way, "_visited"))

    def error(numbers: torch.Tensor) -> float:
        return float((numbers - expected).norm() / expected.norm())

    assert error(got) < 1.5 * error(plain) + 1e-3
    # With few tokens there are experts that none of them chose.
    assert (len(set(chosen.flatten().tolist())) < 9) == (tokens < 70)


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_products_differ_from_plain_ones(device):
    assert experts.trial(device, torch.bfloat16) <= experts.AGREES


@torch.inference_mode()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_visits_experts_one_by_one():
    model, device = mixture(torch.bfloat16, GPU.values[0]), GPU.values[0]
    assert experts.can_group(model.fc1.weight)
    x = torch.randn(100, 64, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.device(device):
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert got.isfinite().all()
