"""The two stages as composed BentoML services, for benchmarks/graph.py:
``bentoml serve benchmarks.rival_bentoml:Model --port PORT``.

One worker of each, as the graph has one replica of each; the model's answers HTTP.
"""

# No ``from __future__ import annotations``: BentoML reads the types of its methods.
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bentoml

from kestrel import api
from kestrel.answers import segment_response
from kestrel.config import RefinerConfig, RuntimeConfig
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

CONFIG = RuntimeConfig(torch_threads=1, max_batch_size=8, refiner=None)
THREADS = 2
OPTIONS: Any = {
    "workers": 1,
    "traffic": {"timeout": 120},
    "logging": {"access": {"enabled": False}},
}


@bentoml.service(**OPTIONS)
class Refiner:
    """The CPU half."""

    def __init__(self) -> None:
        from kestrel.seg_refiner import SegmentRefiner
        from kestrel.seg_refiner.libraries import one_thread_each

        one_thread_each()
        self._refiner = SegmentRefiner(RefinerConfig(), limits=CONFIG.limits)
        self._refiner.self_check()
        self._threads = ThreadPoolExecutor(THREADS)

    @bentoml.api
    async def refine(self, image: Any, path: str, bbox: Any, return_base64: bool) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: self._refiner.refine_encoded(image, path, bbox, return_base64=return_base64),
        )


@bentoml.service(**OPTIONS)
class Model:
    """The model half and the HTTP door."""

    refiner = bentoml.depends(Refiner)

    def __init__(self) -> None:
        from kestrel import InferenceEngine

        # BentoML makes its services on a running event loop, which cannot wait here.
        created = ThreadPoolExecutor(1).submit(asyncio.run, InferenceEngine.create(CONFIG))
        self._engine = created.result()

    @bentoml.api(route="/v1/segment")
    async def segment(self, object: str, image_url: str, return_base64: bool = False) -> dict:
        fields = {"object": object, "return_base64": return_base64}
        request = api.validate_call(
            fields | {"image": api.image_bytes(image_url)},
            limits=CONFIG.limits,
            served_model=CONFIG.model,
        )
        model, refined = await self._engine.complete(request)
        if model.refinable:
            fields = await self.refiner.to_async.refine(
                image=request.image,
                path=model.path,
                bbox=model.bbox,
                return_base64=return_base64,
            )
            refined = SegmentRefineBitmapsResult(**fields)
        return segment_response(model, refined, return_base64=return_base64)
