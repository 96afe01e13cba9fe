"""Numbers for labels that count the classes in another order than the model are refused."""

import numpy as np
import pytest
import torch

from nxm_export.data.label_order import ROWS, require_label_order, rows_to_look_at
from nxm_export.errors import DataError

TAGS = ("O", "B-BAD", "B-GOOD")


def tags(samples: int = 40) -> np.ndarray:
    """Labels (samples, 10): eight tokens in ten are outside of entities."""
    return np.array([[0] * 8 + [1, 2]] * samples)


def test_two_kinds_of_entities_that_changed_places_are_seen_among_tokens_outside_of_any() -> None:
    swapped = np.eye(3)[np.array([0, 2, 1])[tags()]]
    assert (swapped.argmax(axis=-1) == tags()).mean() == 0.8  # far above guessing
    with pytest.raises(DataError, match="0 of 80 that were looked at, fewer than by guessing"):
        require_label_order(swapped, tags(), TAGS, "dev.jsonl")


def test_a_model_that_finds_no_entity_and_one_that_is_right_are_not_accused() -> None:
    nothing = np.eye(3)[np.zeros_like(tags())]
    require_label_order(nothing, tags(), TAGS, "dev.jsonl")
    require_label_order(np.eye(3)[tags()], tags(), TAGS, "dev.jsonl")


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("exceptions", [0, 3])
def test_a_head_that_gives_one_class_to_everything_is_not_accused(share: float, exceptions: int) -> None:
    labels = (np.arange(200) >= 200 * share).astype(int)
    given = np.zeros(200, int)
    given[:exceptions] = 1  # of samples that are of the other class, too
    require_label_order(3.0 * np.eye(2)[given], labels, ("a", "b"), "d")


def test_a_head_that_was_never_trained_is_not_accused_whatever_it_gives() -> None:
    """Classes that lie apart in the features of an encoder, and 300 heads with the weights that they begin with: about
    one in two has them the wrong way round."""
    random, accused = np.random.default_rng(0), 0
    labels = np.arange(200) % 2
    features = np.tanh(random.normal(size=(200, 128)) + np.where(labels, 0.3, -0.3)[:, None] * random.normal(size=128))
    for seed in range(300):
        torch.manual_seed(seed)
        weight = torch.normal(0, 0.02, (2, 128)).numpy()  # as transformers begins with
        try:
            require_label_order(features @ weight.T, labels, ("a", "b"), "d")
        except DataError:
            accused += 1
    assert not accused


def test_a_trained_head_with_its_classes_swapped_is_refused_in_a_sorted_file_too() -> None:
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, 2, 2000))
    rows = rows_to_look_at(len(labels))
    assert len(rows) == len(set(rows)) == ROWS
    assert 80 < labels[rows].sum() < 120
    right = np.where(random.random(2000) < 0.7, labels, 1 - labels)
    logits = np.where(np.eye(2)[right] > 0, 0.42, -0.42)  # as sure as it is right
    require_label_order(logits[rows], labels[rows], ("a", "b"), "d")
    with pytest.raises(DataError, match="fewer than by guessing"):
        require_label_order(logits[rows], 1 - labels[rows], ("a", "b"), "d")


@pytest.mark.parametrize("count", [1, 2, 199, 200, 201, 5000])
def test_rows_of_the_whole_file_are_looked_at_once_each(count: int) -> None:
    rows = rows_to_look_at(count)
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1], len(rows)) == (0, count - 1, min(count, ROWS))
