"""Ranges of numbers say exactly the numbers that they were made of."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from nxm_export.contract.block_ranges import ranges


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40)))
def test_the_numbers_can_be_read_back(numbers: list[int]) -> None:
    text = ranges(numbers)
    ends = [part.split("-") for part in text.split(",") if part]
    read = [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]
    assert read == sorted(set(numbers))
    assert all(int(right[0]) > int(left[-1]) + 1 for left, right in pairwise(ends)), "runs are whole"


def test_they_are_short() -> None:
    assert ranges([5, 0, 1, 2, 1]) == "0-2,5"
    assert ranges([0, 2], ", ") == "0, 2"
    assert ranges([]) == ""
