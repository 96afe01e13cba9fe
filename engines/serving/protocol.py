"""The Open Inference Protocol v2 with its binary tensor extension: a request's bytes to arrays, arrays to an answer.

Functions on bytes and arrays; nothing here knows of queues or sockets. A body is JSON, or JSON followed by the tensors'
raw bytes (little-endian, row-major; BYTES elements each behind a four-byte length), where the header
``Inference-Header-Content-Length`` says how long the JSON is. Whatever a client may get wrong is a `RequestRefused`
with an HTTP status, found before anything of a declared size is allocated. A member that is null counts as left out:
clients that write all members of their classes, such as KServe's, send many of these.

Specification: KServe "Open Inference Protocol", and Triton's extensions for binary tensors and classification.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np

from nxm_export.errors import RequestRefused
from nxm_export.storage.json_files import parse_json as parse_text

T = TypeVar("T")

HEADER_LENGTH = "inference-header-content-length"
SIZES = {"INT64": 8, "FP32": 4}  # bytes an element; BYTES elements vary
_DTYPES: dict[str, np.dtype[np.generic]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}
_JSON_TYPES: dict[str, set[type]] = {"INT64": {int}, "FP32": {int, float}, "BYTES": {str}}
_MAX_DIMENSION = 2**31 - 1
_NOTHING: dict[str, object] = {}
_malformed = partial(RequestRefused, 400)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model: datatype in the protocol's words, and a shape where -1 is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def to_dict(self) -> dict[str, object]:
        """The form of the model metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


class RequestedOutput(NamedTuple):
    """An output that a request wants: as binary data or JSON, and, above 0, only its `classes` largest values."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A parsed request. `tensors` are arrays of the declared shapes (object arrays of `bytes` for BYTES), texts of
    shape (rows, 1) also where the request says [rows]; `outputs` are in the order of the answer; `timeout` is in
    seconds."""

    id: str | None
    tensors: Mapping[str, np.ndarray]
    outputs: Sequence[RequestedOutput]
    timeout: float | None


def _any_shape(shape: tuple[int, ...]) -> None:
    """What a model without limits says."""


def parse_infer(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    require_fits: Callable[[tuple[int, ...]], None] = _any_shape,
) -> InferRequest:
    """The request in `body`, which must fit the model's `inputs` and `outputs`; raises `RequestRefused` (400).

    `require_fits` refuses a shape that is larger than what the model takes. It is asked before there is any work for
    the tensor of that shape.
    """
    head, raw = split_body(body, header_length)
    request = parse_json(head)
    if type(request) is not dict:
        raise RequestRefused(400, "the request must be a JSON object")
    parameters = _member(request, "parameters", dict, _NOTHING)
    expected = {spec.name: spec for spec in inputs}
    tensors: dict[str, np.ndarray] = {}
    for entry in _member(request, "inputs", list):
        if type(entry) is not dict:
            raise RequestRefused(400, "every input must be a JSON object")
        name = _member(entry, "name", str)
        if name not in expected:
            raise RequestRefused(400, f"unexpected input {name!r:.80}; the model takes {', '.join(expected)}")
        if name in tensors:
            raise RequestRefused(400, f"input {name!r} is given twice")
        tensors[name], raw = _tensor(entry, expected[name], raw, require_fits)
    missing = [name for name, spec in expected.items() if name not in tensors and not spec.optional]
    if missing:
        raise RequestRefused(400, f"missing input {', '.join(missing)}; the model takes {', '.join(expected)}")
    if raw:
        raise RequestRefused(400, f"{len(raw)} bytes follow the last binary tensor")
    return InferRequest(
        None if request.get("id") is None else _member(request, "id", str),
        tensors,
        _requested_outputs(request, parameters, outputs),
        _timeout(parameters),
    )


def render_infer(
    model: str, version: str, request: InferRequest, results: Mapping[str, tuple[str, np.ndarray]]
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an answer; `results` are (datatype, array) by output name, object arrays of `str` for
    BYTES."""
    described, blobs = [], []
    for name, binary, classes in request.outputs:
        datatype, array = results[name]
        if classes:
            datatype, array = "BYTES", _largest(array, classes)
        entry: dict[str, object] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            blob = _pack(array) if datatype == "BYTES" else array.astype(_DTYPES[datatype], copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    answer: dict[str, object] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer, separators=(",", ":")).encode("ascii")
    if not blobs:
        return [(b"content-type", b"application/json")], head
    headers = [
        (b"content-type", b"application/octet-stream"),
        (HEADER_LENGTH.encode("ascii"), str(len(head)).encode("ascii")),
    ]
    return headers, b"".join((head, *blobs))


def parse_json(body: bytes | memoryview) -> object:
    """Strict JSON: UTF-8, no NaN or infinity, no duplicate keys, no absurd nesting; raises `RequestRefused` (400)."""
    try:
        text = str(body, "utf-8")
    except UnicodeDecodeError as error:
        raise RequestRefused(400, f"the body is not JSON: it is not UTF-8 (byte {error.start})") from None
    return parse_text(text, "the body", "send JSON (RFC 8259)", _malformed)


def split_body(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    """The JSON of a body, and the binary tensors behind it; raises `RequestRefused` (400)."""
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    _check(
        header_length.isascii() and header_length.isdecimal() and len(header_length) < 12,
        f"Inference-Header-Content-Length must be a whole number of bytes, got {header_length!r:.40}",
    )
    length = int(header_length)
    _check(length <= len(view), f"Inference-Header-Content-Length is {length}, and the body has only {len(view)} bytes")
    return view[:length], view[length:]


def _member(where: Mapping[str, object], key: str, kind: type[T], default: T | None = None) -> T:
    """A member of a JSON object, of the type `kind`; null is as if it were not there, and without a `default` it must
    be."""
    value = where.get(key)
    value = default if value is None else value
    if type(value) is kind:
        return value
    words: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    raise RequestRefused(400, f"{key!r} must be {words[kind]}")


def _tensor(
    entry: Mapping[str, object], spec: TensorSpec, raw: memoryview, require_fits: Callable[[tuple[int, ...]], None]
) -> tuple[np.ndarray, memoryview]:
    """The tensor of an input entry, and what is left of the binary part."""
    datatype = entry.get("datatype")
    if datatype != spec.datatype:
        raise RequestRefused(400, f"input {spec.name!r} has datatype {datatype!r:.40}; the model takes {spec.datatype}")
    shape = _shape(entry.get("shape"), spec)
    require_fits(shape)
    data = entry.get("data")
    parameters = _member(entry, "parameters", dict, _NOTHING)
    if parameters.get("shared_memory_region") is not None:
        raise RequestRefused(400, "shared memory is not offered; send the tensor")
    size = parameters.get("binary_data_size")
    if size is None:
        if data is None:
            raise RequestRefused(400, f"input {spec.name!r} has no data")
        return _from_json(data, spec, shape), raw
    if data is not None:
        raise RequestRefused(400, f"input {spec.name!r} has data and a binary_data_size; send one of them")
    if type(size) is not int or not 0 <= size <= len(raw):
        raise RequestRefused(400, f"binary_data_size of {spec.name!r} is not within the body's bytes")
    blob, rest = raw[:size], raw[size:]
    if spec.datatype == "BYTES":
        return _unpack(blob, spec, shape), rest
    needed = math.prod(shape) * SIZES[spec.datatype]
    if size != needed:
        raise RequestRefused(
            400, f"input {spec.name!r} of shape {shape!s:.80} takes {needed} bytes, binary_data_size is {size}"
        )
    return np.frombuffer(blob, _DTYPES[spec.datatype]).reshape(shape), rest


def _shape(shape: object, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of an input, as `spec` has it: texts may also be a list of them."""
    if spec.datatype == "BYTES" and spec.shape == (-1, 1) and type(shape) is list and len(shape) == 1:
        shape = [*shape, 1]
    if type(shape) is not list or len(shape) != len(spec.shape):
        takes = f"the model takes {list(spec.shape)}, where -1 is free"
        raise RequestRefused(400, f"input {spec.name!r} has shape {shape!s:.80}; {takes}")
    for size, expected in zip(shape, spec.shape, strict=True):
        if type(size) is not int or not 1 <= size <= _MAX_DIMENSION or expected not in (-1, size):
            takes = f"the model takes {list(spec.shape)}, where -1 is any whole number from 1"
            raise RequestRefused(400, f"input {spec.name!r} has shape {shape!s:.80}; {takes}")
    return tuple(shape)


def _from_json(data: object, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Nested or flat JSON data as an array; numbers must be of the datatype already, nothing is rounded."""
    if type(data) is not list:
        raise RequestRefused(400, f"the data of {spec.name!r} must be a list")
    if data and type(data[0]) is list:
        for depth in range(1, len(shape)):
            regular = len(data) == math.prod(shape[:depth]) and all(type(item) is list for item in data)
            if not regular or len(set(map(len, data))) != 1:
                raise RequestRefused(400, f"the data of {spec.name!r} is not nested as its shape {list(shape)} says")
            data = list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise RequestRefused(
            400, f"the data of {spec.name!r} has {len(data)} elements; its shape {list(shape)} says otherwise"
        )
    if not set(map(type, data)) <= _JSON_TYPES[spec.datatype]:
        raise RequestRefused(400, f"the data of {spec.name!r} is not {spec.datatype}")
    try:
        if spec.datatype == "BYTES":
            return _objects([item.encode("utf-8") for item in data], shape)
        return np.array(data, _DTYPES[spec.datatype]).reshape(shape)
    except UnicodeEncodeError:
        raise RequestRefused(400, f"a string of {spec.name!r} has half a surrogate pair") from None
    except OverflowError:
        raise RequestRefused(400, f"a number of {spec.name!r} does not fit {spec.datatype}") from None


def _unpack(blob: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """BYTES elements, each behind its length. Their number may be absurd, so it is compared with what there is
    first."""
    count = math.prod(shape)
    _check(
        count * 4 <= len(blob), f"input {spec.name!r} says {count} elements, and its {len(blob)} bytes cannot hold them"
    )
    items, start = [], 0
    for _ in range(count):
        _check(start + 4 <= len(blob), f"the bytes of {spec.name!r} end within an element")
        (length,) = struct.unpack_from("<I", blob, start)
        start += 4
        _check(start + length <= len(blob), f"the bytes of {spec.name!r} end within an element")
        items.append(bytes(blob[start : start + length]))
        start += length
    _check(start == len(blob), f"{len(blob) - start} bytes follow the last element of {spec.name!r}")
    return _objects(items, shape)


def _pack(array: np.ndarray) -> bytes:
    encoded = [str(item).encode("utf-8") for item in array.ravel()]
    return b"".join(struct.pack("<I", len(item)) + item for item in encoded)


def _objects(items: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def _requested_outputs(
    request: Mapping[str, object], parameters: Mapping[str, object], outputs: Sequence[TensorSpec]
) -> list[RequestedOutput]:
    """What is asked for, all outputs where none is named, in the order of the answer.

    That is Triton's, whatever the request's is: words before the engine's own outputs, and these as in the engine.
    """
    all_binary = _flag(parameters, "binary_data_output", default=False)
    known = {spec.name: spec for spec in sorted(outputs, key=lambda spec: spec.datatype != "BYTES")}
    asked = _member(request, "outputs", list, [])
    if not asked:
        return [RequestedOutput(name, all_binary) for name in known]
    requested: dict[str, RequestedOutput] = {}
    for entry in asked:
        if type(entry) is not dict:
            raise RequestRefused(400, "every requested output must be a JSON object")
        name = _member(entry, "name", str)
        _check(name in known, f"unexpected output {name!r:.80}; the model gives {', '.join(known)}")
        _check(name not in requested, f"output {name!r} is asked for twice")
        options = _member(entry, "parameters", dict, _NOTHING)
        _check(options.get("shared_memory_region") is None, "shared memory is not offered")
        classes = options.get("classification") or 0
        _check(type(classes) is int and classes >= 0, "'classification' must be a whole number of classes")
        _check(
            not classes or known[name].datatype != "BYTES",
            f"output {name!r} holds words, which have no 'classification'; ask for that of another output",
        )
        requested[name] = RequestedOutput(name, _flag(options, "binary_data", default=all_binary), classes)
    return [requested[name] for name in known if name in requested]


def _largest(array: np.ndarray, classes: int) -> np.ndarray:
    """The `classes` largest values of every row and where they stand, ``"value:index"`` in Triton's form: (rows, at
    most `classes`)."""
    flat = array.reshape(len(array), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :classes]
    return np.array([[f"{row[i]:f}:{i}" for i in best] for row, best in zip(flat, order, strict=True)], object)


def _flag(where: Mapping[str, object], key: str, *, default: bool) -> bool:
    value = where.get(key)
    _check(value is None or isinstance(value, bool), f"{key!r} must be true or false")
    return default if value is None else bool(value)


def _timeout(parameters: Mapping[str, object]) -> float | None:
    """Seconds, out of ``timeout`` in microseconds (Triton's schedule policy extension); 0 means none."""
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= 2**63:
        raise RequestRefused(400, "'timeout' must be a whole number of microseconds")
    return value / 1e6 if value else None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RequestRefused(400, message)
