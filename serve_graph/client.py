"""The Python client: one ``segment`` over HTTP, a Serve handle, or Ray Client.

    client = SegmentClient("http://127.0.0.1:8000")      # the HTTP door
    client = SegmentClient("ray://127.0.0.1:10001")      # Ray Client, from another machine
    client = SegmentClient()                             # a handle, on a machine of the cluster
    answer = client.segment(object="dog", image="dog.jpg", return_base64=True)

All doors take the same arguments, give the same answer, and raise the same ``RequestError`` types
of ``kestrel.api``. An address that starts with ``ray://`` or none at all needs Ray's token
(``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``), not an API key. Where there
is one, it is shown to the cluster at that address, unless ``RAY_AUTH_MODE`` is ``disabled``.
Without an address ``RAY_ADDRESS`` says where the cluster is, or Ray finds one on this machine.
"""

from __future__ import annotations

import io
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np
import PIL.Image

from kestrel.api import SegmentSettings, timeout_of_call, validate_segment
from kestrel.config import LONGEST_TIMEOUT_S, Limits
from serve_graph.loop_thread import CLOSED, LoopThread

Image = bytes | np.ndarray | str | os.PathLike[str]
Answer = dict[str, Any]


class Door(Protocol):
    """One way to the service. A call is the contract's fields, validated and without those that
    are not given; its image is encoded bytes."""

    async def acall(self, fields: dict[str, Any]) -> Answer: ...
    def aevents(self, fields: dict[str, Any]) -> AsyncGenerator[Answer, None]: ...
    async def leave_loop(self) -> None:
        """Close what calls in the running event loop have opened."""

    def close(self) -> None:
        """Close what all loops share."""


class SegmentClient:
    """Calls the segmentation service; usable from threads and from asyncio, where ``segment`` works
    too, but holds up the event loop.

    ``address``: ``http(s)://...``; ``ray://host:port``; or None, ``"auto"`` or ``host:port`` of a
    Ray cluster that this machine is part of. ``api_key`` is for HTTP only. ``timeout_s`` is the
    deadline of each call, seconds, where the service's own is not shorter: from when its image is
    encoded to its answer, or to the last event of its stream, which may come a second later.
    ``app`` names the Serve application for the two Ray doors.

    Nothing here bounds how many calls are under way at once: what is too much for the service's
    queues it refuses (``Overloaded``). Over HTTP each has a connection, hence an open file. Through
    Ray Client each stream has a thread here, and an actor on the cluster, which is a process and
    takes a moment to start: for many streams at once take another door.

    Raises ValueError for an ``api_key`` or a ``timeout_s`` that makes no sense, and ConnectionError
    where there is no Ray cluster at the address. Over HTTP the first call connects.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        app: str = "segment",
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        timeout_s = timeout_of_call(timeout_s, LONGEST_TIMEOUT_S)
        self._closed = False
        self._door: Door
        if address and address.lower().startswith(("http://", "https://")):
            from serve_graph.http_door import HttpDoor

            self._door = HttpDoor(address, api_key=api_key, timeout_s=timeout_s)
        else:
            from serve_graph.handle_door import HandleDoor

            self._door = HandleDoor(address, app=app, timeout_s=timeout_s)
        self._thread = LoopThread(self._door.leave_loop)

    @overload
    def segment(
        self,
        *,
        object: str,
        image: Image | None = None,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        return_base64: bool = False,
        stream: Literal[False] = False,
        settings: Mapping[str, Any] | SegmentSettings | None = None,
        model: str | None = None,
    ) -> Answer: ...

    @overload
    def segment(
        self,
        *,
        object: str,
        image: Image | None = None,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        return_base64: bool = False,
        stream: Literal[True],
        settings: Mapping[str, Any] | SegmentSettings | None = None,
        model: str | None = None,
    ) -> Iterator[Answer]: ...

    def segment(
        self,
        *,
        object: str,
        image: Image | None = None,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        return_base64: bool = False,
        stream: bool = False,
        settings: Mapping[str, Any] | SegmentSettings | None = None,
        model: str | None = None,
    ) -> Answer | Iterator[Answer]:
        """Outline the named object.

        ``image`` is encoded bytes (JPEG, PNG, WebP), a path to such a file, or an HxWx3 uint8 RGB
        array. Gives the fields of the plain HTTP response; with ``stream=True`` an iterator of the
        events that SSE sends, the last one of type ``final`` (or ``error``, when the request failed
        after its first event). Closing the iterator cancels the request. ``model``: the name that
        must be served, else ``UnknownModel``; None: whatever is.

        Raises ``kestrel.api.RequestError`` subclasses, OSError for an unreadable file, and
        ConnectionError when the service cannot be reached, or its answer is cut short.
        """
        fields = self._fields(
            object=object,
            image=image,
            spatial_refs=spatial_refs,
            return_base64=return_base64,
            stream=stream,
            settings=settings,
            model=model,
        )
        if stream:
            return self._thread.each(self._door.aevents(fields))
        return self._thread.run(self._door.acall(fields))

    async def asegment(
        self,
        *,
        object: str,
        image: Image | None = None,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        return_base64: bool = False,
        settings: Mapping[str, Any] | SegmentSettings | None = None,
        model: str | None = None,
    ) -> Answer:
        """``segment`` for asyncio; cancelling the task cancels the request."""
        return await self._door.acall(
            self._fields(
                object=object,
                image=image,
                spatial_refs=spatial_refs,
                return_base64=return_base64,
                stream=False,
                settings=settings,
                model=model,
            )
        )

    def astream(
        self,
        *,
        object: str,
        image: Image | None = None,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        return_base64: bool = False,
        settings: Mapping[str, Any] | SegmentSettings | None = None,
        model: str | None = None,
    ) -> AsyncIterator[Answer]:
        """``segment(stream=True)`` for asyncio."""
        return self._door.aevents(
            self._fields(
                object=object,
                image=image,
                spatial_refs=spatial_refs,
                return_base64=return_base64,
                stream=True,
                settings=settings,
                model=model,
            )
        )

    def _fields(self, *, image: Image | None, model: str | None, **given: Any) -> dict[str, Any]:
        """The call as the doors take it."""
        if self._closed:
            raise ConnectionError(CLOSED)
        if isinstance(image, (str, os.PathLike)):
            image = Path(image).read_bytes()
        request = validate_segment(image=image, limits=self._limits, **given)
        # What is left at its default is for the service to choose, whose model may have room for
        # fewer tokens.
        settings, default = asdict(request.settings), asdict(SegmentSettings())
        fields: dict[str, Any] = {
            "object": request.object,
            "return_base64": request.return_base64,
            "settings": {key: settings[key] for key in settings if settings[key] != default[key]},
        }
        if request.image is not None:
            fields["image"] = _encoded(request.image)
        if request.spatial_refs is not None:
            fields["spatial_refs"] = [list(ref) for ref in request.spatial_refs]
        if model is not None:
            fields["model"] = model
        return fields

    def close(self) -> None:
        """Close the connections of calls that were not awaited; a later call is a ConnectionError.

        The last client of this process disconnects it from Ray, unless the program connected it.
        """
        self._closed = True
        self._thread.close()
        self._door.close()

    def __enter__(self) -> SegmentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> SegmentClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._door.leave_loop()
        self.close()


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    # Lossless, and the doors carry one kind of image.
    encoded = io.BytesIO()
    PIL.Image.fromarray(image).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()
