"""Errors are judged where something is decided: not in padding, and each label for itself."""

from __future__ import annotations

import numpy as np
import pytest

from engines.parity.decisions import Reading
from engines.parity.tolerance import Expectation, compare_output


def test_padding_decides_nothing() -> None:
    rng = np.random.default_rng(0)
    lengths = [2, 5, 3]
    expected = rng.normal(size=(3, 5, 4))
    actual, noise = expected.copy(), np.zeros_like(expected)
    for row, length in enumerate(lengths):
        expected[row, length:] = actual[row, length:] = 0
    actual[1, 4] = -expected[1, 4]
    report = compare_output(
        "logits", Expectation(expected, noise, noise), actual, Reading(lengths=lengths), quantized=True
    )
    assert report.agreement == pytest.approx(1 - 1 / sum(lengths))
    assert report.worst_sample == 1
    assert report.mean_abs == pytest.approx(2 * np.abs(expected[1, 4]).sum() / (sum(lengths) * 4))
    assert not report.passed


def test_labels_decide_each_for_itself() -> None:
    expected = np.array([[2.0, -3.0], [0.05, 1.0]])
    actual = expected - np.array([[0.0, 0.0], [0.1, 0.0]])
    error = np.full_like(expected, 0.1)
    expectation, reading = Expectation(expected, error, error), Reading("sigmoid")
    report = compare_output("logits", expectation, actual, reading, quantized=True)
    assert (report.agreement, report.unexcused_flips) == (0.75, 0)  # the margin was within the tolerance
    actual[0, 0] = -2.0
    assert compare_output("logits", expectation, actual, reading, quantized=True).unexcused_flips == 1
