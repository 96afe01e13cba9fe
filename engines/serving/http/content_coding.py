"""Compressed request bodies: inflated within the limit for plain ones, so that a small body cannot become a large one.

Both forms of ``deflate`` are taken: the zlib format that the standard means, and the bare stream that some clients
send.
"""

from __future__ import annotations

import zlib

from nxm_export.errors import RequestRefused

_GZIP, _ZLIB, _BARE = 31, 15, -15  # zlib's window bits, which choose the format
_MEMBERS = 64  # of a gzip body: each costs a copy of what follows it


def coding_of(header: str) -> str:
    """``""``, ``gzip`` or ``deflate`` by the value of Content-Encoding; raises `RequestRefused` (415) for others."""
    codings = [coding.strip().lower().removeprefix("x-") for coding in header.split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")]
    if len(codings) > 1 or not {"gzip", "deflate"}.issuperset(codings):
        raise RequestRefused(415, f"bodies are taken plain, as gzip or as deflate, not as {header!r:.80}")
    return codings[0] if codings else ""


def inflated(body: bytes, coding: str, limit: int) -> bytes:
    """The body of a request of this `coding` (see `coding_of`); raises `RequestRefused`: 400 when it is damaged, 413
    when it holds more than `limit` bytes."""
    if coding == "gzip":
        return _inflated(body, _GZIP, limit)
    if coding == "deflate":
        is_zlib = len(body) > 1 and body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
        return _inflated(body, _ZLIB if is_zlib else _BARE, limit)
    return body


def _inflated(body: bytes, form: int, limit: int) -> bytes:
    parts, size, members = list[bytes](), 0, 0
    while body or not members:
        stream = zlib.decompressobj(form)
        try:
            parts.append(stream.decompress(body, limit + 1 - size))  # 0 would mean no limit, and is not reached
        except zlib.error as error:
            raise RequestRefused(400, f"the body cannot be inflated ({error})") from None
        size += len(parts[-1])
        if size > limit:
            raise RequestRefused(413, f"the body holds more than {limit} bytes")
        if not stream.eof:
            raise RequestRefused(400, "the body cannot be inflated (it ends early)")
        members += 1
        body = stream.unused_data
        if body and (form != _GZIP or members == _MEMBERS):
            raise RequestRefused(400, "the body cannot be inflated (something follows its end)")
    return b"".join(parts)
