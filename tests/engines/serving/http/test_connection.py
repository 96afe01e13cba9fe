"""What a connection refuses before any route sees it, and what it says then."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.http.connection import require_host
from engines.serving.http.framing import MalformedHead
from nxm_export.storage.json_files import as_object, entry_at
from tests.support.serving_calls import eventually
from tools.benchmarks.servers import Running, nxm_serve
from tools.raw_http import Answer, connect, read, request, send


def answer_to(server: Running, *lines: str) -> Answer:
    with connect(server.port) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        return read(connection)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("GET /v2 HTTP/1.1", "Host: 127.0.0.1:8000"), 200),
        (("GET /v2 HTTP/1.1", "hOST:[::1]:80 "), 200),
        (("GET /v2 HTTP/1.1", "Host:"), 200),  # what a client sends whose target has no authority
        (("GET /v2 HTTP/1.1", "Host: a_film.default.svc"), 200),
        (("GET /v2 HTTP/1.0",), 200),
        (("GET /v2 HTTP/1.1",), 400),
        (("GET /v2 HTTP/1.1", "X-Host: a"), 400),
        (("GET /v2 HTTP/1.1", "Host: a", "Host: a"), 400),
        (("GET /v2 HTTP/1.0", "Host: a", "Host: b"), 400),
        (("GET /v2 HTTP/1.1", "Host: a b"), 400),
        (("GET /v2 HTTP/1.1", "Host: a/b"), 400),
        (("GET /v2 HTTP/1.1", "Host: me@a"), 400),
        (("GET /v2 HTTP/1.1", "Host: \x9b31m"), 400),
        (("GET /v2 HTTP/1.1", "Host: a,b"), 200),  # a comma may stand in a name
    ],
)
def test_a_request_names_its_host_once(ours: Running, lines: tuple[str, ...], status: int) -> None:
    answer = answer_to(ours, *lines)
    assert answer.status == status
    if status == 400:
        assert re.search(r"Host header", str(entry_at(answer.json(), "error")))
        assert answer.headers["connection"] == "close"


@given(st.lists(st.binary(max_size=20), max_size=3), st.sampled_from(["1.0", "1.1"]))
def test_a_host_is_one_and_has_nothing_that_hosts_do_not_have(values: list[bytes], version: str) -> None:
    """RFC 9112, 3.2, with the characters of RFC 3986, 3.2.2 and 3.2.3 as they stand there."""
    allowed = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=%:[]")
    taken = len(values) == 1 and set(values[0].strip()) <= allowed
    headers = [(b"x", b"y"), *((b"host", value) for value in values)]
    if taken or (not values and version == "1.0"):
        require_host(headers, version)
    else:
        with pytest.raises(MalformedHead):
            require_host(headers, version)


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        (("nonsense",), 400, "not HTTP/1.1"),
        (("GET /v2 HTTP/1.1", "Host: a", "Content-Length: x"), 400, "not HTTP/1.1"),
        (("GET /v2 HTTP/2.0", "Host: a"), 400, "speaks HTTP/1.1"),
        (("GET /v2 HTTP/0.9", "Host: a"), 400, "speaks HTTP/1.1"),
        (("CONNECT a:80 HTTP/1.1", "Host: a"), 400, "CONNECT is for proxies"),
        (("POST /v2 HTTP/1.1", "Host: a", "Transfer-Encoding: gzip, chunked"), 400, "no other Transfer-Encoding"),
        (("GET /v2 HTTP/1.1", "Host: a", "X: " + "a" * 40_000), 431, "larger than 32768 bytes"),
    ],
)
def test_a_refusal_says_why_and_asks_nobody_to_try_again(
    ours: Running, lines: tuple[str, ...], status: int, says: str
) -> None:
    answer = answer_to(ours, *lines)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert set(as_object(answer.json())) == {"error"}
    assert says in str(entry_at(answer.json(), "error"))
    assert "retry-after" not in answer.headers


DOCUMENT = request("GET", "/openapi.json")


def connected_with_little_room(port: int) -> socket.socket:
    """A client whose kernel takes some kilobytes ahead of it, and no more."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.settimeout(20)
    return client


def test_who_never_reads_the_answers_is_let_go_and_holds_up_no_stop(engine: Path, tmp_path: Path) -> None:
    """They held their connections for ever, all of a server's, and the stop for as long as it may take."""
    options = ("--max-connections", "3", "--read-timeout-ms", "300")
    with nxm_serve(tmp_path / "log", f"exact={engine}", *options) as server, ExitStack() as stack:

        def hold() -> None:
            client = stack.enter_context(connected_with_little_room(server.port))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.sendall(DOCUMENT * 400)

        def served() -> bool:
            return send(server.port, "POST", "/v2/models/exact/infer", b"{}").status == 400

        for _ in range(3):
            hold()
        assert not served()
        assert eventually(served)
        hold()
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10  # of 30


@pytest.mark.slow
def test_who_reads_slowly_gets_every_byte(engine: Path, tmp_path: Path) -> None:
    count = 20
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--read-timeout-ms", "300") as server:
        whole = len(send(server.port, "GET", "/openapi.json").body)
        with connected_with_little_room(server.port) as client:
            client.sendall(DOCUMENT * count)
            began, read_, body = time.monotonic(), 0, b""
            while body.count(b"HTTP/1.1 200 OK") < count or read_ < count * whole:
                part = client.recv(40_000)
                assert part, f"cut off after {read_} of more than {count * whole} bytes"
                read_, body = read_ + len(part), body + part
                time.sleep(0.02)
            assert time.monotonic() - began > 0.6  # twice what is waited for a client that does not read
