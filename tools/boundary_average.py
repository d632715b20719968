"""The mean of the weights of several boundary networks, all trained on from the same ones.

    python tools/boundary_average.py kestrel/models/boundary/model.onnx runs/a.onnx runs/b.onnx

The first file is read like the others, then written. Each errs in its own way on photographs unlike
those it was trained on (Wortsman et al., "Model soups", ICML 2022). Needs the ``onnx`` package.
``boundary_quantise.py`` then makes of it what runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def averaged(files: Sequence[Path]) -> bytes:
    """The first file with the mean of the weights, which are stored in float16."""
    import onnx
    from onnx import numpy_helper

    models = [onnx.load(file) for file in files]
    for stored in zip(*(model.graph.initializer for model in models), strict=True):
        weights = [numpy_helper.to_array(tensor) for tensor in stored]
        if weights[0].dtype == np.float16:
            mean = np.mean([weight.astype(np.float32) for weight in weights], axis=0)
            stored[0].CopyFrom(numpy_helper.from_array(mean.astype(np.float16), stored[0].name))
    return models[0].SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    args.files[0].write_bytes(averaged(args.files))


if __name__ == "__main__":
    main()
