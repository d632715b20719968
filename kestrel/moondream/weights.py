"""Checkpoint files to model parameters: planned by name, then moved tensor by tensor."""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from kestrel.config import ConfigError
from kestrel.moondream.names import Fill, fills, parameter_name, scaled_parameter, scheme

__all__ = ["LoadReport", "Stored", "Ties", "load_weights", "parameter_name", "read_index"]

log = logging.getLogger(__name__)

WINDOW_BYTES = 128 * 2**20
"""Mapped pages count as the process's memory until the file is closed: it is opened anew after
this many bytes."""
BAR_AFTER_S = 1.0
"""Loads that take longer than this show a progress bar (on a terminal), seconds."""
SHOWN_PROBLEMS = 8
"""Of each kind in an error's message; the log has them all."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_FLOAT8 = torch.float8_e4m3fn
_OLD_PT = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How files of ``torch.save`` began before they were zip archives."""
Getter = Callable[[str], Tensor]
Ties = Collection[tuple[str, object]]
"""Pairs of a name that no file holds and that of the stored tensor it shares; what else there is
beside them in the metadata of a file or of an index of shards is passed over."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as its header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: integers or another type that no parameter takes."""
    kind: str
    """The type as the file names it: ``BF16``, ``float32``, ..."""
    nbytes: int
    storage: int | str = ""
    """Equal for tensors that share their bytes (tied weights); "" for one of its own."""


@dataclass
class LoadReport:
    """What a load found."""

    scheme: str
    """Naming of the tensors, in words; several joined by " and "."""
    tensors: int
    """Stored tensors that were used."""
    nbytes: int
    """Bytes of them on disk."""
    dtypes: tuple[str, ...]
    """Types on disk: ``bfloat16``, ``float8_e4m3fn``, ..."""
    tied: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of stored names that share one tensor."""
    seconds: float = 0.0


@dataclass
class _Problems:
    """What keeps a checkpoint from filling a model, one line each."""

    missing: list[str] = field(default_factory=list)
    """Parameters that no tensor fills."""
    misfits: list[str] = field(default_factory=list)
    """Wrong shapes and types, parameters that two tensors fill."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that fill no parameter."""

    def __iter__(self) -> Iterator[str]:
        yield from (*self.missing, *self.misfits, *self.unexpected)

    def shown(self) -> str:
        """The first of each kind, what is missing before what is too much."""
        parts = []
        for kind in filter(None, (self.missing, self.misfits, self.unexpected)):
            parts += kind[:SHOWN_PROBLEMS]
            if len(kind) > SHOWN_PROBLEMS:
                parts[-1] += f" and {len(kind) - SHOWN_PROBLEMS} more"
        return "; ".join(parts)


@dataclass
class _Source:
    """Where a parameter comes from."""

    stored: Stored
    fill: Fill
    scale: Stored | None = None


# Files.


def read_index(files: Iterable[Path], ties: Ties = ()) -> list[Stored]:
    """Every tensor of the files by its header, no data read; no code of a file is run. ``ties``:
    further ones that share a stored tensor.

    Raises ``ConfigError`` for a file that is missing, cut off, or holds more than tensors.
    """
    found: list[Stored] = []
    for file in files:
        with _readable(file):
            found += _safetensors_index(file) if _is_safetensors(file) else _pt_index(file)
    return found + _tied(found, ties)


def _tied(found: Sequence[Stored], ties: Ties) -> list[Stored]:
    # One of several tied tensors is kept, and the names of the others noted: by safetensors in the
    # file, by huggingface_hub in the index of shards, among notes of another kind.
    by_name = {stored.name: stored for stored in found}
    tied = []
    for dropped, kept in ties:
        twin = by_name.get(kept) if isinstance(kept, str) else None
        if twin is not None and dropped not in by_name and fills(dropped):
            storage = twin.storage or twin.name
            tied.append(Stored(twin.file, dropped, twin.shape, twin.dtype, twin.kind, 0, storage))
    return tied


def _is_safetensors(file: Path) -> bool:
    return file.suffix == ".safetensors"


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file; is the checkpoint whole?") from error
    except SafetensorError as error:
        raise ConfigError(
            f"{file}: not a whole safetensors file ({error}); copy or download it again"
        ) from error
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{file}: holds more than tensors and is not loaded, as that would run its code "
            f"({reason}); save its state_dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{file}: cannot be read ({reason}); copy or download it again"
        ) from error


def _safetensors_index(file: Path) -> list[Stored]:
    found = []
    with safe_open(str(file), framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a mapping)
            entry = opened.get_slice(name)
            shape, kind = tuple(entry.get_shape()), entry.get_dtype()
            dtype = _DTYPES.get(kind)
            size = torch.Size(shape).numel() * (dtype.itemsize if dtype else 1)
            found.append(Stored(file, name, shape, dtype, kind, size))
        return found + _tied(found, (opened.metadata() or {}).items())


def _pt_index(file: Path) -> list[Stored]:
    found = []
    owners: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in _pt_tensors(file).items():
        if not isinstance(name, str):
            raise ConfigError(f"{file}: names a tensor {name!r}, which is {type(name).__name__}")
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{file}: {name} is no tensor but {type(tensor).__name__}")
        shape = tuple(tensor.shape)
        # A square transposed view has the pointer and shape of another tensor, not its numbers.
        same = (tensor.data_ptr(), shape, tensor.stride())
        twin = owners.setdefault(same, name) if tensor.numel() else name
        floating = tensor.dtype if tensor.dtype in _DTYPES.values() else None
        kind = str(tensor.dtype).removeprefix("torch.")
        size = tensor.nbytes if twin == name else 0
        storage = "" if twin == name else twin
        found.append(Stored(file, name, shape, floating, kind, size, storage))
    return found


def _pt_tensors(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        begins = opened.read(len(_OLD_PT))
    if begins == _OLD_PT:
        raise ConfigError(
            f"{file}: of the format before torch 1.6, which cannot be memory-mapped; load it with "
            "torch.load and save it again with torch.save"
        )
    if begins and not b"PK\3\4".startswith(begins[:4]):
        raise ConfigError(f"{file}: neither a safetensors file nor a zip archive of torch.save")
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ConfigError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    return state


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Getter]:
    """A function from names to tensors, memory-mapped while the file is open."""
    with contextlib.ExitStack() as stack:
        # Errors of the body, such as a full GPU, are not the file's.
        with _readable(file):
            if _is_safetensors(file):
                get = stack.enter_context(safe_open(str(file), framework="pt")).get_tensor
            else:
                tensors = _pt_tensors(file)
                stack.callback(tensors.clear)
                get = tensors.__getitem__
        yield get


def _windows(sources: Sequence[_Source]) -> Iterator[list[_Source]]:
    """Runs of sources of one file, of about ``WINDOW_BYTES`` each."""
    window: list[_Source] = []
    size = 0
    for source in sources:
        if window and (size >= WINDOW_BYTES or source.stored.file != window[0].stored.file):
            yield window
            window, size = [], 0
        window.append(source)
        size += source.stored.nbytes
    if window:
        yield window


# The plan: which stored tensor fills which parameter, before any byte is moved.


def _plan(index: Sequence[Stored], wanted: dict[str, Tensor]) -> tuple[list[_Source], _Problems]:
    """Sources in the order of the files, and what does not fit."""
    sources: dict[str, _Source] = {}
    scales: dict[str, Stored] = {}
    problems = _Problems()
    for stored in index:
        scaled = scaled_parameter(stored.name)
        if scaled is not None:
            if scaled in scales:
                both = f"{stored.name} and {scales[scaled].name}"
                problems.misfits.append(f"{both} both scale {scaled}")
            scales[scaled] = stored
            continue
        targets = [fill for fill in fills(stored.name) if fill.parameter in wanted]
        if not targets:
            problems.unexpected.append(f"unexpected tensor {stored.name}")
        for fill in targets:
            if fill.parameter in sources:
                other = sources[fill.parameter].stored.name
                problems.misfits.append(f"{stored.name} and {other} both fill {fill.parameter}")
                continue
            sources[fill.parameter] = _Source(stored, fill)
            problems.misfits += _misfit(stored, fill, tuple(wanted[fill.parameter].shape))
    _attach_scales(sources, scales, problems)
    problems.missing += [f"missing tensor {name}" for name in wanted if name not in sources]
    return list(sources.values()), problems


def _misfit(stored: Stored, fill: Fill, wanted: tuple[int, ...]) -> list[str]:
    if stored.dtype is None:
        return [_wrong_kind(stored)]
    if fill.shape(stored.shape) != wanted:
        expected = list(wanted[::-1] if fill.part == "transposed" else wanted)
        return [f"{stored.name} has shape {list(stored.shape)}, not {expected}"]
    return []


def _wrong_kind(stored: Stored) -> str:
    *read, last = (str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
    return f"{stored.name} holds {stored.kind}; {', '.join(read)} and {last} are read"


def _attach_scales(
    sources: dict[str, _Source], scales: dict[str, Stored], problems: _Problems
) -> None:
    for parameter, scale in scales.items():
        source = sources.get(parameter)
        if source is None or source.stored.dtype != _FLOAT8:
            unexpected = f"unexpected tensor {scale.name}: its experts are not float8"
            problems.unexpected.append(unexpected)
            continue
        # One scale per expert and output channel; some writers keep the reduced dimension.
        if scale.shape not in (source.stored.shape[:2], (*source.stored.shape[:2], 1)):
            expected = list(source.stored.shape[:2])
            misfit = f"{scale.name} has shape {list(scale.shape)}, not {expected}"
            problems.misfits.append(misfit)
        if scale.dtype is None:
            problems.misfits.append(_wrong_kind(scale))
        source.scale = scale
    problems.missing += [
        f"{source.stored.name} is float8 and has no scales (moe_quant.up_scale, down_scale)"
        for source in sources.values()
        if source.stored.dtype == _FLOAT8 and source.scale is None
    ]


# The load.


def load_weights(
    model: nn.Module,
    files: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    part: str = "",
    ties: Ties = (),
) -> LoadReport:
    """Fill every parameter of ``model`` (built on the meta device) from a checkpoint.

    Files are memory-mapped; tensors are converted to ``dtype`` and moved to ``device`` one at a
    time, float8 experts multiplied with their scales on the way. Host memory beyond the model is
    bounded by the largest tensor and ``WINDOW_BYTES``. ``part``: only tensors that fill parameters
    whose names begin so are read; the rest of the checkpoint is not looked at. ``ties``: as
    ``read_index`` takes them.

    Raises ``ConfigError`` that names parameters that no tensor fills, shapes that differ, and
    stored tensors that fit no parameter, ``SHOWN_PROBLEMS`` of each, before anything is moved; the
    log has the whole list. Scales that are not finite are a ``ConfigError`` when they are reached.
    """
    started = time.perf_counter()
    index = read_index(files, ties)
    if part:
        index = [s for s in index if any(f.parameter.startswith(part) for f in fills(s.name))]
    sources, problems = _plan(index, dict(model.named_parameters()))
    if any(problems):
        where = files[0] if len(files) == 1 else files[0].parent
        log.error("%s does not fit the model:\n%s", where, "\n".join(problems))
        raise ConfigError(f"{where} does not fit the model: {problems.shown()}")
    report = LoadReport(
        scheme=" and ".join(sorted({scheme(stored.name) for stored in index})),
        tensors=len(index),
        nbytes=sum(stored.nbytes for stored in index),
        dtypes=tuple(sorted({str(s.dtype).removeprefix("torch.") for s in index if s.dtype})),
        tied=[(stored.name, str(stored.storage)) for stored in index if stored.storage],
    )
    _move(model, sources, device, dtype, report.nbytes)
    report.seconds = time.perf_counter() - started
    for name, twin in report.tied:
        log.info("%s is tied to %s: both are filled with the same numbers", name, twin)
    log.info(
        "loaded %d tensors (%s, %s), %.2f GB, in %.1f s",
        report.tensors,
        report.scheme,
        "/".join(report.dtypes),
        report.nbytes / 1e9,
        report.seconds,
    )
    return report


def _move(
    model: nn.Module,
    sources: Sequence[_Source],
    device: torch.device,
    dtype: torch.dtype,
    nbytes: int,
) -> None:
    # disable=None: no bar where the output is no terminal.
    with tqdm(
        total=nbytes, unit="B", unit_scale=True, desc="weights", delay=BAR_AFTER_S, disable=None
    ) as bar:
        for window in _windows(sources):
            with _opened(window[0].stored.file) as get:
                for source in window:
                    _assign(model, source.fill.parameter, _filled(source, get, device, dtype))
                    bar.update(source.stored.nbytes)


def _filled(source: _Source, get: Getter, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The parameter's own tensor: never a view of the file."""
    tensor = get(str(source.stored.storage) or source.stored.name)
    if source.scale is not None:
        if source.scale.file == source.stored.file:
            return _dequantised(tensor, _numbers(source.scale, get), device, dtype)
        with _opened(source.scale.file) as get_scale:
            return _dequantised(tensor, _numbers(source.scale, get_scale), device, dtype)
    if source.fill.part == "transposed":
        tensor = tensor.T
    elif source.fill.part != "all":
        first, second = tensor.tensor_split([tensor.shape[0] // 2])
        tensor = first if source.fill.part == "first half" else second
    return tensor.to(device=device, dtype=dtype, copy=True).contiguous()


def _numbers(scale: Stored, get: Getter) -> Tensor:
    """Scales as float32."""
    numbers = get(scale.name).float()
    if not numbers.isfinite().all():
        raise ConfigError(f"{scale.file}: {scale.name} holds a scale that is no finite number")
    return numbers


def _dequantised(weight: Tensor, scale: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Float8 experts [experts, out, in] times scales [experts, out], one expert at a time."""
    out = torch.empty(weight.shape, device=device, dtype=dtype)
    scale = scale.reshape(weight.shape[:2]).to(device)
    for expert, numbers in enumerate(weight):
        out[expert] = numbers.to(device).float() * scale[expert, :, None]
    return out


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner_name), leaf, nn.Parameter(tensor, requires_grad=False))
