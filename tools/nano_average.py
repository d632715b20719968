"""The mean of the weights of checkpoints that were trained on from one another.

    python tools/nano_average.py kestrel/models/nano runs/nano/last

The first folder's weights are read like the others', then written. What a run has forgotten of what
came before it comes back, and what it learned stays (Wortsman et al., "Model soups", ICML 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    files = [folder / "model.safetensors" for folder in args.folders]
    checkpoints = [load_file(file) for file in files]
    mean = {
        name: torch.stack([one[name].float() for one in checkpoints]).mean(0).to(tensor.dtype)
        for name, tensor in checkpoints[0].items()
    }
    partial = files[0].with_suffix(".partial")
    save_file(mean, partial)
    partial.replace(files[0])


if __name__ == "__main__":
    main()
