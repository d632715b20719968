"""Work of fixed shapes, launched at once where the device can."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2
"""Runs before a capture, so that libraries have set up what they keep."""


def capturing(device: torch.device) -> bool:
    """Whether what is now called for this device is recorded: nothing may then wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Captured:
    """A function without arguments that reads and writes the same tensors each time.

    On CUDA it is captured as a graph, whose launch costs the host one call; elsewhere it is called.
    What it gives is overwritten by the next call.
    """

    def __init__(self, run: Callable[[], Tensor], device: torch.device, pool: Pool) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):  # streams are the current device's
                self._capture(pool)

    def _capture(self, pool: Pool) -> None:
        aside = _stream(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local: a refiner may use the GPU from another thread meanwhile.
        with torch.cuda.graph(
            self._graph, pool=pool.handle, stream=aside, capture_error_mode="thread_local"
        ):
            self._out = self._run()
        pool.handle = self._graph.pool()

    def __call__(self) -> Tensor:
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._out


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of every capture on a GPU: cuBLAS keeps some 30 MB for each stream it meets."""
    return torch.cuda.Stream(device)


class Pool:
    """Memory that captured graphs share, as no two of them run at once."""

    def __init__(self) -> None:
        self.handle: Any = None
