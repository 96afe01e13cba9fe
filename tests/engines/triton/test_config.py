"""The batch that a configuration allows; whole configurations are tried with the repository that holds them."""

from __future__ import annotations

import pytest

from engines.base import Profile
from engines.tensorrt.profiles import pick
from engines.triton.config import batch_size
from nxm_export.errors import ServeError


@pytest.mark.parametrize(
    ("shapes", "most"),
    [
        ([], 16),
        ([((1, 1), (32, 64))], 16),
        ([((1, 1), (8, 32)), ((1, 33), (4, 64))], 4),  # 8 rows of 40 tokens would fit nowhere
        ([((1, 1), (8, 64)), ((1, 33), (4, 64))], 8),
        ([((1, 1), (2, 64)), ((3, 1), (8, 64))], 8),
        ([((1, 1), (2, 64)), ((4, 1), (8, 64))], 2),  # 3 rows would fit nowhere
        ([((1, 1), (8, 32)), ((1, 48), (6, 64))], 6),  # lengths between profiles are nobody's
    ],
)
def test_every_batch_that_triton_may_make_fits_a_profile(
    shapes: list[tuple[tuple[int, int], tuple[int, int]]], most: int
) -> None:
    profiles = [Profile(low, high, high) for low, high in shapes]
    assert batch_size("m", profiles, 16) == most
    for length in {size for low, high in shapes for size in range(low[1], high[1] + 1)}:
        for rows in range(1, most + 1):
            assert pick(profiles, rows, length) is not None


def test_an_engine_that_takes_no_single_row_is_not_handed_over() -> None:
    with pytest.raises(ServeError, match="single row of 1 tokens"):
        batch_size("m", [Profile((2, 1), (8, 64), (8, 64))], 16)
