"""Microseconds of a call on the device: of replayed CUDA graphs, else of the profiler's kernels, else of eager
launches.

A number is the median of CUDA-event times. Calls are rotated over copies of their operands, so that small ones do not
stay in the L2 cache. Without a GPU (a rehearsal) it is one wall-clock time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engines.cusparselt.capturing import capturing

Call = Callable[[], object]
IDLE_S, WARM_UP_S = 0.5, 0.3  # a compilation leaves the GPU without work for longer, and its clocks fall
_LOST = ("illegal memory", "launch failure", "device-side assert", "misaligned address", "illegal instruction")


class ContextLost(Exception):
    """The CUDA context is gone: nothing after it can be measured."""


@dataclass(frozen=True)
class Problem:
    """What failed, and the error; measuring went on."""

    at: str
    error: str

    @classmethod
    def of(cls, at: str, error: Exception) -> Problem:
        """From an exception; raises `ContextLost` where it says that the context is gone."""
        if any(text in str(error) for text in _LOST):
            raise ContextLost(str(error)[:300]) from error
        return cls(at, f"{type(error).__name__}: {error}"[:300])


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; `eager` has the host's overhead, too. `how` is graph, profiler, eager or wall."""

    microseconds: float
    eager: float
    how: str


class Timer:
    """Times calls; `calls` of them are in one graph, which is replayed `replays` times."""

    def __init__(self, device: str, calls: int, replays: int, problems: list[Problem]) -> None:
        self.device, self.calls, self.replays, self.problems = device, calls, replays, problems
        self._no_graph: set[str] = set()  # kinds of calls whose capture failed once
        self._last = 0.0  # when the GPU was kept busy last

    def warm_up(self) -> None:
        """Keep the GPU busy for a second: clocks rise from idle."""
        if self.device == "cpu":
            return
        square = torch.randn(8192, 8192, device=self.device, dtype=torch.float16)
        self._busy(lambda: square @ square, 1.0)

    def time(self, kind: str, copies: Sequence[Call]) -> Timing:
        """Time a call, given once for each copy of its operands; `kind` names calls that a graph can hold or not,
        alike."""
        if self.device == "cpu":
            began = time.perf_counter()
            copies[0]()
            taken = 1e6 * (time.perf_counter() - began)
            return Timing(taken, taken, "wall")
        many = [copies[number % len(copies)] for number in range(self.calls)]
        _run(copies)
        torch.cuda.synchronize()
        if time.monotonic() - self._last > IDLE_S:  # as behind a compilation: what comes next would seem slow
            self._busy(lambda: _run(copies), WARM_UP_S)
        try:
            return self._timed(kind, copies, many)
        finally:
            self._last = time.monotonic()

    def _timed(self, kind: str, copies: Sequence[Call], many: Sequence[Call]) -> Timing:
        eager = self._median(lambda: _run(many), len(many), 5)
        if kind not in self._no_graph:
            try:
                return Timing(self._graph(copies, many), eager, "graph")
            except RuntimeError as error:
                self.problems.append(Problem.of(f"graph of {kind}", error))
                self._no_graph.add(kind)
        try:
            kernels = sum(microseconds for _, microseconds in self.kernel_times(lambda: _run(many))) / len(many)
        except RuntimeError as error:
            self.problems.append(Problem.of(f"profile of {kind}", error))
            kernels = 0.0
        return Timing(kernels, eager, "profiler") if kernels else Timing(eager, eager, "eager")

    def _busy(self, call: Call, seconds: float) -> None:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            call()
            torch.cuda.synchronize()
        self._last = time.monotonic()

    def kernel_times(self, call: Call) -> list[tuple[str, float]]:
        """Name and microseconds of every kernel that a call launches; none without a GPU."""
        if self.device == "cpu":
            return []
        from torch.profiler import ProfilerActivity, profile

        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            call()
            torch.cuda.synchronize()
        return [
            (event.name, float(event.time_range.elapsed_us()))
            for event in recorded.events() or []
            if str(event.device_type).endswith("CUDA") and not event.name.startswith("Mem")
        ]

    def _graph(self, copies: Sequence[Call], many: Sequence[Call]) -> float:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _run(copies)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, torch.cuda.graph_pool_handle()):
            _run(many)
        return self._median(graph.replay, len(many), self.replays)

    def _median(self, call: Call, calls: int, rounds: int) -> float:
        taken = []
        for number in range(-3, rounds):  # three rounds warm up
            start, end = _event(), _event()
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= 0:
                taken.append(1e3 * float(start.elapsed_time(end)) / calls)
        return statistics.median(taken)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
