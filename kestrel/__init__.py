"""Segmentation with a Moondream-style model: an image and a noun in; a path, a box, two masks out.

The names below load on first use, so that ``import kestrel`` costs neither torch nor OpenCV.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kestrel.api import RequestError, SegmentRequest, SegmentSettings
    from kestrel.config import ConfigError, Limits, RefinerConfig, RuntimeConfig
    from kestrel.engine import InferenceEngine
    from kestrel.seg_refiner import SegmentRefiner

DISTRIBUTION = "kestrel-segment-serve"

_HOMES = {
    "ConfigError": "kestrel.config",
    "InferenceEngine": "kestrel.engine",
    "Limits": "kestrel.config",
    "RefinerConfig": "kestrel.config",
    "RequestError": "kestrel.api",
    "RuntimeConfig": "kestrel.config",
    "SegmentRefiner": "kestrel.seg_refiner",
    "SegmentRequest": "kestrel.api",
    "SegmentSettings": "kestrel.api",
}

__all__ = [
    "ConfigError",
    "InferenceEngine",
    "Limits",
    "RefinerConfig",
    "RequestError",
    "RuntimeConfig",
    "SegmentRefiner",
    "SegmentRequest",
    "SegmentSettings",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            return "0+source"  # run from a source tree that was never installed
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _warn_of_namesake() -> None:
    """Two distributions that both own ``kestrel/`` overwrite each other's modules."""
    try:
        version = importlib.metadata.version("kestrel")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution 'kestrel' {version} is installed beside '{DISTRIBUTION}'; both provide "
        "the package 'kestrel' and overwrite each other's modules: uninstall one of them "
        "(pip uninstall kestrel), then reinstall the other",
        RuntimeWarning,
        stacklevel=3,
    )


_warn_of_namesake()
