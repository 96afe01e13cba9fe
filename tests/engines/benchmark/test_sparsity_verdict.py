"""The verdict on 2:4: what the intervals allow, and no more."""

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import pytest

from engines.base import Binding, Engine
from engines.benchmark.latency import BenchReport, Ratio, bench, sparse_verdict
from nxm_export.cli.first_lines import of_bench
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


def verdict(speedups: Speedups, share: float | None = 0.5) -> str:
    ratios = tuple(
        Ratio("int8-sparse", "int8-dense", batch, sequence, speedup, (speedup - width, speedup + width))
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
