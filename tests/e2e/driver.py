"""A Ray driver that the tests command over its standard input, one JSON object per line.

It runs beside pytest, because how Ray finds its cluster is fixed when Ray is first imported.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from kestrel.api import RequestError
from serve_graph.client import SegmentClient


def stats() -> dict[str, list[dict[str, Any]]]:
    """What every replica of each half says; only a driver on the cluster can ask them all."""
    from ray import serve

    halves = {}
    for name in ("Model", "Refiner"):
        handle = serve.get_deployment_handle(name, "segment")
        deadline = time.monotonic() + 30
        while not handle.running_replicas_populated():
            handle.stats.remote().result(timeout_s=deadline - time.monotonic())
        # A replica that was just killed may still be on the list.
        replies = handle.broadcast("stats").results(timeout_s=30, return_exceptions=True)
        halves[name] = [reply for reply in replies if isinstance(reply, dict)]
    return halves


async def leave_when_running(client: SegmentClient, ask: dict[str, Any]) -> None:
    """Ask, and give up as soon as the model works on it."""
    pending = asyncio.create_task(client.asegment(**ask))
    while not any(replica["running"] for replica in (await asyncio.to_thread(stats))["Model"]):
        if pending.done():
            raise RuntimeError("the answer was there before anybody could leave")
    pending.cancel()
    await asyncio.wait([pending])


def leave_stream(client: SegmentClient, ask: dict[str, Any]) -> dict[str, Any]:
    """The first event of a stream that is then left."""
    events = client.segment(**ask, stream=True)
    first = next(events)
    events.close()
    return first


def with_deadline(client: SegmentClient, ask: dict[str, Any]) -> Any:
    """A call of the ingress with its ``timeout_s``, waited for without one."""
    from ray import serve
    from ray.exceptions import RayTaskError

    fields = {**ask, "image": Path(ask["image"]).read_bytes()}
    try:
        return serve.get_app_handle("segment").segment.remote(**fields).result(timeout_s=120)
    except RayTaskError as error:
        raise error.cause from error


async def all_events(client: SegmentClient, ask: dict[str, Any]) -> list[dict[str, Any]]:
    return [event async for event in client.astream(**ask)]


def unheard() -> int:
    """Answers that Ray Client waits for, those of its own that are always due included."""
    from ray.util.client import ray

    return len(ray.worker.data_client.asyncio_waiting_data)


async def in_a_loop(client: SegmentClient, command: str, ask: dict[str, Any]) -> Any:
    """As in a notebook, whose event loop runs."""
    return answer(client, command, ask)


def answer(client: SegmentClient, command: str, ask: dict[str, Any]) -> Any:
    if (inner := command.removesuffix(" in a loop")) != command:
        return asyncio.run(in_a_loop(client, inner, ask))
    if command == "segment":
        return client.segment(**ask)
    if command == "stream":
        return list(client.segment(**ask, stream=True))
    if command == "asegment":
        return asyncio.run(client.asegment(**ask))
    if command == "astream":
        return asyncio.run(all_events(client, ask))
    if command == "leave soon":
        return asyncio.run(asyncio.wait_for(client.asegment(**ask), 0.03))
    if command == "unheard":
        return unheard()
    if command == "leave":
        return asyncio.run(leave_when_running(client, ask))
    if command == "leave_stream":
        return leave_stream(client, ask)
    if command == "with_deadline":
        return with_deadline(client, ask)
    if command == "stats":
        return stats()
    raise ValueError(command)


def main() -> None:
    with SegmentClient(*sys.argv[1:]) as client:
        print(json.dumps({"ok": "connected"}), flush=True)
        for line in sys.stdin:
            command, ask = json.loads(line)
            try:
                reply = {"ok": answer(client, command, ask)}
            except RequestError as error:
                reply = {
                    "type": type(error).__name__,
                    "status": error.status,
                    "field": error.field,
                    "message": error.message,
                }
            except Exception as error:
                reply = {"type": type(error).__name__, "message": str(error)}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
