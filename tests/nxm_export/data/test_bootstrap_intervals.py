"""The bootstrap against a slower and obviously right one."""

from __future__ import annotations

import math

import numpy as np

from nxm_export.data.bootstrap_intervals import RESAMPLES, bootstrap_interval, resamples
from tests.support.intervals import interval


def test_an_interval_holds_the_middle_95_percent_of_the_resampled_statistics() -> None:
    values = np.random.default_rng(1).normal(size=40)
    generator = np.random.default_rng(7)
    means = sorted(float(values[generator.integers(0, 40, 40)].mean()) for _ in range(RESAMPLES))
    low, high = bootstrap_interval(40, lambda picks: float(values[picks].mean()), seed=7)
    assert means[24] <= low <= means[25]
    assert means[974] <= high <= means[975]


def test_an_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(400, lambda picks: float(values[picks].mean()))
    assert math.isclose(high - low, 2 * 1.96 * values.std() / math.sqrt(400), rel_tol=0.1)


def test_the_same_seed_draws_the_same_units_one_array_at_a_time() -> None:
    drawn = resamples(5, seed=3)
    assert iter(drawn) is drawn, "a generator: all of them together would not fit into memory"
    assert [picks.tolist() for picks in drawn] == [picks.tolist() for picks in resamples(5, seed=3)]


def test_nan_stays_nan() -> None:
    low, high = bootstrap_interval(4, lambda picks: math.nan)
    assert math.isnan(low)
    assert math.isnan(high)


def test_accuracy_of_a_thousand_draws_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score

    generator = np.random.default_rng(2)
    labels, logits = generator.integers(0, 3, 37), generator.normal(size=(37, 3))
    expected = bootstrap_interval(37, lambda picks: float(accuracy_score(labels[picks], logits[picks].argmax(-1))))
    assert interval("accuracy", logits, labels) == expected
