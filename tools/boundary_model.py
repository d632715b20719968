"""The boundary refiner's network, and how it becomes an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kestrel.seg_refiner.boundary import CHANNELS

WIDTHS = (24, 48, 96, 128)
STEP = 16
"""Sides of the input must be multiples of this."""
MEAN = CHANNELS - 1
"""Plane that holds the mean of the cues."""
PRIOR = 4.0
"""Logit of a pixel of which the cues are sure, before the network has its say."""


class Conv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class BoundaryNet(nn.Module):
    """Planes float32 [n, CHANNELS, h, w] to logits [n, 1, h, w]: the cues' mean, corrected.

    A U-Net from half the resolution down to a sixteenth; pixels are folded into channels on the
    way in and unfolded on the way out.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        first, second, third, last = widths
        self.at_half = nn.Sequential(Conv(4 * CHANNELS, first), Conv(first, first))
        self.at_quarter = nn.Sequential(Conv(first, second, 2), Conv(second, second))
        self.at_eighth = nn.Sequential(Conv(second, third, 2), Conv(third, third))
        self.bottom = nn.Sequential(Conv(third, last, 2), Conv(last, last), Conv(last, last))
        self.to_eighth = Conv(last + third, third)
        self.to_quarter = Conv(third + second, second)
        self.to_half = Conv(second + first, first)
        self.out = nn.Conv2d(first, 4, 3, 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        half = self.at_half(F.pixel_unshuffle(planes, 2))
        quarter = self.at_quarter(half)
        eighth = self.at_eighth(quarter)
        up = self.bottom(eighth)
        up = self.to_eighth(torch.cat((_doubled(up), eighth), 1))
        up = self.to_quarter(torch.cat((_doubled(up), quarter), 1))
        up = self.to_half(torch.cat((_doubled(up), half), 1))
        return PRIOR * planes[:, MEAN : MEAN + 1] + F.pixel_shuffle(self.out(up), 2)


def _doubled(maps: torch.Tensor) -> torch.Tensor:
    return F.interpolate(maps, scale_factor=2.0, mode="nearest")


def onnx_bytes(net: BoundaryNet) -> bytes:
    """The network in inference mode with its probability, as an ONNX file.

    Input ``planes`` float32 [n, CHANNELS, h, w], output ``probability`` float32 [n, h, w]; weights
    are stored in float16 and widened when a session loads them. Opset 17, which every ONNX Runtime
    since 1.14 reads. Needs the ``onnx`` package.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []

    def node(kind: str, *inputs: str, **attributes: object) -> str:
        output = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(values: np.ndarray) -> str:
        name = f"c{len(stored)}"
        stored.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def weights(values: torch.Tensor) -> str:
        narrow = values.detach().numpy().astype(np.float16)
        return node("Cast", constant(narrow), to=TensorProto.FLOAT)

    def conv(maps: str, weight: torch.Tensor, bias: torch.Tensor, stride: int, pad: int) -> str:
        side = weight.shape[-1]
        return node(
            "Conv",
            maps,
            weights(weight),
            weights(bias),
            kernel_shape=[side, side],
            strides=[stride, stride],
            pads=[pad] * 4,
        )

    def block(maps: str, layer: Conv) -> str:
        weight, bias = folded(layer)
        return node("Relu", conv(maps, weight, bias, layer[0].stride[0], 1))

    def blocks(maps: str, layers: nn.Sequential) -> str:
        for layer in layers:
            maps = block(maps, layer)
        return maps

    doubling = constant(np.array([1, 1, 2, 2], np.float32))

    def joined(maps: str, beside: str) -> str:
        larger = node(
            "Resize",
            maps,
            "",
            doubling,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        return node("Concat", larger, beside, axis=1)

    # Folding 2 x 2 pixels into channels and a 3 x 3 kernel are one 6 x 6 kernel of stride 2.
    weight, bias = folded(net.at_half[0])
    outputs = weight.shape[0]
    wide = weight.reshape(outputs, CHANNELS, 2, 2, 3, 3).permute(0, 1, 4, 2, 5, 3)
    first = node("Relu", conv("planes", wide.reshape(outputs, CHANNELS, 6, 6), bias, 2, 2))
    half = block(first, net.at_half[1])
    quarter = blocks(half, net.at_quarter)
    eighth = blocks(quarter, net.at_eighth)
    up = blocks(eighth, net.bottom)
    up = block(joined(up, eighth), net.to_eighth)
    up = block(joined(up, quarter), net.to_quarter)
    up = block(joined(up, half), net.to_half)
    correction = node(
        "DepthToSpace", conv(up, net.out.weight, net.out.bias, 1, 1), blocksize=2, mode="CRD"
    )
    ends = [constant(np.array([v], np.int64)) for v in (MEAN, MEAN + 1, 1)]
    mean = node("Slice", "planes", *ends)
    prior = node("Mul", mean, constant(np.array(PRIOR, np.float32)))
    probability = node("Sigmoid", node("Add", prior, correction))
    nodes.append(helper.make_node("Squeeze", [probability, ends[2]], ["probability"]))

    graph = helper.make_graph(
        nodes,
        "boundary",
        [helper.make_tensor_value_info("planes", TensorProto.FLOAT, ["n", CHANNELS, "h", "w"])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", "h", "w"])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def folded(layer: Conv) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias of a convolution with its batch norm folded in."""
    kernel, norm = layer[0].weight.detach(), layer[1]
    gain = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    return kernel * gain[:, None, None, None], norm.bias.detach() - norm.running_mean * gain


def layers(net: BoundaryNet) -> list[Conv]:
    """Every convolution with a norm, in the order in which :func:`onnx_bytes` stores them."""
    return [module for module in net.modules() if isinstance(module, Conv)]


def loaded(file: Path, planes: torch.Tensor) -> BoundaryNet:
    """The network of a file that :func:`onnx_bytes` made, ready to be trained further.

    Batch norms are folded there; ``planes`` [n, CHANNELS, h, w], a batch of what it will see, tells
    what each of them has to take out and to give back. Needs the ``onnx`` package.
    """
    import onnx
    from onnx import numpy_helper

    stored = [numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer]
    weights = [torch.from_numpy(a.astype(np.float32)) for a in stored if a.dtype == np.float16]
    net = BoundaryNet()
    wide = weights[0]
    outputs = wide.shape[0]
    narrow = wide.reshape(outputs, CHANNELS, 3, 2, 3, 2).permute(0, 1, 3, 5, 2, 4)
    weights[0] = narrow.reshape(outputs, 4 * CHANNELS, 3, 3)
    net.out.weight.data, net.out.bias.data = weights[-2:]

    def unfold(bias: torch.Tensor) -> Callable[[Conv, tuple[torch.Tensor, ...]], None]:
        def before(layer: Conv, inputs: tuple[torch.Tensor, ...]) -> None:
            convolved, norm = layer[0](inputs[0]), layer[1]
            mean, variance = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.data = torch.sqrt(variance + norm.eps)
            norm.bias.data = bias + mean

        return before

    hooks = []
    for layer, weight, bias in zip(layers(net), weights[:-2:2], weights[1:-2:2], strict=True):
        layer[0].weight.data = weight
        hooks.append(layer.register_forward_pre_hook(unfold(bias)))
    with torch.no_grad():
        net.eval()(planes)
    for hook in hooks:
        hook.remove()
    return net.train()
