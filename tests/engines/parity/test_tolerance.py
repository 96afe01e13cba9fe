"""Errors are judged where something is decided: not in padding, and each label for itself."""

from __future__ import annotations

import numpy as np
import pytest

from engines.parity.decisions import Reading
from engines.parity.tolerance import Expectation, OutputParity, compare_output


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


SAMPLES = 40


def expectation() -> Expectation:
    """Outputs up to 100, so that 0.01 is no change; rounding moves one value of 10 of 40 samples by 1, and one step of
    a code one value of two by 1 and by 2."""
    values, noise, shift = np.full((SAMPLES, 4), 50.0), np.zeros((SAMPLES, 4)), np.zeros((2, 4))
    values[3, 2], noise[:10, 1], shift[0, 3], shift[1, :2] = -100.0, 1.0, 1.0, (2.0, 1.0)
    return Expectation(values, noise, shift)


def compared(error: np.ndarray, given: Expectation | None = None, *, quantized: bool = True) -> OutputParity:
    given = given or expectation()
    return compare_output("y", given, given.values + error, Reading("vector"), quantized=quantized)


def test_the_bounds_are_those_of_the_documentation() -> None:
    report = compared(np.zeros((SAMPLES, 4)))
    assert report.max_tolerance == pytest.approx(3 * 2 + 0.01)
    assert report.mean_tolerance == pytest.approx(2 * (1 / 16 + 2 / SAMPLES) + 0.01)
    assert (report.unchanged_share, report.unchanged_required) == (1.0, 0.75 / 4)
    assert (report.one_step_shift, report.max_steps, report.mean_steps) == (1.5, 0.0, 0.0)
    assert report.passed


@pytest.mark.parametrize(
    ("samples", "value", "passed"),
    [
        (1, 6.009, True),  # the largest error
        (1, -6.009, True),
        (1, 6.011, False),
        (1, -6.011, False),
        (32, 0.293, True),  # the mean, with just as many unchanged as are required
        (32, 0.294, False),
        (33, 0.02, False),  # one sample more is changed
        (33, 0.009, True),  # so little is no change
        (40, 0.009, True),
    ],
)
def test_an_output_passes_up_to_each_bound_and_not_beyond(samples: int, value: float, passed: bool) -> None:
    error = np.zeros((SAMPLES, 4))
    error[:samples] = value if samples > 1 else 0.0
    error[0, 0] = value
    report = compared(error)
    assert report.passed is passed
    assert report.max_abs == pytest.approx(abs(value))
    assert report.mean_abs == pytest.approx(np.abs(error).mean())
    assert report.unchanged_share == (np.abs(error) <= 0.01).all(axis=1).mean()
    assert (report.max_steps, report.mean_steps) == pytest.approx((abs(value) / 1.5, np.abs(error).mean() / 1.5))
    if not passed:
        assert f"max {abs(value):.4g} (tolerated 6.01)" in report.complaint
        assert f"{report.unchanged_share:.1%} of the samples equal (required 18.8%)" in report.complaint


def test_one_changed_value_changes_its_sample() -> None:
    error = np.zeros((SAMPLES, 4))
    error[:33, 1] = 0.02
    assert compared(error).unchanged_share == 7 / SAMPLES
    assert not compared(error).passed


def test_the_largest_of_rounding_and_step_is_what_counts() -> None:
    given = expectation()
    loud = Expectation(given.values, 5 * given.rounding_noise, given.one_step_shift)
    assert compared(np.zeros((SAMPLES, 4)), loud).max_tolerance == pytest.approx(3 * 5 + 0.01)


@pytest.mark.parametrize(("unmoved", "required"), [(19, 0.0), (20, 20 / 40 / 4)])
def test_equal_samples_are_required_where_they_are_enough_for_statistics(unmoved: int, required: float) -> None:
    given = expectation()
    given.rounding_noise[:] = 1.0
    given.rounding_noise[:unmoved] = 0.0
    assert compared(np.zeros((SAMPLES, 4)), given).unchanged_required == required
    assert compared(np.full((SAMPLES, 4), 0.02), given).passed is (required == 0)


def test_steps_are_told_of_what_is_quantized_and_moves() -> None:
    plain = compared(np.ones((SAMPLES, 4)), quantized=False)
    still = Expectation(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2)))
    for report in (plain, compared(np.zeros((2, 2)), still)):
        assert (report.one_step_shift, report.max_steps, report.mean_steps) == (None, None, None)
    assert compared(np.zeros((2, 2)), still).passed, "zeros are zeros"
    assert not compared(np.full((2, 2), 1e-30), still).passed


def test_the_noise_of_padding_does_not_widen_the_mean() -> None:
    """Rounding was measured on the first and the last of three samples, of 1 and 4 tokens."""
    values, noise = np.zeros((3, 4, 2)), np.zeros((2, 4, 2))
    noise[0, 0], noise[1] = 1.0, 0.5
    reading = Reading("vector", lengths=[1, 2, 4])
    report = compare_output("y", Expectation(values, noise, np.zeros((1, 4, 2))), values, reading, quantized=True)
    assert report.mean_tolerance == pytest.approx(2 * (1.0 * 2 + 0.5 * 8) / (5 * 2))


def test_what_is_no_number_has_no_distance_and_does_not_pass() -> None:
    actual = np.zeros((SAMPLES, 4))
    actual[5, 1:3] = np.nan, np.inf
    report = compared(actual)
    assert (report.passed, report.max_abs, report.mean_abs, report.max_steps, report.nonfinite) == (
        False, None, None, None, 2,
    )  # fmt: skip
    assert report.complaint.startswith("2 of its values are NaN or infinity, ")
