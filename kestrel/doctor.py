"""``python -m kestrel doctor``: can this machine serve this configuration, and if not, what to do.

One line a check. Failures make the exit status 1; warnings (slower, or not needed by the
configuration) do not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kestrel.checks_config import check_config
from kestrel.checks_ray import check_ray
from kestrel.checks_refiner import (
    check_opencv,
    check_rasterizers,
    check_refiners,
    check_torchvision,
    check_tracers,
)
from kestrel.config import KERNELS_INSTALL, ConfigError, RuntimeConfig
from kestrel.diagnosis import (
    LESS_MEMORY,
    TRACEBACK,
    Finding,
    Machine,
    Verdict,
    Wanted,
    bad,
    causes,
    line_of,
    ok,
    out_of_memory,
    read_config,
)
from kestrel.errors import DeadlineExceeded, PromptTooLong

log = logging.getLogger(__name__)

KERNELS_COMPANION = ("nvidia-cutlass-dsl", "4.3.5")
"""The release that kestrel-kernels 0.1.2 was built with; another one lacks its symbols."""
KERNELS_LIBRARIES = ("nvidia_cutlass_dsl/lib", "tvm_ffi/lib")
"""Folders of site-packages that the loader must know for kestrel-kernels."""
ACTIVATIONS_BYTES = 1.5e9
"""CUDA context, cuBLAS workspaces and activations of one step: an allowance, not a measurement."""


Check = Callable[[Machine, Wanted], Iterator[Finding]]


# The checks.


def check_python(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    major, minor = machine.python()
    text = f"{major}.{minor} on {platform.machine()}"
    if (3, 10) <= (major, minor) < (3, 15):
        yield ok("Python", text)
    else:
        yield bad("Python", text, "use Python 3.10 to 3.14 (make PYTHON=/path/to/python3)")


def check_torch(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    version = machine.version("torch")
    pinned = f"pip install --force-reinstall --no-deps torch=={version or '<pinned release>'}"
    try:
        torch = machine.load("torch")
    except (ImportError, OSError) as error:
        text = f"{version or 'not installed'}, does not load ({line_of(error)})"
        yield bad("torch", text, f"{pinned}, from the index of your CUDA release")
        return
    build = torch.version.cuda
    wants_gpu = wanted.runtime.device.startswith("cuda")
    if wanted.runtime.device == "cpu":
        yield ok("torch", f"{version}, on the CPU")
    elif torch.cuda.is_available():
        from kestrel.ops.device import gpu_index

        try:
            index = gpu_index(wanted.runtime.device, torch.cuda.device_count())
        except ConfigError as error:
            yield bad("torch", str(error), "set runtime.device to one of them, or to auto")
            return
        yield ok("torch", f"{version}, CUDA {build}, {torch.cuda.get_device_name(index)}")
        yield from _gpu_memory(torch, index, wanted)
    elif wants_gpu and build is None:
        remedy = "pip install torch from the index of your CUDA release, or set device: cpu"
        yield bad("torch", f"{version} is a CPU build and device is cuda", remedy)
    elif wants_gpu:
        driver = "the driver answers" if machine.which("nvidia-smi") else "there is no nvidia-smi"
        text = f"{version} for CUDA {build} sees no GPU, {driver}"
        yield bad("torch", text, "install an NVIDIA driver for that CUDA, or set device: cpu")
    else:
        yield ok("torch", f"{version}, on the CPU")


def _gpu_memory(torch: Any, index: int, wanted: Wanted) -> Iterator[Finding]:
    try:
        need = memory_need(wanted.runtime)
    except ConfigError as error:
        yield bad("GPU memory", f"the model's need is unknown ({error})", "see checkpoint below")
        return
    free, total = torch.cuda.mem_get_info(index)
    text = f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if need <= free:
        yield ok("GPU memory", text)
    else:
        yield bad("GPU memory", text, LESS_MEMORY)


def memory_need(config: RuntimeConfig) -> float:
    """Bytes that the model, its KV cache and its image cache take on a GPU.

    Raises ``ConfigError`` for a checkpoint that is not there.
    """
    import torch

    from kestrel.moondream.checkpoint import locate
    from kestrel.moondream.model import Moondream
    from kestrel.ops.device import resolve_dtype

    architecture = locate(config.located).architecture()
    size = resolve_dtype(config.dtype, torch.device("cuda")).itemsize
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Moondream(architecture).parameters())
    text = architecture.text
    positions = config.max_batch_size * min(config.max_context, text.max_context)
    per_position = 2 * text.n_layers * text.n_kv_heads * text.head_dim
    cached = positions * per_position * size
    if config.kv_cache_bytes is not None:
        cached = min(cached, config.kv_cache_bytes)
    cached += config.image_cache_bytes
    return parameters * size + cached + ACTIVATIONS_BYTES


def check_numba(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    on_cpu = wanted.runtime.device in ("cpu", "auto")
    try:
        numba = machine.load("numba")
    except Exception as error:  # it refuses a NumPy that it does not know
        slow = "pictures are cropped several times as slowly"
        slow += ", and on a CPU decoding takes twice the time" if on_cpu else ""
        text = f"does not load ({line_of(error)}): {slow}"
        yield bad("numba", text, "pip install --upgrade numba", needed=False)
        return
    steps = " and decode steps for the CPU" if on_cpu else ""
    yield ok("numba", f"{numba.__version__}, compiles crops{steps}")


def check_flashinfer(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    version = machine.version("flashinfer-python")
    kernels, device = wanted.runtime.kernels, wanted.runtime.device
    # By default torch's kernels take over where it fails.
    needed = kernels == "flashinfer"
    on_gpu = device.startswith("cuda") or (device == "auto" and _sees_gpu(machine))
    if needed and not on_gpu:
        text = f"kernels is flashinfer, which needs CUDA, and device is {device}"
        yield bad("flashinfer", text, "set runtime.kernels: auto, or runtime.device: cuda")
        return
    if kernels == "torch" or not on_gpu:
        # Nothing imports it then.
        yield ok("flashinfer", f"{version or 'not installed'}, not needed")
        return
    if version is None and needed:
        remedy = "pip install '.[gpu]', or set runtime.kernels: auto"
        yield bad("flashinfer", "not installed, and kernels is flashinfer", remedy)
        return
    if version is None:
        yield ok("flashinfer", "not installed; torch's kernels do its work")
        return
    try:
        machine.load("flashinfer")
    except Exception as error:  # it looks for the GPU while it is imported
        remedy = "pip install --no-deps the release for your torch, or uninstall flashinfer-python"
        text = f"{version}, does not load ({line_of(error)})"
        yield bad("flashinfer", text, remedy, needed=needed)
        return
    if machine.version("flashinfer-jit-cache") is not None:
        yield ok("flashinfer", f"{version}, kernels are prebuilt")
        return
    lacking = {
        "ninja": "apt-get install ninja-build, or pip install ninja",
        "nvcc": "install the CUDA toolkit of torch's CUDA, or pip install flashinfer-jit-cache",
    }
    missing = [tool for tool in lacking if machine.which(tool) is None]
    if "nvcc" in missing and Path(machine.environment("CUDA_HOME") or "/nowhere").is_dir():
        missing.remove("nvcc")
    for tool in missing:
        text = f"{version} compiles its kernels at run time and finds no {tool}"
        yield bad("flashinfer", text, lacking[tool], needed=needed)
    if not missing:
        yield ok("flashinfer", f"{version}, compiles its kernels at the first request")


def _sees_gpu(machine: Machine) -> bool:
    try:
        return bool(machine.load("torch").cuda.is_available())
    except (ImportError, OSError):
        return False


def check_kernels(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    version = machine.version("kestrel-kernels")
    needed = wanted.runtime.kestrel_kernels
    if version is None and needed:
        remedy = f"{KERNELS_INSTALL}, or set runtime.kestrel_kernels: false"
        yield bad("kestrel-kernels", "not installed, and kestrel_kernels is true", remedy)
        return
    if version is None:
        yield ok("kestrel-kernels", "not installed, not needed")
        return
    # Serving goes on without, unless the configuration asks for them.
    said = "" if needed else " (kestrel_kernels is false: nothing calls it)"
    problems = list(_kernels_problems(machine, version))
    for text, remedy in problems:
        yield bad("kestrel-kernels", f"{text}{said}", remedy, needed=needed)
    if not problems:
        yield ok("kestrel-kernels", f"{version}{said}")


def _kernels_problems(machine: Machine, version: str) -> Iterator[tuple[str, str]]:
    """What keeps them from loading, and the remedy of each."""
    companion, pinned = KERNELS_COMPANION
    found = machine.version(companion)
    if found != pinned:
        yield (
            f"{version} needs {companion} {pinned}, not {found or 'none'}",
            f"pip install --force-reinstall --no-deps {companion}=={pinned}",
        )
    known = [Path(p) for p in machine.environment("LD_LIBRARY_PATH").split(os.pathsep) if p]
    for library in KERNELS_LIBRARIES:
        folders = machine.folders(library)
        if not folders:
            yield (
                f"its runtime libraries ({library}) are missing",
                KERNELS_INSTALL,
            )
        elif not set(folders) & set(known):
            yield (
                f"the loader does not look into {folders[0]}",
                f"export LD_LIBRARY_PATH={folders[0]}:$LD_LIBRARY_PATH before the start",
            )


def check_checkpoint(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    from kestrel.moondream.checkpoint import locate
    from kestrel.moondream.weights import read_index, scheme

    try:
        found = locate(wanted.runtime.located)
        architecture = found.architecture()
        index = read_index(found.weights, found.ties)
    except ConfigError as error:
        yield bad("checkpoint", str(error), "see model: {path | repo, filename, revision}")
        return
    names = " and ".join(sorted({scheme(stored.name) for stored in index}))
    size = sum(stored.nbytes for stored in index) / 1e9
    text = f"{architecture.name}, {len(index)} tensors, {size:.2f} GB, {names}"
    yield ok("checkpoint", text)
    yield from _segments(wanted)


def _segments(wanted: Wanted) -> Iterator[Finding]:
    from kestrel.engine import InferenceEngine

    async def start() -> bool | None:
        # The refiners have a check of their own.
        config = replace(wanted.runtime, refiner=None)
        async with await InferenceEngine.create(config) as engine:
            return engine.finds

    try:
        finds = asyncio.run(start())
    except Exception as error:
        yield bad("segmentation", *_explained(error))
        return
    if finds:
        yield ok("segmentation", "the model segments the built-in picture")
    else:
        text = "the model finds nothing in the built-in picture"
        remedy = "segment a picture that it knows; if it finds nothing there either, serve another"
        yield bad("segmentation", text, remedy, needed=False)


def _explained(error: Exception) -> tuple[str, str]:
    """Why the engine does not start, and what to do."""
    from kestrel.self_check import Unfit

    full = out_of_memory(error)
    if full is not None:
        return f"memory ran out ({line_of(full)})", LESS_MEMORY
    if isinstance(error, PromptTooLong):
        return line_of(error), "raise runtime.kv_cache_bytes (null: as needed) or max_context"
    if isinstance(error, DeadlineExceeded):
        text = f"the built-in picture takes too long ({line_of(error)})"
        return text, "raise runtime.request_timeout_s, or take a faster device"
    if isinstance(error, ConfigError):
        return str(error), "see the message"
    if isinstance(error, Unfit):
        return error.cause, error.remedy
    log.error("the engine does not start", exc_info=error)
    first = list(causes(error))[-1]
    return f"the engine does not start ({type(first).__name__}: {line_of(first)})", TRACEBACK


CHECKS: tuple[Check, ...] = (
    check_python,
    check_torch,
    check_torchvision,
    check_numba,
    check_flashinfer,
    check_kernels,
    check_tracers,
    check_rasterizers,
    check_opencv,
    check_ray,
    check_config,
    check_checkpoint,
    check_refiners,
)


def examine(wanted: Wanted, machine: Machine | None = None) -> Iterator[Finding]:
    """Every check's findings, as they come."""
    machine = machine or Machine()
    for check in CHECKS:
        try:
            yield from check(machine, wanted)
        except Exception as error:  # a check that breaks is a finding, the others still run
            name = check.__name__.removeprefix("check_")
            log.error("%s could not be checked", name, exc_info=error)
            text = f"could not be checked ({type(error).__name__}: {line_of(error)})"
            yield bad(name, text, TRACEBACK)


def doctor_command(file: Path | None) -> int:
    """Print the report; gives the exit status: 1 where the configuration cannot be served."""
    failed = 0
    for finding in examine(read_config(file)):
        print(finding, flush=True)
        failed += finding.verdict is Verdict.FAIL
    return 1 if failed else 0
