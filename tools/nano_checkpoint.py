"""The shipped checkpoint's sizes, its tokenizer, and how a trained model is written out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from words import vocabulary_words

from kestrel.moondream.config import (
    MoondreamConfig,
    PromptConfig,
    RegionConfig,
    TextConfig,
    VisionConfig,
)
from kestrel.moondream.model import Moondream

CONTROL = {0: "<|endoftext|>", 3: "<|answer|>", 4: "<|thinking|>", 5: "<|coord|>", 6: "<|size|>"}
COMMANDS = "MLHVCSQTAZmlhvcsqtaz"
SEGMENT = "<|segment|>"


def build_tokenizer(words: list[str]) -> Tokenizer:
    """A Unigram tokenizer: control tokens, path commands, 0..960, whole words, letters, bytes.

    Every string encodes (byte fallback); a known word is one token, an unknown one is letters.
    """
    pieces: list[tuple[str, float]] = [(CONTROL.get(i, f"<|{i}|>"), -100.0) for i in range(21)]
    pieces += [(command, -14.0) for command in COMMANDS]
    pieces += [(str(value), -9.0) for value in range(961)] + [("-", -14.0), (SEGMENT, -100.0)]
    taken = {piece for piece, _ in pieces}
    for word in [*words, "s", "es", "a ", "an ", "the ", " "]:
        if word not in taken:
            pieces.append((word, -6.0 if len(word) > 2 else -10.0))
            taken.add(word)
    pieces += [(chr(c), -14.0) for c in range(33, 127) if chr(c) not in taken]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def nano_config(tokenizer: Tokenizer) -> MoondreamConfig:
    """Sizes of the shipped model: 336 px, 576 patches, width 192, tau attention."""
    vocab = -(-tokenizer.get_vocab_size() // 64) * 64
    return MoondreamConfig(
        text=TextConfig(
            dim=192,
            ff_dim=768,
            n_layers=6,
            vocab_size=vocab,
            max_context=768,
            n_heads=6,
            n_kv_heads=6,
            prefix_attn=577,
            tau_attn=True,
        ),
        vision=VisionConfig(
            enc_dim=192,
            enc_n_layers=10,
            enc_ff_dim=768,
            enc_n_heads=6,
            proj_out_dim=192,
            crop_size=336,
            max_crops=0,
            overlap_margin=0,
            proj_inner_dim=768,
        ),
        region=RegionConfig(
            dim=192,
            coord_feat_dim=64,
            size_feat_dim=128,
            inner_dim=0,
            decoder_arch="linear",
            use_ln=True,
        ),
        prompt=PromptConfig(segment_prefix=(1, tokenizer.token_to_id(SEGMENT), 2)),
        name="nano",
    )


def read_checkpoint(folder: Path) -> tuple[Moondream, Tokenizer]:
    """The model of a checkpoint, of the sizes that its config.json says, in float32, as it trains
    and not made ready to serve, and today's tokenizer."""
    tokenizer = build_tokenizer(vocabulary_words())
    about = json.loads((folder / "config.json").read_text())
    model = Moondream(MoondreamConfig.from_dict(about)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, tokenizer


def write_checkpoint(
    folder: Path, model: Moondream, state: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    """Write weights (bfloat16), config.json and tokenizer.json; each file appears whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(model.named_parameters())
    tensors = {name: state[name].to(torch.bfloat16).contiguous() for name in names}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, str(partial))
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
