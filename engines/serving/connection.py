"""Limits of one connection: how many there may be, how long a request may take to arrive, how large its head may be.

uvicorn closes idle connections between requests, and waits without end for one that never finishes its request, or
never begins it. This protocol class adds the missing timer, and answers in JSON what is refused before it reaches a
route.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import sys
import termios
from typing import TYPE_CHECKING, cast

from engines.serving.settings import ConnectionLimits
from engines.serving.spare_connections import PATIENCE, SPARE, SpareConnections

if TYPE_CHECKING:
    from engines.serving.app import Service

_GRACE = 0.5  # seconds that an idle connection may still begin a request in, when the server stops
_LOOK_AGAIN = 0.05  # seconds


def protocol_class(service: Service, limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits; counts the connections in the service's metrics.

    One long function, since the class needs its base, and that is imported when a server starts.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    spare = SpareConnections()
    full = f"{limits.connections} connections are open already; try again later"

    class Guarded(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            service.metrics.connections.set(len(self.connections))
            self._arriving = False  # a request has begun and is not yet whole
            self._in_head = False
            self._head = self._chunk = 0  # bytes of the head so far, and of the last read
            self._is_spare = len(self.connections) > limits.connections
            if self._is_spare:
                spare.take(self)
            patience = min(PATIENCE, limits.read_timeout) if self._is_spare else limits.read_timeout
            self._timer = self.loop.call_later(patience, self._too_slow)
            if service.draining:
                self.loop.call_later(_GRACE, self._leave)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            spare.leave(self)
            super().connection_lost(exc)
            service.metrics.connections.set(len(self.connections))

        def data_received(self, data: bytes) -> None:
            self._chunk = len(data)
            self._head += len(data)
            super().data_received(data)
            if self._in_head and self._head > limits.head:
                self._refuse(431, f"the request's headers are larger than {limits.head} bytes")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._arriving = self._in_head = True
            self._head = self._chunk
            self._timer.cancel()
            self._timer = self.loop.call_later(limits.read_timeout, self._too_slow)

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()
            if self._is_spare and len(self.connections) <= limits.connections:  # others have left since
                self._is_spare = False
                spare.leave(self)
            if service.draining or self._is_spare:
                self.cycle.keep_alive = False
            if self._is_spare:
                cast("dict[str, object]", self.scope)[SPARE] = full  # a key of ours

        def on_message_complete(self) -> None:
            self._arriving = False
            self._timer.cancel()
            super().on_message_complete()

        def shutdown(self) -> None:
            """Called when the server stops: what is under way ends, and what is just arriving is answered, too."""
            if self.cycle is None or self.cycle.response_complete:
                self.loop.call_later(_GRACE, self._leave)
            else:
                super().shutdown()

        def let_go(self) -> None:
            self._refuse(503, full)

        def _leave(self) -> None:
            """Close, unless a request is arriving; one may have arrived that the loop has not read yet."""
            if self._arriving or _unread(self.transport):
                self.loop.call_later(_LOOK_AGAIN, self._leave)
            else:
                super().shutdown()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is not HTTP")

        def _too_slow(self) -> None:
            if self._arriving and (self._in_head or not self.cycle.response_started):
                self._refuse(408, f"the request did not arrive within {limits.read_timeout:g} seconds")
            else:
                self.transport.close()  # nothing was asked, or it is answered already

        def _refuse(self, status: int, message: str) -> None:
            if self.transport.is_closing():
                return
            self.transport.write(_refusal(status, message))
            self.transport.close()

    return Guarded


def _refusal(status: int, message: str) -> bytes:
    """A whole answer that ends the connection."""
    words = {400: "Bad Request", 408: "Request Timeout", 431: "Headers Too Large", 503: "Service Unavailable"}
    body = json.dumps({"error": message}).encode("ascii")
    head = (
        f"HTTP/1.1 {status} {words[status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\nretry-after: 1\r\n\r\n"
    )
    return head.encode("ascii") + body


def _unread(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds for this connection."""
    if transport.is_closing():
        return 0
    waiting = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(waiting, sys.byteorder)
