"""The boundary network in whole numbers of 8 bits, which is what the refiner runs.

    python tools/boundary_quantise.py kestrel/models/boundary

Reads ``model.onnx`` there and writes ``model-int8.onnx``: convolutions and what lies between them
in 8 bits, a scale for each output channel's weights, activations between the least and the largest
that generated objects give. Weights take 7 bits: the sums of a CPU without VNNI have 16, which two
products of 8 bits overflow. Prints how far probabilities of other objects differ, and times. Needs
the ``onnx`` package and the drawings of ``tools/assets.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from boundary_scenes import BoundaryScenes

from kestrel.seg_refiner.boundary import QUANTISED, WEIGHTS, load_network, network_planes
from kestrel.seg_refiner.cues import Cues

SIDES = (208, 256)
"""Height and width of the objects' pictures, px: about what the refiner shows the network."""
CALIBRATED_ON = 48
COMPARED_ON = 24
KINDS = ("Conv", "Relu", "Concat", "Resize")
"""Operations in 8 bits; the few after the last convolution stay float32."""


def planes_of_objects(seed: int, count: int) -> Iterator[np.ndarray]:
    """What the network reads of generated objects, float32 [1, CHANNELS, h, w]."""
    scenes, cues = BoundaryScenes(seed), Cues()
    for _ in range(count):
        sample = scenes.sample(*SIDES)
        coverage = sample.coarse.astype(np.float32)
        yield network_planes(sample.image, coverage, cues(sample.image, coverage))[None]


def widened(file: Path) -> Any:
    """The network with float32 weights: the file has float16 ones and casts."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Cast"]:
        narrow = stored.pop(node.input[0])
        wide = numpy_helper.to_array(narrow).astype(np.float32)
        model.graph.initializer.remove(narrow)
        model.graph.initializer.append(numpy_helper.from_array(wide, node.output[0]))
        model.graph.node.remove(node)
    return model


def quantise(source: Path, target: Path, seed: int) -> None:
    """Write ``target``, the network of ``source`` in 8 bits."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Objects(CalibrationDataReader):
        def __init__(self) -> None:
            self.planes = planes_of_objects(seed, CALIBRATED_ON)

        def get_next(self) -> dict[str, np.ndarray] | None:
            planes = next(self.planes, None)
            return None if planes is None else {"planes": planes}

    model = widened(source)
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "wide.onnx"), Path(folder, "narrow.onnx")
        onnx.save(model, wide)
        quantize_static(
            wide,
            narrow,
            Objects(),
            op_types_to_quantize=list(KINDS),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantised = onnx.load(narrow)
    # Older runtimes refuse a newer format, of which nothing is used.
    quantised.ir_version = model.ir_version
    target.write_bytes(quantised.SerializeToString())


def compare(source: Path, target: Path, seed: int) -> None:
    """Print by how much they differ on objects that the scales do not come from."""
    networks = {file: load_network(file) for file in (source, target)}
    spent = dict.fromkeys(networks, 0.0)
    differences, moved = [], []
    for planes in planes_of_objects(seed, COMPARED_ON):
        answers = []
        for file, network in networks.items():
            began = time.thread_time()
            answers.append(network(planes))
            spent[file] += (time.thread_time() - began) * 1e3 / COMPARED_ON
        differences.append(np.abs(answers[0] - answers[1]).mean())
        moved.append(np.mean((answers[0] > 0.5) != (answers[1] > 0.5)))
    for file, ms in spent.items():
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB, {ms:.1f} ms")
    print(f"probability differs by {np.mean(differences):.5f}, {np.mean(moved):.4%} of pixels move")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=123)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    source, target = args.folder / WEIGHTS, args.folder / QUANTISED
    quantise(source, target, args.seed)
    compare(source, target, args.seed + 1)


if __name__ == "__main__":
    main()
