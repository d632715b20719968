"""The Python client: one ``segment`` over HTTP, a Serve handle, or Ray Client.

    client = SegmentClient("http://127.0.0.1:8000")      # the HTTP door
    client = SegmentClient("ray://127.0.0.1:10001")      # Ray Client, from another machine
    client = SegmentClient()                             # a handle, on a machine of the cluster
    answer = client.segment(object="dog", image="dog.jpg", return_base64=True)

All doors take the same arguments, give the same answer, and raise the same ``RequestError`` types
of ``kestrel.api``. An address that starts with ``ray://`` or none at all needs Ray's token
(``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``), not an API key.
"""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np
import PIL.Image

from kestrel.api import SegmentRequest, SegmentSettings, validate_segment
from kestrel.config import Limits

Image = bytes | np.ndarray | str | os.PathLike[str]
Answer = dict[str, Any]


def chosen_settings(request: SegmentRequest) -> dict[str, Any]:
    """The settings that differ from the defaults; the rest is for the service to choose, whose
    model may have room for fewer tokens than the default."""
    given, default = asdict(request.settings), asdict(SegmentSettings())
    return {key: value for key, value in given.items() if value != default[key]}


class Door(Protocol):
    """One way to the service. Requests are validated; images are encoded bytes."""

    def call(self, request: SegmentRequest) -> Answer: ...
    def events(self, request: SegmentRequest) -> Iterator[Answer]: ...
    async def acall(self, request: SegmentRequest) -> Answer: ...
    def aevents(self, request: SegmentRequest) -> AsyncIterator[Answer]: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...


class SegmentClient:
    """Calls the segmentation service; usable from threads and from asyncio.

    ``address``: ``http(s)://...``; ``ray://host:port``; or None, ``"auto"`` or ``host:port`` of a
    Ray cluster that this machine is part of. ``api_key`` is for HTTP only. ``timeout_s`` bounds a
    whole call, seconds. ``app`` names the Serve application for the two Ray doors.
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
        self._door: Door
        if address and address.startswith(("http://", "https://")):
            from serve_graph.http_door import HttpDoor

            self._door = HttpDoor(address, api_key=api_key, timeout_s=timeout_s)
        else:
            from serve_graph.handle_door import HandleDoor

            self._door = HandleDoor(address, app=app, timeout_s=timeout_s)

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
    ) -> Answer | Iterator[Answer]:
        """Outline the named object.

        ``image`` is encoded bytes (JPEG, PNG, WebP), a path to such a file, or an HxWx3 uint8 RGB
        array. Gives the fields of the plain HTTP response; with ``stream=True`` an iterator of the
        events that SSE sends, the last one of type ``final`` (or ``error``, when the request failed
        after its first event). Closing the iterator cancels the request.

        Raises ``kestrel.api.RequestError`` subclasses, OSError for an unreadable file, and
        ConnectionError when the service cannot be reached.
        """
        request = self._request(
            object=object,
            image=image,
            spatial_refs=spatial_refs,
            return_base64=return_base64,
            stream=stream,
            settings=settings,
        )
        return self._door.events(request) if stream else self._door.call(request)

    async def asegment(
        self,
        *,
        object: str,
        image: Image | None = None,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        return_base64: bool = False,
        settings: Mapping[str, Any] | SegmentSettings | None = None,
    ) -> Answer:
        """``segment`` for asyncio; cancelling the task cancels the request."""
        return await self._door.acall(
            self._request(
                object=object,
                image=image,
                spatial_refs=spatial_refs,
                return_base64=return_base64,
                stream=False,
                settings=settings,
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
    ) -> AsyncIterator[Answer]:
        """``segment(stream=True)`` for asyncio."""
        return self._door.aevents(
            self._request(
                object=object,
                image=image,
                spatial_refs=spatial_refs,
                return_base64=return_base64,
                stream=True,
                settings=settings,
            )
        )

    def _request(self, *, image: Image | None, **fields: Any) -> SegmentRequest:
        if isinstance(image, (str, os.PathLike)):
            image = Path(image).read_bytes()
        request = validate_segment(image=image, limits=self._limits, **fields)
        if isinstance(request.image, np.ndarray):
            # Lossless, and the doors carry one kind of image.
            encoded = io.BytesIO()
            PIL.Image.fromarray(request.image).save(encoded, "PNG", compress_level=1)
            request.image = encoded.getvalue()
        return request

    def close(self) -> None:
        """Close connections; disconnects from Ray when this client connected to it."""
        self._door.close()

    def __enter__(self) -> SegmentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> SegmentClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._door.aclose()
