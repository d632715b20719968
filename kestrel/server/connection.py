"""uvicorn's connections, of which a request can let go at once."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol


def protocol(**options: Any) -> asyncio.Protocol:
    """What ``uvicorn.Config(http=...)`` takes; each request has ``scope["kestrel.hang_up"]``.

    A connection that is merely closed stays until its client has read what was written to it, which
    one that does not read never does.
    """
    made: Any = AutoHTTPProtocol(**options)
    app = made.app

    def hang_up() -> None:
        # Reset: else the system keeps what is unread, for as long as the client likes.
        made.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        made.transport.abort()

    async def with_hang_up(scope: Scope, receive: Receive, send: Send) -> None:
        scope["kestrel.hang_up"] = hang_up
        await app(scope, receive, send)

    made.app = with_hang_up
    connection: asyncio.Protocol = made
    return connection
