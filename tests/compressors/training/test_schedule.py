"""The order in which training draws its samples."""

import math

import numpy as np
import pytest

from compressors.training.trainer import schedule
from nxm_export.data.features import Features


def features_of_lengths(lengths: list[int]) -> list[Features]:
    return [{"input_ids": [5] * length} for length in lengths]


def test_schedule_visits_every_sample_once_an_epoch() -> None:
    features = features_of_lengths([1 + i % 17 for i in range(96)])
    order = schedule(features, steps=18, batch_size=16, seed=3)
    assert len(order) == 18 * 16
    for epoch in range(3):
        assert sorted(order[epoch * 96 : (epoch + 1) * 96]) == list(range(96))


@pytest.mark.parametrize(("samples", "batch"), [(60, 32), (33, 32), (1000, 32), (20, 8)])
def test_schedule_leaves_no_length_out_where_batches_do_not_come_out_even(samples: int, batch: int) -> None:
    """Every sample as often as any other, the longest and the shortest, too: counts of 400 epochs within five standard
    deviations."""
    per_epoch, epochs = samples // batch, 400
    order = schedule(features_of_lengths(list(range(1, samples + 1))), per_epoch * epochs, batch, seed=0)
    share = per_epoch * batch / samples
    deviation = math.sqrt(epochs * share * (1 - share))
    assert np.bincount(order, minlength=samples) == pytest.approx(epochs * share, abs=5 * deviation)


def test_schedule_depends_on_the_seed_and_on_nothing_else() -> None:
    features = features_of_lengths([1 + i % 17 for i in range(96)])
    assert schedule(features, 12, 16, seed=1) == schedule(features, 12, 16, seed=1)
    assert schedule(features, 12, 16, seed=1) != schedule(features, 12, 16, seed=2)


def test_schedule_batches_samples_of_like_length() -> None:
    lengths = list(np.random.default_rng(0).integers(4, 60, 640))
    order = schedule(features_of_lengths(lengths), steps=40, batch_size=16, seed=0)
    batches = np.array(lengths)[np.array(order)].reshape(40, 16)
    padding = 1 - batches.mean() / batches.max(axis=1).mean()
    random_batches = np.random.default_rng(1).permutation(lengths).reshape(40, 16)
    assert padding < 0.25 * (1 - random_batches.mean() / random_batches.max(axis=1).mean())
    assert batches.max(axis=1)[:10].std() > 0  # lengths still come mixed, not sorted over the epoch


def test_schedule_works_with_fewer_samples_than_a_batch() -> None:
    order = schedule(features_of_lengths([3, 4, 5]), steps=2, batch_size=8, seed=0)
    assert len(order) == 16
    assert set(order) == {0, 1, 2}
