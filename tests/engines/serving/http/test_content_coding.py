"""Compressed bodies are what they were before, or are refused; none becomes larger than the limit."""

from __future__ import annotations

import contextlib
import gzip
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.http.content_coding import coding_of, inflated
from nxm_export.errors import RequestRefused

LIMIT = 1000
ABC = gzip.compress(b"abc", mtime=0)


def bare(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


@given(st.binary(max_size=LIMIT))
def test_a_body_comes_back_from_every_form(body: bytes) -> None:
    for coding, compressed in (
        ("", body),
        ("gzip", gzip.compress(body)),
        ("gzip", gzip.compress(body[:7]) + gzip.compress(body[7:])),
        ("deflate", zlib.compress(body)),
        ("deflate", bare(body)),
    ):
        assert inflated(compressed, coding, LIMIT) == body


@given(st.integers(0, 2 * LIMIT), st.integers(0, 2 * LIMIT))
def test_the_limit_is_that_of_the_plain_body(size: int, second: int) -> None:
    for coding, compressed, total in (
        ("gzip", gzip.compress(bytes(size)), size),
        ("deflate", zlib.compress(bytes(size)), size),
        ("gzip", gzip.compress(bytes(size)) + gzip.compress(bytes(second)), size + second),
    ):
        if total <= LIMIT:
            assert inflated(compressed, coding, LIMIT) == bytes(total)
        else:
            with pytest.raises(RequestRefused, match="more than 1000 bytes") as refused:
                inflated(compressed, coding, LIMIT)
            assert refused.value.status == 413


def test_a_bomb_is_refused_in_no_time_and_space() -> None:
    bomb = zlib.compress(bytes(100 << 20))
    members = gzip.compress(b"") * 200_000
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(RequestRefused, match="more than"):
        inflated(bomb, "deflate", 1 << 20)
    with pytest.raises(RequestRefused, match="something follows"):
        inflated(members, "gzip", 1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert time.process_time() - began < 5


@given(st.binary(max_size=100), st.sampled_from(["gzip", "deflate"]))
def test_no_bytes_whatever_do_more_than_being_refused(body: bytes, coding: str) -> None:
    with contextlib.suppress(RequestRefused):
        assert len(inflated(body, coding, LIMIT)) <= LIMIT


@pytest.mark.parametrize("damage", [b"", b"x", ABC[:-1], ABC + b"x"], ids=["nothing", "junk", "cut", "longer"])
def test_what_is_not_whole_is_refused(damage: bytes) -> None:
    with pytest.raises(RequestRefused, match="cannot be inflated"):
        inflated(damage, "gzip", LIMIT)
    with pytest.raises(RequestRefused, match="cannot be inflated"):
        inflated(zlib.compress(b"abc") + b"x", "deflate", LIMIT)


def test_the_header_names_one_coding() -> None:
    for header, coding in (
        ("", ""), ("identity", ""), ("GZIP", "gzip"), ("x-gzip", "gzip"), ("deflate", "deflate"),
        ("identity, gzip", "gzip"), (" gzip ,", "gzip"),
    ):  # fmt: skip
        assert coding_of(header) == coding
    for header in ("br", "zstd", "gzip, gzip", "deflate,gzip", "gzip;q=1", "\x1b[31m"):
        with pytest.raises(RequestRefused, match="not as") as refused:
            coding_of(header)
        assert refused.value.status == 415
        assert str(refused.value).isprintable()
