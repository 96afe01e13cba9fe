"""Dynamic batching with no delay: whatever queued while the engine was busy runs together.

One queue per engine, split by length bucket; one thread per loaded engine context takes the bucket whose head has
waited longest, and as many of its requests as fit: by rows and by tokens. An idle engine never waits for company
(unless `max_delay` says so), and a busy one makes larger batches the more requests wait. The queue is bounded in rows;
what does not fit is refused at once.

Threads, not tasks: runtimes release the interpreter lock while they compute. Results are handed over by `deliver`,
which the server sets to something that wakes its event loop.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from engines.base import Engine, ShapedEngine
from engines.serving.shapes import Bucket, Buckets
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, rows_within
from nxm_export.errors import RequestRefused

if TYPE_CHECKING:
    import asyncio

    from engines.serving.health import EngineHealth

Deliver = Callable[[Sequence["QueuedRequest"]], None]


class Observer(Protocol):
    """What is told about the work done; see `engines.serving.metrics`."""

    def batch(self, rows: int, padding: float, seconds: float, waits: Sequence[float]) -> None:
        """`rows` of requests ran in `seconds`; `padding` is the share of its tokens that was padding."""
        ...


class QueuedRequest:
    """A request in the queue: feeds (rows, length) by input name, then its outputs or its error. `answered`
    is the future that its caller waits for."""

    __slots__ = ("answered", "bucket", "deadline", "enqueued", "error", "feeds", "length", "outputs", "rows")

    def __init__(
        self, feeds: Mapping[str, np.ndarray], deadline: float, answered: asyncio.Future[None] | None = None
    ) -> None:
        self.feeds = feeds
        self.rows, self.length = next(iter(feeds.values())).shape
        self.deadline = deadline  # on the clock of `time.monotonic`
        self.answered = answered
        self.bucket = 0
        self.enqueued = 0.0
        self.outputs: dict[str, np.ndarray] = {}
        self.error: Exception | None = None


@dataclass(frozen=True)
class Limits:
    """`max_rows` waiting at most; `max_delay` seconds that a batch which is not full waits for more; `merge` rows, and
    `merge_tokens` of rows as long as their bucket, of different requests in a batch at most (a larger request runs
    alone)."""

    max_rows: int = 512
    max_delay: float = 0.0
    merge: int = 32
    merge_tokens: int = MAX_BATCH_TOKENS


class BatchQueue:
    """Requests waiting for one engine. `submit` and `cancel` never block; `take` blocks the engine's threads."""

    def __init__(self, buckets: Buckets, limits: Limits) -> None:
        self._buckets = buckets
        self._limits = limits
        self._waiting: list[deque[QueuedRequest]] = [deque() for _ in buckets.buckets]
        self._condition = threading.Condition()
        self._closed = False
        self.rows = 0

    @property
    def max_delay(self) -> float:
        """Seconds that a batch which is not full waits for more."""
        return self._limits.max_delay

    def submit(self, request: QueuedRequest) -> None:
        """Queue a request; raises `RequestRefused`: 400 when it can never run, 503 when the queue is full."""
        request.bucket = self._buckets.index(request.rows, request.length)
        with self._condition:
            if self._closed:
                raise RequestRefused(503, "the model is being unloaded", retry_after=1)
            if request.rows > self._limits.max_rows:  # nor later
                raise RequestRefused(
                    400,
                    f"a request of {request.rows} rows is larger than the {self._limits.max_rows} that may wait; "
                    "split it",
                )
            if self.rows + request.rows > self._limits.max_rows:
                raise RequestRefused(503, f"{self.rows} rows are waiting already; try again later", retry_after=1)
            request.enqueued = time.monotonic()
            self._waiting[request.bucket].append(request)
            self.rows += request.rows
            self._condition.notify()

    def cancel(self, request: QueuedRequest) -> bool:
        """Take a request back; False when an engine has it already."""
        with self._condition:
            try:
                self._waiting[request.bucket].remove(request)
            except ValueError:
                return False
            self.rows -= request.rows
            return True

    def take(self, patience: float | None = None) -> tuple[Bucket, list[QueuedRequest]] | None:
        """The next batch; blocks. It is empty only where nothing came for `patience` seconds. None once the queue is
        closed and empty."""
        with self._condition:
            while True:
                while not self.rows:
                    if self._closed:
                        return None
                    if not self._condition.wait(patience):
                        return self._buckets.buckets[0], []
                heads = [(queue[0].enqueued, i) for i, queue in enumerate(self._waiting) if queue]
                oldest, index = min(heads)
                bucket, queue = self._buckets.buckets[index], self._waiting[index]
                rest = oldest + self._limits.max_delay - time.monotonic()
                most = rows_within(bucket.length, self._limits.merge_tokens, min(bucket.most, self._limits.merge))
                if rest <= 0 or self._closed or sum(request.rows for request in queue) >= most:
                    return bucket, self._cut(queue, most)
                self._condition.wait(rest)

    def _cut(self, queue: deque[QueuedRequest], most: int) -> list[QueuedRequest]:
        batch: list[QueuedRequest] = []
        rows = 0
        while queue and (not batch or rows + queue[0].rows <= most):
            request = queue.popleft()
            rows += request.rows
            batch.append(request)
        self.rows -= rows
        return batch

    def close(self) -> None:
        """Refuse new requests; the waiting ones still run."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()


def run_worker(
    engine: Engine,
    queue: BatchQueue,
    deliver: Deliver,
    observer: Observer,
    pads: Mapping[str, int],
    sequence_axes: Mapping[str, int],
    health: EngineHealth,
) -> None:
    """Run batches until the queue is closed and empty; the body of an engine's thread.

    `pads` hold the padding value of each input, `sequence_axes` the axis of an output that runs along the sequence. A
    request that cannot run is answered with its error and takes no other down: a failed batch is run again one by one.
    `health` learns whether the engine answers.
    """
    while (taken := queue.take(health.patience)) is not None:
        bucket, batch = taken
        now = time.monotonic()
        late = [request for request in batch if request.deadline < now]
        for request in late:
            request.error = RequestRefused(504, "the deadline passed while the request was waiting")
        batch = [request for request in batch if request.deadline >= now]
        if late:
            deliver(late)
        if not batch:
            if health.failing:
                health.examine()
            continue
        try:
            rows, tokens = run_batch(engine, bucket, batch, pads, sequence_axes)
        except Exception:  # an engine may raise anything; nothing may end this thread
            rows, tokens = _one_by_one(engine, bucket, batch, pads, sequence_axes)
        padding = 1.0 - sum(request.rows * request.length for request in batch) / tokens if tokens else 0.0
        observer.batch(rows, padding, time.monotonic() - now, [now - request.enqueued for request in batch])
        deliver(batch)
        if all(request.error is not None for request in batch):
            health.examine()
        else:
            health.answered()


def _one_by_one(
    engine: Engine, bucket: Bucket, batch: Sequence[QueuedRequest], *options: Mapping[str, int]
) -> tuple[int, int]:
    rows = tokens = 0
    for request in batch:
        try:
            ran = run_batch(engine, bucket, [request], *options)
            rows, tokens = rows + ran[0], tokens + ran[1]
        except Exception as error:
            request.error = error
    return rows, tokens


def run_batch(
    engine: Engine,
    bucket: Bucket,
    batch: Sequence[QueuedRequest],
    pads: Mapping[str, int],
    sequence_axes: Mapping[str, int],
) -> tuple[int, int]:
    """Run `batch` as one rectangle and give every request its own rows; returns (rows of requests, tokens computed, in
    the shape that the engine pads to by itself)."""
    rows = sum(request.rows for request in batch)
    length = bucket.length if bucket.fixed else max(request.length for request in batch)
    feeds = {}
    for name, pad in pads.items():
        array = np.full((max(rows, bucket.least), length), pad, np.int64)
        start = 0
        for request in batch:
            array[start : start + request.rows, : request.length] = request.feeds[name]
            start += request.rows
        array[rows:] = array[0]  # rows that only fill the engine's least batch: a copy of a real one stays finite
        feeds[name] = array
    outputs = engine.run(feeds)
    for name, array in outputs.items():
        if len(array) < rows or not np.isfinite(array[:rows]).all():
            raise ArithmeticError(f"output {name} of shape {array.shape} is not finite or has too few rows for {rows}")
    start = 0
    for request in batch:
        for name, array in outputs.items():
            part = array[start : start + request.rows]
            axis = sequence_axes.get(name)
            request.outputs[name] = part if axis is None else part.take(range(request.length), axis=axis)
        start += request.rows
    shape = engine.compiled_shape(feeds) if isinstance(engine, ShapedEngine) else None
    computed_rows, computed_length = shape or (max(rows, bucket.least), length)
    return rows, computed_rows * computed_length
