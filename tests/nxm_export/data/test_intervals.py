"""Intervals of metrics: what so few samples say that chance alone would say it, too, has none."""

from __future__ import annotations

import numpy as np
import pytest

from nxm_export.data.metrics import LEAST_UNITS, interval, paired_interval


def logits(classes: np.ndarray) -> np.ndarray:
    return np.where(classes[:, None] == np.arange(2), 1.0, -1.0)


@pytest.mark.parametrize("samples", [1, 2, LEAST_UNITS - 1, LEAST_UNITS])
def test_a_difference_of_a_few_samples_is_none(samples: int) -> None:
    """Every sample is right now and was wrong before: the percentiles of any number of them lie at 1."""
    labels = np.arange(samples) % 2
    right, wrong = logits(labels), logits(1 - labels)
    bounds = [
        interval("accuracy", right, labels),
        paired_interval("accuracy", right, wrong, labels),
        paired_interval("accuracy", np.repeat(right, 2, 0), np.repeat(wrong, 2, 0), np.repeat(labels, 2)),
    ]
    expected = [samples >= LEAST_UNITS, samples >= LEAST_UNITS, 2 * samples >= LEAST_UNITS]
    assert [bool(np.isfinite(found).all()) for found in bounds] == expected


def test_groups_count_and_not_their_samples() -> None:
    labels = np.arange(40) % 2
    groups = np.arange(40) // 8
    assert np.isnan(interval("accuracy", logits(labels), labels, groups=groups)).all()
    assert 2 * 0.5**LEAST_UNITS < 0.05 < 2 * 0.5 ** (LEAST_UNITS - 1)
