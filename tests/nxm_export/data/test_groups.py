"""Samples that are scored together stay together: in parts of the data, on disk, and in every interval."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import Features, group_array, inputs_of, members, pad, sample_of, split_indices
from nxm_export.data.metrics import accuracy, paired_interval
from nxm_export.errors import DataError
from tests.support import tiny
from tests.support.intervals import interval

GROUPS = [0, 1, 1, 2, 0, 3, 3, 3, 4, 2, 5, 5]


def examples() -> Examples:
    return Examples([f"t{i}" for i in range(12)], None, list(range(12)), "x", groups=GROUPS)


def whole(part: Examples) -> bool:
    return all(count == GROUPS.count(group) for group, count in Counter(part.groups).items())


class TestExamples:
    @pytest.mark.parametrize("seed", range(5))
    def test_a_split_keeps_every_example_once_and_every_group_whole(self, seed: int) -> None:
        rest, held_out = examples().split(5, seed)
        assert sorted([*rest.labels, *held_out.labels]) == list(range(12))
        assert 5 <= len(held_out) < 5 + 3  # the largest group has 3
        assert whole(rest)
        assert whole(held_out)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_sample_has_whole_groups_and_at_most_what_was_asked(self, seed: int) -> None:
        drawn = examples().sample(6, seed)
        assert 0 < len(drawn) <= 6
        assert whole(drawn)
        assert drawn.labels == sorted(drawn.labels)

    def test_what_would_split_a_group_is_refused(self) -> None:
        with pytest.raises(DataError, match="would split group 1"):
            examples().subset([0, 4, 2])
        assert examples().subset([9, 3]).groups == [2, 2]
        pairs = Examples(["a", "b"], None, [0, 1], "x", groups=[7, 7])
        with pytest.raises(DataError, match="1 examples are fewer than any group has"):
            pairs.sample(1, seed=0)


def test_tokens_carry_their_group_and_models_never_read_it() -> None:
    tokenizer = tiny.tokenizer()
    features = encode(tokenizer, examples(), 8, ("input_ids", "attention_mask"))
    groups = group_array(features)
    assert groups is not None
    assert groups.tolist() == GROUPS
    assert set(pad(features, 0)) == set(inputs_of(features[0])) == {"input_ids", "attention_mask"}
    alone = encode(tokenizer, Examples(["a"], None, [0], "x"), 8, ("input_ids",))
    assert group_array(alone) is None


def test_a_cut_of_features_keeps_groups_and_is_a_permutation_without_them() -> None:
    grouped: list[Features] = [{"input_ids": [1], "labels": 0, "group": group} for group in GROUPS]
    picked, rest = split_indices(grouped, 4, seed=1)
    assert sorted(picked + rest) == list(range(12))
    assert not {GROUPS[i] for i in picked} & {GROUPS[i] for i in rest}
    plain = [sample_of(inputs_of(sample)) for sample in grouped]
    order = np.random.default_rng(1).permutation(12).tolist()
    assert split_indices(plain, 4, seed=1) == (order[:4], order[4:])
    assert split_indices(plain, 0, seed=1)[0] == []


def test_members_are_in_order_of_their_first() -> None:
    assert members(GROUPS, 12) == [[0, 4], [1, 2], [3, 9], [5, 6, 7], [8], [10, 11]]
    assert members(None, 3) == [[0], [1], [2]]


def test_an_interval_resamples_groups() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(12, 3)), rng.integers(0, 3, 12)
    other, groups = logits + rng.normal(size=logits.shape), np.array(GROUPS)
    generator, values, differences = np.random.default_rng(3), [], []
    for _ in range(1000):
        drawn = [members(GROUPS, 12)[i] for i in generator.integers(0, 6, size=6)]
        pick = [i for group in drawn for i in group]
        values.append(accuracy(logits[pick], labels[pick]))
        differences.append(values[-1] - accuracy(other[pick], labels[pick]))
    actual = interval("accuracy", logits, labels, seed=3, groups=groups)
    assert actual == tuple(np.percentile(values, [2.5, 97.5]))
    paired = paired_interval("accuracy", logits, other, labels, seed=3, groups=groups)
    assert paired == tuple(np.percentile(differences, [2.5, 97.5]))
    assert actual != interval("accuracy", logits, labels, seed=3)
