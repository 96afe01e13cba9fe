"""Length buckets out of profiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Profile
from engines.serving.shapes import plan_buckets, usual_lengths
from nxm_export.errors import RequestRefused, ServeError


@given(st.integers(1, 4096))
def test_usual_lengths_rise_to_the_longest_and_pad_by_little(longest: int) -> None:
    lengths = usual_lengths(longest)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == longest
    assert len(lengths) <= 8 + 4 * longest.bit_length()
    for length in range(17, longest + 1, 7):
        bucket = next(b for b in lengths if b >= length)
        assert bucket - length < bucket / 5, "as docs/serving.md says: the longest steps are a fifth of where they end"


def test_an_engine_without_profiles_takes_every_length_and_pads_to_the_batch() -> None:
    buckets = plan_buckets(50, 16, ())
    assert [b.length for b in buckets.buckets][-2:] == [48, 50]
    assert {(b.least, b.most, b.fixed) for b in buckets.buckets} == {(1, 16, False)}
    assert buckets.buckets[buckets.index(3, 33)].length == 40


def test_lengths_of_compiled_shapes_are_buckets_unless_lengths_are_given() -> None:
    compiled = [(1, 30), (4, 43), (1, 600)]
    lengths = [bucket.length for bucket in plan_buckets(64, 16, (), compiled=compiled).buckets]
    assert lengths == sorted({*usual_lengths(64), 30, 43})
    assert [bucket.length for bucket in plan_buckets(64, 16, (), (16,), compiled=compiled).buckets] == [16, 64]


def test_profiles_limit_lengths_and_rows_and_fix_the_shape() -> None:
    profiles = [Profile((1, 1), (1, 32), (4, 64)), Profile((8, 64), (16, 128), (32, 128))]
    buckets = plan_buckets(512, 16, profiles, lengths=(16, 64, 128))
    assert [(b.length, b.least, b.most, b.fixed) for b in buckets.buckets] == [
        (16, 1, 4, True),
        (64, 8, 16, True),
        (128, 8, 16, True),
    ]
    assert buckets.index(2, 10) == 0
    assert buckets.index(9, 10) == 1  # too many rows for the short bucket: pad to one that has room


def test_a_gap_between_profiles_is_bridged_by_padding() -> None:
    profiles = [Profile((1, 1), (1, 8), (4, 8)), Profile((1, 48), (1, 64), (4, 64))]
    buckets = plan_buckets(64, 4, profiles)
    assert buckets.buckets[buckets.index(1, 20)].length == 48


@given(st.integers(1, 9000), st.integers(1, 40), st.integers(1, 20_000))
def test_no_batch_holds_more_rows_or_tokens_than_allowed(longest: int, rows: int, tokens: int) -> None:
    for bucket in plan_buckets(longest, rows, (), max_batch_tokens=tokens).buckets:
        assert 1 <= bucket.most <= rows
        assert bucket.most == 1 or bucket.most * bucket.length <= tokens
        assert bucket.most == rows or (bucket.most + 1) * bucket.length > tokens


def test_documents_share_a_batch_by_tokens_and_sentences_by_rows() -> None:
    buckets = plan_buckets(8192, 32, ())
    most = {bucket.length: bucket.most for bucket in buckets.buckets}
    assert (most[512], most[2048], most[4096], most[8192]) == (32, 8, 4, 2)
    with pytest.raises(RequestRefused, match="a batch of 3 rows of 8000 tokens is larger than the 2 that are served"):
        buckets.index(3, 8000)


def test_the_least_batch_of_a_profile_stays_possible_beyond_the_budget() -> None:
    profiles = [Profile((8, 1), (8, 64), (16, 64))]
    assert {(b.least, b.most) for b in plan_buckets(64, 16, profiles, max_batch_tokens=64).buckets} == {(8, 8), (8, 16)}


@pytest.mark.parametrize(("rows", "length", "complaint"), [(1, 65, "longer than the 64"), (5, 3, "larger than the 4")])
def test_what_no_bucket_has_room_for_is_refused(rows: int, length: int, complaint: str) -> None:
    buckets = plan_buckets(512, 32, [Profile((1, 1), (1, 32), (4, 64))])
    with pytest.raises(RequestRefused, match=complaint) as refused:
        buckets.index(rows, length)
    assert refused.value.status == 400


@pytest.mark.parametrize("lengths", [(0, 8), (8, 65)])
def test_lengths_that_the_engine_does_not_have_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ServeError, match="from 1 to 64"):
        plan_buckets(64, 4, (), lengths)


def test_a_profile_with_more_rows_than_allowed_is_refused() -> None:
    with pytest.raises(ServeError, match="raise --max-batch"):
        plan_buckets(64, 4, [Profile((8, 64), (8, 64), (8, 64))])
