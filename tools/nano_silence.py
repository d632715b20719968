"""Choose how readily the model answers with nothing, on held-out scenes, and write it down.

    python tools/nano_silence.py kestrel/models/nano --share 0.92

The first thing an answer says is whether the noun is to be seen at all: it ends, or it begins with
a coordinate. A bias on the end is moved until a share of the absent nouns is answered with nothing.
What that costs in nouns that are there is printed. Later the end follows the path's last command,
where nothing else is likely.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from nano_checkpoint import read_checkpoint, write_checkpoint
from nano_eval import EVAL_SEED
from nano_questions import SceneQuestions
from nouns import CORE, CORE_STYLES
from scenes import SceneGenerator

from kestrel.moondream.model import Moondream


@torch.inference_mode()
def leads(model: Moondream, asker: SceneQuestions, scenes: int) -> dict[str, np.ndarray]:
    """By how much an answer's end is likelier than its begin (logits), for nouns that are
    ``absent`` and ``present``."""
    generator = SceneGenerator(
        "eval", EVAL_SEED + 1, styles=CORE_STYLES, nouns=asker.nouns, size=(336, 336)
    )
    rng = np.random.default_rng(EVAL_SEED)
    special, found = model.config.prompt, {"absent": [], "present": []}
    bos = model.embed_tokens(torch.tensor([special.bos_id]))
    for index in range(scenes):
        scene = generator.scene(index)
        image = torch.cat([bos, model.encode_image(scene.image)])
        nouns = {seen.noun for seen in scene.objects}
        asked = [(noun, "present") for noun in nouns]
        unseen = asker.absent(nouns, rng)
        for noun, kind in asked if unseen is None else [*asked, (unseen, "absent")]:
            prompt = torch.tensor(asker.prompt(noun))
            x = torch.cat([image, model.embed_tokens(prompt)])[None]
            logits = model.text.logits(model.text(x, len(image))[0, -1])
            found[kind].append(float(logits[special.eos_id] - logits[special.coord_id]))
    return {kind: np.array(values) for kind, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint, which is written anew")
    parser.add_argument("--share", type=float, default=0.92, help="of absent nouns, to be silent")
    parser.add_argument("--scenes", type=int, default=400)
    args = parser.parse_args()
    model, tokenizer = read_checkpoint(args.folder)
    found = leads(model, SceneQuestions(tokenizer, CORE), args.scenes)
    chosen = -float(np.quantile(found["absent"], 1 - args.share))
    for more in sorted((-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, chosen)):
        shares = {kind: float((lead + more > 0).mean()) for kind, lead in found.items()}
        told = ", ".join(f"{share:.3f} {kind}" for kind, share in shares.items())
        print(f"{more:5.2f}: nothing for {told}" + ", chosen" * (more == chosen))
    with torch.no_grad():
        model.text.lm_head.bias[model.config.prompt.eos_id] += chosen
    write_checkpoint(args.folder, model, dict(model.named_parameters()), tokenizer)
    print(f"end of the answer: {chosen:+.2f}")


if __name__ == "__main__":
    main()
