"""Malformed requests to `nxm serve`: mutations of good ones, by a seeded generator, in every place and of every kind
that the protocol has. None of them is good: every mutation changes something that matters.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.exact_engine import MAX_LENGTH, VOCABULARY, feeds_of
from tests.support.serving_calls import INFER

TEXT = "/v2/models/exact_text/infer"
NAMES = ("input_ids", "attention_mask", "token_type_ids")
JUNK: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e300,
    2**63,
    -(2**63) - 1,
    10**400,
    "",
    "x",
    "\u0000",
    "../..",
    [],
    [[]],
    [None],
    {},
    {"a": []},
    [1] * 1000,
    ["1", "2"],
)
Request = tuple[str, str, bytes, tuple[str, ...]]  # what, path, body, headers


def good() -> dict[str, Any]:
    """The body of a request that is answered: two rows of four tokens."""
    tensors = feeds_of([4, 4])
    inputs = [{"name": n, "datatype": "INT64", "shape": [2, 4], "data": tensors[n].ravel().tolist()} for n in NAMES]
    return {"id": "h", "inputs": inputs, "outputs": [{"name": "logits", "parameters": {"binary_data": False}}]}


def good_text() -> dict[str, Any]:
    """The same with a text."""
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["good"]}]}


def binary(sizes: tuple[int, int, int] = (64, 64, 64)) -> tuple[dict[str, Any], bytes]:
    tensors = feeds_of([4, 4])
    inputs = [
        {"name": n, "datatype": "INT64", "shape": [2, 4], "parameters": {"binary_data_size": size}}
        for n, size in zip(NAMES, sizes, strict=True)
    ]
    return {"inputs": inputs}, b"".join(tensors[n].tobytes() for n in NAMES)


def framed(head: dict[str, Any], blob: bytes, length: int | str | None = None) -> tuple[bytes, tuple[str, ...]]:
    text = json.dumps(head).encode()
    return text + blob, (f"Inference-Header-Content-Length: {len(text) if length is None else length}",)


def junk_in_fields() -> Iterator[Request]:
    """Every member of an input replaced by every kind of junk, in every input in turn."""
    for number, (field, junk) in enumerate((f, j) for f in ("name", "datatype", "shape", "data") for j in JUNK):
        body = good()
        body["inputs"][number % 3][field] = junk
        yield f"{field} = {str(junk)[:20]}", INFER, json.dumps(body).encode(), ()
    for field in ("name", "datatype", "shape", "data"):
        body = good()
        del body["inputs"][1][field]
        yield f"no {field}", INFER, json.dumps(body).encode(), ()


def junk_in_structure() -> Iterator[Request]:
    for junk in JUNK:
        yield f"body = {str(junk)[:20]}", INFER, json.dumps(junk).encode(), ()
        yield f"inputs = {str(junk)[:20]}", INFER, json.dumps({**good(), "inputs": junk}).encode(), ()
        yield f"input = {str(junk)[:20]}", INFER, json.dumps({"inputs": [junk]}).encode(), ()
        if junk not in ([], None):
            yield f"outputs = {str(junk)[:20]}", INFER, json.dumps({**good(), "outputs": junk}).encode(), ()
        if not isinstance(junk, str) and junk is not None:
            yield f"id = {str(junk)[:20]}", INFER, json.dumps({**good(), "id": junk}).encode(), ()
    for junk in (3, [], "x"):
        yield f"parameters = {junk}", INFER, json.dumps({**good(), "parameters": junk}).encode(), ()
    for junk in (-1, 1.5, "5", True, [], 2**70):
        yield f"timeout = {junk}", INFER, json.dumps({**good(), "parameters": {"timeout": junk}}).encode(), ()


def wrong_values(rng: random.Random) -> Iterator[Request]:
    """Right shape, wrong numbers: each must be noticed before a runtime looks a table up with it."""
    bad = {
        "input_ids": [-1, len(VOCABULARY), 2**31, 2**62, -(2**63)],
        "attention_mask": [2, -1, 255],
        "token_type_ids": [2, -1, 2**40],
    }
    for name, values in bad.items():
        for value in values:
            body = good()
            body["inputs"][NAMES.index(name)]["data"][rng.randrange(8)] = value
            yield f"{name} holds {value}", INFER, json.dumps(body).encode(), ()


def wrong_shapes(rng: random.Random) -> Iterator[Request]:
    for shape in (
        [8],
        [2, 4, 1],
        [4, 2, 1, 1],
        [0, 8],
        [-1, 4],
        [2, -4],
        [2**31, 2**31],
        [2**62, 4],
        [1, 8],
        [8, 1],
        [2, 4.0],
        ["2", 4],
        [],
    ):
        body = good()
        body["inputs"][rng.randrange(3)]["shape"] = shape
        yield f"shape {shape}", INFER, json.dumps(body).encode(), ()
    for rows, length in ((33, 1), (1, MAX_LENGTH + 1), (1000, 10), (2, 10_000)):
        body = good()
        for entry in body["inputs"]:
            entry["shape"], entry["data"] = [rows, length], [1] * (rows * length)
        yield f"{rows} rows of {length}", INFER, json.dumps(body).encode(), ()


def wrong_bytes(rng: random.Random) -> Iterator[Request]:
    """The binary extension: sizes, header lengths, what follows."""
    for sizes in (
        (63, 64, 64),
        (65, 64, 64),
        (64, 64, 63),
        (64, 64, 65),
        (0, 64, 64),
        (64, 128, 64),
        (192, 0, 0),
        (2**40, 64, 64),
    ):
        yield f"sizes {sizes}", INFER, *framed(*binary(sizes))
    size: object
    for size in (-1, 1.5, "64", None, True, [], 10**30):
        head, blob = binary()
        head["inputs"][rng.randrange(3)]["parameters"]["binary_data_size"] = size
        yield f"size {size}", INFER, *framed(head, blob)
    head, blob = binary()
    text = json.dumps(head).encode()
    for length in (
        0,
        1,
        len(text) - 1,
        len(text) + 1,
        len(text) + len(blob) + 1,
        10**9,
        10**30,
        -1,
        "",
        "abc",
        "0x10",
        "1 2",
        "+5",
        "1.0",
    ):
        yield f"header length {length}", INFER, *framed(head, blob, length)
    for extra in (1, 7, 64):
        yield f"{extra} bytes too many", INFER, *framed(head, blob + bytes(extra))
        yield f"{extra} bytes too few", INFER, *framed(head, blob[:-extra])
    random_blob = np.random.default_rng(0).bytes(len(blob))
    yield "random token ids", INFER, *framed(head, random_blob)
    yield "floats as token ids", INFER, *framed(head, np.full(24, np.nan).tobytes())


def wrong_json(rng: random.Random) -> Iterator[Request]:
    text = json.dumps(good()).encode()
    for cut in sorted(rng.sample(range(1, len(text) - 1), 15)):
        yield f"cut at {cut}", INFER, text[:cut], ()
    for replaced in (
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"1e5",
        b"0x5",
        b"01",
        b"1_0",
        b"9" * 5000,
        b'"1"',
        b"'1'",
    ):
        at = text.index(b'"data": [') + 9
        yield f"number {replaced[:12]!r}", INFER, text[:at] + replaced + b", " + text[text.index(b",", at) + 2 :], ()
    for depth in (1_000, 100_000, 500_000):
        yield f"{depth} lists deep", INFER, b"[" * depth, ()
        yield f"{depth} objects deep", INFER, b'{"a":' * depth, ()
        yield f"data {depth} deep", INFER, text.replace(b'"data": [', b'"data": [' + b"[" * depth, 1), ()
    for key in (b'"inputs"', b'"id"', b'"outputs"'):
        yield f"{key!r} twice", INFER, text.replace(b"{", b"{" + key + b": [], ", 1), ()
    yield "name twice in an input", INFER, text.replace(b'"name": "input_ids"', b'"name": "x", "name": "input_ids"'), ()
    yield "input twice", INFER, json.dumps({**good(), "inputs": [*good()["inputs"], good()["inputs"][0]]}).encode(), ()
    yield "output twice", INFER, json.dumps({**good(), "outputs": [{"name": "logits"}] * 2}).encode(), ()
    for bad in (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x00"):
        yield f"bytes {bad!r} in a name", INFER, text.replace(b"input_ids", b"input" + bad, 1), ()
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        yield f"JSON in {encoding}", INFER, json.dumps(good()).encode(encoding), ()
    yield "XML", INFER, b"<?xml version='1.0'?><a/>", ()
    yield "a pickle", INFER, b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins.", ()
    yield "nothing", INFER, b"", ()
    yield "blanks", INFER, b" \n\t", ()


def wrong_texts() -> Iterator[Request]:
    for junk in JUNK:
        body = good_text()
        body["inputs"][0]["data"] = [junk]
        if not isinstance(junk, str):
            yield f"text = {str(junk)[:20]}", TEXT, json.dumps(body).encode(), ()
    raw = json.dumps(good_text()).encode()
    yield "half a surrogate pair", TEXT, raw.replace(b'"good"', b'"\\udc00"'), ()
    yield "a text that is too large", TEXT, raw.replace(b"good", b"a" * 10_000), ()
    head = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 8}}]}
    for blob in (
        b"\x05\0\0\0abcd",
        b"\xff\xff\xff\xffabcd",
        b"\x00\0\0\0abcd",
        b"\x04\0\0\0\xff\xfe\xfd\xfc",
        struct.pack("<I", 4) + b"\xed\xa0\x80a",
    ):
        yield f"text bytes {blob!r}", TEXT, *framed(head, blob)
    for count in (0, 2, 33, 2**31 - 1):
        wide = json.loads(json.dumps(head))
        wide["inputs"][0]["shape"] = [count, 1]
        yield f"{count} texts in 8 bytes", TEXT, *framed(wide, b"\x04\0\0\0abcd")
    body = good_text()
    body["inputs"].append({"name": "text_pair", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "b"]})
    yield "pairs without a partner", TEXT, json.dumps(body).encode(), ()
    body["inputs"] = body["inputs"][1:]
    yield "a pair alone", TEXT, json.dumps(body).encode(), ()


def wrong_models() -> Iterator[Request]:
    names = (
        "nobody",
        "EXACT",
        "exact%00",
        "exact%20",
        "..",
        "%2e%2e",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2fetc%2fpasswd",
        "exact%2f..%2fexact",
        "exact/../../etc/passwd",
        "....//",
        "exact;id",
        "$(id)",
        "%F0%9F%8E%AC",
        "a" * 8000,
        "exact/versions/..",
        "exact/versions/%2e%2e/1",
        "exact/versions/0",
        "exact/versions/01",
        "exact/versions/1e0",
        "exact/versions/-1",
        "exact/versions/" + "9" * 500,
        "C:%5cwindows",
        "%c0%ae%c0%ae",
    )
    for name in names:
        yield f"model {name[:30]}", f"/v2/models/{name}/infer", json.dumps(good()).encode(), ()


def requests() -> list[Request]:
    """All that are malformed."""
    rng = random.Random(0)
    makers: tuple[Callable[[], Iterator[Request]], ...] = (
        junk_in_fields, junk_in_structure, wrong_texts, wrong_models,
        lambda: wrong_values(rng), lambda: wrong_shapes(rng), lambda: wrong_bytes(rng), lambda: wrong_json(rng),
    )  # fmt: skip
    return [made for maker in makers for made in maker()]


def resident_bytes(process: int) -> int:
    """Resident memory of another process."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[1]) * 4096
