"""Rows of a batch by a budget of tokens."""

from __future__ import annotations

import pytest

from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, MAX_ROWS, rows_within
from nxm_export.errors import DataError


@pytest.mark.parametrize(
    ("length", "rows"), [(1, 32), (511, 32), (512, 32), (513, 31), (2048, 8), (8192, 2), (8193, 1), (10**6, 1)]
)
def test_the_default_budget_is_what_the_documents_say(length: int, rows: int) -> None:
    assert (MAX_BATCH_TOKENS, MAX_ROWS) == (16_384, 32)
    assert rows_within(length) == rows


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_less_than_one_row_of_one_token_is_no_batch(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="at least one row of one token"):
        rows_within(*numbers)
