"""What two outputs decide, and where they decide differently."""

from __future__ import annotations

import numpy as np
import pytest

from engines.parity.decisions import Distance, Reading, cosines, distance, flips


def test_changed_classes_are_listed_by_margin() -> None:
    expected = np.array([[0.0, 1.0], [0.0, 0.1], [3.0, 0.0], [5.0, 0.0]])
    actual = np.array([[1.0, 0.0], [0.1, 0.0], [0.0, 3.0], [5.0, 0.0]])
    listed = flips(expected, actual, tolerance=0.1)
    assert [(flip.sample, flip.margin, flip.excused) for flip in listed] == [
        (2, 3.0, False),
        (0, 1.0, False),
        (1, 0.1, True),
    ]


def test_cosines_are_of_each_sample() -> None:
    expected, actual = (
        np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]),
        np.array([[2.0, 0.0], [1.0, 1.0], [0.0, -0.0]]),
    )
    np.testing.assert_allclose(cosines(expected, actual), [1.0, np.sqrt(0.5), 1.0])
    assert np.isnan(cosines(expected, np.full((3, 2), np.nan))).all()


def test_an_engine_of_zeros_is_not_alike() -> None:
    """Its cosine is none; a gate on it, which says at least, must not hold."""
    expected = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    for given, other in ((expected, np.zeros_like(expected)), (np.zeros_like(expected), expected)):
        assert cosines(given, other).tolist() == [0.0, 0.0]
        assert distance(given, other).cosine == 0.0
    assert distance(0 * expected, 0 * expected).cosine == 1.0


def test_an_answer_without_a_rival_changes_by_no_number_and_comes_first() -> None:
    expected, actual = np.array([[3.0, 0.0], [5.0, 0.0]]), np.array([[0.0, 3.0], [0.0, 5.0]])
    reading = Reading("span", allowed=np.array([[True, True], [True, False]]))
    assert [(flip.sample, flip.margin) for flip in flips(expected, actual, 0.1, reading)] == [(0, 3.0)]
    listed = flips(np.array([[3.0, 0.0], [5.0, -np.inf]]), actual, 0.1, Reading())
    assert [(flip.sample, flip.margin, flip.excused) for flip in listed] == [(1, None, False), (0, 3.0, False)]


def test_a_distance_that_float32_does_not_hold_has_a_number_and_one_beyond_float64_has_none() -> None:
    wide = np.array([[3e38, -3e38]], np.float32)
    away = distance(wide, -wide)
    assert [away.max_abs, away.mean_abs] == pytest.approx([6e38, 6e38])
    assert away.cosine == pytest.approx(-1.0)
    wider = np.array([[1e308, -1e308]])
    assert distance(wider, -wider) == Distance(None, None, None)
