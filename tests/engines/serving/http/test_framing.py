"""Requests are cut out of a connection's bytes in the same way however the network split them."""

from __future__ import annotations

import itertools
import random

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.http.framing import Framing, OversizedHead

LIMIT = 400


class Requests:
    """What a server sees of a connection: a parser that is fed through `Framing`, and answers at once."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, list[tuple[bytes, bytes]], bytes]] = []
        self.error = ""
        self.framing = Framing(LIMIT)
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.framing.in_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert not self.parser.should_upgrade()
        self.framing.begin_body(self.headers)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.seen.append((self.url, self.headers, self.body))
        self.framing.end_request()

    def receive(self, data: bytes) -> None:
        """What arrived, and the answer to every request that is whole."""
        if self.error:
            return
        self.framing.add(data)
        try:
            while (piece := self.framing.take()) is not None or self.framing.held:
                if piece is None:
                    self.framing.release()
                else:
                    self.parser.feed_data(piece)
        except OversizedHead:
            self.error = "oversized"
        except httptools.HttpParserError:
            self.error = "malformed"


def received(data: bytes, cuts: list[int]) -> Requests:
    requests, edges = Requests(), sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    for start, end in itertools.pairwise(edges):
        requests.receive(data[start:end])
    return requests


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
bodies = st.binary(max_size=300) | st.sampled_from(
    [b"x" * (3 * LIMIT), b"GET /smuggled HTTP/1.1\r\n\r\n", b"0\r\n\r\n", b"\r\n" * 9]
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A request and its body: plain or in chunks, with or without an upgrade that nobody takes up."""
    body, extra = draw(bodies), draw(st.sampled_from([b"", H2C, b"UPGRADE:websocket\r\nconnection: upgrade\r\n"]))
    before, after = (extra, b"") if draw(st.booleans()) else (b"", extra)
    if draw(st.booleans()):
        sizes, chunked, rest = draw(st.lists(st.integers(1, 99), min_size=1)), b"", body
        while rest:
            size = sizes.pop() if sizes else len(rest)
            number = draw(st.sampled_from([b"%x", b"%X", b"%020x", b"%064X"])) % len(rest[:size])
            chunked += b"%s%s\r\n%s\r\n" % (number, b";a=b" * draw(st.integers(0, 1)), rest[:size])
            rest = rest[size:]
        framing, sent = (
            b"Transfer-Encoding: chunked",
            chunked
            + draw(st.sampled_from([b"0", b"0" * 40]))
            + b"\r\n"
            + draw(st.sampled_from([b"", b"X: y\r\n"]))
            + b"\r\n",
        )
    else:
        framing, sent = b"Content-Length: %d" % len(body), body
    return b"POST /a HTTP/1.1\r\nHost: a\r\n" + before + framing + b"\r\n" + after + b"\r\n" + sent, body


@given(st.lists(messages(), min_size=1, max_size=4), st.lists(st.integers(0, 5000), max_size=12))
def test_every_request_arrives_with_its_body_however_the_bytes_are_split(
    made: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    requests = received(b"".join(message for message, _ in made), cuts)
    assert requests.error == ""
    assert [body for _, _, body in requests.seen] == [body for _, body in made]
    assert all(b"upgrade" not in dict(headers) for _, headers, _ in requests.seen)


def test_the_bytes_of_javas_client_split_at_every_place() -> None:
    """What java.net.http.HttpClient sends by default, to speak HTTP/2 where the server likes: head, then body."""
    body = b'{"inputs": []}'
    message = (
        b"POST /v2/models/film_text/infer HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 14\r\n"
        b"Host: 127.0.0.1:8000\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
        b"User-Agent: Java-http-client/17.0.15\r\n\r\n" + body
    )
    for cut in range(len(message) + 1):
        requests = received(message * 2, [cut, len(message) + cut])
        assert [seen for _, _, seen in requests.seen] == [body, body], cut


@given(st.integers(LIMIT - 60, LIMIT + 60), st.lists(st.integers(0, 5000), max_size=8), st.booleans(), st.booleans())
def test_one_limit_of_a_head_holds_in_every_split(size: int, cuts: list[int], second: bool, spaces: bool) -> None:
    """A head of `size` bytes, the first on its connection or behind a request with a large body."""
    frame = b"GET / HTTP/1.1\r\nHost: a\r\nX:\r\n\r\n"
    filling = (b" " if spaces else b"x") * (size - len(frame))
    head = frame.replace(b"X:", b"X:" + filling)
    assert len(head) == size
    first = b"POST /a HTTP/1.1\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000 if second else b""
    requests = received(first + head, cuts)
    assert requests.error == ("oversized" if size > LIMIT else "")
    assert len(requests.seen) == second + (size <= LIMIT)


@pytest.mark.parametrize(
    "endless",
    [
        b"GET / HTTP/1.1\r\nX: " + b"a" * 9999,
        b"GET /" + b"a" * 9999,
        b"\r\n" * 9999,
        b"GET / HTTP/1.1\r\n" + b"Upgrade: h2c\r\n" * 999,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 9999,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 9999,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 999,
    ],
)
def test_what_never_ends_is_refused(endless: bytes) -> None:
    for cuts in ([], list(range(0, len(endless), 7))):
        assert received(endless, cuts).error == "oversized"


@pytest.mark.parametrize(
    "smuggling",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length : 5\r\n",
        b"X: a\r\n Transfer-Encoding: chunked\r\n",
        b"Upgrade: a\r\n b\r\n",
        b"Content-Length: 5\n",
    ],
)
def test_a_body_that_has_no_one_length_is_refused(smuggling: bytes) -> None:
    message = b"POST /a HTTP/1.1\r\nHost: a\r\n" + smuggling + b"\r\n0\r\n\r\nGET /b HTTP/1.1\r\n\r\n"
    for seed in range(5):
        cuts = random.Random(seed).sample(range(len(message)), seed * 3)
        requests = received(message, cuts)
        assert (requests.error, requests.seen) == ("malformed", []), cuts


@pytest.mark.parametrize(
    "size", [b"f" * 16, b"1" + b"0" * 16, b"0" * 20 + b"f" * 17, b"0x5", b"-1", b"", b" 5", b"5 5", b"g"]
)
def test_a_chunk_of_no_size_that_can_be_is_refused(size: bytes) -> None:
    message = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + b"x" * 9999
    for cuts in ([], list(range(0, len(message), 7))):
        requests = received(message, cuts)
        assert (requests.error, requests.seen) == ("" if size == b"f" * 16 else "malformed", [])


def test_a_trailer_is_no_header() -> None:
    trailer = b"Inference-Header-Content-Length: 1\r\n"
    message = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + trailer + b"\r\n"
    ((_, headers, body),) = received(message, []).seen
    assert (dict(headers), body) == ({b"transfer-encoding": b"chunked"}, b"x")


def test_nothing_of_the_next_request_is_taken_before_the_answer() -> None:
    requests = Requests()
    requests.framing.add(b"GET /a HTTP/1.1\r\n\r\nGARBAGE\r\n\r\n")
    while (piece := requests.framing.take()) is not None:
        requests.parser.feed_data(piece)
    assert ([url for url, _, _ in requests.seen], requests.framing.held) == ([b"/a"], True)
    assert requests.framing.waiting == len(b"GARBAGE\r\n\r\n")
    requests.framing.release()
    piece = requests.framing.take()
    assert piece == b"GARBAGE\r\n"
