"""A replica that is given a ``user_config`` which does not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from serve_graph import metrics

logger = logging.getLogger("ray.serve")


class FormerSettings:
    """What a replica goes on with where new settings do not fit: those that it has, at its start
    those of ``args``.

    Serve stops a replica whose settings raise, and would stop all of a pool for one typing error;
    nor would one start in the place of a replica that dies.
    """

    def __init__(self) -> None:
        self._refused = False

    @contextmanager
    def stay(self) -> Iterator[None]:
        """Around what takes a ``user_config``: its error is logged and told as a metric, and the
        replica goes on as before."""
        try:
            yield
        except Exception as error:
            self._refused = True
            logger.error(
                "user_config is refused, the former settings stay, at a start those of args: %s",
                error,
            )
        else:
            self._refused = False
        self.export()

    def export(self) -> None:
        """To be called every few seconds: Ray forgets a gauge that is not set again."""
        metrics.level(metrics.FORMER_SETTINGS, float(self._refused))
