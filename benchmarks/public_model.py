"""The public Moondream implementation, from a checkout, beside the engine: the same weights, prompt
and number of tokens, in one process.

A random model in the shape of Moondream 2 that both take: the public vision code wants as many
layers as a crop has patches along a side, and its mask 2048 positions. Its answers are tokens that
the segment prompt may have in a path's place and that never end it, so that both run as long.
"""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from kestrel import InferenceEngine, RuntimeConfig
from kestrel.api import SegmentRequest, SegmentSettings
from kestrel.config import SHIPPED_MODELS
from kestrel.cores import usable_cores
from kestrel.engine import EngineResult
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.model import Moondream
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.skills.segment import build_prompt

NANO = SHIPPED_MODELS / "nano"
TOKENS = 96
"""Sampled tokens of an answer: the box's three, then text."""
NOUN = "dog"
TOLD = slice(7, 21)
"""Ids that a text token is chosen from: no command, coordinate, size or end among them."""
SIZES = {
    "text": {
        "dim": 512,
        "ff_dim": 2048,
        "n_layers": 12,
        "n_heads": 8,
        "n_kv_heads": 8,
        "vocab_size": 1664,
    },
    "vision": {"enc_dim": 96, "enc_ff_dim": 384, "enc_n_heads": 4, "proj_inner_dim": 1024},
    "region": {"dim": 512, "inner_dim": 1024},
}
"""What differs from Moondream 2."""
SIDES = (320, 240)
"""Width and height of the pictures, pixels: one local crop, which the public code encodes too."""

Answer = tuple[list[int], list[float]]
"""Text tokens, and the box's centre and size."""


def talkative(model: Moondream) -> Moondream:
    """Have a random model answer with a box and then with ``TOLD`` tokens without end."""
    bias = model.text.lm_head.bias
    assert bias is not None
    with torch.no_grad():
        bias[TOLD] += 20.0
        bias[model.config.prompt.coord_id] += 5.0
        # As large as what the layers add, so that a token depends on those before it.
        model.text.wte.mul_(20.0)
    return model


def write_checkpoint(folder: Path) -> MoondreamConfig:
    """Weights, configuration and tokenizer of the random model."""
    sizes: dict[str, Any] = {part: dict(values) for part, values in SIZES.items()}
    sizes["vision"]["proj_out_dim"] = sizes["text"]["dim"]
    sizes["prompt"] = {"segment_prefix": [1, 1003, 2]}
    config = MoondreamConfig.from_dict({**sizes, "name": "random-md2"})
    torch.manual_seed(0)
    model = talkative(Moondream(config))
    save_file(dict(model.named_parameters()), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_bytes((NANO / "tokenizer.json").read_bytes())
    return config


def pictures(count: int, first: int) -> list[bytes]:
    """Different pictures as PNG files."""
    made = []
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize(SIDES, Image.Resampling.BICUBIC).save(file, "PNG")
        made.append(file.getvalue())
    return made


class PublicModel:
    """The public model with the weights of a folder, in float32, one request at a time."""

    def __init__(self, checkout: Path, folder: Path, config: MoondreamConfig) -> None:
        sys.path.insert(0, str(checkout))
        from moondream.torch import moondream as public
        from moondream.torch import region, text
        from moondream.torch.config import (
            MoondreamConfig as PublicConfig,
        )
        from moondream.torch.image_crops import (
            overlap_crop_image,
        )

        def crops_in_float32(image: Any, sizes: Any, device: Any) -> Any:
            # As its own, which gives bfloat16 whatever the model's type is.
            cut = overlap_crop_image(
                np.array(image), max_crops=sizes.max_crops, overlap_margin=sizes.overlap_margin
            )
            pixels = torch.from_numpy(cut["crops"].transpose(0, 3, 1, 2)).float()
            return pixels.div_(255.0).sub_(0.5).div_(0.5), cut["tiling"]

        public.prepare_crops = crops_in_float32
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

        class Local:  # its own is fetched from a hub
            from_pretrained = staticmethod(lambda name: tokenizer)

        public.Tokenizer = Local
        known = {
            "text": set(text.TextConfig.__dataclass_fields__),
            "vision": set(config.to_dict()["vision"]),
            "region": set(config.to_dict()["region"]) - {"decoder_arch", "use_ln"},
        }
        values = config.to_dict()
        sizes = {p: {k: v for k, v in values[p].items() if k in known[p]} for p in known}
        self.model = public.MoondreamModel(PublicConfig.from_dict(sizes), dtype=torch.float32)
        missing, unexpected = self.model.load_state_dict(
            load_file(str(folder / "model.safetensors")), strict=False
        )
        assert not unexpected and all("kv_cache" in name for name in missing), (missing, unexpected)
        self.model.eval().requires_grad_(False)
        self._text_encoder, self._region = text.text_encoder, region

    @torch.inference_mode()
    def answer(self, image: bytes, prompt: list[int]) -> Answer:
        """What its own loops for boxes and for text do, one after the other."""
        model, region = self.model, self._region
        with Image.open(io.BytesIO(image)) as opened:
            pos = model.encode_image(opened.convert("RGB")).pos
        _, hidden, _, pos = model._prefill_prompt(torch.tensor([prompt]), pos, 0, 1.0)
        hidden = hidden[:, -1:]
        mask = torch.zeros(1, 1, 2048, dtype=torch.bool)
        mask[:, :, :pos] = 1
        box = []

        def fed(embedding: torch.Tensor) -> torch.Tensor:
            nonlocal hidden, pos
            mask[:, :, pos] = 1
            logits, hidden = model._decode_one_tok(embedding, mask, torch.tensor([pos]), None)
            pos += 1
            return logits

        for _ in range(2):
            logits = region.decode_coordinate(hidden, model.region)
            place = logits.argmax(-1) / logits.shape[-1]
            box.append(float(place))
            fed(region.encode_coordinate(place.to(logits.dtype), model.region).unsqueeze(0))
        bins = region.decode_size(hidden, model.region).argmax(-1)
        size = torch.pow(2.0, bins.float() / 1023.0 * 10.0 - 10.0)
        box += size.tolist()
        logits = fed(region.encode_size(size, model.region)[None, None])
        told = [int(logits.argmax(-1))]
        while len(told) < TOKENS - 3:
            token = torch.tensor([[told[-1]]])
            told.append(int(fed(self._text_encoder(token, model.text)).argmax(-1)))
        return told, box

    def rate(self, images: list[bytes], prompt: list[int], threads: int) -> float:
        """Answers per second, one after the other, with so many of torch's threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            began = time.perf_counter()
            for image in images:
                self.answer(image, prompt)
            return len(images) / (time.perf_counter() - began)
        finally:
            torch.set_num_threads(before)


async def ask(engine: InferenceEngine, image: bytes) -> EngineResult:
    return await engine.segment(image=image, object=NOUN, settings={"max_tokens": TOKENS})


def answered(result: EngineResult) -> Answer:
    segment = result.output["segments"][0]
    return segment["token_ids"], [*segment["points"][0], *segment["sizes"][0]]


async def against_public(checkout: Path, rounds: int, clients: int) -> dict[str, Any]:
    """Requests per second of both, every picture new, alternating; the answers are compared first.
    The public one counts with one thread or with one on every core, whichever is faster: the engine
    encodes pictures on all cores that are idle.

    Raises ``RuntimeError`` where they differ.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_checkpoint(folder)
        public = PublicModel(checkout, folder, config)
        runtime = RuntimeConfig(
            model_path=name,
            refiner=None,
            torch_threads=1,
            max_batch_size=clients,
            max_context=config.text.prefix_attn + TOKENS + 32,
            allow_empty_paths=True,
        )
        engine = await InferenceEngine.create(runtime)
    request = SegmentRequest(NOUN, b"", settings=SegmentSettings())
    tokenizer = SegmentTokenizer.from_file(NANO / "tokenizer.json", config.prompt)
    prompt = [t for t in build_prompt(request, config, tokenizer).tokens if isinstance(t, int)]
    shown = pictures(clients, 0)
    alone = [answered(await ask(engine, image)) for image in shown[:3]]
    batched = await asyncio.gather(*(ask(engine, image) for image in pictures(clients, 0)))
    for image, one, many in zip(shown, alone, batched, strict=False):
        told, box = public.answer(image, prompt)
        if not told == one[0] == answered(many)[0] or not np.allclose(box, one[1], atol=1e-6):
            raise RuntimeError(f"the answers differ: {told[:9]}, {box}; {one[0][:9]}, {one[1]}")
    variety = len({token for told, _ in alone for token in told})
    rates: dict[str, list[float]] = {"public": [], "one": [], "many": []}
    seen = clients
    for _ in range(rounds):
        images = pictures(6, seen)
        rates["public"].append(
            max(public.rate(images[:3], prompt, threads) for threads in {1, usable_cores()})
        )
        began = time.perf_counter()
        for image in images[3:]:
            await ask(engine, image)
        rates["one"].append(3 / (time.perf_counter() - began))
        images = pictures(clients, seen + 6)
        began = time.perf_counter()
        await asyncio.gather(*(ask(engine, image) for image in images))
        rates["many"].append(clients / (time.perf_counter() - began))
        seen += 6 + clients
    await engine.shutdown()
    ratio = {
        key: statistics.median(
            ours / theirs for ours, theirs in zip(rates[key], rates["public"], strict=True)
        )
        for key in ("one", "many")
    }
    return {
        "parameters": sum(p.numel() for p in public.model.parameters()),
        "tokens": TOKENS,
        "different_tokens": variety,
        "requests_per_s": {key: statistics.median(values) for key, values in rates.items()},
        "one_over_public": ratio["one"],
        "at_once": clients,
        "at_once_over_public": ratio["many"],
    }
