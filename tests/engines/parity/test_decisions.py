"""What two outputs decide, and where they decide differently."""

from __future__ import annotations

import numpy as np
import pytest

from engines.parity.decisions import Distance, Reading, agreement, cosines, decisions, distance, flips, spread


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


def test_decisions_are_those_of_the_kind_of_output() -> None:
    logits = np.array([[0.5, 2.0, -1.0], [-0.0, -2.0, -1.0]])
    allowed = np.array([[True, False, True], [False, True, True]])

    def made(kind: str, values: np.ndarray = logits, of: np.ndarray | None = None) -> object:
        found = decisions(values, Reading(kind, allowed=of))
        return None if found is None else found.tolist()

    assert made("softmax") == [1, 0]
    assert made("sigmoid") == [[1, 1, 0], [0, 0, 0]], "above 0, which 0 is not"
    assert made("span") == [1, 0]
    assert made("span", of=allowed) == [0, 2]
    assert made("softmax", logits[:, None, :]) == [[1], [0]]
    for kind, values in (("softmax", logits[:, :1]), ("vector", logits), ("identity", logits)):
        assert made(kind, values) is None
        assert agreement(values, values + 1, Reading(kind)) is None
        assert flips(values, -values, 0.0, Reading(kind)) == []


def test_agreement_is_of_decisions_and_a_span_has_one_a_sample() -> None:
    expected, actual = np.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), np.array([[0.0, 3.0, 0.0], [0.0, 2.0, 0.0]])
    assert agreement(expected, actual, Reading("span", lengths=[2, 3])) == 0.5
    assert agreement(expected, actual) == 0.5
    assert agreement(expected, actual, Reading("sigmoid")) == 4 / 6
    tokens = np.stack([expected, expected]), np.stack([actual, expected])
    assert agreement(*tokens, Reading(lengths=[1, 2])) == 2 / 3, "one of three real tokens"


@pytest.mark.parametrize(("tolerance", "excused"), [(0.25, True), (0.2499, False)])
def test_a_change_is_excused_up_to_twice_the_tolerance(tolerance: float, excused: bool) -> None:
    """Of two logits each may move towards the other; a label's single logit has to cross 0 by itself."""
    pair = flips(np.array([[1.0, 0.5]]), np.array([[0.0, 0.5]]), tolerance)
    label = flips(np.array([[0.25, 1.0]]), np.array([[-1.0, 1.0]]), tolerance, Reading("sigmoid"))
    span = flips(
        np.array([[9.0, 1.0, 0.5]]), np.array([[9.0, 0.0, 0.5]]), tolerance,
        Reading("span", allowed=np.array([[False, True, True]])),
    )  # fmt: skip
    assert [(flip.margin, flip.excused) for flip in (*pair, *label, *span)] == [(0.5, excused)] * 3
    assert [(flip.position, flip.reference, flip.engine) for flip in (*pair, *label, *span)] == [
        ((), 0, 1), ((0,), 1, 0), ((), 1, 2),
    ]  # fmt: skip


def test_a_distance_is_that_of_its_largest_its_mean_and_its_direction() -> None:
    away = distance(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert (away.max_abs, away.mean_abs) == (1.0, 0.25)
    assert away.cosine == pytest.approx(np.sqrt(0.5))
    assert distance(np.array([[np.inf]]), np.array([[1.0]])) == Distance(None, None, None)


@pytest.mark.parametrize(
    ("samples", "count", "picks"), [(5, 3, [0, 2, 4]), (3, 5, [0, 1, 2]), (1, 4, [0]), (9, 2, [0, 8])]
)
def test_picks_are_spread_from_the_first_sample_to_the_last(samples: int, count: int, picks: list[int]) -> None:
    assert spread(samples, count).tolist() == picks
