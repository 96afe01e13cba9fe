"""Texts without labels, to be answered: what `nxm predict` reads of a data file."""

from __future__ import annotations

from pathlib import Path

from nxm_export.contract.tasks import Task
from nxm_export.data.columns import (
    TOKEN_COLUMNS,
    Columns,
    note_unread_text,
    require_distinct,
    second_text_of,
    text_columns,
    text_of,
)
from nxm_export.data.examples import column_names
from nxm_export.data.question_answering import load_questions
from nxm_export.data.readers import FORMATS, format_of, no_file, read_rows, read_table
from nxm_export.data.token_labels import joined
from nxm_export.errors import DataError

# A text; a pair: (text, second text), (query, document), (question, context); or, for tags, a text as its tokens.
Text = str | tuple[str, str] | list[str]


def read_texts(source: str | Path, columns: Columns, task: Task) -> list[Text]:
    """The texts of a data file, in its order, as a task reads them; labels that it may have are not looked at.

    Columns are those of training data. A task that reads one text at a time gets the first of two columns; one that
    gives tags gets lists of tokens where the file has them. Raises `DataError` with file and line.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: {no_file(path)}; give a {', '.join(FORMATS)} file with the texts")
    if task.output_kind == "span":
        return _questions(path, columns)
    rows = list(read_rows(path) if task.label == "tags" else read_table(path))
    if not rows:
        raise DataError(f"{path}: no texts in it; the file is empty or has only a header")
    names = column_names(rows)
    tokens = next((name for name in TOKEN_COLUMNS if name in names), None)
    if task.label == "tags" and columns.text is None and tokens is not None:
        return [_tokens(row.get(tokens), tokens, place) for place, row in rows]
    first, second = text_columns(columns, names, path)
    if second is None and task.texts != "one" and task.label != "tags":
        note_unread_text(rows, first, columns, path)
    if second is None or task.texts == "one" or task.label == "tags":
        return [text_of(row, first, place) for place, row in rows]
    read_second = text_of if task.texts == "two" else second_text_of
    pairs = [(text_of(row, first, place), read_second(row, second, place)) for place, row in rows]
    # GLUE's single-sentence files as some mirrors write them have an empty second column.
    if task.texts == "any" and not any(pair[1] for pair in pairs):
        return [text for text, _ in pairs]
    return [*pairs]


def _questions(path: Path, columns: Columns) -> list[Text]:
    question, context = columns.text or "question", columns.pair or "context"
    if format_of(path) == ".json":  # SQuAD's own form
        raw = load_questions(str(path), columns, answered=False)
        return list(zip(raw.texts, raw.pairs or [], strict=True))
    pairs: list[Text] = []
    for place, row in read_table(path):
        for column, flag in ((question, "--text-column"), (context, "--pair-column")):
            if column not in row:
                raise DataError(f"{place}: no column {column!r}; it has {', '.join(row)}; name it with {flag}")
        require_distinct((question, context), place)
        pairs.append((text_of(row, question, place), text_of(row, context, place)))
    if not pairs:
        raise DataError(f"{path}: no questions in it; the file is empty or has only a header")
    return pairs


def _tokens(tokens: object, column: str, place: str) -> list[str]:
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(f"{place}: column {column!r} holds {tokens!r}; tokens are a list of texts")
    return tokens


def text_read(row: Text) -> str | tuple[str, str]:
    """What places in an answer count characters of: the text, that of its tokens (`joined`), or the pair."""
    return joined(row) if isinstance(row, list) else row
