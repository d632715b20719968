"""The libraries that the refiner works with: one of several that do the same, their threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def first_that_loads(
    loaders: Mapping[str, Callable[[], T]],
    missing: type[ImportError],
    doing: str,
    log: logging.Logger,
) -> T:
    """What the first loader gives that does not raise ``missing``; loaders come best first.

    Says in one warning what is used in place of what. Raises ``missing`` with all the reasons when
    none loads.
    """
    reasons: list[str] = []
    for name, load in loaders.items():
        try:
            loaded = load()
        except missing as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("%s with %s: %s", doing, name, "; ".join(reasons))
        return loaded
    raise missing("; ".join(reasons))


def one_thread_each() -> None:
    """Keep the libraries of this process from starting threads of their own: for a server that
    refines several requests at once. Nothing where OpenCV is missing."""
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(1)
