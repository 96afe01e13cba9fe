"""The histogram of activations: at its edges, and its ranges against NumPy and a search over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressors.quantization.observers import BINS, HistogramObserver
from compressors.settings import Settings
from nxm_export.errors import DataError
from tests.support.random_tensors import randn


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
    assert zeros.scale(127, None) > 0
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


def test_percentile_of_a_stream_matches_numpy_and_needs_no_more_memory() -> None:
    observer, chunks = HistogramObserver(), [randn(1000, seed=i) * (i + 1) for i in range(20)]
    for chunk in chunks:
        observer.observe(chunk)
    assert observer.counts is not None
    assert observer.counts.numel() == 4096
    values = torch.cat(chunks).abs().numpy()
    for q in (50.0, 99.0, 99.9, 100.0):
        actual = observer.percentile(q)
        # At least q percent lie at or below it, and no longer one histogram bin further down.
        assert (values <= actual * (1 + 1e-6)).mean() >= q / 100
        assert (values <= actual - 1.001 * observer.limit / 4096).mean() <= q / 100


def squared_error(values: Tensor, scale: float) -> float:
    codes = (values.double() / scale).round().clamp(-128, 127)
    return float((codes * scale - values.double()).square().sum())


@settings(max_examples=40, deadline=None)
@given(
    rare=st.integers(0, 40), size=st.floats(1.0, 500.0), chunks=st.integers(1, 5), seed=st.integers(0, 10)
)  # some of 20,000 values are far larger than the others, as in what encoders compute
def test_the_scale_of_least_error_is_that_of_a_search_over_the_values_themselves(
    rare: int, size: float, chunks: int, seed: int
) -> None:
    values = randn(20_000, seed=seed)
    values[torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))[:rare]] *= size
    observer = HistogramObserver()
    for chunk in values.chunk(chunks):
        observer.observe(chunk)
    chosen = squared_error(values, observer.scale(127, None))
    tried = np.linspace(0.1, 1.0, 200) * float(values.abs().max()) / 127
    # The histogram has 2048 bins or more up to the largest value: at least 16 of them to a step.
    assert chosen <= 1.05 * min(squared_error(values, float(scale)) for scale in tried)


def test_a_percentile_cuts_off_what_a_few_tokens_carry_and_least_error_does_not() -> None:
    values = randn(100_000)
    values[:9] = 60.0  # fewer than one in ten thousand
    observer = HistogramObserver()
    observer.observe(values)
    assert observer.scale(127, 99.99) * 127 < 6
    assert observer.scale(127, None) * 127 > 55


def test_more_values_than_float32_counts_are_counted() -> None:
    observer, values = HistogramObserver(), torch.zeros(2**24 + 4096)
    values[0] = 1.0
    observer.observe(values)
    assert observer.counts is not None
    assert int(observer.counts.sum()) == len(values)


def test_ranges_are_of_least_error_where_no_training_moves_them() -> None:
    assert [Settings(steps=0).range_percentile, Settings(recipe="one-shot").range_percentile] == [None, None]
    assert Settings(steps=5).range_percentile == Settings().range_percentile == 99.99
    assert Settings(steps=0, percentile=99.0).range_percentile == Settings(percentile=99.0).range_percentile == 99.0


def test_what_saw_nothing_has_no_scale() -> None:
    with pytest.raises(DataError, match="saw no activation"):
        HistogramObserver().scale(127, 99)
    with pytest.raises(DataError, match=r"a\.weight: calibration saw no activation"):
        HistogramObserver("a.weight").scale(127, None)
