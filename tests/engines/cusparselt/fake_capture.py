"""How torch 2.11 captures CUDA graphs, in names alone: what a failed capture leaves behind is what matters here.

`torch.cuda.graph` restores the stream only behind a `capture_end` that succeeds, and `capture_end` raises before the
allocator ends recording into the pool; a pool that is recorded into is refused to the next graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class FakeCapture:
    """Patched into torch: `stream` is the current one, `recording` the pools that the allocator records into."""

    OWN = "the caller's stream"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.recording, self.pools, self.fails = self.OWN, set[tuple[int, int]](), 0, False
        self.modes: list[str] = []
        for name, made in {
            "current_stream": lambda: self.stream,
            "current_device": lambda: 0,
            "Stream": FakeStream,
            "stream": self._on,
            "graph": self._graph,
            "CUDAGraph": FakeGraph,
            "graph_pool_handle": self._handle,
            "synchronize": lambda: None,
            "Event": FakeEvent,
        }.items():
            monkeypatch.setattr(f"torch.cuda.{name}", made)
        monkeypatch.setattr("torch._C._cuda_endAllocateToPool", self._end, raising=False)
        monkeypatch.setattr(FakeStream, "wait_stream", lambda *_: None)

    def _handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    def _end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    @contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _graph(
        self, graph: FakeGraph, pool: tuple[int, int] | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.modes.append(capture_error_mode)
        pool, before = pool or self._handle(), self.stream
        self.stream = "the graph's stream"
        if pool in self.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.recording.add(pool)
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.recording.remove(pool)
            self.stream = before


class FakeStream(str):
    """A stream is its name."""

    def wait_stream(self, other: object) -> None:
        """Nothing is ever behind."""


FakeCapture.OWN = FakeStream(FakeCapture.OWN)


class FakeGraph:
    """Nothing is replayed."""

    def replay(self) -> None:
        """Nothing to do."""


class FakeEvent:
    """A millisecond lies between any two."""

    def __init__(self, *, enable_timing: bool) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, _: FakeEvent) -> float:
        return 1.0
