"""One connection: requests one after the other, and limits of their number, their time to arrive, and their heads.

uvicorn's protocol class does the parsing and the answering. It closes idle connections between requests, waits without
end for a request that never arrives whole and for a client that never reads its answer, and reads on into the next
request while one is being answered, so that whatever is wrong with the next one can cost the answer to the first. Here
every request has a timer from its first byte, the next one is looked at when its predecessor is answered
(`engines.serving.http.framing`), and what is refused before it reaches a route is answered in JSON, too.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
import sys
import termios
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from engines.serving.http.framing import Framing, MalformedHead, OversizedHead
from engines.serving.http.spare_connections import PATIENCE, SPARE, SpareConnections
from engines.serving.settings import ConnectionLimits

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl as _FlowBase
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as _ProtocolBase

    from engines.serving.app import Service
else:  # uvicorn is loaded when a server starts: `protocol_class` puts its classes behind these two
    _FlowBase = _ProtocolBase = object

BEGAN = "began"  # in the state of an ASGI scope: when the first byte of the request was seen, on `time.monotonic`
_GRACE = 0.5  # seconds that an idle connection may still begin a request in, when the server stops
_LOOK_AGAIN = 0.05  # seconds
_LINGER = 1.0  # seconds that a client may take to read a refusal in, before its connection is closed
_AHEAD = 64 << 10  # bytes of later requests that are taken over while one is answered
_PIECES = 256  # of a request's bytes that are parsed in one go: a millisecond, then it is the turn of others


_HOST = re.compile(rb"[A-Za-z0-9._~!$%&'()*+,;=:\[\]-]*")


class _Flow(_FlowBase):
    """Reads on only while little waits to be parsed."""

    def __init__(self, transport: asyncio.Transport, framing: Framing) -> None:
        super().__init__(transport)
        self._framing = framing

    def resume_reading(self) -> None:
        if self._framing.waiting <= _AHEAD:
            super().resume_reading()


class _Guarded(_ProtocolBase):
    """A connection. The class attributes are those of one server."""

    service: ClassVar[Service]
    limits: ClassVar[ConnectionLimits]
    spare: ClassVar[SpareConnections]
    flow_class: ClassVar[type[_Flow]]
    parser_error: ClassVar[type[Exception]]  # of httptools
    high_water: ClassVar[int]  # bytes of a body that may wait for the application

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.service.metrics.connections.set(len(self.connections))
        self._framing = Framing(self.limits.head)
        self.flow = self.flow_class(transport, self._framing)
        self._arriving = False  # a request has begun and is not yet whole
        self._began = 0.0  # when it began
        self._refused = False
        self._going_on: asyncio.Handle | None = None  # what parses on in the loop's next round
        self._watching: asyncio.TimerHandle | None = None  # looks whether the client reads what it asked for
        self._is_spare = len(self.connections) > self.limits.connections
        if self._is_spare:
            self.spare.take(self)
        self._patience = min(PATIENCE, self.limits.read_timeout) if self._is_spare else self.limits.read_timeout
        self._timer = self.loop.call_later(self._patience, self._too_slow)
        if self.service.draining:
            self.loop.call_later(_GRACE, self._leave)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        for handle in (self._going_on, self._watching):
            if handle is not None:
                handle.cancel()
        self.spare.leave(self)
        super().connection_lost(exc)
        self.service.metrics.connections.set(len(self.connections))

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
                    if self.cycle is None or len(self.cycle.body) <= self.high_water:
                        self.flow.resume_reading()
                    return
                self.parser.feed_data(piece)
        except OversizedHead:
            self._refuse(431, f"the request's headers are larger than {self.limits.head} bytes")
        except self.parser_error as error:
            ours = error.__context__  # httptools wraps what its callbacks raise
            what = str(ours) if isinstance(ours, MalformedHead) else "this is not HTTP/1.1 as a server takes it"
            self._refuse(400, what)
        else:
            self._going_on = self.loop.call_soon(self._parse)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._framing.in_head:  # a trailer is no header: it comes when what it could say is decided
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            raise MalformedHead("CONNECT is for proxies")
        require_host(self.headers, self.parser.get_http_version())
        self._framing.begin_body(self.headers)
        self.scope["state"][BEGAN] = self._began
        super().on_headers_complete()
        if self._is_spare and len(self.connections) <= self.limits.connections:  # others have left since
            self._is_spare = False
            self.spare.leave(self)
        if self.service.draining or self._is_spare:
            self.cycle.keep_alive = False
        if self._is_spare:
            cast("dict[str, object]", self.scope)[SPARE] = self._full  # a key of ours

    def on_message_complete(self) -> None:
        self._arriving = False
        self._timer.cancel()
        self._framing.end_request()
        super().on_message_complete()
        if self.cycle.response_complete:
            self._next()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Let the client go when it takes nothing of what is written for as long as a request may take to arrive. Until
        all of that is taken, not even closing ends a connection."""
        if self._watching is None and self.transport.get_write_buffer_size():
            self._watching = self.loop.call_later(self.limits.read_timeout, self._look_at_reader, self._unsent())

    def _look_at_reader(self, before: tuple[int, int]) -> None:
        self._watching = None
        if before == self._unsent():
            self.transport.abort()
        else:
            self._watch_reader()

    def _unsent(self) -> tuple[int, int]:
        """Bytes that the kernel has not taken, and bytes that the client's has not."""
        return self.transport.get_write_buffer_size(), _queued(self.transport, termios.TIOCOUTQ)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()
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
        """Make room on a full server."""
        self._refuse(503, self._full)

    @property
    def _full(self) -> str:
        return f"{self.limits.connections} connections are open already; try again later"

    def _leave(self) -> None:
        """Close, unless a request is arriving; one may have arrived that the loop has not read yet."""
        if self._arriving or (not self.transport.is_closing() and _queued(self.transport, termios.FIONREAD)):
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
        self._watch_reader()
        self._timer = self.loop.call_later(_LINGER, self.transport.close)


def protocol_class(service: Service, limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits; counts the connections in the service's metrics."""
    import httptools
    from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    attributes = {
        "service": service,
        "limits": limits,
        "spare": SpareConnections(),
        "flow_class": type("Flow", (_Flow, FlowControl), {}),
        "parser_error": httptools.HttpParserError,
        "high_water": HIGH_WATER_LIMIT,
    }
    return type("Guarded", (_Guarded, HttpToolsProtocol), attributes)


def require_host(headers: Sequence[tuple[bytes, bytes]], version: str) -> None:
    """Raise `MalformedHead` unless a request of HTTP/1.1 or 1.0 names its host as RFC 9112 (3.2) has it: once, in
    HTTP/1.0 at most once, and with no character that a host and a port do not have. Names of `headers` are in lower
    case."""
    if version not in ("1.0", "1.1"):
        raise MalformedHead("this server speaks HTTP/1.1")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version != "1.0"):
        raise MalformedHead(f"a request of HTTP/{version} has one Host header, and this one has {len(hosts) or 'none'}")
    if hosts and not _HOST.fullmatch(hosts[0].strip()):
        raise MalformedHead("the Host header is no host")


def _refusal(status: int, message: str) -> bytes:
    """A whole answer that ends the connection. Only where it is the server that is full, trying again may help."""
    words = {400: "Bad Request", 408: "Request Timeout", 431: "Headers Too Large", 503: "Service Unavailable"}
    body = json.dumps({"error": message}).encode("ascii")
    again = "retry-after: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {words[status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n{again}\r\n"
    )
    return head.encode("ascii") + body


def _queued(transport: asyncio.Transport, which: int) -> int:
    """Bytes that the kernel holds for a connection: that have arrived (FIONREAD), or that the client has not taken
    (TIOCOUTQ)."""
    waiting = fcntl.ioctl(transport.get_extra_info("socket").fileno(), which, bytes(4))
    return int.from_bytes(waiting, sys.byteorder)
