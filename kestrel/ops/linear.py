"""Matrix products with weights that are final, laid out as the CPU's kernels read them.

On a CPU ``torch.nn.functional.linear`` reads float32 weights as they lie. That costs less than
half of what the processor can do for many rows, and for two to sixteen rows, which is a decode
step of a batch, twice to six times what one row costs. oneDNN, which torch brings along, has its
own order for them: reordered once, a step of a batch is about bound by reading the weights, as one
row is. Elsewhere, and where a trial does not agree, the weights stay as they are.

In oneDNN's order a row's product is the same to the last bit whatever other rows come with it, in
torch's it is not: one row takes the same calls as many, so that a request is answered alike alone
and in a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.ops.rows import compiled

log = logging.getLogger(__name__)

SMALL = 2**20
"""Layers of fewer weights keep them under their names as well: that costs little."""
ROWS = 16
"""Rows that the order is chosen for; it serves others as well (that for one row does not)."""
AGREES = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Types that are reordered, and the largest difference from the plain product in a trial; its
values are of order 8."""


class Product:
    """``x @ weight.T + bias`` of weights that no longer change."""

    __slots__ = ("_bias", "_ordered", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, *, reorder: bool) -> None:
        """``weight`` [out, in]; ``reorder`` it where that is faster."""
        self._bias = bias
        self._ordered = _reordered(weight) if reorder else None
        self.weight = weight if self._ordered is None or weight.numel() < SMALL else None
        """The weights as they came; None where they are held in the other order only."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self._ordered is None:
            return F.linear(x, self.weight, self._bias)  # type: ignore[arg-type]
        return torch.ops.mkldnn._linear_pointwise(x, self._ordered, self._bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """The product's GELU (tanh form)."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and (by_us := _own_gelu()):
            inner = self(x)
            by_us(inner.view(-1).numpy())
            return inner
        if self._ordered is None:
            return F.gelu(F.linear(x, self.weight, self._bias), approximate="tanh")  # type: ignore[arg-type]
        return torch.ops.mkldnn._linear_pointwise(x, self._ordered, self._bias, "gelu", [], "tanh")

    def plus(self, x: Tensor, rest: Tensor) -> Tensor:
        """``rest`` [N, out] and the product of ``x`` [N, in]."""
        if self._ordered is None:
            assert self.weight is not None
            rest = rest if self._bias is None else rest + self._bias
            return torch.addmm(rest, x, self.weight.T)
        return torch.ops.mkldnn._linear_pointwise.binary(x, rest, self._ordered, self._bias, "add")


class FinalLinear(nn.Module):
    """A linear layer of a ``Product``, its parameters under the names that they had."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = Product(linear.weight.detach(), linear.bias.detach(), reorder=True)
        self.weight, self.bias = linear.weight, linear.bias
        if self.product.weight is None:
            self.weight = shape_of(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def final(linear: nn.Linear | FinalLinear) -> nn.Linear | FinalLinear:
    """A layer that is not trained any more, faster where it can be.

    Large weights are then held in the other order only, so that memory does not grow: what is left
    of them under their name is their shape (on the meta device).
    """
    if isinstance(linear, FinalLinear) or not reorders(linear.weight):
        return linear
    return FinalLinear(linear)


def finalize(module: nn.Module) -> None:
    """``final`` for every linear layer of a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, final(child))
        else:
            finalize(child)


def gelu_of(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh form) of a linear layer, in one pass where the layer has one."""
    if isinstance(linear, FinalLinear):
        return linear.product.gelu(x)
    return F.gelu(linear(x), approximate="tanh")


def shape_of(parameter: Tensor) -> nn.Parameter:
    """What stands for a parameter whose numbers are held elsewhere."""
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def reorders(weight: Tensor) -> bool:
    """Whether a ``Product`` of this weight would have it in another order."""
    return weight.device.type == "cpu" and weight.dtype in AGREES and _agrees(weight.dtype)


def _reordered(weight: Tensor) -> Tensor | None:
    if not reorders(weight):
        return None
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _own_gelu() -> Callable[..., None] | None:
    """GELU in place by one thread, where the processor has no vectors for which oneDNN has a fast
    ``tanh``: there it takes as long as the product, and ours a fifth of that."""
    if torch.get_num_threads() > 1 or torch.is_grad_enabled():
        return None
    return _narrow_gelu()


@cache
def _narrow_gelu() -> Callable[..., None] | None:
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        return None
    return compiled(lambda made: made.gelu_all())


@cache
def _agrees(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have the calls, and they give the plain product."""
    try:
        worst = _trial(dtype)
    except Exception as error:  # another torch, a processor without bfloat16, a build without it
        log.warning("weights stay in torch's order: %s: %s", type(error).__name__, error)
        return False
    if not worst <= AGREES[dtype]:
        log.warning("weights stay in torch's order: products differ by %g", worst)
        return False
    return True


def _trial(dtype: torch.dtype) -> float:
    """Largest difference from the plain product and its forms, for one row and several."""
    chance = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(dtype)

    worst = 0.0
    with torch.inference_mode():
        weight, bias = numbers(96, 64), numbers(96)
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        product = Product(weight, bias, reorder=False)
        apply = torch.ops.mkldnn._linear_pointwise
        for rows in (1, 3, ROWS, 50):
            x, rest = numbers(rows, 64), numbers(rows, 96)
            pairs = [
                (apply(x, ordered, bias, "none", [], ""), product(x)),
                (apply(x, ordered, bias, "gelu", [], "tanh"), product.gelu(x)),
                (apply.binary(x, rest, ordered, bias, "add"), product.plus(x, rest)),
            ]
            for got, expected in pairs:
                worst = max(worst, float((got.float() - expected.float()).abs().max()))
    return worst
