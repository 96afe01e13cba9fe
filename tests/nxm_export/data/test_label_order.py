"""Numbers for labels that count the classes in another order than the model are refused."""

import numpy as np
import pytest

from nxm_export.data.label_order import require_label_order
from nxm_export.errors import DataError

TAGS = ("O", "B-BAD", "B-GOOD")


def tags(samples: int = 40) -> np.ndarray:
    """Labels (samples, 10): eight tokens in ten are outside of entities."""
    return np.array([[0] * 8 + [1, 2]] * samples)


def test_two_kinds_of_entities_that_changed_places_are_seen_among_tokens_outside_of_any() -> None:
    swapped = np.eye(3)[np.array([0, 2, 1])[tags()]]
    assert (swapped.argmax(axis=-1) == tags()).mean() == 0.8  # far above guessing
    with pytest.raises(DataError, match="0 of the first 80, fewer than by guessing"):
        require_label_order(swapped, tags(), TAGS, "dev.jsonl")


def test_a_model_that_finds_no_entity_and_one_that_is_right_are_not_accused() -> None:
    nothing = np.eye(3)[np.zeros_like(tags())]
    require_label_order(nothing, tags(), TAGS, "dev.jsonl")
    require_label_order(np.eye(3)[tags()], tags(), TAGS, "dev.jsonl")
