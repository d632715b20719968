"""Mask refinement backends by name.

A backend is built once from the configuration, when the refiner is, and then called per request.
It raises ``ConfigError`` that says what to install or to set where a part of it is missing::

    def _mine(config: RefinerConfig) -> Refine:
        from kestrel.seg_refiner.mine import MyRefiner  # heavy imports only when it is asked for

        return MyRefiner(config)

    BACKENDS["mine"] = _mine  # then RefinerConfig(refiner="mine")

Where the configuration is all that reaches the process, as in a Serve config, such a function is
named by where it is, ``package.module:function``: ``RefinerConfig(refiner="mine.refiner:build")``.

It gets the whole picture (uint8 [H, W, 3] RGB) and the coarse mask (uint8 [H, W], 0/1), must not
change either, and gives the refined mask (uint8 [H, W], 0/1). It may raise: the caller then keeps
the model's own path. Calls may come from several threads at once.

A backend that needs less of the picture than all its pixels says so with the two methods of
:class:`Reduced`: a JPEG is then decoded smaller, which takes half the time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, runtime_checkable

import numpy as np

from kestrel.config import ConfigError, RefinerConfig
from kestrel.image import REDUCTIONS
from kestrel.seg_refiner.box import Size

Refine = Callable[[np.ndarray, np.ndarray], np.ndarray]


@runtime_checkable
class Reduced(Protocol):
    """A backend that looks at the mask's grown box alone (``box.grown_box``), and works with a
    picture smaller than the mask as well. It may be given picture and mask cut to that box, or to
    the whole pixels of the smaller picture that hold it."""

    def reduction(self, box: Size, picture: Size) -> int:
        """What the picture's sides may be divided by, one of ``kestrel.image.REDUCTIONS`` at most,
        where the coarse mask's grown box has these sides and the picture those, in pixels."""

    def __call__(self, image: np.ndarray, mask: np.ndarray, reduction: int = 1) -> np.ndarray:
        """``image``: uint8 [ceil(H / reduction), ceil(W / reduction), 3] RGB, whose pixel
        ``[i, j]`` is the mean of those from ``[i * reduction, j * reduction]`` on. ``mask`` and
        result: uint8 [H, W], 0/1."""


class _Unrefined:
    """Gives the coarse mask, whatever the picture shows."""

    def reduction(self, box: Size, picture: Size) -> int:
        return max(REDUCTIONS)

    def __call__(self, image: np.ndarray, mask: np.ndarray, reduction: int = 1) -> np.ndarray:
        return mask


def _none(config: RefinerConfig) -> Refine:
    return _Unrefined()


def _guided(config: RefinerConfig) -> Refine:
    from kestrel.seg_refiner.guided import GuidedRefiner

    return GuidedRefiner(config)


def _boundary(config: RefinerConfig) -> Refine:
    from kestrel.seg_refiner.boundary import BoundaryRefiner

    return BoundaryRefiner()


def _seghead(config: RefinerConfig) -> Refine:
    from kestrel.seg_refiner.seghead import SegHeadRefiner

    return SegHeadRefiner(config)


def _hq_sam(config: RefinerConfig) -> Refine:
    from kestrel.seg_refiner.hq_sam import HqSamRefiner

    return HqSamRefiner(config)


BACKENDS: dict[str, Callable[[RefinerConfig], Refine]] = {
    "none": _none,
    "guided": _guided,
    "boundary": _boundary,
    "seghead": _seghead,
    "hq-sam": _hq_sam,
}


def find_backend(name: str) -> Callable[[RefinerConfig], Refine]:
    """The function that builds the backend of that name.

    Raises :class:`ConfigError` for a name that is not registered, listing those that are, and for
    a place where there is no function or whose module does not load.
    """
    module, colon, function = name.partition(":")
    if not colon:
        if name not in BACKENDS:
            known = ", ".join(sorted(BACKENDS))
            raise ConfigError(
                f"refiner {name!r} is not known; known refiners are {known}, and yours as "
                "package.module:function"
            )
        return BACKENDS[name]
    try:
        build: Callable[[RefinerConfig], Refine] = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"refiner {name!r} is not there: {error}") from error
    except Exception as error:  # the user's own module
        raise ConfigError(f"refiner {name!r} does not load: {_line(error)}") from error
    if not callable(build):
        raise ConfigError(
            f"refiner {name!r} is not there: {function} is no function but {type(build).__name__}"
        )
    return build


def build_backend(name: str, config: RefinerConfig) -> Refine:
    """The backend of that name.

    Raises :class:`ConfigError` as :func:`find_backend` does, and for a function of the user's own
    that fails or gives nothing to call, ImportError for a library that is missing, and whatever
    else a registered function raises.
    """
    build = find_backend(name)
    if ":" not in name:
        return build(config)
    try:
        refine = build(config)
    except (ConfigError, ImportError):
        raise
    except Exception as error:  # as any function may be named
        raise ConfigError(f"refiner {name!r} fails: {_line(error)}") from error
    if not callable(refine):
        raise ConfigError(f"refiner {name!r} must give a function, not {type(refine).__name__}")
    return refine


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
