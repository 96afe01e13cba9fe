"""The histogram of activations at its edges, and its ranges against a search over few known values."""

from __future__ import annotations

import pytest
import torch

from compressors.quantization.observers import BINS, HistogramObserver
from nxm_export.errors import DataError


def observed(*chunks: list[float]) -> HistogramObserver:
    observer = HistogramObserver()
    for chunk in chunks:
        observer.observe(torch.tensor(chunk))
    return observer


@pytest.mark.parametrize("value", [1e-3, 0.5, 1.0, 3.0, -7.0])
def test_of_one_value_every_percentile_is_that_value(value: float) -> None:
    observer = observed([value])
    assert observer.limit == observer.largest == pytest.approx(abs(value))  # no finer bins can be had
    for q in (0.01, 50.0, 100.0):
        assert observer.scale(127, q) == pytest.approx(abs(value) / 127)
    assert observer.scale(127, None) == pytest.approx(abs(value) / 127, rel=2 / BINS)


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    values = [n / 100 for n in range(1, 101)]
    observer = observed(values)
    for q in (1, 10, 50, 99, 100):
        assert observer.percentile(q) == pytest.approx(q / 100, abs=2 / BINS)
    assert observer.percentile(100.0) == 1.0, "no more than was seen"


def test_zeros_first_or_alone_leave_a_range() -> None:
    zeros = observed([0.0] * 4)
    assert zeros.percentile(100.0) == 1 / BINS
    later = observed([0.0], [0.25] * 9)
    assert later.percentile(100.0) == 0.25
    assert later.percentile(5.0) == pytest.approx(1 / BINS)


def test_a_larger_value_folds_the_bins_and_loses_none() -> None:
    observer = observed([1.0] * 3, [2.0] * 2, [3.0], [16.0])
    assert observer.counts is not None
    assert observer.limit == 16.0
    assert float(observer.counts.sum()) == 7
    assert observer.percentile(100 * 3 / 7 - 1) == pytest.approx(1.0, abs=2 * 16 / BINS)
    assert observer.percentile(100 * 5 / 7 - 1) == pytest.approx(2.0, abs=2 * 16 / BINS)
    assert observer.percentile(100.0) == 16.0


def test_what_is_empty_counts_nothing_and_what_is_no_number_is_refused() -> None:
    observer = observed([], [2.0], [])
    assert observer.percentile(50.0) == 2.0
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(DataError, match="NaN or infinite activation"):
            observer.observe(torch.tensor([1.0, bad]))
    assert observer.percentile(100.0) == 2.0


def test_the_scale_of_least_error_weighs_clipping_against_rounding() -> None:
    """Codes from -1 to 1, of which only the scale is chosen: 1 for a thousand values of 1, however large one more is,
    unless it is so large that clipping it costs more than rounding all others."""
    assert observed([1.0] * 1000, [4.0]).scale(1, None) == pytest.approx(1.0, abs=0.05)
    assert observed([1.0] * 3, [10.0]).scale(1, None) == pytest.approx(10.0, rel=0.02)
