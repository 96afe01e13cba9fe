"""One connection: requests one after the other, and limits of their number, their time to arrive, and their heads.

uvicorn's protocol class does the parsing and the answering. It closes idle connections between requests, waits without
end for a request that never arrives whole, and reads on into the next request while one is being answered, so that
whatever is wrong with the next one can cost the answer to the first. Here every request has a timer from its first
byte, the next one is looked at when its predecessor is answered (`engines.serving.http.framing`), and what is refused
before it reaches a route is answered in JSON, too.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import sys
import termios
from typing import TYPE_CHECKING, cast

from engines.serving.http.framing import Framing, OversizedHead
from engines.serving.http.spare_connections import PATIENCE, SPARE, SpareConnections
from engines.serving.settings import ConnectionLimits

if TYPE_CHECKING:
    from engines.serving.app import Service

BEGAN = "began"  # in the state of an ASGI scope: when the first byte of the request was seen, on `time.monotonic`
_GRACE = 0.5  # seconds that an idle connection may still begin a request in, when the server stops
_LOOK_AGAIN = 0.05  # seconds
_LINGER = 1.0  # seconds that a client may take to read a refusal in, before its connection is closed
_AHEAD = 64 << 10  # bytes of later requests that are taken over while one is answered
_PIECES = 256  # of a request's bytes that are parsed in one go: a millisecond, then it is the turn of others


def protocol_class(service: Service, limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits; counts the connections in the service's metrics.

    One long function, since the class needs its base, and that is imported when a server starts.
    """
    import httptools
    from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    spare = SpareConnections()
    full = f"{limits.connections} connections are open already; try again later"

    class Flow(FlowControl):
        """Reads on only while little waits to be parsed."""

        def __init__(self, transport: asyncio.Transport, framing: Framing) -> None:
            super().__init__(transport)
            self._framing = framing

        def resume_reading(self) -> None:
            if self._framing.waiting <= _AHEAD:
                super().resume_reading()

    class Guarded(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            service.metrics.connections.set(len(self.connections))
            self._framing = Framing(limits.head)
            self.flow = Flow(transport, self._framing)
            self._arriving = False  # a request has begun and is not yet whole
            self._began = 0.0  # when it began
            self._refused = False
            self._going_on: asyncio.Handle | None = None  # what parses on in the loop's next round
            self._is_spare = len(self.connections) > limits.connections
            if self._is_spare:
                spare.take(self)
            self._patience = min(PATIENCE, limits.read_timeout) if self._is_spare else limits.read_timeout
            self._timer = self.loop.call_later(self._patience, self._too_slow)
            if service.draining:
                self.loop.call_later(_GRACE, self._leave)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            if self._going_on is not None:
                self._going_on.cancel()
            spare.leave(self)
            super().connection_lost(exc)
            service.metrics.connections.set(len(self.connections))

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return  # read, so that closing does not reset the connection before the refusal is read
            self._framing.add(data)
            if self._framing.waiting > _AHEAD:
                self.flow.pause_reading()
            if self._going_on is None:
                self._parse()

        def _parse(self) -> None:
            """Feed the parser what has arrived of the present request."""
            self._going_on = None
            if self._framing.waiting and not self._framing.held:
                self._unset_keepalive_if_required()
                if not self._arriving:
                    self._arriving, self._began = True, self.loop.time()
                    self._timer.cancel()
                    self._timer = self.loop.call_later(self._patience, self._too_slow)
            try:
                for _ in range(_PIECES):
                    piece = self._framing.take()
                    if piece is None or self.transport.is_closing():
                        if self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
                            self.flow.resume_reading()
                        return
                    self.parser.feed_data(piece)
            except OversizedHead:
                self._refuse(431, f"the request's headers are larger than {limits.head} bytes")
            except httptools.HttpParserError:
                self._refuse(400, "this is not HTTP/1.1 as a server takes it")
            else:
                self._going_on = self.loop.call_soon(self._parse)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._framing.in_head:  # a trailer is no header: it comes when what it could say is decided
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                raise ValueError("CONNECT is for proxies")
            self._framing.begin_body(self.headers)
            self.scope["state"][BEGAN] = self._began
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
            self._framing.end_request()
            super().on_message_complete()
            if self.cycle.response_complete:
                self._next()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._framing.held and not self.transport.is_closing():
                self._next()

        def _next(self) -> None:
            self._framing.release()
            if self._framing.waiting:
                self._going_on = self._going_on or self.loop.call_soon(self._parse)
            elif self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

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

        def _too_slow(self) -> None:
            if self._arriving and (self._framing.in_head or not self.cycle.response_started):
                self._refuse(408, f"the request did not arrive within {self._patience:g} seconds")
            else:
                self.transport.close()  # nothing was asked, or it is answered already

        def _refuse(self, status: int, message: str) -> None:
            """Answer what no route will see, and close the connection when the client has had time to read that."""
            if self.transport.is_closing() or self._refused:
                return
            answered = False  # this very request, which goes on arriving
            if self._arriving and not self._framing.in_head:
                answered = self.cycle.response_started
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._refused, self._arriving = True, False
            self._timer.cancel()
            self._unset_keepalive_if_required()
            self._framing.clear()
            self.flow.resume_reading()
            if not answered:
                self.transport.write(_refusal(status, message))
            self.transport.write_eof()
            self._timer = self.loop.call_later(_LINGER, self.transport.close)

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
