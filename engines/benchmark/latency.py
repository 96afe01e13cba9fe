"""Latency of engines against each other, interleaved in one run: the only comparison that a noisy machine allows.

Shape by shape, every round times every engine once, in an order that rotates, so that slow spells hit all of them
alike; on the CPU each timed run follows an untimed one, so that no other runtime's threads are still spinning. Medians
are reported with the interval of the middle half, and ratios are medians of paired ratios with a bootstrap interval.
GPU engines are timed by CUDA events around the engine alone, with the inputs on the device; CPU engines by the wall
clock. The report names the clock, and two clocks are never compared.

A GPU keeps runs in a queue, so that launching one does not wait for the end of another. What it gets through in a
second is therefore measured apart from how long one run takes.

With the twins of `nxm build --twins` among the engines the report ends in a verdict: from which batch x sequence on 2:4
pays on this GPU, if it does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from engines.base import Closing, Engine, QueuedEngine
from engines.sample_inputs import nearest_shape, require_shape, sample_feeds
from nxm_export.contract.records.speedup import Speedup
from nxm_export.data.bootstrap_intervals import bootstrap_interval
from nxm_export.errors import EngineError
from nxm_export.storage.json_files import read_record, to_json_object

SCHEMA = "nxm-bench/1"
T = TypeVar("T")
_UNLIKE = (
    "the runs of one are launched as a CUDA graph, those of the other kernel by kernel, which takes longer whichever "
    "kernels they are; TensorRT-RTX has no graphs, and elsewhere a notice says why there is none"
)
WARMUP = 3  # runs of each engine, at least
GPU_WARM_UP_S = 1.0  # an idle GPU raises its clocks over some tenths of a second
QUEUE_MS, QUEUE_RUNS = 20.0, (4, 64)  # runs of about so long are queued, but no fewer and no more than these
# ONNX Runtime's threads were seen to slow another runtime on two cores for 45 ms after their last run.
SETTLE_S = 0.06
# The median of fewer rounds has no 95 % interval: not even from the least of five ratios to the largest (94 %).
LEAST_ROUNDS = 6
VOCABULARY = 1000  # token ids are drawn below; no encoder's embedding is smaller, but for tests


@dataclass(frozen=True)
class Timing:
    """One engine at one shape; milliseconds. `quartiles` hold the middle half of the rounds, `p95` and `p99` what 95
    and 99 % of them do not exceed; None in reports of older versions.

    On a GPU `queued` is what a run takes among others in a queue, and `launches_graph` whether it is launched as one
    CUDA graph.
    """

    name: str
    batch: int
    sequence: int
    median: float
    quartiles: tuple[float, float]
    rounds: int
    clock: str = "wall clock"
    p95: float | None = None
    p99: float | None = None
    queued: float | None = None
    launches_graph: bool | None = None

    @property
    def samples_per_second(self) -> float:
        """Rows a second at the median of runs one after another, which on a GPU are queued."""
        return 1e3 * self.batch / (self.median if self.queued is None else self.queued)


@dataclass(frozen=True)
class BenchReport:
    """All timings, all ratios against the first engine (the dense INT8 twin, where there is one), and the verdict.
    `machine` is the CPU or GPU that they were timed on, where that is known: engines may have been built on another."""

    timings: tuple[Timing, ...]
    ratios: tuple[Speedup, ...]
    verdict: str | None = None
    unmeasured: tuple[str, ...] = ()
    machine: str | None = None

    @property
    def reference(self) -> str:
        """The name of the engine that the others are compared with; where none is, of the first that was timed."""
        return next((ratio.reference for ratio in self.ratios), self.timings[0].name)

    @property
    def too_few_rounds(self) -> str | None:
        """Why nothing is called faster or slower, where engines were compared in fewer than `LEAST_ROUNDS`."""
        rounds = min((timing.rounds for timing in self.timings), default=LEAST_ROUNDS)
        if not self.ratios or rounds >= LEAST_ROUNDS:
            return None
        return f"too few rounds ({rounds}) to call a difference; give --rounds {LEAST_ROUNDS} or more"

    def to_dict(self) -> dict[str, object]:
        """The form of ``bench/*.json`` and ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


def read_bench_report(file: Path) -> BenchReport:
    """The report in a file of ``bench/``; raises `ArtifactError` by file and field."""
    return read_record(file, BenchReport, schema=SCHEMA, way_out="run `nxm bench` again")


def bench(
    engines: Mapping[str, Engine],
    shapes: Sequence[tuple[int, int]],
    *,
    rounds: int = 30,
    vocabulary: int | None = VOCABULARY,
    seed: int = 0,
) -> BenchReport:
    """Time `engines` at `shapes` (batch, sequence) with random token ids below `vocabulary` and no padding, or what
    `engines.sample_inputs` makes up.

    The first engine is the reference of the ratios. There is none of an engine whose runs are launched as a CUDA graph
    to one whose kernels are launched one by one. An engine that fails at a shape, such as for too little memory, is
    `BenchReport.unmeasured` there. Raises `EngineError` for no engines, shapes or rounds, for shapes that an engine
    does not take, and where no engine runs at any shape.
    """
    if not engines or not shapes or rounds < 1:
        raise EngineError("a bench needs at least one engine, one shape and one round")
    names = list(engines)
    if len({engine.clock for engine in engines.values()}) > 1:
        raise EngineError("engines on the CPU and on the GPU are timed by different clocks; time them in two runs")
    timings: list[Timing] = []
    ratios: list[Speedup] = []
    unmeasured: list[str] = []
    failures: list[EngineError] = []
    for batch, sequence in shapes:
        feeds = {name: feeds_for(engine, batch, sequence, vocabulary, seed) for name, engine in engines.items()}
        timers, failed = _timers({name: partial(engine.timer, feeds[name]) for name, engine in engines.items()})
        failures += failed.values()
        unmeasured += [f"{name} at {batch}x{sequence}: {error}" for name, error in failed.items()]
        running = {name: engines[name] for name in timers}
        graphs = {name: _launches_graph(engine, feeds[name]) for name, engine in running.items()}
        on_cpu = engines[names[0]].clock == Closing.clock
        taken = interleaved(timers, rounds, settle=on_cpu, warm_up_s=0.0 if on_cpu else GPU_WARM_UP_S)
        medians = {name: float(np.median(times)) for name, times in taken.items()}
        queued, unqueued = _queued(running, feeds, medians)
        unmeasured += [f"{name} at {batch}x{sequence}, in a queue: {error}" for name, error in unqueued.items()]
        for name in running:
            low, high, p95, p99 = map(float, np.percentile(taken[name], [25, 75, 95, 99]))
            tail, clock = (p95, p99), engines[name].clock
            timing = Timing(name, batch, sequence, medians[name], (low, high), rounds, clock, *tail, queued.get(name))
            timings.append(replace(timing, launches_graph=graphs[name]))
            if name == names[0] or names[0] in failed:
                continue
            if graphs[name] != graphs[names[0]]:
                unmeasured.append(f"{name} against {names[0]} at {batch}x{sequence}: {_UNLIKE}")
                continue
            speedup, bounds = paired(np.array(taken[names[0]]), np.array(taken[name]), seed)
            ratios.append(Speedup(name, names[0], batch, sequence, speedup, bounds))
    if not timings:
        raise failures[0]
    return BenchReport(tuple(timings), tuple(ratios), unmeasured=tuple(unmeasured))


def _timers(
    makers: Mapping[str, Callable[[], Callable[[], float]]],
) -> tuple[dict[str, Callable[[], float]], dict[str, EngineError]]:
    """(timers, errors of the engines that have none). Each has run once, untimed: an engine on the CPU fails there at
    what it cannot run, one on a GPU where its timer is made."""
    timers: dict[str, Callable[[], float]] = {}
    failed: dict[str, EngineError] = {}
    for name, make in makers.items():
        try:
            timer = make()
            timer()
        except EngineError as error:
            failed[name] = error
        else:
            timers[name] = timer
    return timers, failed


def _launches_graph(engine: Engine, feeds: Mapping[str, np.ndarray]) -> bool | None:
    return engine.launches_graph(feeds) if isinstance(engine, QueuedEngine) else None


def _queued(
    engines: Mapping[str, Engine], feeds: Mapping[str, Mapping[str, np.ndarray]], medians: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, EngineError]]:
    """(milliseconds of a run in a queue of runs, of the engines that have one: the median of `LEAST_ROUNDS` queues;
    errors of those that fail there)."""
    runs = {name: min(max(round(QUEUE_MS / ms), QUEUE_RUNS[0]), QUEUE_RUNS[1]) for name, ms in medians.items()}
    timers, failed = _timers(
        {
            name: partial(engine.queue_timer, feeds[name], runs[name])
            for name, engine in engines.items()
            if isinstance(engine, QueuedEngine)
        }
    )
    taken = interleaved(timers, LEAST_ROUNDS)
    return {name: float(np.median(times)) / runs[name] for name, times in taken.items()}, failed


def sparse_verdict(
    report: BenchReport, sparse: str, dense: str, sparse_share: float | None, gpu: str, unknown: str | None = None
) -> str:
    """What the timings say about 2:4 on this GPU: `sparse` and `dense` are the names of the INT8 twins.

    2:4 pays at a shape when the 95 % interval of its speed-up over the dense twin lies above 1. It pays from N tokens
    on when it does at every measured shape of at least N tokens. Without a proven sparse kernel nothing is ascribed to
    2:4: a difference is noise where it is known that none runs, and without a verdict where that is not known, for the
    reason `unknown`. Of fewer than `LEAST_ROUNDS` there is no verdict.
    """
    ratios = [ratio for ratio in report.ratios if ratio.name == sparse and ratio.reference == dense]
    if not ratios:
        of_twins = tuple(f"{name} {what} " for name in (sparse, dense) for what in (f"against {dense}", "at"))
        why = next((f": {text}" for text in report.unmeasured if text.startswith(of_twins)), "")
        return f"no verdict: the INT8 twins were not timed against each other{why}"
    if not sparse_share and unknown is not None:
        return f"no verdict: {unknown}; measured {', '.join(map(_at, ratios))}"
    if not sparse_share:
        known = "no sparse kernel is proven to run" if sparse_share == 0 else "nothing was planned sparse"
        return f"do not use 2:4 here: {known} on {gpu}, so any difference between the twins is noise"
    if report.too_few_rounds is not None:
        return f"no verdict: {report.too_few_rounds}"
    by_tokens = sorted(ratios, key=lambda ratio: (ratio.batch * ratio.sequence, ratio.speedup))
    losing = [ratio for ratio in by_tokens if not ratio.interval[0] > 1.0]  # NaN wins nothing
    best = max(by_tokens, key=lambda ratio: ratio.speedup)
    if not losing:
        first = by_tokens[0]
        return (
            f"2:4 pays from batch x sequence >= {first.batch * first.sequence} on {gpu}, the smallest "
            f"shape measured; best {_at(best)}"
        )
    beyond = [ratio for ratio in by_tokens if ratio.batch * ratio.sequence > max(r.batch * r.sequence for r in losing)]
    if not beyond:
        return f"do not use 2:4 here: on {gpu} it does not pay at the largest shapes; best {_at(best)}"
    first = beyond[0]
    return f"2:4 pays from batch x sequence >= {first.batch * first.sequence} on {gpu}; best {_at(best)}"


def _at(ratio: Speedup) -> str:
    low, high = ratio.interval
    return f"{ratio.speedup:.2f}x ({low:.2f} to {high:.2f}) at {ratio.batch}x{ratio.sequence}"


def feeds_for(engine: Engine, batch: int, sequence: int, vocabulary: int | None, seed: int) -> dict[str, np.ndarray]:
    """Random token ids below `vocabulary` (None: nobody knows it), no padding, and made-up values for inputs that are
    no tokens; raises `EngineError` for a shape that `engine` does not take."""
    require_shape(engine.input_bindings, batch, sequence)
    return sample_feeds(engine.input_bindings, batch, sequence, vocabulary, seed)


def fitted_shapes(engines: Iterable[Engine], shapes: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """`shapes` with the batch and the length that the engines have fixed, each once."""
    bindings = [engine.input_bindings for engine in engines]
    fitted = []
    for shape in shapes:
        for inputs in bindings:
            shape = nearest_shape(inputs, *shape)
        fitted.append(shape)
    return tuple(dict.fromkeys(fitted))


def interleaved(
    timers: Mapping[str, Callable[[], float]], rounds: int, *, settle: bool = False, warm_up_s: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of every timer in every round; the order within a round rotates. Before it, all run in turns at
    least `WARMUP` times and for `warm_up_s` seconds. Raises `EngineError` for a clock that gives no time.

    With `settle` every timed run follows untimed ones of the same engine for `SETTLE_S`: the threads of a CPU runtime
    spin for a while after a run, on the cores of whoever comes next, and an engine is not to be timed by its neighbour.
    """
    began, turns = time.perf_counter(), 0
    while timers and (turns < WARMUP or time.perf_counter() - began < warm_up_s):
        for timer in timers.values():
            timer()
        turns += 1
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in rotated(list(timers), number):
            if settle and len(timers) > 1:
                until = time.perf_counter() + SETTLE_S
                timers[name]()
                while time.perf_counter() < until:
                    timers[name]()
            taken[name].append(timers[name]())
    for name, times in taken.items():
        wrong = next((ms for ms in times if not 0.0 < ms < math.inf), None)
        if wrong is not None:
            raise EngineError(f"the clock of {name} gave {wrong} ms for a run, which takes longer: time it again")
    return taken


def rotated(items: list[T], number: int) -> list[T]:
    """`items` beginning with another one in every round."""
    start = number % max(1, len(items))
    return items[start:] + items[:start]


def paired(reference: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """How many times faster `other` is: the median of the rounds' ratios, with its 95 % bootstrap interval.

    Fewer than `LEAST_ROUNDS` have no such interval: theirs holds all ratios and 1, so that no difference is found.
    """
    ratios = reference / other
    if len(ratios) < LEAST_ROUNDS:
        return float(np.median(ratios)), (float(min(ratios.min(), 1.0)), float(max(ratios.max(), 1.0)))
    interval = bootstrap_interval(len(ratios), lambda picks: float(np.median(ratios[picks])), seed)
    return float(np.median(ratios)), interval
