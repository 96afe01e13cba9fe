"""What two outputs decide, and where they decide differently."""

from __future__ import annotations

import numpy as np

from engines.parity.decisions import cosines, flips


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
        np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
    )
    np.testing.assert_allclose(cosines(expected, actual), [1.0, np.sqrt(0.5), 1.0])
    assert np.isnan(cosines(expected, np.full((3, 2), np.nan))[:2]).all()
