"""Continuous batching: the thread that owns the model.

Requests wait in a queue, join the running batch between decode steps, and leave it when they end,
are cancelled or run out of time. One request's failure is its own; a failure of a step ends the
requests that were in it, and the thread goes on with the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kestrel.api import (
    DeadlineExceeded,
    ModelDone,
    ModelEvent,
    ModelMetrics,
    ModelResult,
    Overloaded,
    PromptTooLong,
    SegmentRequest,
)
from kestrel.moondream.model import Moondream
from kestrel.ops.sampling import sample
from kestrel.skills.segment import Prompt, SegmentState

logger = logging.getLogger(__name__)

PREFILL_POSITIONS = 2048
"""Prompt positions of one admission: bounds how long decoding requests wait for newcomers."""
EMBEDDING_CACHE = 32
"""Image embeddings kept, least recently used first out."""


@dataclass
class Crops:
    """An image ready for the vision tower: crops uint8 [N, 3, S, S], grid, content key."""

    tensor: Tensor
    tiling: tuple[int, int]
    key: bytes


@dataclass(eq=False)
class Job:
    """One request on its way through the model. ``deliver`` takes events and at most one error."""

    request_id: str
    request: SegmentRequest
    prompt: Prompt
    crops: Crops | None
    state: SegmentState
    deliver: Callable[[ModelEvent | BaseException], None]
    deadline: float
    """On ``time.monotonic``."""
    metrics: ModelMetrics = field(default_factory=ModelMetrics)
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    slot: int = -1
    length: int = 0
    """Positions in the cache."""
    started: float = 0.0
    prefilled: float = 0.0


class Scheduler:
    """Owns the model, its KV cache and the thread that runs them.

    ``slots`` requests decode together; ``queue`` more may wait.
    """

    def __init__(
        self, model: Moondream, *, slots: int, queue: int, torch_threads: int | None = None
    ) -> None:
        self._model = model
        self._slots = slots
        self._queue_limit = queue
        self._torch_threads = torch_threads
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._images: OrderedDict[bytes, Tensor] = OrderedDict()
        self._counts = {"submitted": 0, "completed": 0, "failed": 0, "cancelled": 0, "steps": 0}
        config = model.config
        special = config.prompt
        self._text_only = torch.zeros(config.text.vocab_size, device=model.device)
        self._text_only[[special.coord_id, special.size_id]] = float("-inf")
        self._first = torch.full_like(self._text_only, float("-inf"))
        self._first[[special.coord_id, special.eos_id]] = 0.0
        self._generator = torch.Generator(device=model.device)
        self._thread = threading.Thread(target=self._run, name="kestrel-engine", daemon=True)
        self._thread.start()

    # Called from other threads.

    def submit(self, job: Job) -> None:
        """Queue a request; ``Overloaded`` when the queue is full, ``PromptTooLong`` by itself."""
        needed = self._prompt_length(job)
        context = self._model.config.text.max_context
        if needed >= context:
            raise PromptTooLong(
                f"the prompt has {needed} positions, the model's context {context}", "object"
            )
        with self._wake:
            if self._stopping:
                raise Overloaded("the engine is shutting down", retry_after_s=1.0)
            if len(self._waiting) >= self._queue_limit:
                raise Overloaded(
                    f"{self._queue_limit} requests are waiting already", retry_after_s=1.0
                )
            self._waiting.append(job)
            self._counts["submitted"] += 1
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Free the request's slot before the next step; nothing more is delivered."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread; requests in flight fail with ``Overloaded``. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stats(self) -> dict[str, int]:
        """Counts since the start, and requests running and waiting now."""
        return self._counts | {"running": len(self._running), "waiting": len(self._waiting)}

    # The engine thread.

    def _run(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        with torch.inference_mode():
            self._cache = self._model.new_cache(self._slots)
            while True:
                with self._wake:
                    while not (self._stopping or self._waiting or self._running):
                        self._wake.wait()
                    if self._stopping:
                        break
                self._turn()
        gone = Overloaded("the engine was shut down", retry_after_s=1.0)
        for job in [*self._running, *self._waiting]:
            self._fail(job, gone)
        self._running.clear()
        self._waiting.clear()

    def _turn(self) -> None:
        """Drop what ended from outside, admit newcomers, decode one step."""
        self._drop_ended()
        hidden: list[tuple[Job, Tensor]] = []
        batch = self._admit()
        try:
            if self._running:
                hidden += zip(self._running, self._decode(), strict=True)
            if batch:
                hidden += zip(batch, self._prefill(batch), strict=True)
                self._running += batch
            if hidden:
                self._counts["steps"] += 1
                self._advance([job for job, _ in hidden], torch.stack([h for _, h in hidden]))
        except Exception as error:
            logger.exception("an engine step failed; its requests end, the engine goes on")
            for job in {id(j): j for j in [*self._running, *batch]}.values():
                self._fail(job, error)
            self._running.clear()
        self._running = [job for job in self._running if job.slot >= 0]

    def _drop_ended(self) -> None:
        now = time.monotonic()
        with self._wake:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                if job.cancelled or now > job.deadline:
                    self._end_early(job)
                else:
                    self._waiting.append(job)
        for job in self._running:
            if job.cancelled or now > job.deadline:
                self._end_early(job)
        self._running = [job for job in self._running if job.slot >= 0]

    def _end_early(self, job: Job) -> None:
        if job.cancelled:
            job.slot = -1
            self._counts["cancelled"] += 1
        else:
            self._fail(job, DeadlineExceeded())

    def _fail(self, job: Job, error: BaseException) -> None:
        job.slot = -1
        self._counts["failed"] += 1
        job.deliver(error)

    def _prompt_length(self, job: Job) -> int:
        image = self._model.config.vision.n_patches if job.crops is not None else 0
        return 1 + image + len(job.prompt.steps)

    def _admit(self) -> list[Job]:
        """First come, first served; one batch has images throughout or not at all."""
        taken = {job.slot for job in self._running}
        free = [slot for slot in range(self._slots) if slot not in taken]
        batch: list[Job] = []
        positions = 0
        with self._wake:
            while self._waiting and len(batch) < len(free):
                job = self._waiting[0]
                if batch and (job.crops is None) != (batch[0].crops is None):
                    break
                positions += self._prompt_length(job)
                if batch and positions > PREFILL_POSITIONS:
                    break
                batch.append(self._waiting.popleft())
        for job, slot in zip(batch, free, strict=False):
            job.slot = slot
            job.started = time.monotonic()
        return batch

    def _embed(self, job: Job) -> Tensor:
        """Prompt embeddings [T, dim]."""
        model = self._model
        special, device = model.config.prompt, model.device
        parts = [model.embed_tokens(torch.tensor([special.bos_id], device=device))]
        if job.crops is not None:
            parts.append(self._image_embedding(job.crops))
        for step in job.prompt.steps:
            if isinstance(step, int):
                parts.append(model.embed_tokens(torch.tensor([step], device=device)))
            elif step[0] == "coord":
                parts.append(model.encode_coord(torch.tensor([step[1]], device=device)))
            else:
                parts.append(model.encode_size(torch.tensor([step[1]], device=device)))
        return torch.cat(parts)

    def _image_embedding(self, crops: Crops) -> Tensor:
        embedding = self._images.pop(crops.key, None)
        if embedding is None:
            tensor = crops.tensor.to(self._model.device, non_blocking=True)
            embedding = self._model.vision.embed(tensor, crops.tiling)
        self._images[crops.key] = embedding
        while len(self._images) > EMBEDDING_CACHE:
            self._images.popitem(last=False)
        return embedding

    def _prefill(self, batch: list[Job]) -> Tensor:
        """Hidden states [B, dim] after each prompt."""
        device = self._model.device
        prompts = [self._embed(job) for job in batch]
        lengths = [len(prompt) for prompt in prompts]
        embeds = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        prefix = self._model.config.text.prefix_attn if batch[0].crops is not None else 0
        slots = torch.tensor([job.slot for job in batch], device=device)
        hidden = self._model.prefill(
            embeds, torch.tensor(lengths, device=device), prefix, self._cache, slots
        )
        for job, length in zip(batch, lengths, strict=True):
            job.length = job.metrics.input_tokens = length
        return hidden

    def _decode(self) -> Tensor:
        """Hidden states [B, dim] after each running request's last token."""
        device = self._model.device
        jobs = self._running
        positions = torch.tensor([job.length for job in jobs], device=device)
        slots = torch.tensor([job.slot for job in jobs], device=device)
        span = 1 + max(job.length for job in jobs)
        embeds = self._next[slots]
        for job in jobs:
            job.length += 1
        return self._model.decode(embeds, positions, self._cache, slots, span)

    def _advance(self, jobs: list[Job], hidden: Tensor) -> None:
        """Sample every job's next token, feed it to its answer, keep its embedding."""
        model, special = self._model, self._model.config.prompt
        phases = [job.state.phase for job in jobs]
        settings = [job.request.settings for job in jobs]
        temperature = top_p = None
        if any(s.temperature > 0 for s in settings):
            temperature = torch.tensor([s.temperature for s in settings], device=hidden.device)
            top_p = torch.tensor([s.top_p for s in settings], device=hidden.device)

        def pick(logits: Tensor, rows: list[int] | None = None) -> Tensor:
            if temperature is None or top_p is None:
                return sample(logits, None, None)
            chosen = slice(None) if rows is None else rows
            return sample(logits, temperature[chosen], top_p[chosen], self._generator)

        forced = {1: special.coord_id, 2: special.size_id}
        logits = model.logits(hidden).float()
        masks = torch.stack([self._first if p == 0 else self._text_only for p in phases])
        ids = pick(logits + masks)
        if any(p in forced for p in phases):
            fixed = torch.tensor([forced.get(p, -1) for p in phases], device=hidden.device)
            ids = torch.where(fixed >= 0, fixed, ids)
        embeds = model.embed_tokens(ids)
        values: dict[int, tuple[float, ...]] = {}
        coord_rows = [i for i, p in enumerate(phases) if p < 2]
        if coord_rows:
            coords = model.region.coord_value(
                pick(model.coord_logits(hidden[coord_rows]).float(), coord_rows)
            )
            encoded = model.encode_coord(coords)
            is_coord = (ids[coord_rows] == special.coord_id)[:, None]
            embeds[coord_rows] = torch.where(is_coord, encoded, embeds[coord_rows])
            values |= {
                row: (value,) for row, value in zip(coord_rows, coords.tolist(), strict=True)
            }
        size_rows = [i for i, p in enumerate(phases) if p == 2]
        if size_rows:
            bins = model.size_logits(hidden[size_rows]).float()
            twice = [row for row in size_rows for _ in range(2)]
            sizes = model.region.size_value(pick(bins.flatten(0, 1), twice).view(-1, 2))
            embeds[size_rows] = model.encode_size(sizes)
            values |= {
                row: tuple(pair) for row, pair in zip(size_rows, sizes.tolist(), strict=True)
            }
        self._keep_next(jobs, embeds)
        now = time.monotonic()
        for row, (job, token) in enumerate(zip(jobs, ids.tolist(), strict=True)):
            value = values.get(row, ()) if token in (special.coord_id, special.size_id) else ()
            self._accept(job, token, value, now)

    def _keep_next(self, jobs: list[Job], embeds: Tensor) -> None:
        if not hasattr(self, "_next"):
            self._next = embeds.new_zeros(self._slots, embeds.shape[-1])
        self._next[[job.slot for job in jobs]] = embeds

    def _accept(self, job: Job, token: int, value: tuple[float, ...], now: float) -> None:
        metrics = job.metrics
        if metrics.output_tokens == 0:
            job.prefilled = now
            metrics.prefill_time_ms = (now - job.started) * 1e3
            metrics.ttft_ms = (now - job.submitted) * 1e3
        metrics.output_tokens += 1
        for event in job.state.feed(token, value):
            job.deliver(event)
        limit = min(
            job.request.settings.max_tokens,
            self._model.config.text.max_context - metrics.input_tokens,
        )
        if job.state.finished or metrics.output_tokens >= limit:
            self._finish(job, truncated=not job.state.finished, now=now)

    def _finish(self, job: Job, truncated: bool, now: float) -> None:
        state = job.state
        state.close(truncated)
        job.metrics.decode_time_ms = (now - job.prefilled) * 1e3
        job.slot = -1
        self._counts["completed"] += 1
        job.deliver(
            ModelDone(
                ModelResult(
                    request_id=job.request_id,
                    finish_reason="length" if truncated else "stop",
                    object=job.request.object,
                    path=state.path,
                    bbox=state.bbox,
                    metrics=job.metrics,
                    parse_error=state.parse_error,
                    text=state.text,
                    token_ids=state.token_ids,
                    path_tokens=state.path_tokens,
                    points=state.points,
                    sizes=state.sizes,
                )
            )
        )
