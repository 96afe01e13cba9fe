"""The verdict on 2:4: what the intervals allow, and no more."""

import pytest

from engines.benchmark.latency import BenchReport, Ratio, sparse_verdict

Speedups = list[tuple[int, int, float, float]]  # batch, sequence, speed-up, half the width of its interval


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


def test_nothing_is_ascribed_to_kernels_that_do_not_run() -> None:
    assert "no sparse kernel is proven to run on A100" in verdict([(1, 128, 1.5, 0.1)], share=0.0)
    assert "nothing was planned sparse" in verdict([(1, 128, 1.5, 0.1)], share=None)
    assert "no verdict" in verdict([])
