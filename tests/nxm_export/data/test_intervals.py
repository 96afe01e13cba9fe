"""Intervals of metrics: what so few samples say that chance alone would say it, too, has none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nxm_export.data import metrics
from nxm_export.data.metrics import LEAST_UNITS, Groups, RowMetric, ScoredOutputs, paired_interval
from tests.support.intervals import interval


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


def test_what_metrics_make_of_the_samples_is_made_once_of_each_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def rows(outputs: np.ndarray, labels: np.ndarray, _: Sequence[str], __: Groups) -> np.ndarray:
        made.append(id(outputs))
        right: np.ndarray = outputs.argmax(-1) == labels
        return right[:, None].astype(np.float64)

    monkeypatch.setitem(metrics.ROW_METRICS, "squad_f1", RowMetric(rows, lambda kept: float(kept.mean())))
    monkeypatch.setitem(metrics.ROW_METRICS, "exact_match", RowMetric(rows, lambda kept: -float(kept.mean())))
    labels = np.arange(2 * LEAST_UNITS) % 2
    right, wrong = ScoredOutputs(logits(labels), labels), ScoredOutputs(logits(1 - labels), labels)
    for scored, share in ((right, 1.0), (wrong, 0.0)):
        assert (scored.value("squad_f1"), scored.value("exact_match")) == (share, -share)
        assert scored.interval("squad_f1") == (share, share)
        assert scored.units("squad_f1") == len(labels)
    assert right.interval_against(wrong, "squad_f1") == (1.0, 1.0)
    assert made == [id(right.outputs), id(wrong.outputs)]
