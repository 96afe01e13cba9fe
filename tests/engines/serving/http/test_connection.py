"""What a connection refuses before any route sees it, and what it says then."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.http.connection import require_host
from engines.serving.http.framing import MalformedHead
from nxm_export.storage.json_files import as_object, entry_at
from tools.benchmarks.servers import Running
from tools.raw_http import Answer, connect, read


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
