"""Which columns of a data file hold what, and the cells in them.

A label counts without the spaces around it, and a whole number is the same class however it is written (1 and 1.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nxm_export.errors import DataError, notice, some

DataRow = Mapping[str, object]  # of a data file: cells by column
# The usual columns of text and second text, in order of preference: GLUE's own, then what else is common.
TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("query", "document"),
    ("query", "passage"),
    ("text", "text2"),
    ("text", "text_pair"),
    ("sentence", "sentence2"),
    ("sentence", None),
    ("text", None),
    ("sentence1", None),
)
LABEL_COLUMNS = ("label", "labels", "score", "relevance")
TOKEN_COLUMNS, TAG_COLUMNS = ("tokens", "words"), ("tags", "ner_tags", "labels")
_FIRST_ROWS = 20  # tell what a column holds
_MOST_DIGITS = 400  # the largest float has 309


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text, the second text and the label; None means the usual names. `label_map` says which
    class a label of the file stands for, where it is not the class's own name."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    label_map: Mapping[str, str] = field(default_factory=dict)


def text_columns(asked: Columns, names: list[str], path: Path) -> tuple[str, str | None]:
    """The columns of text and second text: as asked, else the first usual ones that are all there."""
    for column in filter(None, (asked.text, asked.pair)):
        _require_column(column, names, path)
    if asked.text:
        usual = next((second for first, second in TEXT_COLUMNS if first == asked.text and second in names), None)
        require_distinct((asked.text, asked.pair), path)
        return asked.text, asked.pair or usual
    for first, second in TEXT_COLUMNS:
        if first in names and (second is None or second in names):
            require_distinct((first, asked.pair), path)
            return first, asked.pair or second
    seconds = {first: [second for same, second in TEXT_COLUMNS if same == first] for first, _ in TEXT_COLUMNS}
    if alone := next((first for first in seconds if first in names), None):
        raise DataError(
            f"{path}: column {alone!r} goes with {' or '.join(map(str, seconds[alone]))}, and there is none among "
            f"{', '.join(names)}; name the text with --text-column, and a second one, a text a row, with --pair-column"
        )
    if len(names) == 1 and any(mark in names[0] for mark in ",;\t"):
        raise DataError(f"{path}: one column, {names[0]!r}; .csv has commas between columns, and .tsv tabs")
    usual_names = ", ".join(seconds)
    raise DataError(
        f"{path}: none of the usual text columns ({usual_names}) among {', '.join(names)}; name it with --text-column"
    )


def note_unread_text(rows: Sequence[tuple[str, DataRow]], text: str, asked: Columns, path: Path) -> None:
    """Say, as a `Notice`, which columns hold text and are neither `text`, the only one that is read, nor a label: one
    may be the second text of pairs.

    A column holds text where most of its first cells have several words.
    """
    first = [row for _, row in rows[:_FIRST_ROWS]]
    unread = {name for row in first for name in row} - {text, asked.label, *LABEL_COLUMNS}
    words = {name: [cell for row in first if isinstance(cell := row.get(name), str)] for name in unread}
    if columns := [
        name for name, cells in words.items() if 2 * sum(" " in cell.strip() for cell in cells) > len(first)
    ]:
        notice(
            f"{path}: nothing is read from {some(columns)}, which looks like text; name it with --pair-column if it is "
            "the second text of a pair"
        )


def only_column(asked: str | None, usual: Sequence[str], names: list[str], path: Path, what: str, flag: str) -> str:
    """The column of one thing: as asked, else the first usual one that is there; `flag` names it in an error."""
    if asked is not None:
        _require_column(asked, names, path)
        return asked
    for name in usual:
        if name in names:
            return name
    raise DataError(
        f"{path}: none of the usual {what} columns ({', '.join(usual)}) among {', '.join(names)}; name it with {flag}"
    )


def require_distinct(columns: Sequence[str | None], place: Path | str) -> None:
    """Raise `DataError` where one column is to be two of text, second text and label: it would be read twice without a
    word."""
    named = [column for column in columns if column is not None]
    twice = next((column for column in named if named.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"{place}: column {twice!r} cannot be two of text, second text and label; name others with --text-column, "
            "--pair-column and --label-column"
        )


def _require_column(name: str, names: list[str], path: Path) -> None:
    if name not in names:
        raise DataError(f"{path}: no column {name!r}; it has {', '.join(names)}")


def text_of(row: DataRow, column: str, place: str) -> str:
    """A cell that holds text; raises `DataError`."""
    value = value_of(row, column, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} holds {value!r}, which is no text")
    _require_characters(value, column, place)
    return value


def _require_characters(text: str, column: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: column {column!r} holds half a surrogate pair, which is no text; fix the row"
        ) from error


def second_text_of(row: DataRow, column: str, place: str) -> str:
    """A cell that holds a second text, which a row need not have."""
    return "" if row.get(column) is None else text_of(row, column, place)


def label_text(row: DataRow, column: str, place: str) -> str:
    """The label as text; whole numbers without the point that some tools write."""
    value = value_of(row, column, place)
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: label {value!r} is neither a name nor a number")
    if isinstance(value, float) and math.isinf(value):
        raise DataError(f"{place}: label {value} is no finite number, or too large for one; fix the row")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    _require_characters(text, column, place)
    text = without_point(text)
    if not text or text.lower() == "nan":
        raise DataError(f"{place}: the label is missing ({value!r}); fix the row or remove it")
    return text


def without_point(label: str) -> str:
    """A label as it counts: of a whole number that is written as ``1.`` or ``1.00`` the number alone."""
    whole, point, zeros = label.partition(".")
    return whole if point and not zeros.strip("0") and is_integer(whole) else label


def value_of(row: DataRow, column: str, place: str) -> object:
    """What a cell holds; a missing one is a `DataError`."""
    if row.get(column) is None:
        raise DataError(f"{place}: column {column!r} is missing in this row; every row needs it")
    return row[column]


def is_integer(text: str) -> bool:
    """Whether a text is a whole number in digits, with a minus or not; so many that Python makes no number of them are
    none."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS
