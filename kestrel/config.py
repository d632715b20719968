"""Every knob of the library: its unit, its default, its bounds.

Nothing here imports torch, Ray or OpenCV, so that any process can read a configuration.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kestrel.api_keys import ApiKey, parse_keys

SHIPPED_MODELS = Path(__file__).parent / "models"
KERNELS_INSTALL = "pip install -c constraints.txt '.[kestrel-kernels]'"
"""What ``RuntimeConfig.kestrel_kernels`` takes."""


LONGEST_TIMEOUT_S = 86_400.0
"""Largest ``request_timeout_s``, a day: locks and sockets cannot wait for any number of seconds."""


MOST_IMAGE_PIXELS = 178_956_970
"""Largest ``max_image_pixels``, twice Pillow's ``Image.MAX_IMAGE_PIXELS``: no WebP of more is read
unless that is changed for all of the process."""


class ConfigError(ValueError):
    """A configuration value breaks its rule; the message names the key and the rule."""


def _check(ok: bool, key: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{key} {rule}, not {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(value: object, low: float, high: float = math.inf) -> bool:
    """Whether it is a finite number, no less than ``low`` and no more than ``high``."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        # Neither NaN nor infinity, nor an integer that is larger than any float.
        and low <= value <= min(high, sys.float_info.max)
    )


def _positive(value: object) -> bool:
    return _in_range(value, 0) and value != 0


def _check_device(device: object) -> None:
    known = isinstance(device, str) and (
        device in ("auto", "cpu", "cuda")
        or (device.startswith("cuda:") and device[5:].isdigit() and device.isascii())
    )
    _check(known, "device", "must be auto, cpu, cuda or cuda:N", device)


@dataclass(frozen=True)
class Limits:
    """What a request may cost. One place for every door."""

    max_body_bytes: int = 32 * 2**20
    """HTTP body, bytes; more is a 413."""
    max_image_pixels: int = 100_000_000
    """Width x height read from the image header, before decoding; more is a 413. At most
    ``MOST_IMAGE_PIXELS``."""
    max_object_chars: int = 256
    """Characters of the trimmed noun."""
    max_spatial_refs: int = 16
    """Points and boxes together."""
    max_path_chars: int = 65_536
    """Characters of SVG path data that the parser reads."""
    max_path_commands: int = 8_192
    """Drawn segments of one path, implicit repeats counted."""
    max_path_length: int = 100
    """Length of a path's segments within the image, in units of the image's width + height."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _check(
                _is_int(value) and value > 0,
                f"limits.{f.name}",
                "must be a positive integer",
                value,
            )
        _check(
            self.max_image_pixels <= MOST_IMAGE_PIXELS,
            "limits.max_image_pixels",
            f"must be at most {MOST_IMAGE_PIXELS}",
            self.max_image_pixels,
        )


FEWEST_VERTICES = 16
"""Least ``max_vertices``: what is left of a mask after halving has no more."""


@dataclass(frozen=True)
class RefinerConfig:
    """The CPU half: rasterise, refine, clean, trace."""

    refiner: str = "boundary"
    """Backend by name: ``boundary`` snaps the coarse mask to the picture's edges with several rules
    and a small network (ONNX Runtime), ``guided`` with one fast filter, ``none`` does not,
    ``seghead`` is Moondream's neural head, ``hq-sam`` a SAM-HQ model of ``transformers``."""
    selectable: tuple[str, ...] = ("none", "guided")
    """Further backends that are loaded, so that a request may choose one (``settings.refiner``)."""
    device: str = "auto"
    """Where ``seghead`` and ``hq-sam`` run: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    seghead_weights: str | None = None
    """``seghead``: the head's file (``.pt`` or ``.safetensors``), or ``owner/name@commit`` of a hub
    repository with a ``model.pt`` (the public one is ``moondream/SegHeadRefiner``)."""
    seghead_vision: ModelSource | None = None
    """``seghead``: the Moondream checkpoint whose vision tower gives the features: a path, or a
    mapping of ``ModelSource`` keys; None: the served one (see ``served_with``)."""
    hq_sam_model: str | None = None
    """``hq-sam``: folder of a saved ``SamHQModel``, or ``owner/name@commit`` of one on the hub."""
    rasterizer: str = "auto"
    """``skia`` (fast), ``resvg`` (the reference), or ``auto``: the first that loads."""
    tracer: str = "auto"
    """``libpotrace``, ``pypotrace``, ``potracer``, or ``auto``: the first that loads."""
    turdsize: int = 2
    """Potrace: suppress speckles of up to this many pixels."""
    alphamax: float = 1.0
    """Potrace: corner threshold, 0 (polygon) to 4/3 (no corners)."""
    opttolerance: float = 0.2
    """Potrace: curve optimisation tolerance, pixels."""
    decimals: int | None = None
    """Digits after the point of a path's coordinates, which are relative to its box, 1 to 9; null:
    as many as a twentieth of a pixel takes."""
    max_vertices: int = 4096
    """Lines and curves of a path at most; a mask that has more is traced at half its size."""
    guided_radius: float = 0.08
    """Guided filter radius as a fraction of the object's size (square root of its area), over 0 and
    at most 0.5."""
    guided_eps: float = 1e-4
    """Guided filter regularisation, squared intensity with channels in 0..1: 1e-6 to 1."""
    min_agreement: float = 0.6
    """A refined mask whose IoU with the coarse mask is lower has drifted and is rejected."""

    def served_with(self, runtime: RuntimeConfig) -> RefinerConfig:
        """This configuration beside that model: ``seghead`` sees through its vision tower, unless
        another is named."""
        if self.seghead_vision is not None or "seghead" not in self.loaded:
            return self
        return replace(self, seghead_vision=runtime.located)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the backends that are loaded, the default first."""
        return tuple(dict.fromkeys((self.refiner, *self.selectable)))

    def __post_init__(self) -> None:
        for key in ("refiner", "rasterizer", "tracer"):
            value = getattr(self, key)
            _check(isinstance(value, str) and bool(value), key, "must be a name", value)
        names: Any = self.selectable
        _check(
            isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names),
            "selectable",
            "must be a list of names",
            names,
        )
        object.__setattr__(self, "selectable", tuple(names))
        _check_device(self.device)
        vision: Any = self.seghead_vision
        if isinstance(vision, str) and vision:
            object.__setattr__(self, "seghead_vision", ModelSource(path=vision))
        elif vision is not None and not isinstance(vision, ModelSource):
            object.__setattr__(self, "seghead_vision", _source(vision, "seghead_vision"))
        for key in ("seghead_weights", "hq_sam_model"):
            value = getattr(self, key)
            _check(
                value is None or (isinstance(value, str) and bool(value)),
                key,
                "must be a path, owner/name@commit or null",
                value,
            )
        _check(
            self.decimals is None or (_is_int(self.decimals) and 1 <= self.decimals <= 9),
            "decimals",
            "must be an integer in 1..9 or null",
            self.decimals,
        )
        _check(
            _is_int(self.max_vertices) and self.max_vertices >= FEWEST_VERTICES,
            "max_vertices",
            f"must be an integer of at least {FEWEST_VERTICES}",
            self.max_vertices,
        )
        _check(
            self.rasterizer in ("auto", "skia", "resvg"),
            "rasterizer",
            "must be auto, skia or resvg",
            self.rasterizer,
        )
        _check(
            self.tracer in ("auto", "libpotrace", "pypotrace", "potracer"),
            "tracer",
            "must be auto, libpotrace, pypotrace or potracer",
            self.tracer,
        )
        _check(
            _is_int(self.turdsize) and self.turdsize >= 0,
            "turdsize",
            "must be an integer of at least 0",
            self.turdsize,
        )
        for key, high, rule in (
            ("alphamax", 4 / 3 + 1e-4, "must be a number in 0..1.3334"),
            ("opttolerance", math.inf, "must be a number of at least 0"),
            ("min_agreement", 1, "must be a number in 0..1"),
        ):
            value = getattr(self, key)
            _check(_in_range(value, 0, high), key, rule, value)
        _check(
            _positive(self.guided_radius) and self.guided_radius <= 0.5,
            "guided_radius",
            "must be over 0 and at most 0.5",
            self.guided_radius,
        )
        # Less is lost in float32; a channel's variance is never more than 0.25.
        _check(
            _in_range(self.guided_eps, 1e-6, 1),
            "guided_eps",
            "must be a number in 1e-6..1",
            self.guided_eps,
        )


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint is: ``path`` on this machine, or ``repo`` on the Hugging Face hub."""

    path: str | None = None
    """Folder (weights, tokenizer.json, config.json), or weights file or index of shards with those
    beside it."""
    repo: str | None = None
    """``owner/name`` of a hub repository."""
    filename: str | None = None
    """Weights file or index of shards in the repository; None: ``model.safetensors``, sharded or
    not."""
    revision: str | None = None
    """Commit of the repository, 40 hexadecimal digits; nothing that moves is taken."""
    tokenizer: str | None = None
    """Path of a tokenizer.json, or ``repo@commit`` of one on the hub; None: the one beside the
    weights or, in a hub repository without one there, at its root (so also config.json)."""
    name: str | None = None
    """Name under which the model is served; None: the last part of the repository or the path."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _check(
                value is None or (isinstance(value, str) and bool(value)),
                f"model.{f.name}",
                "must be a non-empty string or null",
                value,
            )
        if (self.path is None) == (self.repo is None):
            raise ConfigError("model must give either path or repo")
        for key in ("filename", "revision"):
            if self.path is not None and getattr(self, key) is not None:
                raise ConfigError(f"model.{key} belongs to repo, not to path")

    @property
    def served_name(self) -> str:
        """Name under which the model is served."""
        return self.name or Path(self.repo or self.path or "").name or "model"


@dataclass(frozen=True)
class RuntimeConfig:
    """One engine: the model, where it runs, how much it takes on at once.

    ``source``, ``refiner`` and ``limits`` may be mappings of their keys. ``ConfigError`` names the
    key whose value breaks its rule.
    """

    model: str = ""
    """Name under which the model is served (the ``model`` field of a request); empty or null: the
    checkpoint's, ``nano`` for the shipped one. A mapping of ``ModelSource`` keys in its place
    (YAML) sets the name and ``source``."""
    model_path: str | None = None
    """Short for ``source`` with a path alone. Neither: the shipped model."""
    source: ModelSource | None = None
    """Where the checkpoint is."""
    device: str = "auto"
    """``auto`` (CUDA when torch sees one), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """``auto`` (bfloat16 on CUDA, float32 on CPU), ``float32``, ``bfloat16``, ``float16``."""
    image_dtype: str | None = "auto"
    """``bfloat16``: a float32 model on a CPU encodes images in bfloat16, vision tower and prefix,
    which takes half to two thirds of the time where the processor has products for it (AMX,
    AVX512-BF16). The decoder's weights are then held once more in bfloat16. Prompt and answer are
    computed in float32, and a request's answer is the same alone and in a batch, but its tokens are
    often others than float32 gives. ``auto``: bfloat16 for a small model on such a processor whose
    weights are stored in it, so that none is rounded. None: as ``dtype``."""
    kv_dtype: str | None = "auto"
    """``bfloat16``: a float32 model on a CPU keeps keys and values in it, half of what a decode
    step reads of them, and computes with them in float32. ``auto``: bfloat16 where images are
    encoded in it, and for a small model whose weights are stored in it. None: as ``dtype``."""
    max_batch_size: int = 16
    """Requests that decode together (KV slots)."""
    max_context: int = 4096
    """Positions that prompt and answer of a request share, at most the model's own. Every KV slot
    holds this many: 0.8 GB of bfloat16 for Moondream 3 at 4096, 6.4 GB at its own 32768; see
    ``kv_cache_bytes``."""
    kv_cache_bytes: int | None = None
    """Bytes of the keys and values of all running requests; null: what ``max_batch_size`` requests
    of ``max_context`` take. With fewer, requests wait for memory as they wait for slots, and what
    is left of it bounds ``max_context``. They are then in pages of 16 positions, as on CUDA always;
    on a CPU, slots are faster."""
    kernels: str = "auto"
    """Attention and sampling of decode steps: ``torch``, ``flashinfer`` (CUDA), or ``auto``:
    FlashInfer where it loads and agrees with torch."""
    kestrel_kernels: bool = False
    """Have the proprietary kestrel-kernels choose each token's experts (Moondream 3 on CUDA). Their
    licence allows use with their own engine only: turn it on where M87 Labs has agreed. The engine
    does not start where they do not load, run or agree with torch."""
    prefill_tokens: int = 512
    """Most positions that one engine step prefills, patches of crops counted, beside one token for
    every running request: bounds how long those stall. A single crop or image may exceed it."""
    image_cache_bytes: int = 256 * 2**20
    """Keys and values of encoded images kept for further questions about them, bytes: 1.2 MB each
    for the shipped model (2.4 MB in float32), 144 MB for Moondream 3 in bfloat16. 0 keeps none."""
    max_queue: int = 256
    """Requests that may wait for a slot; more are refused with 503 and Retry-After."""
    max_queue_bytes: int = 256 * 2**20
    """Bytes of the images (files, or arrays of the Python door) of requests that wait for a slot;
    more are refused like those beyond ``max_queue``."""
    max_held_requests: int = 512
    """Requests that one HTTP server (in the graph: one ingress replica) holds at once, from their
    first byte to the last of the answer; more are refused with 503 before their body is read."""
    max_held_bytes: int = 512 * 2**20
    """Bytes of the bodies of those requests; more are refused with 503."""
    request_timeout_s: float = 60.0
    """Deadline of a request from arrival, seconds, over 0 and at most ``LONGEST_TIMEOUT_S``; then
    its work is cancelled (504)."""
    torch_threads: int | None = None
    """Intra-op CPU threads of the model; None: one for a small model on a CPU, else torch's own
    choice. With one, pictures are encoded by other threads beside the steps that decode."""
    refiner: RefinerConfig | None = field(default_factory=RefinerConfig)
    """None: the engine gives the model's path as it is, and no masks (the graph refines
    elsewhere)."""
    refiner_threads: int = 1
    """Refinements that run at once beside the engine thread."""
    refiner_stuck_s: float = 30.0
    """While a refinement has run for longer, the engine's health check fails, seconds."""
    allow_empty_paths: bool = False
    """Serve a checkpoint that gives a box and no whole path for the built-in picture; by default
    the engine does not start with it."""
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[ApiKey, ...] = ()
    """When not empty, the HTTP door asks for one of these (401 otherwise). Entries are given as
    ``kestrel.api_keys.parse_keys`` takes them; keys in the clear are hashed here."""

    def __post_init__(self) -> None:
        for key, kind in (("source", ModelSource), ("refiner", RefinerConfig), ("limits", Limits)):
            part = getattr(self, key)
            if not isinstance(part, kind) and (part is not None or key == "limits"):
                built = _source(part, key) if kind is ModelSource else from_mapping(kind, part, key)
                object.__setattr__(self, key, built)
        self._resolve_source()
        # A key without a value is null in YAML.
        keys: Any = self.api_keys
        try:
            object.__setattr__(self, "api_keys", parse_keys(() if keys is None else keys))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _check(isinstance(self.model, str), "model", "must be a string", self.model)
        for key in (
            "max_batch_size",
            "max_context",
            "prefill_tokens",
            "max_queue",
            "max_queue_bytes",
            "max_held_requests",
            "max_held_bytes",
            "refiner_threads",
        ):
            value = getattr(self, key)
            _check(_is_int(value) and value > 0, key, "must be a positive integer", value)
        _check(
            self.kv_cache_bytes is None
            or (_is_int(self.kv_cache_bytes) and self.kv_cache_bytes > 0),
            "kv_cache_bytes",
            "must be a positive integer or null",
            self.kv_cache_bytes,
        )
        _check(
            self.kernels in ("auto", "torch", "flashinfer"),
            "kernels",
            "must be auto, torch or flashinfer",
            self.kernels,
        )
        _check(
            isinstance(self.kestrel_kernels, bool),
            "kestrel_kernels",
            "must be true or false",
            self.kestrel_kernels,
        )
        _check(
            _is_int(self.image_cache_bytes) and self.image_cache_bytes >= 0,
            "image_cache_bytes",
            "must be an integer of at least 0",
            self.image_cache_bytes,
        )
        _check(
            _positive(self.request_timeout_s) and self.request_timeout_s <= LONGEST_TIMEOUT_S,
            "request_timeout_s",
            f"must be over 0 and at most {LONGEST_TIMEOUT_S:.0f} seconds",
            self.request_timeout_s,
        )
        _check(
            _positive(self.refiner_stuck_s),
            "refiner_stuck_s",
            "must be over 0 seconds",
            self.refiner_stuck_s,
        )
        _check(
            self.torch_threads is None or (_is_int(self.torch_threads) and self.torch_threads > 0),
            "torch_threads",
            "must be a positive integer or null",
            self.torch_threads,
        )
        _check(
            self.dtype in ("auto", "float32", "bfloat16", "float16"),
            "dtype",
            "must be auto, float32, bfloat16 or float16",
            self.dtype,
        )
        for key in ("image_dtype", "kv_dtype"):
            value = getattr(self, key)
            known = value in (None, "auto", "bfloat16")
            _check(known, key, "must be auto, bfloat16 or null", value)
        _check_device(self.device)
        _check(
            self.max_held_bytes >= self.limits.max_body_bytes,
            "max_held_bytes",
            "must be at least limits.max_body_bytes",
            self.max_held_bytes,
        )
        _check(
            isinstance(self.allow_empty_paths, bool),
            "allow_empty_paths",
            "must be true or false",
            self.allow_empty_paths,
        )

    def _resolve_source(self) -> None:
        """Where ``model`` is a mapping, make it a name and ``source`` what it says, and where it is
        empty the checkpoint's name; one place at most may name the checkpoint."""
        model: Any = self.model
        named = model if isinstance(model, dict) else None
        path: Any = self.model_path
        _check(
            path is None or (isinstance(path, str) and bool(path)),
            "model_path",
            "must be a non-empty string or null",
            path,
        )
        if sum(given is not None for given in (named, self.source, path)) > 1:
            raise ConfigError("model, source and model_path name more than one checkpoint")
        if named is not None:
            object.__setattr__(self, "source", _source(named, "model"))
        if named is not None or model in (None, ""):
            object.__setattr__(self, "model", self.located.served_name)

    @property
    def refiners(self) -> tuple[str, ...]:
        """Refiner backends that a request may name, the default first."""
        return self.refiner.loaded if self.refiner is not None else ()

    @property
    def located(self) -> ModelSource:
        """Where the checkpoint is, the shipped one included."""
        if self.source is not None:
            return self.source
        return ModelSource(path=self.model_path or str(SHIPPED_MODELS / "nano"))


def _source(values: Any, where: str) -> ModelSource:
    """The ``ModelSource`` that the mapping at ``where`` says; errors name its keys there."""
    try:
        source: ModelSource = from_mapping(ModelSource, values, "model")
    except ConfigError as error:
        raise ConfigError(where + str(error).removeprefix("model")) from None
    return source


def from_mapping(cls: type, values: dict[str, Any], where: str) -> Any:
    """Build a config dataclass from YAML/JSON; unknown keys are a ConfigError that lists the known.

    ``where`` prefixes the key in messages (``refiner``, ``limits``).
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping, not {type(values).__name__}")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known, key=str)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}"
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
