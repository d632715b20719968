"""The shipped model as an engine, its samples, and a refiner that does what a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
from devices import GPU
from PIL import Image
from serving import encoded

from kestrel.config import SHIPPED_MODELS, RefinerConfig, RuntimeConfig
from kestrel.engine import EngineResult, InferenceEngine
from kestrel.moondream.config import MoondreamConfig
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.seg_refiner import backends
from kestrel.seg_refiner.guided import GuidedRefiner

NANO = SHIPPED_MODELS / "nano"
MODEL = MoondreamConfig.from_file(NANO / "config.json")
TOKENIZER = SegmentTokenizer.from_file(NANO / "tokenizer.json", MODEL.prompt)
MASKS = {"coarse_mask_base64", "refined_mask_base64"}
SEGMENT = {"object", "text", "svg_path", "bbox", "coarse_path", "coarse_bbox", "path_tokens",
           "token_ids", "points", "sizes"}  # fmt: skip


class Switch:
    """A refiner backend: the guided filter until a test says otherwise."""

    def __init__(self) -> None:
        self.guided = GuidedRefiner(RefinerConfig())
        self.behave: Callable[[np.ndarray, np.ndarray], np.ndarray] = self.guided

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.behave(image, mask)


@pytest.fixture(scope="module")
def switched() -> Iterator[Switch]:
    made = Switch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "switch", lambda config: made)
        yield made


@pytest.fixture
def switch(switched: Switch) -> Iterator[Switch]:
    yield switched
    switched.behave = switched.guided


CONFIG: dict[str, Any] = {"device": "cpu", "torch_threads": 1}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=GPU.marks)])
def engine(switched: Switch, request: pytest.FixtureRequest) -> Iterator[InferenceEngine]:
    """The shipped model with four slots; tests may use it from any event loop."""
    config = RuntimeConfig(
        max_batch_size=4,
        refiner=RefinerConfig(refiner="switch"),
        **{**CONFIG, "device": request.param, "dtype": "float32"},
    )
    made = asyncio.run(InferenceEngine.create(config))
    yield made
    asyncio.run(made.shutdown())


def sample(file: File) -> bytes:
    with Image.open(file) as image:
        return encoded(image.convert("RGB").resize((203, 157)), "PNG")


SAMPLES = [
    {"object": entry["noun"], "image": sample(NANO / "samples" / entry["file"])}
    for entry in json.loads((NANO / "samples" / "samples.json").read_text())
]


@pytest.fixture(scope="module")
def ask(engine: InferenceEngine) -> dict[str, Any]:
    """Arguments that the model answers with a path which is then refined."""

    async def first() -> dict[str, Any] | None:
        for arguments in SAMPLES:
            result = await engine.segment(**arguments, return_base64=True)
            if set(segment(result)) > MASKS:
                return arguments
        return None

    found = asyncio.run(first())
    assert found is not None, "the engine gives both masks for none of the samples"
    return found


def segment(result: EngineResult) -> dict[str, Any]:
    (only,) = result.output["segments"]
    return only


def comparable(result: EngineResult) -> dict[str, Any]:
    """What two runs of one request must agree in."""
    tokens = (result.metrics.input_tokens, result.metrics.output_tokens)
    return {**segment(result), "finish_reason": result.finish_reason, "tokens": tokens}


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 30)
