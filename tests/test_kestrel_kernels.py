"""kestrel-kernels are missed too late, or believed where they choose other experts than torch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import GPU
from tiny_models import TINY_2, hugging_face_tensors, random_model, write_checkpoint

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.config import ConfigError
from kestrel.ops import routing

SCORES = torch.zeros(1, dtype=torch.bfloat16)


def right(scores: torch.Tensor, k: int, softmax: bool) -> Any:
    """What the documentation says, in an order and in types of its own."""
    assert softmax
    weights, chosen = routing.choose(scores.float(), k)
    return weights.flip(1), chosen.flip(1).int()


def install(monkeypatch, topk_fwd: Any) -> None:
    """In the package's place, for the CPU."""
    package, module = ModuleType("kestrel_kernels"), ModuleType("kestrel_kernels.topk")
    module.topk_fwd = topk_fwd  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kestrel_kernels", package)
    monkeypatch.setitem(sys.modules, "kestrel_kernels.topk", module)
    monkeypatch.setattr(routing, "DEVICE", "cpu")


def test_a_missing_package_is_not_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kestrel_kernels", None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt '\.\[kestrel-kernels"):
        routing.precompiled(64, 8, SCORES)


def test_a_cpu_is_given_kernels_for_cuda(monkeypatch):
    install(monkeypatch, right)
    monkeypatch.setattr(routing, "DEVICE", "cuda")
    with pytest.raises(ConfigError, match="need CUDA, and the model is on cpu"):
        routing.precompiled(64, 8, SCORES)


def sums_over_all(scores, k, softmax):
    weights, chosen = scores.softmax(-1).topk(k)
    return weights, chosen


def one_too_few(scores, k, softmax):
    return routing.choose(scores, k - 1)


def no_kernel(scores, k, softmax):
    raise RuntimeError("no kernel for sm_70")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (sums_over_all, "differ from torch by"),
        (one_too_few, "shapes"),
        (no_kernel, "RuntimeError: no kernel for sm_70"),
    ],
)
def test_other_choices_than_torch_s_are_believed(monkeypatch, kernel, said):
    install(monkeypatch, kernel)
    with pytest.raises(ConfigError, match=said):
        routing.precompiled(64, 8, SCORES)


@torch.inference_mode()
def test_a_model_computes_otherwise_with_them(monkeypatch):
    install(monkeypatch, right)
    model = random_model()
    mlp = model.text.blocks[1].mlp
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    expected = mlp(x)
    model.use_kestrel_kernels()
    assert mlp.choose is not routing.choose
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="no experts"):
        random_model(TINY_2).use_kestrel_kernels()


async def test_an_engine_starts_without_what_it_was_told_to_use(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kestrel_kernels", None)
    folder = write_checkpoint(tmp_path / "t", hugging_face_tensors(random_model()))
    config = RuntimeConfig(
        model_path=str(folder), refiner=None, torch_threads=1, kestrel_kernels=True
    )
    with pytest.raises(ConfigError, match=r"kestrel_kernels is on.*pip install"):
        await InferenceEngine.create(config)


def test_a_word_turns_them_on():
    with pytest.raises(ConfigError, match="kestrel_kernels must be true or false"):
        RuntimeConfig(kestrel_kernels="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_experts_are_other_than_torch_s(device, dtype):
    pytest.importorskip("kestrel_kernels")
    kernel = routing.precompiled(64, 8, torch.zeros(1, dtype=dtype, device=device))
    for rows in (1, 16, 740):
        scores = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        scores = scores.to(device=device, dtype=dtype)
        found = [choice(scores, 8) for choice in (routing.choose, kernel)]
        for weights, chosen in found:
            assert weights.dtype == dtype and chosen.dtype == torch.int64
        # Which of two equal scores is taken is nobody's mistake.
        taken = [scores.gather(1, chosen).sort(-1).values for _, chosen in found]
        assert torch.equal(taken[1], taken[0])
        shares = [weights.float().sort(-1).values for weights, _ in found]
        torch.testing.assert_close(shares[1], shares[0], atol=routing.AGREES, rtol=0)
