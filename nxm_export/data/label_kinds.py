"""What the label of one example can be, task by task: a class, a score, several classes, a tag for every token, the
similarity of a pair, how relevant a document is to its query, or answers.

A `LabelKind` is the one place that knows how such a label is written in a data file, which names a head needs for it,
and what it becomes in `Examples`. A task names its kind (`nxm_export.contract.tasks.Task.label`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from nxm_export.contract.tasks import Task
from nxm_export.data.examples import (
    Cell,
    Columns,
    DataRow,
    Examples,
    RawExamples,
    RawLabel,
    class_names,
    label_text,
    load_raw,
    scores_of,
    text_of,
    value_of,
    with_classes,
    with_scores,
)
from nxm_export.data.question_answering import Answer, answers_of, load_questions, windows
from nxm_export.errors import DataError

SPAN_ENDS = ("start", "end")  # what the two outputs of a head for answers stand for
OUTSIDE = "O"  # the tag of a token that belongs to no entity
_TAG = re.compile(r"O|[BIES]-\S+")


@dataclass(frozen=True)
class LabelKind:
    """How one kind of label is read (`cell`: row, column, place), named and turned into numbers.

    `names` gives the class names of a training file, `apply` the examples for given names. `per_token` labels have one
    tag for every token of a pre-split text, which stands in the column that is otherwise the text. `pairs` need a
    second text; where the model reads the two `separate`, each is an example of its own, and training data needs
    neither pair nor label. `load` reads a file in which labels are more than a cell each.
    """

    cell: Cell
    names: Callable[[RawExamples], list[str]] | None
    apply: Callable[[RawExamples, Sequence[str]], Examples]
    per_token: bool = False
    pairs: bool = False
    separate: bool = False
    load: Callable[[str, Columns], RawExamples] | None = None


def load_labelled(source: str, split: str, columns: Columns, task: Task) -> RawExamples:
    """Read a data file (or a GLUE task) whose labels are of this task's kind; raises `DataError` with file and line."""
    kind = LABELS[task.label]
    if kind.load is not None:
        return kind.load(source, columns)
    if kind.pairs:
        plain = kind.separate and split == "train"
        return _require_pairs(load_raw(source, split, columns, label=kind.cell, unlabelled=plain), task, plain)
    if not kind.per_token:
        return load_raw(source, split, columns, label=kind.cell)
    if columns.pair is not None:
        raise DataError(f"{source}: task {task.name} takes one text; drop --text-pair")
    return _require_aligned(load_raw(source, split, columns, text=_tokens, label=kind.cell, per_token=True))


def names_for(raw: RawExamples, task: Task, head: Sequence[str] | None) -> list[str] | None:
    """Class names for the examples: the head's, or its indices where the data labels by number; without a head, those
    of the data. None for tasks without classes."""
    kind = LABELS[task.label]
    if kind.names is None:
        return None
    if head is None:
        return kind.names(raw)
    numbers, used = [str(i) for i in range(len(head))], _used(raw)
    return numbers if used <= set(numbers) and not used <= set(head) else list(head)


def labelled(raw: RawExamples, task: Task, names: Sequence[str] | None) -> Examples:
    """The examples with their labels as numbers; raises `DataError` with the line of one that does not fit."""
    return LABELS[task.label].apply(raw, names or ())


def read_by_model(raw: RawExamples, task: Task) -> list[str | tuple[str, str]]:
    """What the model reads, sample by sample: a text, or a pair of texts at once."""
    if raw.pairs is None:
        return list(raw.texts)
    pairs = zip(raw.texts, raw.pairs, strict=True)
    return [text for pair in pairs for text in pair] if LABELS[task.label].separate else list(pairs)


def _require_pairs(raw: RawExamples, task: Task, plain: bool) -> RawExamples:
    """Refuse what is no pair of texts; with `plain`, single texts will do."""
    if raw.pairs is None and not plain:
        raise DataError(
            f"{raw.source}: task {task.name} is scored on pairs of texts, and there is one text a row; name both "
            "columns with "
            "--text and --text-pair"
        )
    for i, place in enumerate(raw.places):
        if not raw.texts[i].strip() or (raw.pairs is not None and not raw.pairs[i].strip()):
            raise DataError(f"{place}: a text is empty; fix the row or remove it")
    return raw


def _with_pair_score(raw: RawExamples, _: Sequence[str]) -> Examples:
    """Two examples for each pair, one for each text, in a group; a text without a partner is in none. Scores that the
    file does not have are NaN: they are for the metric alone."""
    if raw.pairs is None:
        return Examples(raw.texts, None, [math.nan] * len(raw.texts), raw.source)
    scored = all(label is not None for label in raw.labels)
    scores = scores_of(raw) if scored else [math.nan] * len(raw.texts)
    texts = [text for pair in zip(raw.texts, raw.pairs, strict=True) for text in pair]
    groups = [i for i in range(len(raw.texts)) for _ in range(2)]
    return Examples(texts, None, [scores[i] for i in groups], raw.source, groups=groups)


def _with_relevance(raw: RawExamples, _: Sequence[str]) -> Examples:
    """Candidates, those of one query (an equal text) in a group; relevance as a share of the file's highest, because
    the loss takes probabilities and the metric any scale."""
    grades = scores_of(raw)
    for grade, place in zip(grades, raw.places, strict=True):
        if grade < 0:
            raise DataError(f"{place}: relevance {grade:g} is negative; 0 is the least: not relevant")
    highest = max(grades)
    if highest == 0:
        raise DataError(f"{raw.source}: no document is relevant to its query; is --label the right column?")
    numbers = {query: i for i, query in enumerate(dict.fromkeys(raw.texts))}
    shares, groups = [[grade / highest] for grade in grades], [numbers[query] for query in raw.texts]
    return Examples(raw.texts, raw.pairs, shares, raw.source, groups=groups)


def _used(raw: RawExamples) -> set[str]:
    """Every class name that the labels hold."""
    return {name for label in raw.labels for name in _texts(label)}


def _texts(label: RawLabel) -> tuple[str, ...]:
    """A label of one text or of several, as texts."""
    return (label,) if isinstance(label, str) else cast("tuple[str, ...]", label)


def _several(row: DataRow, column: str, place: str) -> tuple[str, ...]:
    """Class names of one example: a JSON list, or text with ``;`` or ``,`` between them; none at all is an answer,
    too."""
    value = value_of(row, column, place)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{place}: labels {value!r} are no JSON list ({error}); fix the row") from error
    parts: list[object]
    if isinstance(value, str):
        parts = [*value.split(";" if ";" in value else ",")] if value.strip() else []
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, int):
        parts = [value]
    else:
        raise DataError(f"{place}: labels {value!r} are neither names nor a list of names")
    names = tuple(label_text({column: part}, column, place) for part in parts)
    if len(set(names)) < len(names):
        raise DataError(f"{place}: labels {list(names)} name a class twice; fix the row")
    return names


def _several_names(train: RawExamples) -> list[str]:
    singles = [(name, place) for label, place in zip(train.labels, train.places, strict=True) for name in _texts(label)]
    if not singles:
        raise DataError(f"{train.source}: no example has a label; is --label the right column?")
    return class_names(replace(train, labels=[name for name, _ in singles], places=[place for _, place in singles]))


def _with_several(raw: RawExamples, classes: Sequence[str]) -> Examples:
    index = {name: i for i, name in enumerate(classes)}
    rows = []
    for label, place in zip(map(_texts, raw.labels), raw.places, strict=True):
        for name in label:
            if name not in index:
                raise DataError(
                    f"{place}: label {name!r} is none of the model's classes {list(classes)[:10]}; fix the row, or "
                    "retrain with these labels"
                )
        rows.append([float(name in label) for name in classes])
    return Examples(raw.texts, raw.pairs, rows, raw.source)


def _strings(row: DataRow, column: str, place: str, what: str) -> list[str]:
    value = value_of(row, column, place)
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{place}: column {column!r} holds {value!r}; {what} are a list, one entry a token")
    return [text_of({column: item}, column, place) if isinstance(item, str) else str(item) for item in value]


def _tokens(row: DataRow, column: str, place: str) -> str:
    """The tokens with one space between them: what the model reads when it is served the same text."""
    tokens = _strings(row, column, place, "tokens")
    for token in tokens:
        if not token or len(token.split()) != 1 or token.split() != [token]:
            raise DataError(f"{place}: token {token!r} is empty or holds white space; fix the row")
    return " ".join(tokens)


def _tags(row: DataRow, column: str, place: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in _strings(row, column, place, "tags"))


def _require_aligned(raw: RawExamples) -> RawExamples:
    for text, tags, place in zip(raw.texts, map(_texts, raw.labels), raw.places, strict=True):
        if len(text.split(" ")) != len(tags):
            raise DataError(f"{place}: {len(text.split(' '))} tokens and {len(tags)} tags; every token needs one tag")
    return raw


def _tag_names(train: RawExamples) -> list[str]:
    """``O`` first, then the others in order; raises `DataError` for tags that do not mark entities."""
    for names, place in zip(train.labels, train.places, strict=True):
        for tag in _texts(names):
            if not _TAG.fullmatch(tag):
                raise DataError(
                    f"{place}: tag {tag!r} is none of O, B-NAME, I-NAME (or E-, S-); write the entities in one of the "
                    "IOB schemes, by name"
                )
    tags = sorted(_used(train) - {OUTSIDE})
    if not tags:
        raise DataError(f"{train.source}: every tag is {OUTSIDE}; there is no entity to learn")
    return [OUTSIDE, *tags]


def _with_tags(raw: RawExamples, classes: Sequence[str]) -> Examples:
    index = {name: i for i, name in enumerate(classes)}
    rows = []
    for tags, place in zip(map(_texts, raw.labels), raw.places, strict=True):
        unknown = next((tag for tag in tags if tag not in index), None)
        if unknown is not None:
            raise DataError(
                f"{place}: tag {unknown!r} is none of the model's classes {list(classes)[:10]}; fix the row, or "
                "retrain with these tags"
            )
        rows.append([index[tag] for tag in tags])
    return Examples(raw.texts, None, rows, raw.source, per_token=True)


def _with_answers(raw: RawExamples, _: Sequence[str]) -> Examples:
    answers = [cast("tuple[Answer, ...]", label) for label in raw.labels]
    return Examples(raw.texts, raw.pairs, answers, raw.source, encoder=windows)


LABELS: dict[str, LabelKind] = {
    "class": LabelKind(label_text, class_names, with_classes),
    "score": LabelKind(label_text, None, lambda raw, _: with_scores(raw)),
    "classes": LabelKind(_several, _several_names, _with_several),
    "tags": LabelKind(_tags, _tag_names, _with_tags, per_token=True),
    "pair-score": LabelKind(label_text, None, _with_pair_score, pairs=True, separate=True),
    "relevance": LabelKind(label_text, None, _with_relevance, pairs=True),
    "answers": LabelKind(answers_of, lambda _: list(SPAN_ENDS), _with_answers, load=load_questions),
}
