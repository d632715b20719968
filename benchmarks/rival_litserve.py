"""The two stages in one LitServe API, for benchmarks/graph.py: ``python rival_litserve.py PORT``.

An asynchronous API: its worker hands every request to the engine, which batches by itself.
"""

# No ``from __future__ import annotations``: LitServe reads the types of ``decode_request``.
import asyncio
import sys
from typing import Any

import litserve

from kestrel import InferenceEngine, api
from kestrel.answers import segment_response
from kestrel.config import RuntimeConfig

CONFIG = RuntimeConfig(torch_threads=1, max_batch_size=8, refiner_threads=2)


class SegmentAPI(litserve.LitAPI):
    """Decode, predict, encode."""

    def setup(self, device: str) -> None:
        self.engine = asyncio.run(InferenceEngine.create(CONFIG))

    async def decode_request(self, request: dict[str, Any]) -> api.SegmentRequest:
        image = api.image_bytes(request["image_url"])
        return api.validate_call(
            request | {"image": image}, limits=CONFIG.limits, served_model=CONFIG.model
        )

    async def predict(self, request: api.SegmentRequest) -> dict[str, Any]:
        model, refined = await self.engine.complete(request)
        return segment_response(model, refined, return_base64=request.return_base64)

    async def encode_response(self, answer: dict[str, Any]) -> dict[str, Any]:
        return answer


if __name__ == "__main__":
    server = litserve.LitServer(
        SegmentAPI(enable_async=True, api_path="/v1/segment"), accelerator="cpu", timeout=120
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
