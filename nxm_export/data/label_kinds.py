"""What the label of one example can be, task by task: a class, a score, several classes, a tag for every token, the
similarity of a pair, how relevant a document is to its query, or answers.

A `LabelKind` is the one place that knows how such a label is written in a data file, which names a head needs for it,
and what it becomes in `Examples`. A task names its kind (`nxm_export.contract.tasks.Task.label`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from nxm_export.contract.tasks import Task
from nxm_export.data.columns import Columns, DataRow, label_text, text_of, value_of, without_point
from nxm_export.data.examples import (
    Cell,
    Examples,
    RawExamples,
    RawLabel,
    as_read,
    class_names,
    index_of,
    load_raw,
    scores_of,
    unknown_label,
    with_classes,
    with_scores,
)
from nxm_export.data.question_answering import Answer, answers_of, load_questions, windows
from nxm_export.data.readers import TAG
from nxm_export.data.token_labels import NO_LABEL, OUTSIDE
from nxm_export.errors import DataError, notice, some
from nxm_export.storage.json_files import parse_json

SPAN_ENDS = ("start", "end")  # what the two outputs of a head for answers stand for
NO_CLASS = ("-1", str(NO_LABEL))  # what stands for a missing label, in GLUE's test data and in tensors


@dataclass(frozen=True)
class Classes:
    """The classes of a head by index (`names`), and which of them a label of the data means (`index`).

    `numbered`: the data has numbers, which are taken for indices of the head; nothing but the score tells whether the
    data count the classes in that order.
    """

    names: tuple[str, ...]
    index: Mapping[str, int]
    numbered: bool = False


@dataclass(frozen=True)
class LabelKind:
    """How one kind of label is read (`cell`: row, column, place), named and turned into numbers.

    `names` gives the class names of a training file, `apply` the examples for the index of every name. `per_token`
    labels have one tag for every token of a pre-split text, which stands in the column that is otherwise the text.
    `several` classes may be one text in the file.
    `pairs` need a second text; where the model reads the two `separate`, each is an example of its own, and training
    data needs neither pair nor label. `load` reads a file in which labels are more than a cell each.
    """

    cell: Cell
    names: Callable[[RawExamples], list[str]] | None
    apply: Callable[[RawExamples, Mapping[str, int]], Examples]
    per_token: bool = False
    several: bool = False
    pairs: bool = False
    separate: bool = False
    load: Callable[[str, Columns], RawExamples] | None = None


def load_labelled(
    source: str,
    split: str,
    columns: Columns,
    task: Task,
    head: Sequence[str] | None = None,
    *,
    texts_alone: bool = False,
) -> RawExamples:
    """Read a data file (or a GLUE task) whose labels are of this task's kind; raises `DataError` with file and line.

    Labels that the map of `columns` names are what it says. Rows without a label (-1, unless the `head` or the map has
    a class of that name) and without tokens are left out. With `texts_alone` labels are not read, whatever they are:
    rows without one are calibration text like any other, and questions without an answer tell nothing of the model.
    """
    kind = LABELS[task.label]
    if columns.label_map and (kind.names is None or kind.load is not None):
        raise DataError(f"{source}: task {task.name} has no classes that labels could stand for; drop --label-map")
    if texts_alone:
        return load_unlabelled(source, columns, task)
    if kind.load is not None:
        return kind.load(source, columns)
    if kind.pairs:
        plain = kind.separate and split == "train"
        raw = _require_pairs(load_raw(source, split, columns, label=kind.cell, unlabelled=True), task, plain)
        return raw if plain or _has_labels(raw) else load_raw(source, split, columns, label=kind.cell)
    if not kind.per_token:
        raw = _require_text(load_raw(source, split, columns, label=kind.cell))
        if kind.names is None:
            return raw
        raw = _separated(raw, head or ()) if kind.several else raw
        mapped = _mapped(_without_hot_rows(raw), columns.label_map)
        return _without_unlabelled(mapped, {*columns.label_map.values(), *_as_labels(head or ())})
    _require_no_pair_column(source, columns, task)
    raw = load_raw(source, split, columns, label=kind.cell, tokens=_tokens)
    return _mapped(_aligned(raw), columns.label_map)


def load_unlabelled(source: str, columns: Columns, task: Task) -> RawExamples:
    """The texts of a data file (or a GLUE task) as this task's model reads them; labels are not read, and need not be
    there. Raises `DataError` with file and line."""
    kind, columns = LABELS[task.label], replace(columns, label=None)
    if kind.load is not None:
        return load_questions(source, columns, answered=False)
    if kind.per_token:
        _require_no_pair_column(source, columns, task)
        return _with_tokens(load_raw(source, "train", columns, tokens=_tokens, reads_labels=False))
    raw = load_raw(source, "train", columns, reads_labels=False)
    return _require_pairs(raw, task, kind.separate) if kind.pairs else _require_text(raw)


def _require_text(raw: RawExamples) -> RawExamples:
    if not any(text.strip() for text in (*raw.texts, *(raw.pairs or ()))):
        raise DataError(f"{raw.source}: every text is empty; name the column that has them with --text-column")
    return raw


def _require_no_pair_column(source: str, columns: Columns, task: Task) -> None:
    if columns.pair is not None:
        raise DataError(f"{source}: task {task.name} takes one text; drop --pair-column")


def unlabelled(texts: list[str], pairs: list[str] | None, source: str, task: Task) -> Examples:
    """Examples without labels, as the model reads them: theirs are NaN, or no answers, which say nothing of whether a
    model may give none. What is scored together is a group, as with labels."""
    kind, none = LABELS[task.label], [math.nan] * len(texts)
    if kind.load is not None:
        return Examples(texts, pairs, [()] * len(texts), source, encoder=windows)
    if kind.separate and pairs is not None:
        return _separate(texts, pairs, none, source)
    return Examples(texts, pairs, none, source, groups=_by_query(texts) if task.label == "relevance" else None)


def _has_labels(raw: RawExamples) -> bool:
    """Whether any row of a file has a label."""
    return any(label is not None for label in raw.labels)


def classes_of(raw: RawExamples, task: Task, head: Sequence[str] | None) -> Classes | None:
    """The classes of the examples: the head's, by name or else by number; without a head, those of the data. None for
    tasks without classes. Labels that fit neither are left to `labelled`, which names their line."""
    kind = LABELS[task.label]
    if kind.names is None:
        return None
    if head is None:
        names = tuple(kind.names(raw))
        return Classes(names, index_of(names))
    by_name = _as_labels(head)
    used = _used(raw) - ({*NO_CLASS} if kind.per_token else set())
    if kind.per_token:
        by_name = {**{tag: by_name[form] for tag in used for form in _forms(tag)[::-1] if form in by_name}, **by_name}
    by_number = {str(i): i for i in range(len(head))}
    numbered = bool(used) and used <= set(by_number) and not used <= set(by_name)
    if numbered:
        shown = ", ".join(f"{i} is {name!r}" for i, name in enumerate(head[:10])) + ", ..." * (len(head) > 10)
        notice(f"{raw.source}: labels are numbers, taken for those of the model's classes: {shown}")
    return Classes(tuple(head), by_number if numbered else by_name, numbered)


def _as_labels(head: Sequence[str]) -> dict[str, int]:
    """Indices of a head's classes by what a label of them may be: the name, and of one such as ``1.00`` the number that
    data is read as."""
    names, numbers = index_of(head), {without_point(name.strip()): i for i, name in enumerate(head)}
    return names if len(numbers) < len(head) else {**names, **numbers, **names}  # the names first, where they are shown


def labelled(raw: RawExamples, task: Task, classes: Classes | None) -> Examples:
    """The examples with their labels as numbers; raises `DataError` with the line of one that does not fit."""
    return LABELS[task.label].apply(raw, {} if classes is None else classes.index)


def _forms(tag: str) -> tuple[str, ...]:
    """A tag, the same in BIOES and BILOU, and the one of BIO that marks the same entity, in order of preference."""
    mark, separator, name = tag.partition("-")
    others = {"L": "EI", "E": "LI", "U": "SB", "S": "UB"}.get(mark, "")
    return (tag, *(f"{other}{separator}{name}" for other in others))


def _mapped(raw: RawExamples, label_map: Mapping[str, str]) -> RawExamples:
    """The examples with every label replaced by what the map says it stands for."""
    if not label_map:
        return raw
    used, label_map = _used(raw), {**{without_point(label): name for label, name in label_map.items()}, **label_map}
    if not used & set(label_map) and not used <= set(label_map.values()):
        raise DataError(f"{raw.source}: no label is {min(label_map)!r}, as --label-map says; it has {some(used)}")

    def meant(label: RawLabel) -> RawLabel:
        if isinstance(label, str):
            return label_map.get(label, label)
        return tuple(label_map.get(name, name) for name in _texts(label))

    return replace(raw, labels=[meant(label) for label in raw.labels])


def _without_unlabelled(raw: RawExamples, stated: set[str]) -> RawExamples:
    """The examples that have a label: -1 stands for none, unless it is one of the `stated` names of classes."""
    keep = [not set(_texts(label)) & (set(NO_CLASS) - stated) for label in raw.labels]
    if all(keep):
        return raw
    advice = "if -1 is a class, say so with --label-map=-1=NAME"
    if len({label for label, kept in zip(raw.labels, keep, strict=True) if kept}) < 2:
        raise DataError(
            f"{raw.source}: {keep.count(False)} of {len(keep)} labels are -1, which stands for no label, and the "
            f"others are no two classes; {advice}"
        )
    notice(f"{raw.source}: {keep.count(False)} of {len(keep)} rows are left out: -1 stands for no label; {advice}")
    return raw.kept(keep)


def _without_hot_rows(raw: RawExamples) -> RawExamples:
    """Labels as names where the file has a row of 0 and 1 for every example, an entry for each class."""
    rows = [label for label in raw.labels if not isinstance(label, str)]
    widths = {len(_texts(row)) for row in rows}
    if len(rows) < len(raw.labels) or len(widths) != 1 or min(widths) < 2:
        return raw
    if not {name for row in rows for name in _texts(row)} <= {"0", "1"}:
        return raw
    labels = [tuple(str(i) for i, hot in enumerate(_texts(row)) if hot == "1") for row in rows]
    return replace(raw, labels=labels, width=min(widths))


def read_by_model(raw: RawExamples, task: Task) -> list[str | tuple[str, str]]:
    """What the model reads, sample by sample: a text, or a pair of texts at once."""
    if raw.pairs is not None and LABELS[task.label].separate:
        return [text for pair in zip(raw.texts, raw.pairs, strict=True) for text in pair]
    return list(as_read(raw.texts, raw.pairs))


def _require_pairs(raw: RawExamples, task: Task, plain: bool) -> RawExamples:
    """Refuse what is no pair of texts; with `plain`, single texts will do."""
    if raw.pairs is None and not plain:
        raise DataError(
            f"{raw.source}: task {task.name} is scored on pairs of texts, and there is one text a row; name both "
            "columns with "
            "--text-column and --pair-column"
        )
    for i, place in enumerate(raw.places):
        if not raw.texts[i].strip() or (raw.pairs is not None and not raw.pairs[i].strip()):
            raise DataError(f"{place}: a text is empty; fix the row or remove it")
    return raw


def _with_pair_score(raw: RawExamples, _: Mapping[str, int]) -> Examples:
    """Two examples for each pair, one for each text, in a group; a text without a partner is in none. Scores that the
    file does not have are NaN: they are for the metric alone."""
    if raw.pairs is None:
        return Examples(raw.texts, None, [math.nan] * len(raw.texts), raw.source)
    scored = all(label is not None for label in raw.labels)
    scores = scores_of(raw) if scored else [math.nan] * len(raw.texts)
    return _separate(raw.texts, raw.pairs, scores, raw.source)


def _separate(texts: Sequence[str], pairs: Sequence[str], scores: Sequence[float], source: str) -> Examples:
    singles = [text for pair in zip(texts, pairs, strict=True) for text in pair]
    groups = [i for i in range(len(texts)) for _ in range(2)]
    return Examples(singles, None, [scores[i] for i in groups], source, groups=groups)


def _with_relevance(raw: RawExamples, _: Mapping[str, int]) -> Examples:
    """Candidates, those of one query (an equal text) in a group; relevance as a share of the file's highest, because
    the loss takes probabilities and the metric any scale."""
    grades = scores_of(raw)
    for grade, place in zip(grades, raw.places, strict=True):
        if grade < 0:
            raise DataError(f"{place}: relevance {grade:g} is negative; 0 is the least: not relevant")
    highest = max(grades)
    if highest == 0:
        raise DataError(f"{raw.source}: no document is relevant to its query; is --label-column the right one?")
    shares = [[grade / highest] for grade in grades]
    return Examples(raw.texts, raw.pairs, shares, raw.source, groups=_by_query(raw.texts))


def _by_query(queries: Sequence[str]) -> list[int]:
    """The candidates of an equal query are a group."""
    numbers = {query: i for i, query in enumerate(dict.fromkeys(queries))}
    return [numbers[query] for query in queries]


def _used(raw: RawExamples) -> set[str]:
    """Every class name that the labels hold."""
    return {name for label in raw.labels for name in _texts(label)}


def _texts(label: RawLabel) -> tuple[str, ...]:
    """A label of one text or of several, as texts."""
    return (label,) if isinstance(label, str) else cast("tuple[str, ...]", label)


def _several(row: DataRow, column: str, place: str) -> str | tuple[str, ...]:
    """Class names of one example: a JSON list, none at all is an answer, too; or text with several names, as it is: the
    whole file says what separates them (`_separated`)."""
    value = value_of(row, column, place)
    if isinstance(value, str) and value.strip().startswith("["):
        value = parse_json(value, f"{place}: labels {value!r:.80}", "fix the row", DataError, foreign=True)
    if isinstance(value, str):
        return text_of(row, column, place)
    parts: list[object]
    if isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, int):
        parts = [value]
    else:
        raise DataError(f"{place}: labels {value!r} are neither names nor a list of names")
    return tuple(label_text({column: int(part) if isinstance(part, bool) else part}, column, place) for part in parts)


def _separated(raw: RawExamples, head: Sequence[str]) -> RawExamples:
    """The examples with texts of several class names split: at ``;`` where the file has one or a name of the `head`
    has a comma, else at commas. Raises `DataError` where something else seems to stand between names."""
    cells = [label for label in raw.labels if isinstance(label, str)]
    names_have_commas = any("," in name and name.strip() in map(str.strip, cells) for name in head)
    mark = ";" if names_have_commas or any(";" in cell for cell in cells) else ","

    def split(label: RawLabel, place: str) -> RawLabel:
        if not isinstance(label, str):
            return label
        parts = label.split(mark) if label.strip() else []
        return tuple(label_text({"label": part}, "label", place) for part in parts)

    separated = replace(raw, labels=[split(label, place) for label, place in zip(raw.labels, raw.places, strict=True)])
    others = (",",) if mark == ";" else ("|",) if any("," in cell for cell in cells) else ("|", " ")
    names = {*head, *_used(separated)}
    for cell, place in zip(raw.labels, raw.places, strict=True):
        for other in others if isinstance(cell, str) and cell.strip() not in head else ():
            parts = {part.strip() for part in str(cell).split(other)} - {""}
            if len(parts) > 1 and (other == "|" or parts <= names):
                raise DataError(
                    f"{place}: label {cell!r:.80} reads like several labels with {other!r} between them; put ; between "
                    "labels, or write them as a JSON list"
                )
    return separated


def _several_names(train: RawExamples) -> list[str]:
    if train.width is not None:
        return [str(i) for i in range(train.width)]
    singles = [(name, place) for label, place in zip(train.labels, train.places, strict=True) for name in _texts(label)]
    if not singles:
        raise DataError(f"{train.source}: no example has a label; is --label-column the right one?")
    return class_names(replace(train, labels=[name for name, _ in singles], places=[place for _, place in singles]))


def _with_several(raw: RawExamples, index: Mapping[str, int]) -> Examples:
    count = len(set(index.values()))
    if raw.width not in (None, count):
        raise DataError(f"{raw.source}: labels are rows of {raw.width} times 0 or 1, and the model has {count} classes")
    rows = []
    for names, place in zip(map(_texts, raw.labels), raw.places, strict=True):
        unknown = next((name for name in names if name not in index), None)
        if unknown is not None:
            raise unknown_label(unknown, place, index)
        if len(set(names)) < len(names):
            raise DataError(f"{place}: labels {list(names)} name a class twice; fix the row")
        classes = {index[name] for name in names}
        rows.append([float(i in classes) for i in range(count)])
    return Examples(raw.texts, raw.pairs, rows, raw.source)


def _strings(row: DataRow, column: str, place: str, what: str) -> tuple[str, ...]:
    value = value_of(row, column, place)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{place}: column {column!r} holds {value!r}; {what} are a list, one entry a token")
    return tuple(  # texts as they are; numbers as labels are written
        (text_of if isinstance(item, str) else label_text)({column: item}, column, place) for item in value
    )


def _tokens(row: DataRow, column: str, place: str) -> tuple[str, ...]:
    tokens = _strings(row, column, place, "tokens")
    if "" in tokens:
        raise DataError(f"{place}: token {tokens.index('')} is empty; fix the row")
    return tokens


def _tags(row: DataRow, column: str, place: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in _strings(row, column, place, "tags"))


def _aligned(raw: RawExamples) -> RawExamples:
    """The sentences that have tokens, each with a tag for every token."""
    assert raw.tokens is not None
    for tokens, tags, place in zip(raw.tokens, map(_texts, raw.labels), raw.places, strict=True):
        if len(tokens) != len(tags):
            raise DataError(f"{place}: {len(tokens)} tokens and {len(tags)} tags; every token needs one tag")
    return _with_tokens(raw)


def _with_tokens(raw: RawExamples) -> RawExamples:
    """The sentences that have tokens."""
    assert raw.tokens is not None
    if not any(raw.tokens):
        raise DataError(f"{raw.source}: no sentence has a token")
    return raw.kept([bool(tokens) for tokens in raw.tokens])


def _tag_names(train: RawExamples) -> list[str]:
    """``O`` first, then the others in order; raises `DataError` for tags that do not mark entities."""
    for names, place in zip(train.labels, train.places, strict=True):
        for tag in _texts(names):
            if not (TAG.fullmatch(tag) or tag in NO_CLASS):
                raise DataError(
                    f"{place}: tag {tag!r} is none of O, B-NAME, I-NAME (or E-, S-, L-, U-); write the entities in one "
                    "of the IOB schemes, by name, or say what stands for what: --label-map 0=O,1=B-NAME"
                )
    tags = sorted(_used(train) - {OUTSIDE, *NO_CLASS})
    if not tags:
        raise DataError(f"{train.source}: every tag is {OUTSIDE}; there is no entity to learn")
    return [OUTSIDE, *tags]


def _with_tags(raw: RawExamples, index: Mapping[str, int]) -> Examples:
    known = {**dict.fromkeys(NO_CLASS, NO_LABEL), **index}
    rows = []
    for tags, place in zip(map(_texts, raw.labels), raw.places, strict=True):
        unknown = next((tag for tag in tags if tag not in known), None)
        if unknown is not None:
            raise unknown_label(unknown, place, index)
        rows.append([known[tag] for tag in tags])
    return Examples(raw.texts, None, rows, raw.source, tokens=raw.tokens)


def _with_answers(raw: RawExamples, _: Mapping[str, int]) -> Examples:
    answers = [cast("tuple[Answer, ...]", label) for label in raw.labels]
    threshold = None if all(answers) else 0.0  # said of the whole file, and so true of every part of it
    return Examples(raw.texts, raw.pairs, answers, raw.source, encoder=partial(windows, threshold=threshold))


LABELS: dict[str, LabelKind] = {
    "class": LabelKind(label_text, class_names, with_classes),
    "score": LabelKind(label_text, None, lambda raw, _: with_scores(raw)),
    "classes": LabelKind(_several, _several_names, _with_several, several=True),
    "tags": LabelKind(_tags, _tag_names, _with_tags, per_token=True),
    "pair-score": LabelKind(label_text, None, _with_pair_score, pairs=True, separate=True),
    "relevance": LabelKind(label_text, None, _with_relevance, pairs=True),
    "answers": LabelKind(answers_of, lambda _: list(SPAN_ENDS), _with_answers, load=load_questions),
}
