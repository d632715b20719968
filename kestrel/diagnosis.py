"""What ``python -m kestrel doctor`` asks of a machine, and the findings that it reports."""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from kestrel.config import ConfigError, RefinerConfig, RuntimeConfig, from_mapping
from kestrel.ports import is_taken
from kestrel.serve_config import HTTP, graph_of, http_address, mapping_of


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    verdict: Verdict
    text: str
    remedy: str = ""
    """A command or a change of the configuration."""

    def __str__(self) -> str:
        line = f"{self.verdict.value:>4}  {self.subject}: {self.text}"
        return f"{line} -> {self.remedy}" if self.remedy else line


def ok(subject: str, text: str) -> Finding:
    return Finding(subject, Verdict.OK, text)


def bad(subject: str, text: str, remedy: str, *, needed: bool = True) -> Finding:
    """A failure, or a warning where the configuration does not need it."""
    return Finding(subject, Verdict.FAIL if needed else Verdict.WARN, text, remedy)


TRACEBACK = "see the traceback on standard error"
"""What to do about an error that nobody foresaw."""
LESS_MEMORY = (
    "lower runtime.max_batch_size, kv_cache_bytes or image_cache_bytes, or free the device's memory"
)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def out_of_memory(error: BaseException) -> BaseException | None:
    """The error among the causes that says that memory ran out, of the GPU or the machine."""
    for cause in causes(error):
        # By name, as torch may be missing; on a CPU it raises a mere RuntimeError.
        named = type(cause).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(cause)
        if named or isinstance(cause, MemoryError):
            return cause
    return None


def line_of(error: BaseException) -> str:
    """The first line of an error's message, its type's name without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Machine:
    """What the checks ask of the machine; tests answer in its place."""

    def python(self) -> tuple[int, int]:
        return sys.version_info[:2]

    def platform(self) -> str:
        """As ``sys.platform``."""
        return sys.platform

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution, None without one."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def load(self, module: str) -> ModuleType:
        """Import a module; raises ImportError or OSError as the import does."""
        return importlib.import_module(module)

    def which(self, command: str) -> str | None:
        return shutil.which(command) or (
            shutil.which(command, path=str(Path(sys.executable).parent))
        )

    def environment(self, name: str) -> str:
        return os.environ.get(name, "")

    def folders(self, suffix: str) -> list[Path]:
        """Folders of ``sys.path`` that end so and hold shared libraries."""
        found = (Path(entry) / suffix for entry in sys.path)
        return [folder for folder in found if glob.glob(str(folder / "*.so*"))]

    def port_free(self, host: str, port: int) -> bool:
        """Whether nobody listens there."""
        return not is_taken(host, port)


@dataclass(frozen=True)
class Wanted:
    """What is to be served."""

    runtime: RuntimeConfig
    refiner: RefinerConfig | None
    http: tuple[str, int] = HTTP
    graph: bool = False
    """Whether it is a Serve config: Ray is needed."""
    serve_config: dict[str, Any] | None = None
    """All of that."""


def read_config(file: Path | None) -> Wanted:
    """A Serve config, or a YAML file with ``runtime`` and ``refiner`` at its top; the defaults
    without one. Raises ``ConfigError``."""
    if file is None:
        config = RuntimeConfig()
        return Wanted(config, config.refiner)
    try:
        import yaml
    except ImportError:
        raise ConfigError("reading YAML needs PyYAML: pip install pyyaml") from None
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a readable YAML file ({error})") from error
    values = {} if values is None else values
    args, served = values, isinstance(values, dict) and "applications" in values
    if served:
        args = mapping_of(graph_of(values), "args")
    if not isinstance(args, dict):
        raise ConfigError(f"{file}: no mapping with runtime and refiner")
    # A key without a value is null in YAML.
    runtime, refiner = (
        {} if args.get(key) is None else args[key] for key in ("runtime", "refiner")
    )
    if not served:  # of a Serve config this is ``check_config``'s to say
        unknown = sorted(set(args) - {"runtime", "refiner"}, key=str)
        if unknown:
            raise ConfigError(
                f"{file}: unknown key {unknown[0]!r}; known keys are runtime, refiner and, of a "
                "Serve config, applications"
            )
        if isinstance(runtime, dict) and "refiner" in runtime:
            raise ConfigError(f"{file}: runtime.refiner: it is refiner, beside runtime")
    if isinstance(runtime, dict):
        runtime = {**runtime, "refiner": None}
    return Wanted(
        from_mapping(RuntimeConfig, runtime, "runtime"),
        from_mapping(RefinerConfig, refiner, "refiner"),
        http_address(values) if served else HTTP,
        graph=served,
        serve_config=values if served else None,
    )
