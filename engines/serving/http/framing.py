"""Cuts the bytes of a connection into requests, before any parser sees them.

A parser that is fed whatever the network delivered runs ahead: into the next request while this one is not answered,
past an ``Upgrade`` that nobody takes up, past a limit that depends on where the bytes were split. So it is fed in
pieces instead: whole lines of a head, then the body, and nothing beyond the end of a request until that is answered.
What a piece means is the parser's decision alone; here only its length is.

``Upgrade`` lines are left out. A server may ignore them (RFC 9110, 7.8), and the parser would take everything behind
the head of such a request for another protocol: also the body that Java's client and ``curl --http2`` send with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_METHODS_BEGIN = b"\r\nABCDEFGHIJKLMNOPQRSTUVWXYZ"  # with the blank lines that may stand before a request
_UPGRADE = re.compile(rb"upgrade[ \t]*:", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"0*([0-9a-fA-F]{1,16})")


class OversizedHead(Exception):
    """The request line and headers of a request are larger than the limit; or what frames a chunked body is."""


class MalformedHead(ValueError):
    """A head that no parser complains of, and that this server does not take. The message repeats nothing of it."""


class Framing:
    """The bytes of one connection. `add` them; `take` gives the next piece for the parser, None when there is none yet.

    Tell it what the parser has learned: `begin_body` at the end of a head, `end_request` when a request is whole, and
    `release` when that is answered, which lets the next one through. `limit` is in bytes of a head.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._take = self._head
        self._lines = 0  # bytes of the lines of this head, or of these trailers
        self._left = 0  # bytes of the body, or of the chunk with its line end

    @property
    def waiting(self) -> int:
        """Bytes that have arrived and were not taken."""
        return len(self._buffer)

    @property
    def held(self) -> bool:
        """True between the end of a request and its answer."""
        return self._take == self._nothing

    @property
    def in_head(self) -> bool:
        """True while a head is expected or arriving."""
        return self._take == self._head

    def add(self, data: bytes) -> None:
        """What arrived."""
        self._buffer += data

    def clear(self) -> None:
        """Forget what has arrived."""
        self._buffer.clear()

    def take(self) -> bytes | None:
        """The next piece; raises `OversizedHead`."""
        return self._take()

    def begin_body(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The head has ended; `headers`, with names in lower case, say how long the body is.

        Raises `MalformedHead` for a body in another form than its length or its chunks give it.
        """
        codings = [value for name, value in headers if name == b"transfer-encoding"]
        lengths = [value for name, value in headers if name == b"content-length"]
        if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
            raise MalformedHead("this server knows no other Transfer-Encoding than chunked")
        self._lines = 0
        self._left = int(lengths[0]) if lengths else 0
        self._take = self._chunk_size if codings else self._body

    def end_request(self) -> None:
        """Nothing more is taken before `release`."""
        self._take = self._nothing

    def release(self) -> None:
        """Go on to the next request."""
        self._lines = 0
        self._take = self._head

    def _nothing(self) -> bytes | None:
        return None

    def _head(self) -> bytes | None:
        if self._buffer and not self._lines and self._buffer[0] not in _METHODS_BEGIN:
            return self._cut(len(self._buffer))  # no line may ever come: let the parser say what this is not
        line = self._line()
        while line and _UPGRADE.match(line):
            line = self._line()
        return line

    def _body(self) -> bytes | None:
        piece = self._cut(self._left)
        self._left -= len(piece)
        return piece or None

    def _chunk_size(self) -> bytes | None:
        self._lines = 0
        line = self._line()
        if line:
            digits = _CHUNK_SIZE.match(line)
            size = int(digits[1], 16) if digits else 0  # a line without is for the parser to refuse
            self._left = size + len(b"\r\n")
            self._take = self._chunk if size else self._line
        return line

    def _chunk(self) -> bytes | None:
        piece = self._body()
        if not self._left:
            self._take = self._chunk_size
        return piece

    def _line(self) -> bytes | None:
        """A whole line, None while it is none; of a head and of trailers all lines count to the limit."""
        end = self._buffer.find(b"\n") + 1
        if self._lines + (end or len(self._buffer)) > self._limit:
            raise OversizedHead
        self._lines += end
        return self._cut(end) if end else None

    def _cut(self, size: int) -> bytes:
        piece = bytes(self._buffer[:size])
        del self._buffer[:size]
        return piece
