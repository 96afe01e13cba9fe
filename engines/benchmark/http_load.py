"""Load on inference servers: how many requests a second, how fast, how many errors, at a given number of clients.

Every client is a thread with one connection that sends the next request when it has the answer (a closed loop). Bodies
are made before the clock starts. Several servers are measured in one go, in rounds whose order rotates: on a noisy
machine, only that compares them. Any server of the Open Inference Protocol will do: ours, Triton, KServe.

A request that fails is counted; a client that fails is an error of the whole run, and so is a server that answers
nothing: neither may look like a slow server.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from types import TracebackType
from urllib.parse import quote, urlsplit

import numpy as np

from engines.benchmark.latency import rotated
from nxm_export.contract.choices import TOKEN_ENCODING, TOKEN_ENCODINGS
from nxm_export.contract.io_spec import IOSpec
from nxm_export.data.features import Features, pad
from nxm_export.errors import DataError, ServeError
from nxm_export.storage.json_files import to_json_object

SCHEMA = "nxm-load/1"
TIMEOUT = 60.0  # seconds without a byte before a client gives its request up
WARM_UP = 1.0  # seconds, and at most a quarter of the time that is measured


@dataclass(frozen=True)
class InferenceRequest:
    """Body of a request, and the headers that say what is in it."""

    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class ServedModel:
    """A model on a running server, and the requests to send it, used in turn. `path` is that of its inference."""

    name: str
    host: str
    port: int
    path: str
    requests: Sequence[InferenceRequest]
    https: bool = False

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"


class Client:
    """One connection to a served model, kept open from request to request. A context manager."""

    def __init__(self, served: ServedModel) -> None:
        kind = HTTPSConnection if served.https else HTTPConnection
        self._connection = kind(served.host, served.port, timeout=TIMEOUT)
        self._path = served.path

    def send(self, request: InferenceRequest) -> tuple[int, bytes]:
        """(status, body) of the answer; raises `OSError` or `HTTPException` when it does not come whole, and connects
        anew for the next request."""
        try:
            self._connection.request("POST", self._path, request.body, dict(request.headers))
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, HTTPException):
            self._connection.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()


@dataclass(frozen=True)
class LoadResult:
    """One server at one number of clients: medians over the rounds. Latencies are in milliseconds, of answered
    requests."""

    name: str
    clients: int
    throughput: float
    throughput_range: tuple[float, float]
    p50: float
    p95: float
    p99: float
    p99_range: tuple[float, float]
    answered: int
    errors: Mapping[str, int]
    rounds: int


@dataclass(frozen=True)
class LoadReport:
    """All results of a run."""

    results: tuple[LoadResult, ...]

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


def with_tokens(
    name: str,
    url: str,
    model: str,
    features: Sequence[Features],
    spec: IOSpec,
    *,
    multiple: int = 1,
    encoding: str = TOKEN_ENCODING,
) -> ServedModel:
    """A model with requests of one sample each, as tokens; lengths are padded up to a multiple of `multiple`."""
    if encoding not in TOKEN_ENCODINGS:
        raise ServeError(f"unknown encoding {encoding!r}; choose one of {', '.join(TOKEN_ENCODINGS)}")
    requests = []
    for sample in features:
        length = -(-len(sample["input_ids"]) // multiple) * multiple
        tensors = pad([sample], spec.pad_id, min(length, spec.max_length))
        requests.append(_binary_request(tensors) if encoding == "binary" else _json_request(tensors))
    return _served(name, url, model, requests)


def with_text(name: str, url: str, model: str, texts: Sequence[str | tuple[str, str]]) -> ServedModel:
    """A model that tokenizes by itself, with requests of one text or one pair of texts each, as JSON."""
    requests = []
    for text in texts:
        parts = (text,) if isinstance(text, str) else text
        inputs = [
            {"name": part_name, "datatype": "BYTES", "shape": [1, 1], "data": [part]}
            for part_name, part in zip(("text", "text_pair"), parts, strict=False)
        ]
        requests.append(_json_body(inputs))
    return _served(name, url, model, requests)


def measure(models: Sequence[ServedModel], clients: Sequence[int], *, seconds: float, rounds: int = 3) -> LoadReport:
    """Load every model for `seconds` a round at every number of clients, each time after a warm-up of up to `WARM_UP`.

    Raises `ServeError` for two models of one name, for one that refuses the first request, or that answers none at one
    number of clients, and when a client fails.
    """
    if not models or not clients or rounds < 1:
        raise ServeError("a load test needs at least one server, one number of clients and one round")
    if len({served.name for served in models}) < len(models):
        raise ServeError("the same server is given twice; its results would be counted as those of one")
    for served in models:
        _require_answer(served)
    taken: dict[tuple[str, int], list[Round]] = {(served.name, count): [] for served in models for count in clients}
    for number in range(rounds):
        for count in clients:
            for served in rotated(list(models), number):
                run_round(served, count, min(WARM_UP, seconds / 4))
                taken[served.name, count].append(run_round(served, count, seconds))
    return LoadReport(tuple(_summary(name, count, loads) for (name, count), loads in taken.items()))


@dataclass(frozen=True)
class Round:
    """Seconds of every answered request, what failed, and how long it all took."""

    latencies: np.ndarray
    errors: Counter[str]
    seconds: float


def run_round(served: ServedModel, clients: int, seconds: float) -> Round:
    """One closed loop of `clients` for `seconds`; raises `ServeError` with its cause when a client fails."""
    began = time.perf_counter()
    loops = [_ClosedLoop(served, number, clients, began + seconds) for number in range(clients)]
    failed = threading.Event()
    with ThreadPoolExecutor(clients, "load-client") as pool:
        futures = [pool.submit(loop.run, failed) for loop in loops]
    passed = time.perf_counter() - began
    error = next(filter(None, (future.exception() for future in futures)), None)
    if error is not None:
        raise ServeError(f"{served.name}: a client of the load test failed: {error!r}; nothing was measured") from error
    latencies = np.array([latency for loop in loops for latency in loop.latencies])
    return Round(latencies, sum((loop.errors for loop in loops), Counter()), passed)


class _ClosedLoop:
    """One client: it sends every `stride`-th request, from `first` on, until the clock says `stop`."""

    def __init__(self, served: ServedModel, first: int, stride: int, stop: float) -> None:
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()
        self._served, self._first, self._stride, self._stop = served, first, stride, stop

    def run(self, failed: threading.Event) -> None:
        """Send until `stop`, or until another client sets `failed`; sets it when this one fails."""
        requests, position = self._served.requests, self._first
        try:
            with Client(self._served) as client:
                while (began := time.perf_counter()) < self._stop and not failed.is_set():
                    try:
                        status, _ = client.send(requests[position % len(requests)])
                    except (OSError, HTTPException) as error:
                        self.errors[type(error).__name__] += 1
                        time.sleep(0.01)  # a server that is gone must not be hammered
                    else:
                        if status == 200:
                            self.latencies.append(time.perf_counter() - began)
                        else:
                            self.errors[f"HTTP {status}"] += 1
                    position += self._stride
        except BaseException:
            failed.set()
            raise


def _require_answer(served: ServedModel) -> None:
    try:
        with Client(served) as client:
            status, body = client.send(served.requests[0])
    except (OSError, HTTPException) as error:
        raise ServeError(f"{served.name}: no answer from {served.address} ({error!r}); is it running?") from error
    if status != 200:
        raise ServeError(f"{served.name}: the first request got status {status}: {body[:300].decode(errors='replace')}")


def _summary(name: str, clients: int, rounds: Sequence[Round]) -> LoadResult:
    errors = sum((r.errors for r in rounds), Counter[str]())
    answered = [r for r in rounds if len(r.latencies)]
    if not answered:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in errors.items()) or "no answer came in time"
        raise ServeError(f"{name}: all requests of {clients} clients failed ({kinds}); look into the server's log")
    speeds = [len(r.latencies) / r.seconds for r in rounds]
    p50, p95, p99 = ([float(np.percentile(r.latencies, q)) * 1e3 for r in answered] for q in (50, 95, 99))
    return LoadResult(
        name=name,
        clients=clients,
        throughput=float(np.median(speeds)),
        throughput_range=(min(speeds), max(speeds)),
        p50=float(np.median(p50)),
        p95=float(np.median(p95)),
        p99=float(np.median(p99)),
        p99_range=(min(p99), max(p99)),
        answered=sum(len(r.latencies) for r in rounds),
        errors=dict(errors),
        rounds=len(rounds),
    )


def _json_request(tensors: Mapping[str, np.ndarray]) -> InferenceRequest:
    """int64 tensors as lists of numbers."""
    return _json_body([{**_described(name, array), "data": array.ravel().tolist()} for name, array in tensors.items()])


def _json_body(inputs: Sequence[Mapping[str, object]]) -> InferenceRequest:
    return InferenceRequest({"Content-Type": "application/json"}, json.dumps({"inputs": inputs}).encode())


def _binary_request(tensors: Mapping[str, np.ndarray]) -> InferenceRequest:
    """int64 tensors as their bytes behind the JSON that describes them; the answer is asked for in bytes, too."""
    blobs = [array.astype("<i8").tobytes() for array in tensors.values()]
    inputs = [
        {**_described(name, array), "parameters": {"binary_data_size": len(blob)}}
        for (name, array), blob in zip(tensors.items(), blobs, strict=True)
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return InferenceRequest(headers, head + b"".join(blobs))


def _described(name: str, array: np.ndarray) -> dict[str, object]:
    return {"name": name, "datatype": "INT64", "shape": list(array.shape)}


def _served(name: str, url: str, model: str, requests: Sequence[InferenceRequest]) -> ServedModel:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    extra = parts.query or parts.fragment or parts.username
    if parts.scheme not in ("http", "https") or not parts.hostname or extra or port == -1:
        raise ServeError(f"{url!r} is not a server's address; write it as http://127.0.0.1:8000")
    if not requests:
        raise DataError("no samples to send")
    https = parts.scheme == "https"
    path = f"{parts.path.rstrip('/')}/v2/models/{quote(model, safe='')}/infer"
    return ServedModel(name, parts.hostname, port or (443 if https else 80), path, requests, https)
