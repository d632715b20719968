"""The ingress deployment: both doors of the graph. It decodes no pixels."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.schema import ReplicaState

from kestrel import api
from kestrel.answers import ErrorEvent, segment_response
from kestrel.api import Overloaded, RequestError, SegmentRequest, TooLarge, image_size
from kestrel.api_keys import RateLimits
from kestrel.config import RuntimeConfig
from kestrel.deadlines import within
from kestrel.freed_memory import GivingBack, settle
from kestrel.seg_refiner.result import REASONS
from kestrel.server.room import Place
from serve_graph import metrics
from serve_graph.args import IngressSettings
from serve_graph.compose import GraphBackend
from serve_graph.environment import HAPROXY_ON
from serve_graph.full import TURNED_AWAY
from serve_graph.halves import Deadline
from serve_graph.hedge import Hedge
from serve_graph.reconfigured import FormerSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from ray.util.queue import Queue
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

COUNT_PERIOD_S = 10.0
"""How often an ingress replica asks how many of them share the rates of the API keys, seconds."""

COUNTED: tuple[tuple[metrics.Spec, dict[str, str]], ...] = (
    *(
        (metrics.REQUESTS, {"door": door, "outcome": outcome})
        for door in ("http", "handle")
        for outcome in metrics.OUTCOMES
    ),
    *((metrics.REFINEMENTS, {"reason": reason}) for reason in REASONS),
    *((metrics.LOST_REPLICAS, {"half": half}) for half in ("model", "refiner")),
    (metrics.HEDGED_REFINEMENTS, {}),
)
"""Every counter of an ingress replica with each value of its tags."""


class IngressDeployment:
    """HTTP, and by handle the methods ``segment`` and ``stream``: one validation, one composing."""

    async def __init__(  # type: ignore[misc]
        self,
        config: RuntimeConfig,
        refine_timeout_s: float,
        hedge: Hedge,
        model: DeploymentHandle,
        refiner: DeploymentHandle,
    ) -> None:
        metrics.log_with_serve()
        for spec, tags in COUNTED:
            metrics.begin(spec, **tags)
        self._backend = GraphBackend(config, refine_timeout_s, hedge, model, refiner)
        self._former = FormerSettings()
        self._keyed = False
        # Kept, because asyncio itself holds its tasks weakly.
        self._tasks = [asyncio.create_task(self._backend.wait_for_halves())]
        self._tasks.append(asyncio.create_task(self._count_replicas()))
        self._tasks.append(asyncio.create_task(self._watch()))
        self._replicas = 1
        GivingBack()
        settle()

    def __serve_build_asgi_app__(self) -> Starlette:
        from kestrel.server.routes import build_app

        app = build_app(
            self._backend,
            # Every door spreads requests evenly (see serve_graph.environment), so that the shares
            # add up to the rate of a key.
            rates=RateLimits(share=lambda: 1 / self._replicas),
            room=self._backend.room,
            ended=partial(metrics.request_ended, "http"),
            # Serve gives every HTTP request its id before it comes here, and the answer its header.
            name_answers=False,
        )
        if os.environ.get(HAPROXY_ON) == "1":  # else nobody takes that header from clients
            app.add_middleware(CountTurnedAway)
        return app

    async def _watch(self) -> None:
        """Export what both doors hold, once a second."""
        while True:
            self._former.export()
            metrics.level(metrics.HELD_REQUESTS, self._backend.room.requests)
            metrics.level(metrics.HELD_BYTES, self._backend.room.bytes)
            await asyncio.sleep(1.0)

    async def _count_replicas(self) -> None:
        """Keep up with how many ingress replicas autoscaling runs."""
        context = serve.get_replica_context()
        while True:
            if any(key.rate_per_s is not None for key in self._backend.config.api_keys):
                try:
                    status = await asyncio.to_thread(serve.status)
                    ingress = status.applications[context.app_name].deployments[context.deployment]
                    self._replicas = max(1, ingress.replica_states.get(ReplicaState.RUNNING, 1))
                except Exception as error:
                    logger.info("the ingress replicas could not be counted: %r", error)
            await asyncio.sleep(COUNT_PERIOD_S)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this with the deployment's ``user_config`` (``IngressSettings``).

        Raises ValueError at a start where API keys may be meant by what does not fit.
        """
        if not self._keyed:
            # A door must not open for a typing error. Under a mistyped name too, keys are no
            # number: all else has to fit before the replica starts.
            self._take({k: v for k, v in user_config.items() if not isinstance(v, (int, float))})
            self._keyed = True
        with self._former.stay():
            self._take(user_config)

    def _take(self, user_config: dict[str, Any]) -> None:
        settings = IngressSettings.model_validate(user_config)
        self._backend.change(settings.refine_timeout_s, settings.api_keys)
        self._backend.draining = settings.draining

    async def segment(
        self, *, timeout_s: Any = None, due: Any = None, **fields: Any
    ) -> dict[str, Any]:
        """The contract's fields in (``kestrel.api.validate_call``), those of the plain HTTP answer
        out; raises RequestError. ``timeout_s``: the call's own deadline, seconds from its
        arrival. ``due``: when its caller leaves, by ``time.time()``; only for the count of those
        who leave, as clocks may differ."""
        with _counted(due) as ended:
            deadline = ended.deadline = self._deadline(timeout_s)
            with self._backend.room.enter(deadline.left()) as place:
                request = await self._taken(fields, place, deadline)
                left = deadline.left()
                model, refined = await self._backend.complete(request, _request_id(), left)
                return segment_response(model, refined, return_base64=request.return_base64)

    async def stream(
        self, *, timeout_s: Any = None, due: Any = None, **fields: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """``segment`` as the events that SSE sends; raises RequestError before the first only."""
        with _counted(due) as ended:
            deadline = ended.deadline = self._deadline(timeout_s)
            with self._backend.room.enter(deadline.left()) as place:
                request = await self._taken(fields, place, deadline)
                events = self._backend.events(request, _request_id(), deadline.left())
                async with contextlib.aclosing(events):
                    async for event in events:
                        place.heard(event)
                        if isinstance(event, ErrorEvent):
                            ended.outcome = event.outcome
                            event = dict(event)  # callers need not have its class
                        yield event

    async def stream_into(self, queue: Queue, **fields: Any) -> None:
        """``stream`` for Ray Client, which has no streaming calls: the events go into a queue."""
        try:
            # A caller that is gone has ended the queue: then the request ends here, at once.
            async with contextlib.aclosing(self.stream(**fields)) as events:
                async for event in events:
                    await queue.put_async(event)
        except RequestError as error:
            await queue.put_async(error)

    def _deadline(self, timeout_s: Any) -> Deadline:
        """That of a call which arrives now."""
        return Deadline(api.timeout_of_call(timeout_s, self._backend.config.request_timeout_s))

    async def _taken(
        self, fields: dict[str, Any], place: Place, deadline: Deadline
    ) -> SegmentRequest:
        config = self._backend.config
        request = api.validate_call(
            fields,
            limits=config.limits,
            served_model=config.model,
            max_context=self._backend.max_context,
            refiners=config.refiners,
        )
        size = image_size(request.image)
        if isinstance(request.image, bytes) and size > config.limits.max_body_bytes:
            raise TooLarge(f"image is larger than {config.limits.max_body_bytes} bytes", "image")
        place.hold(size)
        reason = await within(deadline.at, self._backend.serving())
        if reason is not None:
            raise Overloaded(reason, retry_after_s=2.0)
        place.begin(deadline.left())
        return request


class CountTurnedAway:
    """ASGI middleware: counts the requests that HAProxy says it refused for the service."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()):
            if name == TURNED_AWAY.lower().encode() and value.isdigit():
                metrics.count(metrics.REQUESTS, int(value), door="http", outcome="overloaded")
        await self._app(scope, receive, send)


def _request_id() -> str:
    """The id that Serve's log and traces have for the call under way."""
    return serve.context._get_serve_request_context().request_id or uuid.uuid4().hex


@contextlib.contextmanager
def _counted(due: Any) -> Iterator[SimpleNamespace]:
    """Count and time one call of the handle door, whose caller leaves when it is ``due``.
    ``deadline`` is to be set once it is known, ``outcome`` may be where nothing raises."""
    ended, started = SimpleNamespace(outcome=None, deadline=None), time.monotonic()
    failure: BaseException | None = None
    try:
        yield ended
    except BaseException as error:
        failure = error
        raise
    finally:
        deadline = ended.deadline.at if ended.deadline is not None else None
        if deadline is not None and isinstance(due, (int, float)):
            deadline = min(deadline, time.monotonic() + due - time.time())
        outcome = ended.outcome or api.outcome(failure, deadline)
        metrics.request_ended("handle", outcome, time.monotonic() - started)
