"""Sizes, special token ids and the prompt of a Moondream-architecture model.

The JSON keys are those of the public ``config.json`` files, so that a published configuration
loads as it is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kestrel.config import ConfigError


@dataclass(frozen=True)
class MoeConfig:
    """Mixture-of-experts layers of the text decoder."""

    num_experts: int = 64
    start_layer: int = 4
    """First layer whose MLP is a mixture; those before it are dense."""
    experts_per_token: int = 8
    expert_inner_dim: int = 1024


@dataclass(frozen=True)
class TextConfig:
    """Prefix-LM text decoder."""

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32
    prefix_attn: int = 730
    """Leading positions (BOS and image) that see each other in both directions."""
    rope_theta: float = 10_000.0
    tau_attn: bool = False
    moe: MoeConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated; the rest pass through."""
        return self.head_dim // 2


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP-style tower over one global and several local crops."""

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    """Most local crops; 0 encodes the global crop alone, which then stands for both."""
    overlap_margin: int = 4
    """Patches that neighbouring crops share on each side."""
    proj_inner_dim: int = 8192

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.enc_patch_size

    @property
    def n_patches(self) -> int:
        return self.grid * self.grid


@dataclass(frozen=True)
class RegionConfig:
    """Coordinates and sizes as embeddings in, as binned logits out."""

    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192
    decoder_arch: str = "mlp"
    """``mlp`` (Moondream 2) or ``linear`` (Moondream 3)."""
    use_ln: bool = False
    """LayerNorm before the decoders (Moondream 3)."""


@dataclass(frozen=True)
class PromptConfig:
    """Special ids, the segment prompt and how ids spell a path."""

    bos_id: int = 0
    eos_id: int = 0
    answer_id: int = 3
    coord_id: int = 5
    size_id: int = 6
    segment_prefix: tuple[int, ...] = (1, 17374, 2)
    first_path_id: int = 21
    """Ids below are control tokens, never path text."""
    path_grid: int = 960
    """Integers of a path run from 0 to this across the box."""


SECTIONS = ("text", "vision", "region", "prompt")
"""Parts of a ``config.json``."""


@dataclass(frozen=True)
class MoondreamConfig:
    """A whole model."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    name: str = "moondream"

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path | None = None) -> MoondreamConfig:
        """Build from a parsed ``config.json``, that of ``file``.

        Unknown sections and keys of other consumers are ignored, as published files carry some;
        a known key with a size that cannot work raises ``ConfigError``, which names the file.
        """
        try:
            return cls._from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}" if file is not None else str(error)) from None

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> MoondreamConfig:
        text, vision, region, prompt = (
            dict(_section(values.get(name) or {}, name)) for name in SECTIONS
        )
        if text.get("moe") is not None:
            text["moe"] = _pick(MoeConfig, _section(text["moe"], "text.moe", " or null"))
        if isinstance(prompt.get("segment_prefix"), list):
            prompt["segment_prefix"] = tuple(prompt["segment_prefix"])
        config = cls(
            text=_pick(TextConfig, text),
            vision=_pick(VisionConfig, vision),
            region=_pick(RegionConfig, region),
            prompt=_pick(PromptConfig, prompt),
            name=str(values.get("name", "moondream")),
        )
        config.check()
        return config

    @classmethod
    def from_file(cls, path: Path) -> MoondreamConfig:
        """Read ``config.json``; raises ``ConfigError`` naming the file."""
        return cls.from_dict(sections(path) or {}, path)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """Raise ``ConfigError``, which names the field, where a size cannot work or two of them
        contradict each other."""
        text, vision, region = self.text, self.vision, self.region
        parts: list[tuple[str, Any]] = [
            ("text", text), ("vision", vision), ("region", region), ("prompt", self.prompt),
            *([("text.moe", text.moe)] if text.moe is not None else []),
        ]  # fmt: skip
        for where, part in parts:
            for f in fields(part):
                _check_value(f"{where}.{f.name}", str(f.type), getattr(part, f.name))
        rules = [
            *self._id_rules(),
            (text.dim % text.n_heads == 0, "text.dim must be a multiple of text.n_heads"),
            (text.head_dim % 4 == 0, "text.dim / text.n_heads must be a multiple of 4"),
            (
                text.n_heads % text.n_kv_heads == 0,
                "text.n_heads must be a multiple of text.n_kv_heads",
            ),
            (
                # Tau scales values by the head of the query: heads that share values have no scale.
                not text.tau_attn or text.n_kv_heads == text.n_heads,
                "text.n_kv_heads must equal text.n_heads where text.tau_attn is true",
            ),
            (
                vision.crop_size % vision.enc_patch_size == 0,
                "vision.crop_size must be a multiple of vision.enc_patch_size",
            ),
            (
                vision.enc_dim % vision.enc_n_heads == 0,
                "vision.enc_dim must be a multiple of vision.enc_n_heads",
            ),
            (vision.proj_out_dim == text.dim, "vision.proj_out_dim must equal text.dim"),
            (region.dim == text.dim, "region.dim must equal text.dim"),
            (
                text.prefix_attn == 1 + vision.n_patches,
                "text.prefix_attn must be 1 + the patches of a crop",
            ),
            (
                text.max_context > text.prefix_attn,
                "text.max_context must be larger than text.prefix_attn",
            ),
            (
                region.decoder_arch in ("mlp", "linear"),
                "region.decoder_arch must be mlp or linear",
            ),
            (
                region.decoder_arch == "linear" or region.inner_dim > 0,
                "region.inner_dim must be at least 1 where region.decoder_arch is mlp",
            ),
            (region.coord_feat_dim % 2 == 0, "region.coord_feat_dim must be even"),
            (region.size_feat_dim % 2 == 0, "region.size_feat_dim must be even"),
            (
                region.size_out_dim % 2 == 0 and region.size_out_dim >= 4,
                "region.size_out_dim must be an even number of at least 4",
            ),
            (vision.in_channels == 3, "vision.in_channels must be 3: pictures are RGB"),
            (
                vision.max_crops == 0 or 2 * vision.overlap_margin < vision.grid,
                "vision.overlap_margin must be under half of a crop's patches along one side",
            ),
            (
                text.moe is None or text.moe.experts_per_token <= text.moe.num_experts,
                "text.moe.experts_per_token must be at most text.moe.num_experts",
            ),
        ]
        for ok, rule in rules:
            if not ok:
                raise ConfigError(rule)

    def _id_rules(self) -> list[tuple[bool, str]]:
        """The rules of token ids: each has an embedding, those that part an answer differ."""
        prompt, size = self.prompt, self.text.vocab_size
        ids = [
            (f.name, token_id)
            for f in fields(prompt)
            if f.name.endswith("_id") or f.name == "segment_prefix"
            for token_id in _ids(getattr(prompt, f.name))
        ]
        rules = [
            (i < size, f"prompt.{name} must be under text.vocab_size ({size}), not {i}")
            for name, i in ids
        ]
        parted = {prompt.coord_id, prompt.size_id, prompt.eos_id}
        return [
            *rules,
            (len(parted) == 3, "prompt.coord_id, size_id and eos_id must differ from each other"),
        ]


def sections(path: Path) -> dict[str, Any] | None:
    """The part of a ``config.json`` that gives the model's sizes; None if no part does.

    The files of the hub keep it under ``config``, and may leave everything at the published sizes.
    Raises ``ConfigError`` naming the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON configuration ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object")
    for part in (values, values.get("config")):
        if isinstance(part, dict) and part.keys() & set(SECTIONS):
            return part
    return None


_MAY_BE_0 = (
    "vision.max_crops",
    "vision.overlap_margin",
    "region.inner_dim",
    "text.moe.start_layer",
    *(f"prompt.{name}_id" for name in ("bos", "eos", "answer", "coord", "size", "first_path")),
)


def _check_value(key: str, kind: str, value: Any) -> None:
    """``ConfigError`` where a field's value is not of the kind that its annotation says."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    ok, rule = True, ""
    if kind == "int":
        least = 0 if key in _MAY_BE_0 else 1
        ok, rule = is_int and value >= least, f"an integer of at least {least}"
    elif kind == "float":
        # No infinity, nor an integer that is larger than any float.
        ok = (is_int or isinstance(value, float)) and 0 < value <= sys.float_info.max
        rule = "a number over 0"
    elif kind == "bool":
        ok, rule = isinstance(value, bool), "true or false"
    elif kind == "tuple[int, ...]":
        ok = isinstance(value, tuple) and all(type(v) is int and v >= 0 for v in value)
        rule = "a list of token ids"
    if not ok:
        raise ConfigError(f"{key} must be {rule}, not {value!r}")


def _ids(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _section(values: Any, name: str, more: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be an object{more}, not {values!r}")
    return values


def _pick(cls: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    return cls(**{key: value for key, value in values.items() if key in known})


_REGION_3 = RegionConfig(decoder_arch="linear", use_ln=True)

MOONDREAM_2 = MoondreamConfig(name="moondream2")
MOONDREAM_3 = MoondreamConfig(
    text=TextConfig(max_context=32_768, rope_theta=1_500_000.0, tau_attn=True, moe=MoeConfig()),
    region=_REGION_3,
    name="moondream3",
)
"""Published sizes; see the model cards of vikhyatk/moondream2 and moondream/moondream3-preview."""
