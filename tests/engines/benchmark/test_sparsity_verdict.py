"""The verdict on 2:4: what the intervals allow, and no more."""

import functools
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from engines.base import Binding, Closing, Engine
from engines.benchmark.latency import GPU_WARM_UP_S, WARMUP, BenchReport, bench, interleaved, sparse_verdict
from nxm_export.cli.first_lines import of_bench
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import EngineError

Speedups = list[tuple[int, int, float, float]]  # batch, sequence, speed-up, half the width of its interval


class Steady:
    """An engine whose every run takes as long as it is told, by its own clock."""

    clock, inputs, outputs = "told", ("input_ids",), ("logits",)
    input_bindings = (Binding("input_ids", "int64", (-1, -1)),)

    def __init__(self, milliseconds: float) -> None:
        self._told = milliseconds

    def timer(self, _: Mapping[str, np.ndarray]) -> Callable[[], float]:
        return lambda: self._told


class Queue(Steady):
    """An engine on a GPU: a run alone takes a millisecond longer than in a queue."""

    def __init__(self, milliseconds: float, *, graph: bool = True) -> None:
        super().__init__(milliseconds)
        self._graph, self.queues = graph, list[int]()

    def queue_timer(self, _: Mapping[str, np.ndarray], runs: int) -> Callable[[], float]:
        self.queues.append(runs)
        return lambda: runs * (self._told - 1.0)

    def launches_graph(self, _: Mapping[str, np.ndarray]) -> bool:
        return self._graph


def verdict(speedups: Speedups, share: float | None = 0.5) -> str:
    ratios = tuple(
        Speedup("int8-sparse", "int8-dense", batch, sequence, speedup, (speedup - width, speedup + width))
        for batch, sequence, speedup, width in speedups
    )
    return sparse_verdict(BenchReport((), ratios), "int8-sparse", "int8-dense", share, "A100")


@pytest.mark.parametrize(
    ("speedups", "text"),
    [
        (
            [(1, 128, 0.9, 0.05), (8, 128, 1.0, 0.1), (32, 128, 1.2, 0.1)],
            "2:4 pays from batch x sequence >= 4096 on A100; best 1.20x (1.10 to 1.30) at 32x128",
        ),
        ([(1, 128, 1.1, 0.05), (8, 128, 1.2, 0.1)], ">= 128 on A100, the smallest shape measured"),
        (
            [(1, 128, 1.3, 0.1), (32, 128, 0.9, 0.1)],
            "do not use 2:4 here: on A100 it does not pay at the largest shapes; best 1.30x",
        ),
        ([(1, 128, 1.05, 0.05)], "do not use 2:4 here"),
        ([(4, 128, 1.2, 0.1), (1, 512, 0.9, 0.1)], "do not use 2:4 here"),
        ([(1, 512, 1.2, 0.1), (4, 64, 1.3, 0.1)], ">= 256 on A100, the smallest shape measured; best 1.30x"),
        ([(1, 512, 1.2, 0.1), (4, 64, 1.3, 0.1), (1, 128, 0.9, 0.05)], ">= 256 on A100; best 1.30x"),
        ([(1, 128, 1.25, 0.25), (8, 128, 1.2, 0.1)], ">= 1024 on A100; best 1.25x (1.00 to 1.50)"),
    ],
)
def test_it_pays_from_where_every_larger_shape_wins(speedups: Speedups, text: str) -> None:
    assert text in verdict(speedups)


@pytest.mark.parametrize(("rounds", "said"), [(1, "no verdict"), (5, "no verdict"), (6, "2:4 pays")])
def test_rounds_that_leave_no_interval_leave_no_verdict(rounds: int, said: str) -> None:
    """Among k rounds, all lie on one side of the true median once in 2**(k - 1): 1 in 16 of five, 1 in 32 of six."""
    dense, sparse = cast(Engine, Steady(2.0)), cast(Engine, Steady(1.0))
    report = bench({"int8-dense": dense, "int8-sparse": sparse}, [(1, 8)], rounds=rounds)
    assert report.ratios[0].interval == (2.0 if rounds >= 6 else 1.0, 2.0)
    assert sparse_verdict(report, "int8-sparse", "int8-dense", 0.5, "A100").startswith(said)
    assert of_bench(report).startswith(
        "Against int8-dense: int8-sparse: faster" if rounds > 5 else "No comparison: too"
    )


def test_a_shape_without_a_number_wins_nothing() -> None:
    nan = float("nan")
    assert verdict([(1, 128, 1.5, 0.1), (8, 128, nan, nan)]).startswith("do not use 2:4 here")


@pytest.mark.parametrize("milliseconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_gives_no_time_is_refused(milliseconds: float) -> None:
    """Of 0 ms every engine is infinitely faster than its reference."""
    dense, sparse = cast(Engine, Steady(2.0)), cast(Engine, Steady(milliseconds))
    with pytest.raises(EngineError, match=r"the clock of int8-sparse gave .* ms for a run"):
        bench({"int8-dense": dense, "int8-sparse": sparse}, [(1, 8)], rounds=6)


def test_nothing_is_ascribed_to_kernels_that_do_not_run() -> None:
    assert "no sparse kernel is proven to run on A100" in verdict([(1, 128, 1.5, 0.1)], share=0.0)
    assert "nothing was planned sparse" in verdict([(1, 128, 1.5, 0.1)], share=None)
    assert "no verdict" in verdict([])


def test_what_is_not_known_to_run_dense_gets_no_verdict_and_keeps_its_times() -> None:
    ratios = tuple(Speedup("s", "d", 1, length, 1.4, (1.38, 1.42)) for length in (32, 128))
    said = functools.partial(sparse_verdict, BenchReport((), ratios), "s", "d", gpu="A100", unknown="nobody looked")
    measured = "1.40x (1.38 to 1.42) at 1x32, 1.40x (1.38 to 1.42) at 1x128"
    assert said(sparse_share=0.0) == f"no verdict: nobody looked; measured {measured}"
    assert said(sparse_share=0.5).startswith("2:4 pays from")


def test_the_twins_are_held_against_each_other_alone() -> None:
    against = {"int8-dense": 0.9, "fp16": 2.0}
    ratios = [Speedup("int8-sparse", name, 1, 128, speedup, (speedup, speedup)) for name, speedup in against.items()]
    ratios.append(Speedup("another", "int8-dense", 1, 128, 3.0, (3.0, 3.0)))
    for order in (ratios, ratios[::-1]):
        report = BenchReport((), tuple(order))
        assert sparse_verdict(report, "int8-sparse", "int8-dense", 1.0, "A100").startswith("do not use 2:4 here")


class Told(Steady):
    """An engine that takes longer from run to run, in whole milliseconds."""

    def timer(self, _: Mapping[str, np.ndarray]) -> Callable[[], float]:
        runs = itertools.count(-WARMUP)  # and one run when its timer is made
        return lambda: max(self._told, self._told * next(runs))


def test_a_timing_has_the_percentiles_of_its_rounds_and_a_ratio_pairs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.benchmark.latency.GPU_WARM_UP_S", 0.0)
    engines = {"slow": cast(Engine, Told(2.0)), "fast": cast(Engine, Told(1.0))}
    report = bench(engines, [(4, 8), (2, 8)], rounds=101)
    assert [(timing.name, timing.batch, timing.sequence) for timing in report.timings] == [
        ("slow", 4, 8), ("fast", 4, 8), ("slow", 2, 8), ("fast", 2, 8),
    ]  # fmt: skip
    fast = report.timings[1]
    assert (fast.quartiles[0], fast.median, fast.quartiles[1], fast.p95, fast.p99) == (26, 51, 76, 96, 100)
    assert (fast.rounds, fast.clock) == (101, "told")
    assert fast.samples_per_second == 4 / 0.051
    assert {(ratio.name, ratio.reference, ratio.speedup, ratio.interval) for ratio in report.ratios} == {
        ("fast", "slow", 2.0, (2.0, 2.0))
    }


@pytest.mark.parametrize(("told", "runs"), [(1.25, 16), (2.0, 10), (50.0, 4)])
def test_an_engine_with_a_queue_has_the_time_of_a_run_in_it(told: float, runs: int) -> None:
    engine = Queue(told)
    (timing,) = bench({"a": cast(Engine, engine)}, [(8, 16)], rounds=6).timings
    assert engine.queues == [runs]
    assert (timing.median, timing.queued) == (told, told - 1.0)
    assert timing.samples_per_second == 8e3 / (told - 1.0)
    (alone,) = bench({"a": cast(Engine, Steady(told))}, [(8, 16)], rounds=6).timings
    assert (alone.queued, alone.launches_graph, alone.samples_per_second) == (None, None, 8e3 / told)


@pytest.mark.parametrize(("dense", "sparse"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_cuda_graph_is_not_held_against_kernels_that_are_launched_one_by_one(dense: bool, sparse: bool) -> None:
    """Kernels that are no faster would look so."""
    twins = {"int8-dense": Queue(4.0, graph=dense), "int8-sparse": Queue(2.0, graph=sparse)}
    report = bench({name: cast(Engine, twin) for name, twin in twins.items()}, [(1, 8)], rounds=6)
    assert [timing.launches_graph for timing in report.timings] == [dense, sparse]
    said = sparse_verdict(report, "int8-sparse", "int8-dense", 0.5, "A100")
    if dense == sparse:
        assert said.startswith("2:4 pays")
        assert not report.unmeasured
    else:
        assert not report.ratios
        assert of_bench(report).startswith("No comparison: int8-sparse against int8-dense at 1x8: the runs of one")
        assert said.startswith("no verdict: the INT8 twins were not timed against each other: ")
        assert "int8-sparse against int8-dense at 1x8: the runs of one are launched as a CUDA graph" in said


def test_nothing_is_timed_without_engines_shapes_rounds_or_one_clock() -> None:
    engines, other = {"a": cast(Engine, Steady(1.0))}, cast(Engine, Steady(1.0))
    for given, shapes, rounds in (({}, [(1, 8)], 6), (engines, [], 6), (engines, [(1, 8)], 0)):
        with pytest.raises(EngineError, match="at least one engine, one shape and one round"):
            bench(given, shapes, rounds=rounds)
    other.clock = "another"
    with pytest.raises(EngineError, match="different clocks"):
        bench({**engines, "b": other}, [(1, 8)], rounds=6)


def test_a_warm_up_lasts_as_long_as_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second at every look."""
    now = itertools.count()
    monkeypatch.setattr("engines.benchmark.latency.time", SimpleNamespace(perf_counter=lambda: next(now)))
    calls: list[str] = []

    def timer(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or 1.0  # type: ignore[func-returns-value]

    interleaved({"a": timer("a"), "b": timer("b")}, 1, warm_up_s=4.0)
    assert calls == ["a", "b"] * (WARMUP + 3) + ["a", "b"]  # at 1, 2 and 3 seconds it goes on


def test_engines_on_a_gpu_are_warmed_up_until_its_clocks_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def taken(
        timers: Mapping[str, object], rounds: int, *, settle: bool = False, warm_up_s: float = -1.0
    ) -> dict[str, list[float]]:
        asked.extend([warm_up_s] if timers else [])
        return {name: [1.0] * rounds for name in timers}

    monkeypatch.setattr("engines.benchmark.latency.interleaved", taken)
    for clock in ("wall clock", "CUDA events"):
        engine = Steady(1.0)
        engine.clock = clock  # of this engine alone
        bench({"a": cast(Engine, engine)}, [(1, 8)], rounds=6)
    assert asked == [0.0, GPU_WARM_UP_S]


@pytest.mark.parametrize(("engines", "settle", "untimed"), [(2, True, 2), (2, False, 0), (1, True, 0)])
def test_engines_side_by_side_run_untimed_until_the_others_are_still(
    engines: int, settle: bool, untimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by half of the wait at every look: one run at once, and one more before it is over."""
    now = itertools.count(step=0.5)
    monkeypatch.setattr("engines.benchmark.latency.SETTLE_S", 1.0)
    monkeypatch.setattr("engines.benchmark.latency.time", SimpleNamespace(perf_counter=lambda: next(now)))
    runs = dict.fromkeys("ab"[:engines], 0)

    def timer(name: str) -> float:
        runs[name] += 1
        return float(runs[name])

    taken = interleaved({name: functools.partial(timer, name) for name in runs}, 2, settle=settle)
    assert list(taken.values()) == [[WARMUP + untimed + 1, WARMUP + 2 * untimed + 2]] * engines


class Full(Queue):
    """An engine on a GPU whose memory holds no more than so many tokens."""

    def __init__(self, milliseconds: float, most: int) -> None:
        super().__init__(milliseconds)
        self._most = most

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        if feeds["input_ids"].size > self._most:
            raise EngineError("CUDA out of memory")
        return super().timer(feeds)


@pytest.mark.parametrize(("dense", "sparse", "who"), [(8, 99, "int8-dense"), (99, 8, "int8-sparse")])
def test_an_engine_that_fails_at_a_shape_takes_neither_the_others_nor_other_shapes_along(
    dense: int, sparse: int, who: str
) -> None:
    engines = {"int8-dense": Full(4.0, dense), "int8-sparse": Full(2.0, sparse), "fp16": Queue(8.0)}
    report = bench(cast("dict[str, Engine]", engines), [(2, 8), (1, 8)], rounds=6)
    timed = [(timing.name, timing.batch) for timing in report.timings]
    assert timed == [
        *((name, 2) for name in engines if name != who), *((name, 1) for name in engines)
    ]  # fmt: skip
    assert report.unmeasured == (f"{who} at 2x8: CUDA out of memory",)
    assert report.reference == "int8-dense", "which the first timing of all may not be of"
    assert ("fp16", "int8-dense", 2) in {(r.name, r.reference, r.batch) for r in report.ratios} or who == "int8-dense"
    assert "at 1x8" in sparse_verdict(report, "int8-sparse", "int8-dense", 0.5, "A100")
    nowhere = bench(cast("dict[str, Engine]", engines), [(2, 8)], rounds=6)
    assert sparse_verdict(nowhere, "int8-sparse", "int8-dense", 0.5, "A100") == (
        f"no verdict: the INT8 twins were not timed against each other: {who} at 2x8: CUDA out of memory"
    )
    with pytest.raises(EngineError, match="out of memory"):
        bench({"alone": cast(Engine, Full(1.0, 8))}, [(2, 8)], rounds=6)


class OnTheCpu(Closing):
    """An engine with the timer of every engine on the CPU, which takes so many tokens and no more."""

    inputs = ("input_ids",)

    def __init__(self, most: int) -> None:
        self._most = most

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if feeds["input_ids"].shape[1] > self._most:
            raise EngineError(f"it has positions for {self._most} tokens")
        return {}


@pytest.mark.parametrize("short", ["a", "b"])
def test_an_engine_on_the_cpu_that_fails_at_a_shape_is_named_and_the_others_are_timed(short: str) -> None:
    """Its timer runs nothing when it is made: all times were lost."""
    engines = {name: cast(Engine, OnTheCpu(64 if name == short else 512)) for name in "ab"}
    report = bench(engines, [(1, 32), (1, 128)], rounds=6)
    timed = [(timing.name, timing.sequence) for timing in report.timings]
    assert timed == [("a", 32), ("b", 32), ("b" if short == "a" else "a", 128)]
    assert report.unmeasured == (f"{short} at 1x128: it has positions for 64 tokens",)
    assert [ratio.sequence for ratio in report.ratios] == [32]


class FullQueue(Queue):
    """An engine on a GPU whose memory holds one run, and no queue of them."""

    def queue_timer(self, feeds: Mapping[str, np.ndarray], runs: int) -> Callable[[], float]:
        raise EngineError("CUDA out of memory")


def test_an_engine_that_fails_in_a_queue_keeps_its_other_times_and_takes_none_of_others() -> None:
    engines = {"full": cast(Engine, FullQueue(4.0)), "fp16": cast(Engine, Queue(8.0))}
    report = bench(engines, [(2, 8)], rounds=6)
    assert [(timing.name, timing.median, timing.queued) for timing in report.timings] == [
        ("full", 4.0, None), ("fp16", 8.0, 7.0),
    ]  # fmt: skip
    assert report.unmeasured == ("full at 2x8, in a queue: CUDA out of memory",)
