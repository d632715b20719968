"""Checkpoint files to model parameters, by exact name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kestrel.config import ConfigError

_ENGINE_NAMES: list[tuple[str, str]] = [
    (r"text_model\.transformer\.embd\.wte\.weight", "text.wte"),
    (r"text_model\.transformer\.h\.(\d+)\.ln\.(\w+)", r"text.blocks.\1.ln.\2"),
    (r"text_model\.transformer\.h\.(\d+)\.mixer\.Wqkv\.(\w+)", r"text.blocks.\1.attn.qkv.\2"),
    (r"text_model\.transformer\.h\.(\d+)\.mixer\.out_proj\.(\w+)", r"text.blocks.\1.attn.proj.\2"),
    (r"text_model\.transformer\.h\.(\d+)\.tau_(wq|wv|alpha)", r"text.blocks.\1.attn.tau.\2"),
    (r"text_model\.transformer\.h\.(\d+)\.mlp\.(fc[12]\.\w+)", r"text.blocks.\1.mlp.\2"),
    (r"text_model\.transformer\.h\.(\d+)\.gate\.(\w+)", r"text.blocks.\1.mlp.router.\2"),
    (
        r"text_model\.transformer\.h\.(\d+)\.mlp\.experts\.weight",
        r"text.blocks.\1.mlp.fc1.weight",
    ),
    (
        r"text_model\.transformer\.h\.(\d+)\.mlp\.output_experts\.weight",
        r"text.blocks.\1.mlp.fc2.weight",
    ),
    (r"text_model\.lm_head\.ln\.(\w+)", r"text.post_ln.\1"),
    (r"text_model\.lm_head\.linear\.(\w+)", r"text.lm_head.\1"),
    (
        r"vision_encoder\.encoder\.model\.visual\.patch_embed\.linear\.(\w+)",
        r"vision.patch_emb.\1",
    ),
    (r"vision_encoder\.encoder\.model\.visual\.pos_embed", "vision.pos_emb"),
    (r"vision_encoder\.encoder\.model\.visual\.norm\.(\w+)", r"vision.post_ln.\1"),
    (
        r"vision_encoder\.encoder\.model\.visual\.blocks\.(\d+)\.norm([12])\.(\w+)",
        r"vision.blocks.\1.ln\2.\3",
    ),
    (
        r"vision_encoder\.encoder\.model\.visual\.blocks\.(\d+)\.((?:attn|mlp)\..+)",
        r"vision.blocks.\1.\2",
    ),
    (r"vision_encoder\.projection\.mlp\.(fc[12]\.\w+)", r"vision.proj_mlp.\1"),
    (r"region_model\.coordinate_encoder\.(\w+)", r"region.coord_encoder.\1"),
    (r"region_model\.coordinate_head\.(.+)", r"region.coord_decoder.\1"),
    (r"region_model\.size_encoder\.(\w+)", r"region.size_encoder.\1"),
    (r"region_model\.size_head\.(.+)", r"region.size_decoder.\1"),
    (r"region_model\.ln\.(\w+)", r"region.ln.\1"),
    (r"region_model\.coordinate_features\.weight", "region.coord_features"),
    (r"region_model\.size_features\.weight", "region.size_features"),
]
_ENGINE_PATTERNS = [(re.compile(pattern), name) for pattern, name in _ENGINE_NAMES]
_TRANSPOSED = {"region_model.coordinate_features.weight", "region_model.size_features.weight"}


def parameter_name(stored: str) -> str | None:
    """The parameter that a stored tensor fills, or None if its name is of no known scheme.

    Known schemes: engine names, Hugging Face names (``model.`` first), this package's own.
    """
    for pattern, name in _ENGINE_PATTERNS:
        match = pattern.fullmatch(stored)
        if match:
            return match.expand(name)
    stored = stored.removeprefix("model.")
    return stored if stored.split(".")[0] in ("text", "vision", "region") else None


def checkpoint_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint folder or file; raises ``ConfigError`` if there is none."""
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [path / shard for shard in shards]
    for pattern in ("*.safetensors", "*.pt"):
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise ConfigError(f"model_path: no .safetensors or .pt file in {path}")


def stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file, memory-mapped, one at a time; no code of the file is run."""
    if file.suffix == ".safetensors":
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)
        return
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    yield from state.items()


def load_weights(model: nn.Module, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Fill every parameter of ``model`` (built on the meta device) from a checkpoint.

    Tensors are converted and moved one at a time. Raises ``ConfigError`` that lists stored tensors
    that fit no parameter, parameters that no tensor fills, and shapes that differ.
    """
    wanted = dict(model.named_parameters())
    loaded: dict[str, str] = {}
    problems: list[str] = []
    for file in checkpoint_files(path):
        for stored, tensor in stored_tensors(file):
            name = parameter_name(stored)
            if name is None or name not in wanted:
                problems.append(f"unexpected tensor {stored}")
                continue
            if stored in _TRANSPOSED:
                tensor = tensor.T.contiguous()
            if name in loaded:
                problems.append(f"{stored} and {loaded[name]} both fill {name}")
            elif tensor.shape != wanted[name].shape:
                problems.append(
                    f"{stored} has shape {list(tensor.shape)}, not {list(wanted[name].shape)}"
                )
            else:
                _assign(model, name, tensor.to(device=device, dtype=dtype))
            loaded[name] = stored
    problems += [f"missing tensor {name}" for name in wanted if name not in loaded]
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise ConfigError(f"{path} does not fit the model: {shown}")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    # A clone lets go of the memory map that a converted-in-place tensor would keep alive.
    setattr(
        model.get_submodule(owner_name), leaf, nn.Parameter(tensor.clone(), requires_grad=False)
    )
