"""A running replica that is given a ``user_config`` which does not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from serve_graph import metrics

logger = logging.getLogger("ray.serve")


class FormerSettings:
    """What a replica goes on with where its new settings do not fit.

    Serve stops a replica whose settings raise, and would stop all of a pool for one typing error.
    """

    def __init__(self) -> None:
        self._serving = self._refused = False

    @contextmanager
    def stay(self) -> Iterator[None]:
        """Around what takes a ``user_config``: once one has been taken, the error of another is
        logged and told as a metric, and the replica goes on as before.

        The first does raise: the deployment says why it has no more replicas.
        """
        try:
            yield
        except Exception as error:
            if not self._serving:
                raise
            self._refused = True
            logger.error("user_config is refused, the former settings stay: %s", error)
        else:
            self._serving, self._refused = True, False
        self.export()

    def export(self) -> None:
        """To be called every few seconds: Ray forgets a gauge that is not set again."""
        metrics.level(metrics.FORMER_SETTINGS, float(self._refused))
