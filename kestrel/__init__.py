"""Segmentation as a library: an image and a noun in; an SVG path, its box and two masks out."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kestrel.config import RefinerConfig, RuntimeConfig
    from kestrel.engine import InferenceEngine

__version__ = "0.1.0"
__all__ = ["InferenceEngine", "RefinerConfig", "RuntimeConfig", "__version__"]

_HOMES = {
    "InferenceEngine": "kestrel.engine",
    "RefinerConfig": "kestrel.config",
    "RuntimeConfig": "kestrel.config",
}


def __getattr__(name: str) -> Any:
    # Lazily: a refiner process imports this package and must not load torch for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _warn_of_namesake() -> None:
    """The distribution ``kestrel`` on PyPI installs a package of this name over this one."""
    try:
        version = importlib.metadata.version("kestrel")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution 'kestrel' {version} is installed beside kestrel-segment-serve: both "
        "hold a package named kestrel and their files mix; pip uninstall one of them, then "
        "reinstall the other",
        RuntimeWarning,
        stacklevel=2,
    )


_warn_of_namesake()
