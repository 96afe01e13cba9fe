"""How many rows of a length run at once: a budget of tokens, not a number of rows.

A batch of 32 rows is 4096 tokens of short sentences and 262,144 of long documents. So wherever something chooses a
batch by itself (an engine's profiles, a comparison, a server) it takes as many rows as `MAX_BATCH_TOKENS` hold, and
never more than `MAX_ROWS`: 32x512, 8x2048, 2x8192 (rows x tokens). Attention still grows with the square of a length.
"""

from __future__ import annotations

from nxm_export.errors import DataError

MAX_BATCH_TOKENS = 16_384
MAX_ROWS = 32
# Of a batch that one thread runs beside others. Fewer or many more tokens cost more for each (docs/performance.md).
THREAD_BATCH_TOKENS = 512
DEFAULT_MAX_LENGTH = 512  # tokens of a text in training, where nobody asks for more
BATCH_TOKENS_HELP = (
    f"Rows x tokens of a batch at most, at least one row: with {MAX_BATCH_TOKENS} that is 32x512, 8x2048 or 2x8192."
)


def rows_within(length: int, tokens: int = MAX_BATCH_TOKENS, most: int = MAX_ROWS) -> int:
    """Rows of `length` tokens of a batch with at most `tokens`: at least one, and at most `most`.

    Raises `DataError` for numbers below 1.
    """
    if min(length, tokens, most) < 1:
        raise DataError(f"a batch has at least one row of one token, got {most} rows, {length} long, of {tokens}")
    return max(1, min(most, tokens // length))
