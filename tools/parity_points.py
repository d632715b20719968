"""Run the public implementations on the models of ``tests/seeded.py``; record what they give.

    pip install --no-deps --target /tmp/pillow pillow==10.4.0   # what the public code is pinned to
    PYTHONPATH=/tmp/pillow python tools/parity_points.py MOONDREAM ENGINE [-o points.safetensors]

``MOONDREAM`` is a clone of github.com/vikhyat/moondream, ``ENGINE`` one of
github.com/m87-labs/kestrel (bare ones will do); files are taken from the commits below. The former
gives crops, the vision tower and Moondream 2. The latter gives Moondream 3: its decoder as it was
when it still ran on plain torch, with the GELU of its later correction (``ad58dcd``), and its
region module of today.

Nothing of either is part of this repository; the recorded numbers alone are.
"""

from __future__ import annotations

import argparse
import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from seeded import ANSWER, CASES, MODELS, PICTURES, POINTS, parameter, picture
from tiny_models import TOKENIZER

from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.model import Moondream
from kestrel.skills.segment import Coord, Size

MOONDREAM = "44146f139242dacdf7c02b799e68097424a31036"
ENGINE_TEXT = "38ff6d7"
ENGINE_REGION = "f920e71e7342cc0ea89a89bb7a03ef06d2d5d39a"


def extract(repository: str, commit: str, folder: str, into: Path) -> None:
    """Files of ``folder`` as of ``commit``, laid directly into ``into``."""
    command = ["git", "-C", repository, "archive", f"{commit}:{folder}"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(into, filter="data")


def seeded(names: Any) -> dict[str, Tensor]:
    return {name: parameter(name, tensor.shape) for name, tensor in names}


def own_shapes(config: MoondreamConfig) -> Any:
    with torch.device("meta"):
        return list(Moondream(config).named_parameters())


class Public2:
    """The public Moondream 2 model: prompts, pictures and answers by its own functions."""

    def __init__(self, config: MoondreamConfig) -> None:
        public = importlib.import_module("public_moondream.moondream")
        sizes = importlib.import_module("public_moondream.config")
        self.region = importlib.import_module("public_moondream.region")
        self.text = importlib.import_module("public_moondream.text")
        self.crops = importlib.import_module("public_moondream.image_crops")
        if self.crops.HAS_VIPS:
            raise SystemExit("pyvips resizes otherwise than Pillow; uninstall it")
        tokenizer = Tokenizer.from_file(str(TOKENIZER))

        class Local:  # its own is fetched from a hub
            from_pretrained = staticmethod(lambda name: tokenizer)

        public.Tokenizer = Local
        public.prepare_crops = self.crops_in_float32
        self.config = config
        own = asdict(config)
        parts = {
            "text": sizes.TextConfig,
            "vision": sizes.VisionConfig,
            "region": sizes.RegionConfig,
        }
        known = {
            part: cls(**{k: v for k, v in own[part].items() if k in cls.__dataclass_fields__})
            for part, cls in parts.items()
        }
        model = public.MoondreamModel(sizes.MoondreamConfig(**known), dtype=torch.float32)
        if config.region.decoder_arch == "mlp" and not config.text.tau_attn:
            names = own_shapes(config)
        else:  # its vision tower alone is used
            names = [n for n in own_shapes(config) if n[0].startswith("vision.")]
        missing, unexpected = model.load_state_dict(seeded(names), strict=False)
        if unexpected or (len(names) > 40 and not all("kv_cache" in name for name in missing)):
            raise SystemExit(f"missing {missing}, unexpected {unexpected}")
        # Its number of layers is the side of its grid of patches too.
        model.config = replace(
            model.config, vision=replace(model.config.vision, enc_n_layers=config.vision.grid)
        )
        self.model = model.eval().requires_grad_(False)

    def crops_in_float32(self, image: Any, sizes: Any, device: Any) -> Any:
        # As its own, which gives bfloat16 whatever the model's type is.
        cut = self.cut(np.array(image))
        pixels = torch.from_numpy(cut["crops"].transpose(0, 3, 1, 2)).float()
        return pixels.div_(255.0).sub_(0.5).div_(0.5), cut["tiling"]

    def cut(self, image: np.ndarray) -> Any:
        vision = self.config.vision
        return self.crops.overlap_crop_image(
            image, max_crops=vision.max_crops, overlap_margin=vision.overlap_margin
        )

    def embedding(self, name: str) -> Tensor:
        return self.model._run_vision_encoder(Image.fromarray(picture(name)))

    def hidden(self, case: Any) -> tuple[list[int], Tensor]:
        """Ids of the prompt without BOS, and hidden states after it and after each token of
        ``ANSWER``."""
        model, region, special = self.model, self.region, self.config.prompt
        model._setup_caches()
        places = []
        for ref in case.refs:
            places += [special.coord_id] * 2 + [special.size_id] * (len(ref) == 4)
        words = case.words() if case.ids else model.tokenizer.encode(case.noun).ids
        prompt = [*special.segment_prefix, *places, *words, special.answer_id]
        tokens, pos, mask = prompt, 0, None
        if case.picture is None:
            tokens, context = [special.bos_id, *prompt], model.config.text.max_context
            mask = torch.ones(1, 1, context, context, dtype=torch.bool).tril_()
        else:
            pos = model.encode_image(Image.fromarray(picture(case.picture))).pos
        _, hidden, _, pos = model._prefill_prompt(
            torch.tensor([tokens]), pos, 0, 1.0, list(case.refs) or None, attn_mask=mask
        )
        found = [hidden[0, -1]]
        seen = torch.zeros(1, 1, model.config.text.max_context, dtype=torch.bool)
        seen[..., :pos] = True
        for token in ANSWER:
            if isinstance(token, Coord):
                fed = region.encode_coordinate(torch.tensor([[[token.value]]]), model.region)
            elif isinstance(token, Size):
                fed = region.encode_size(torch.tensor([[[*token]]]), model.region)
            else:
                fed = self.text.text_encoder(torch.tensor([[token]]), model.text)
            seen[..., pos] = True
            _, hidden = model._decode_one_tok(fed, seen, torch.tensor([pos]), None)
            pos += 1
            found.append(hidden[0, -1])
        return prompt, torch.stack(found)

    def heads(self, hidden: Tensor) -> dict[str, Tensor]:
        """Logits of one hidden state."""
        return {
            "token": self.text.lm_head(hidden[None, None], self.model.text)[0],
            "coord": self.region.decode_coordinate(hidden, self.model.region),
            "size": self.region.decode_size(hidden, self.model.region).flatten(),
        }


class Public3:
    """The public engine's Moondream 3 decoder and region module, whole sequences at once."""

    def __init__(self, config: MoondreamConfig, pictures: Public2) -> None:
        text = importlib.import_module("public_engine_text.text")
        sizes = importlib.import_module("public_engine_text.config")
        rope = importlib.import_module("public_engine_text.rope")
        assert rope.precompute_freqs_cis.__defaults__[0] == config.text.rope_theta

        class TauGelu:
            """``torch.nn.functional`` with the GELU that the engine later took for tau."""

            def __getattr__(self, name: str) -> Any:
                return getattr(F, name)

            @staticmethod
            def gelu(x: Tensor) -> Tensor:
                return F.gelu(x, approximate="tanh")

        text.F = TauGelu()
        # Of its layers the region module takes this alone, the others want its kernels; of its
        # configuration a record with attributes.
        layers = types.ModuleType("public_engine_region.layers")
        layers.LayerNormWeights = types.SimpleNamespace  # type: ignore[attr-defined]
        layers.layer_norm = lambda x, w: F.layer_norm(  # type: ignore[attr-defined]
            x, w.bias.shape, w.weight, w.bias
        )
        sys.modules["public_engine_region.layers"] = layers
        settings = types.ModuleType("public_engine_region.config")
        settings.RegionConfig = types.SimpleNamespace  # type: ignore[attr-defined]
        sys.modules["public_engine_region.config"] = settings
        self.region_code = importlib.import_module("public_engine_region.region")
        own = asdict(config)
        kept = {k: v for k, v in own["text"].items() if k in sizes.TextConfig.__dataclass_fields__}
        kept["moe"] = sizes.TextMoeConfig(**own["text"]["moe"])
        self.sizes = sizes.TextConfig(**kept)
        self.text = text.build_text_model(self.sizes, torch.float32)
        self.region = self.region_code.build_region_module(config.region, torch.float32)
        for part, module in (("text.", self.text), ("region.", self.region)):
            names = [n for n in own_shapes(config) if n[0].startswith(part)]
            module.load_state_dict({k.removeprefix(part): v for k, v in seeded(names).items()})
            module.requires_grad_(False)
        self.tables = self.region_code.build_spatial_decode_tables(self.region)
        self.code, self.config, self.pictures = text, config, pictures

    def hidden(self, case: Any) -> tuple[list[int], Tensor]:
        special = self.config.prompt
        prompt: list[int] = [*special.segment_prefix]
        regions: list[Coord | Size] = []
        for ref in case.refs:
            prompt += [special.coord_id] * 2 + [special.size_id] * (len(ref) == 4)
            if len(ref) == 2:
                regions += [Coord(ref[0]), Coord(ref[1])]
            else:
                regions += [Coord((ref[0] + ref[2]) / 2), Coord((ref[1] + ref[3]) / 2)]
                regions.append(Size(ref[2] - ref[0], ref[3] - ref[1]))
        tokenizer = self.pictures.model.tokenizer
        prompt += case.words() if case.ids else tokenizer.encode(case.noun).ids
        prompt.append(special.answer_id)
        ids = [special.bos_id, *prompt, *(t if isinstance(t, int) else 0 for t in ANSWER)]
        x = self.code.text_encoder(torch.tensor([ids]), self.text)
        start = 1 + len(special.segment_prefix)
        places = [start + i for i in range(len(regions))]
        fed = [t for t in ANSWER if not isinstance(t, int)]
        places += [1 + len(prompt) + i for i in range(len(fed))]
        for place, token in zip(places, [*regions, *fed], strict=True):
            encode = self.region_code.encode_coordinate
            if isinstance(token, Size):
                encode = self.region_code.encode_size
            x[0, place] = encode(torch.tensor([*token]), self.region)
        prefix = 0
        if case.picture is not None:
            image = self.pictures.embedding(case.picture)[None]
            x, prefix = torch.cat([x[:, :1], image, x[:, 1:]], dim=1), 1 + image.shape[1]
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril_()
        mask[:prefix, :prefix] = True
        positions = torch.arange(length)[None]
        hidden = self.code.text_decoder(x, self.text, mask[None, None], positions, self.sizes)
        return prompt, hidden[0, -len(ANSWER) - 1 :]

    def heads(self, hidden: Tensor) -> dict[str, Tensor]:
        coord, width, height = self.region_code.spatial_decode_logits(hidden, self.tables)
        return {
            "token": self.code.lm_head(hidden[None, None], self.text)[0],
            "coord": coord[0],
            "size": torch.cat([width[0], height[0]]),
        }


def margins(logits: Tensor, parts: int) -> Tensor:
    """By how much the likeliest of each part leads, in spreads of that part's logits."""
    rows = logits.unflatten(0, (parts, -1))
    best = rows.topk(2).values
    return (best[:, 0] - best[:, 1]) / rows.std(-1)


@torch.inference_mode()
def record() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for config in MODELS.values():
        public2 = Public2(config)
        if config.name == "md2":
            for name in PICTURES:
                cut = public2.cut(picture(name))
                crops = torch.from_numpy(cut["crops"])
                found[f"{name}.tiling"] = torch.tensor(cut["tiling"])
                found[f"{name}.sums"] = crops.long().sum((1, 2, 3))
                found[f"{name}.pixels"] = crops.flatten()[:: 4001 * len(crops) + 2].clone()
                found[f"{name}.embedding"] = public2.embedding(name)[::61, ::9].clone()
        public = public2 if config.text.moe is None else Public3(config, public2)
        for name, case in CASES.items():
            prompt, hidden = public.hidden(case)
            key = f"{config.name}.{name}"
            found[f"{key}.prompt"] = torch.tensor(prompt, dtype=torch.int16)
            found[f"{key}.hidden"] = hidden[:, ::9].clone()
            heads = [public.heads(state) for state in hidden]
            for head, step in (("token", 67), ("coord", 79), ("size", 131)):
                logits = torch.stack([state[head] for state in heads])
                found[f"{key}.{head}"] = logits[:, ::step].clone()
                parts = 2 if head == "size" else 1
                best = logits.unflatten(1, (parts, -1)).argmax(-1)
                found[f"{key}.{head}.best"] = best.short()
                lead = torch.stack([margins(row, parts) for row in logits])
                found[f"{key}.{head}.lead"] = lead
            print(key, len(prompt), f"hidden up to {hidden.abs().max():.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("moondream", help="clone of github.com/vikhyat/moondream")
    parser.add_argument("engine", help="clone of github.com/m87-labs/kestrel")
    parser.add_argument("-o", "--output", type=Path, default=POINTS)
    args = parser.parse_args()
    if int(PIL.__version__.split(".")[0]) >= 13:
        raise SystemExit("Pillow of 13 and later resizes tall pictures otherwise; see above")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, name)
        extract(args.moondream, MOONDREAM, "moondream/torch", folder / "public_moondream")
        extract(args.engine, ENGINE_TEXT, "kestrel/moondream", folder / "public_engine_text")
        extract(
            args.engine, ENGINE_REGION, "kestrel/models/moondream", folder / "public_engine_region"
        )
        for package in folder.iterdir():
            (package / "__init__.py").write_text("")
        found = record()
    save_file(found, args.output)
    print(f"{args.output}: {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
