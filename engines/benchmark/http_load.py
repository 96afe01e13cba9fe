"""Load on inference servers: how many requests a second, how fast, how many errors, at a given number of clients.

Every client is a thread with one connection that sends the next request when it has the answer (a closed loop).
Requests are made before the clock starts, and the answer's head is all that is parsed, so little of the machine goes to
the clients. Several servers are measured in one go, in rounds whose order rotates: on a noisy machine, only that
compares them. Any server of the Open Inference Protocol will do: ours, Triton, KServe.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from nxm_export.contract.io_spec import IOSpec
from nxm_export.data.examples import Features, pad
from nxm_export.errors import DataError, ServeError

SCHEMA = "nxm-load/1"
TIMEOUT = 60.0  # seconds without a byte before a client gives its request up
ENCODINGS = ("binary", "json")


@dataclass(frozen=True)
class Target:
    """A server's model and the requests to send it: whole HTTP messages, used in turn."""

    name: str
    host: str
    port: int
    requests: Sequence[bytes]


@dataclass(frozen=True)
class LoadResult:
    """One server at one number of clients: medians over the rounds. Latencies are in milliseconds, of answered
    requests."""

    name: str
    clients: int
    throughput: float
    throughput_range: tuple[float, float]
    p50: float
    p99: float
    p99_range: tuple[float, float]
    answered: int
    errors: Mapping[str, int]
    rounds: int


@dataclass(frozen=True)
class LoadReport:
    """All results of a run."""

    results: list[LoadResult]

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {"schema": SCHEMA, **asdict(self)}

    def find(self, name: str, clients: int) -> LoadResult:
        """The result of a server at a number of clients."""
        return next(r for r in self.results if (r.name, r.clients) == (name, clients))


def token_target(
    name: str,
    url: str,
    model: str,
    features: Sequence[Features],
    spec: IOSpec,
    *,
    multiple: int = 1,
    encoding: str = "binary",
) -> Target:
    """Requests of one sample each, as tokens; lengths are padded up to a multiple of `multiple`."""
    if encoding not in ENCODINGS:
        raise ServeError(f"unknown encoding {encoding!r}; choose one of {', '.join(ENCODINGS)}")
    messages = []
    for sample in features:
        length = -(-len(sample["input_ids"]) // multiple) * multiple
        tensors = pad([sample], spec.pad_id, min(length, spec.max_length))
        messages.append(_tensors(tensors, binary=encoding == "binary"))
    return _target(name, url, model, messages)


def text_target(name: str, url: str, model: str, texts: Sequence[str | tuple[str, str]]) -> Target:
    """Requests of one text or one pair of texts each, as JSON, for a model that tokenizes by itself."""
    messages: list[tuple[dict[str, str], bytes]] = []
    for text in texts:
        parts = (text,) if isinstance(text, str) else text
        inputs = [
            {"name": part_name, "datatype": "BYTES", "shape": [1, 1], "data": [part]}
            for part_name, part in zip(("text", "text_pair"), parts, strict=False)
        ]
        messages.append(({}, json.dumps({"inputs": inputs}).encode()))
    return _target(name, url, model, messages)


def measure(
    targets: Sequence[Target], clients: Sequence[int], *, seconds: float, rounds: int = 3, warm_up: float = 1.0
) -> LoadReport:
    """Load every target for `seconds` a round at every number of clients; raises `ServeError` when one does not
    answer."""
    if not targets or not clients or rounds < 1:
        raise ServeError("a load test needs at least one server, one number of clients and one round")
    for target in targets:
        _probe(target)
    taken: dict[tuple[str, int], list[_Round]] = {(t.name, c): [] for t in targets for c in clients}
    for number in range(rounds):
        for count in clients:
            start = number % len(targets)
            for target in [*targets[start:], *targets[:start]]:
                run_round(target, count, warm_up)
                taken[target.name, count].append(run_round(target, count, seconds))
    return LoadReport([_summary(name, count, found) for (name, count), found in taken.items()])


@dataclass(frozen=True)
class _Round:
    latencies: np.ndarray
    errors: Counter[str]
    seconds: float


def run_round(target: Target, clients: int, seconds: float) -> _Round:
    """One closed loop of `clients` for `seconds`."""
    lists: list[list[float]] = [[] for _ in range(clients)]
    errors: list[Counter[str]] = [Counter() for _ in range(clients)]
    stop = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=_client, args=(target, i, clients, stop, lists[i], errors[i])) for i in range(clients)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - began
    return _Round(np.array([t for found in lists for t in found]), sum(errors, Counter()), passed)


def exchange(connection: socket.socket, message: bytes) -> tuple[int, bytes, bool]:
    """Send one HTTP request and read its answer: (status, body, whether the connection stays open).

    Raises `OSError` when the connection breaks. Only answers with a Content-Length are understood, which is what
    inference servers give.
    """
    connection.sendall(message)
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += _more(connection)
    head = data[:end].lower()
    fields = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    length = int(fields.get(b"content-length", b"0"))
    body = [data[end + 4 :]]
    missing = length - len(body[0])
    while missing > 0:
        body.append(_more(connection))
        missing -= len(body[-1])
    return int(head.split(b" ", 2)[1]), b"".join(body), fields.get(b"connection", b"").strip() != b"close"


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise ConnectionResetError("the server closed the connection before its answer was complete")
    return data


def _client(target: Target, index: int, step: int, stop: float, latencies: list[float], errors: Counter[str]) -> None:
    connection: socket.socket | None = None
    position = index
    while (began := time.perf_counter()) < stop:
        try:
            if connection is None:
                connection = socket.create_connection((target.host, target.port), TIMEOUT)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            status, _, open_ = exchange(connection, target.requests[position % len(target.requests)])
        except OSError as error:
            errors[type(error).__name__] += 1
            open_ = False
            time.sleep(0.01)  # a server that is gone must not be hammered
        else:
            if status == 200:
                latencies.append(time.perf_counter() - began)
            else:
                errors[f"HTTP {status}"] += 1
        position += step
        if connection is not None and not open_:
            connection.close()
            connection = None
    if connection is not None:
        connection.close()


def _probe(target: Target) -> None:
    try:
        with socket.create_connection((target.host, target.port), TIMEOUT) as connection:
            status, body, _ = exchange(connection, target.requests[0])
    except OSError as error:
        raise ServeError(
            f"{target.name}: no answer from {target.host}:{target.port} ({error}); is it running?"
        ) from error
    if status != 200:
        raise ServeError(f"{target.name}: the first request got status {status}: {body[:300].decode(errors='replace')}")


def _summary(name: str, clients: int, rounds: Sequence[_Round]) -> LoadResult:
    speeds = [len(r.latencies) / r.seconds for r in rounds]
    p50, p99 = ([float(np.percentile(r.latencies, q)) * 1e3 for r in rounds if len(r.latencies)] for q in (50, 99))
    return LoadResult(
        name=name,
        clients=clients,
        throughput=float(np.median(speeds)),
        throughput_range=(min(speeds), max(speeds)),
        p50=float(np.median(p50)),
        p99=float(np.median(p99)),
        p99_range=(min(p99, default=float("nan")), max(p99, default=float("nan"))),
        answered=sum(len(r.latencies) for r in rounds),
        errors=dict(sum((r.errors for r in rounds), Counter())),
        rounds=len(rounds),
    )


def _tensors(tensors: Mapping[str, np.ndarray], *, binary: bool) -> tuple[dict[str, str], bytes]:
    """Headers and body of a request with int64 tensors."""
    inputs: list[dict[str, Any]] = []
    blobs = []
    for name, array in tensors.items():
        entry: dict[str, Any] = {"name": name, "datatype": "INT64", "shape": list(array.shape)}
        if binary:
            blobs.append(array.astype("<i8").tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        inputs.append(entry)
    request: dict[str, Any] = {"inputs": inputs}
    if not binary:
        return {}, json.dumps(request).encode()
    head = json.dumps({**request, "parameters": {"binary_data_output": True}}).encode()
    return {"Inference-Header-Content-Length": str(len(head))}, head + b"".join(blobs)


def _target(name: str, url: str, model: str, messages: Sequence[tuple[dict[str, str], bytes]]) -> Target:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ServeError(f"{url!r} is not a server's address; write it as http://127.0.0.1:8000")
    if not messages:
        raise DataError("no samples to send")
    port = parts.port or 80
    requests = []
    for headers, body in messages:
        kind = "application/octet-stream" if headers else "application/json"
        lines = [f"POST /v2/models/{model}/infer HTTP/1.1", f"Host: {parts.hostname}:{port}", f"Content-Type: {kind}"]
        lines += [f"{key}: {value}" for key, value in headers.items()] + [f"Content-Length: {len(body)}", "", ""]
        requests.append("\r\n".join(lines).encode("ascii") + body)
    return Target(name, parts.hostname, port, requests)
