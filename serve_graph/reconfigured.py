"""A running replica that is given a ``user_config`` which does not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from serve_graph import metrics

logger = logging.getLogger("ray.serve")


@contextmanager
def former_settings_stay(*, serving: bool) -> Iterator[None]:
    """Around what takes a ``user_config``: its error is logged and told as a metric, and a replica
    that is ``serving`` goes on as before.

    Serve stops a replica whose settings raise, and would stop all of a pool for one typing error.
    One that only starts does raise: the deployment says why it has no more replicas.
    """
    try:
        yield
    except Exception as error:
        if not serving:
            raise
        metrics.level(metrics.FORMER_SETTINGS, 1)
        logger.error("user_config is refused, the former settings stay: %s", error)
    else:
        metrics.level(metrics.FORMER_SETTINGS, 0)
