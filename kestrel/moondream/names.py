"""Names of stored tensors to parameters, by exact name.

Three schemes are known: the engine's (``text_model.``, ``vision_encoder.``, ``region_model.``),
Hugging Face's (``model.text.``, ``model.vision.``, ``model.region.``) and this package's own, which
is Hugging Face's without the prefix. A compiled model's ``_orig_mod.`` is taken off first, as the
public loaders do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_VISUAL = r"vision_encoder\.encoder\.model\.visual"
_LAYER = r"text_model\.transformer\.h\.(\d+)"
_ENGINE_NAMES: list[tuple[str, str]] = [
    (r"text_model\.transformer\.embd\.wte\.weight", "text.wte"),
    (_LAYER + r"\.ln\.(\w+)", r"text.blocks.\1.ln.\2"),
    (_LAYER + r"\.mixer\.Wqkv\.(\w+)", r"text.blocks.\1.attn.qkv.\2"),
    (_LAYER + r"\.mixer\.out_proj\.(\w+)", r"text.blocks.\1.attn.proj.\2"),
    (_LAYER + r"\.tau_(wq|wv|alpha)", r"text.blocks.\1.attn.tau.\2"),
    (_LAYER + r"\.mlp\.(fc[12]\.\w+)", r"text.blocks.\1.mlp.\2"),
    (_LAYER + r"\.gate\.(\w+)", r"text.blocks.\1.mlp.router.\2"),
    (_LAYER + r"\.mlp\.experts\.weight", r"text.blocks.\1.mlp.fc1.weight"),
    (_LAYER + r"\.mlp\.output_experts\.weight", r"text.blocks.\1.mlp.fc2.weight"),
    (r"text_model\.lm_head\.ln\.(\w+)", r"text.post_ln.\1"),
    (r"text_model\.lm_head\.linear\.(\w+)", r"text.lm_head.\1"),
    (_VISUAL + r"\.patch_embed\.linear\.(\w+)", r"vision.patch_emb.\1"),
    (_VISUAL + r"\.pos_embed", "vision.pos_emb"),
    (_VISUAL + r"\.norm\.(\w+)", r"vision.post_ln.\1"),
    (_VISUAL + r"\.blocks\.(\d+)\.norm([12])\.(\w+)", r"vision.blocks.\1.ln\2.\3"),
    (_VISUAL + r"\.blocks\.(\d+)\.((?:attn|mlp)\..+)", r"vision.blocks.\1.\2"),
    (r"vision_encoder\.projection\.mlp\.(fc[12]\.\w+)", r"vision.proj_mlp.\1"),
    (r"region_model\.coordinate_encoder\.(\w+)", r"region.coord_encoder.\1"),
    # Moondream 3 calls its linear layer a head, Moondream 2 its MLP a decoder.
    (r"region_model\.coordinate_(?:head|decoder)\.(.+)", r"region.coord_decoder.\1"),
    (r"region_model\.size_encoder\.(\w+)", r"region.size_encoder.\1"),
    (r"region_model\.size_(?:head|decoder)\.(.+)", r"region.size_decoder.\1"),
    (r"region_model\.ln\.(\w+)", r"region.ln.\1"),
    (r"region_model\.coordinate_features\.weight", "region.coord_features"),
    (r"region_model\.size_features\.weight", "region.size_features"),
]
_ENGINE_PATTERNS = [(re.compile(pattern), name) for pattern, name in _ENGINE_NAMES]
_TRANSPOSED = {"region_model.coordinate_features.weight", "region_model.size_features.weight"}
_FUSED_TAU = re.compile(_LAYER + r"\.tau_wqwv")
_SCALE = re.compile(_LAYER + r"\.moe_quant\.(up|down)_scale")
_EXPERTS = {"up": "fc1", "down": "fc2"}


@dataclass(frozen=True)
class Fill:
    """What one stored tensor, or a part of it, fills."""

    parameter: str
    part: Literal["all", "transposed", "first half", "second half"] = "all"

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that is filled by a tensor of shape ``stored``."""
        if self.part == "all" or not stored:
            return stored
        if self.part == "transposed":
            return stored[::-1]
        half = stored[0] // 2
        return (half if self.part == "first half" else stored[0] - half, *stored[1:])


def plain_name(stored: str) -> str:
    """The name without what ``torch.compile`` put into it."""
    return stored.replace("_orig_mod.", "")


def scheme(stored: str) -> str:
    """Which naming a stored tensor follows, in words; "unknown" for none."""
    stored = plain_name(stored)
    if stored.startswith(("text_model.", "vision_encoder.", "region_model.")):
        return "engine names"
    if stored.startswith(("model.text.", "model.vision.", "model.region.")):
        return "Hugging Face names"
    return "own names" if stored.startswith(("text.", "vision.", "region.")) else "unknown"


def parameter_name(stored: str) -> str | None:
    """The parameter that a stored tensor fills whole, or None if its name is of no known scheme."""
    stored = plain_name(stored)
    for pattern, name in _ENGINE_PATTERNS:
        match = pattern.fullmatch(stored)
        if match:
            return match.expand(name)
    stored = stored.removeprefix("model.")
    return stored if stored.split(".")[0] in ("text", "vision", "region") else None


def fills(stored: str) -> list[Fill]:
    """Every parameter that a stored tensor fills; [] if its name is of no known scheme.

    Several only where the engine fuses what are two parameters here (``tau_wqwv``).
    """
    name = plain_name(stored)
    fused = _FUSED_TAU.fullmatch(name)
    if fused:
        tau = f"text.blocks.{fused[1]}.attn.tau."
        return [Fill(tau + "wq", "first half"), Fill(tau + "wv", "second half")]
    parameter = parameter_name(name)
    if parameter is None:
        return []
    return [Fill(parameter, "transposed" if name in _TRANSPOSED else "all")]


def scaled_parameter(stored: str) -> str | None:
    """The expert weights whose float8 scales a stored tensor holds; None if it holds none."""
    match = _SCALE.fullmatch(plain_name(stored))
    return f"text.blocks.{match[1]}.mlp.{_EXPERTS[match[2]]}.weight" if match else None
