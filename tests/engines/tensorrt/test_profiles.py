"""Optimization profiles: the buckets waste least, by brute force, and every shape finds the smallest that holds it."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Binding, Profile
from engines.tensorrt.profiles import (
    STEP,
    choose_buckets,
    default_profiles,
    parse_profile,
    pick,
    profiles_for,
    profiles_from_lengths,
    require_positions,
)
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.errors import EngineError


def padded(lengths: Sequence[int], edges: Sequence[int]) -> int:
    return sum(min(edge for edge in edges if edge >= length) for length in lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_buckets_of_the_same_number_pad_less(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(length) for length in np.minimum(128, rng.geometric(0.04, size=60))]
    grid = range(STEP, 129, STEP)
    top = -(-max(lengths) // STEP) * STEP
    every = [
        (*rest, top) for size in range(count) for rest in combinations([edge for edge in grid if edge < top], size)
    ]
    best = min(padded(lengths, edges) for edges in every)
    buckets = choose_buckets(lengths, count, 128)
    assert len(buckets) <= count
    assert padded(lengths, buckets) == best


def test_profiles_hold_every_length_up_to_the_models_limit() -> None:
    profiles = profiles_from_lengths([10, 12, 30, 100], 512, count=2)
    assert [profile.maximum[1] for profile in profiles] == [32, 112, 512]
    assert {profile.minimum for profile in profiles} == {(1, 1)}
    with pytest.raises(EngineError, match="lengths run from 10 to 600 tokens, and the model takes 1 to 512"):
        profiles_from_lengths([10, 600], 512)
    with pytest.raises(EngineError, match="at least one length"):
        profiles_from_lengths([], 512)


def test_a_shape_goes_to_the_smallest_profile_that_holds_it() -> None:
    profiles = [
        Profile((1, 1), (8, 32), (8, 32)),
        Profile((1, 1), (8, 128), (32, 128)),
        Profile((1, 33), (8, 64), (8, 64)),
    ]
    assert pick(profiles, 8, 32) == 0
    assert pick(profiles, 9, 32) == 1
    assert pick(profiles, 8, 33) == 2
    assert pick(profiles, 1, 129) is None


@pytest.mark.parametrize(
    ("longest", "tokens", "expected"),
    [
        (64, MAX_BATCH_TOKENS, [((8, 64), (32, 64))]),
        (512, MAX_BATCH_TOKENS, [((8, 128), (32, 512))]),
        (1536, MAX_BATCH_TOKENS, [((8, 128), (32, 512)), ((2, 768), (10, 1536))]),
        (8192, MAX_BATCH_TOKENS, [((8, 128), (32, 512)), ((2, 1024), (8, 2048)), ((1, 4096), (2, 8192))]),
        (8192, 1024, [((2, 128), (2, 512)), ((1, 1024), (1, 2048)), ((1, 4096), (1, 8192))]),
    ],
)
def test_default_profiles_hold_a_budget_of_tokens(
    longest: int, tokens: int, expected: list[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    profiles = default_profiles(longest, tokens)
    assert [(profile.optimum, profile.maximum) for profile in profiles] == expected
    assert {profile.minimum for profile in profiles} == {(1, 1)}
    require_positions(profiles, longest)


@given(st.integers(1, 20_000), st.integers(1, 100_000))
def test_default_profiles_take_every_length_and_no_batch_beyond_the_budget(longest: int, tokens: int) -> None:
    profiles = default_profiles(longest, tokens)
    assert profiles[-1].maximum[1] == longest
    for profile in profiles:
        rows, length = profile.maximum
        assert rows == 1 or rows * length <= tokens
        assert rows == 32 or (rows + 1) * length > tokens
    for length in (1, longest // 2 + 1, longest):
        chosen = pick(profiles, 1, length)
        assert chosen == next(i for i, profile in enumerate(profiles) if profile.maximum[1] >= length)


def test_profiles_from_lengths_hold_the_budget_too() -> None:
    profiles = profiles_from_lengths([16, 8192], 8192, count=2)
    assert [profile.maximum for profile in profiles] == [(32, 16), (2, 8192)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((-1, 8192), ((1, 8192), (1, 8192), (2, 8192))), ((4, -1), ((4, 1), (4, 128), (4, 512)))],
)
def test_a_graph_with_a_fixed_size_gets_the_rows_of_its_own_length(
    shape: tuple[int, int], expected: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    profiles = profiles_for((), tmp_path, [Binding("input_ids", "int64", shape)])
    assert [(profile.minimum, profile.optimum, profile.maximum) for profile in profiles] == [expected]


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "x8", "1x1,8x128", "axb", "8x8x8", "1x1,0x4,8x8", "1x1,9x4,8x8", "1_0x8", "８x8"]
)
def test_nonsense_profiles_are_refused(text: str) -> None:
    with pytest.raises(EngineError, match=r"not a profile|must rise from 1"):
        parse_profile(text)


def test_profiles_are_read_and_held_against_the_positions() -> None:
    assert parse_profile("8x128") == Profile((1, 1), (8, 128), (8, 128))
    assert parse_profile("1x1,8x128,32x512") == Profile((1, 1), (8, 128), (32, 512))
    require_positions(default_profiles(64), 64)
    with pytest.raises(EngineError, match="goes to 512 tokens, and the model takes at most 64"):
        require_positions([parse_profile("8x512")], 64)
