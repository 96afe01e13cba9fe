"""Task data: local files (`nxm_export.data.readers`) or a GLUE task from the hub, to samples of tokens.

A file is read once into `Examples` (texts and labels, in file order), with every complaint naming the file and line.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from nxm_export.contract.plain_numbers import real_number
from nxm_export.data.columns import (
    LABEL_COLUMNS,
    TAG_COLUMNS,
    TOKEN_COLUMNS,
    Columns,
    DataRow,
    is_integer,
    label_text,
    note_unread_text,
    only_column,
    require_distinct,
    second_text_of,
    text_columns,
    text_of,
)
from nxm_export.data.features import Features, Label, members, tokens_of
from nxm_export.data.readers import FORMATS, no_file, read_rows, read_table
from nxm_export.data.token_labels import erased_tokens, joined, piece_labels
from nxm_export.data.tokenization import Encoding, Tokenizer, cut_at
from nxm_export.errors import DataError, notice, some

Cell = Callable[[DataRow, str, str], "RawLabel"]  # row, column and place to what the cell holds
# A label as the file has it: text, several texts, or answers (text and where it begins); None where the file has none.
RawLabel = str | tuple[str, ...] | tuple[tuple[str, int], ...] | None
_MANY_CLASSES = 100  # more of them are believed where each has two samples, and none is a fraction
GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


@dataclass(frozen=True)
class Examples:
    """Texts (with a second text each, for pair tasks) and labels: class indices, floats for regression, a row of 0 and
    1 for several classes. With `tokens`, those that each text is joined of (`token_labels.joined`), a label is the list
    of their class indices.

    `groups` are numbers of what is scored together, such as the candidates of one query; None where every example is
    scored by itself. No part of the examples ever splits a group. `encoder` makes samples of them in a way of its own,
    with the parameters of `encode`: that of questions makes several of one example (see
    `nxm_export.data.question_answering`)."""

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[Label]
    source: str
    tokens: Sequence[Sequence[str]] | None = None
    groups: list[int] | None = None
    encoder: Callable[[Tokenizer, Examples, int, Sequence[str]], list[Features]] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order; `DataError` where that would split a group."""
        if self.groups is not None:
            whole, part = Counter(self.groups), Counter(self.groups[i] for i in indices)
            split = [group for group in part if part[group] != whole[group]]
            if split:
                raise DataError(
                    f"{self.source}: a part of it would split group {min(split)}, which is scored as a whole"
                )
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return replace(
            self,
            texts=[self.texts[i] for i in indices],
            pairs=pairs,
            labels=[self.labels[i] for i in indices],
            tokens=None if self.tokens is None else [self.tokens[i] for i in indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
        )

    def split(self, held_out: int, seed: int) -> tuple[Examples, Examples]:
        """(rest, held-out slice), shuffled by `seed`; the slice has `held_out` examples, and the rest of its last
        group."""
        units = members(self.groups, len(self))
        order, slice_ = random.Random(seed).sample(range(len(units)), len(units)), list[int]()
        while order and len(slice_) < held_out:
            slice_ += units[order.pop(0)]
        return self.subset([i for unit in order for i in units[unit]]), self.subset(sorted(slice_))

    def sample(self, count: int, seed: int) -> Examples:
        """At most `count` examples (whole groups), drawn by `seed`, in file order; `DataError` for a count below 1, and
        where no group is that small."""
        if count < 1:
            raise DataError(f"{self.source}: a sample has at least one example, got a limit of {count}")
        if count >= len(self):
            return self
        if self.groups is None:
            return self.subset(sorted(random.Random(seed).sample(range(len(self)), count)))
        units, drawn = members(self.groups, len(self)), list[int]()
        for unit in random.Random(seed).sample(units, len(units)):
            drawn += unit if len(drawn) + len(unit) <= count else []
        if not drawn:
            raise DataError(f"{self.source}: {count} examples are fewer than any group has; allow more of them")
        return self.subset(sorted(drawn))


@dataclass(frozen=True)
class RawExamples:
    """Examples whose labels are still the text of the file, or tuples of such; None where the file has no labels.
    `tokens` are those that texts are joined of, where labels belong to tokens; `width` is how many classes labels say
    yes or no to, where the file has them as rows of 0 and 1."""

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[RawLabel]
    places: list[str]
    source: str
    tokens: list[tuple[str, ...]] | None = None
    width: int | None = None

    def kept(self, keep: Sequence[bool]) -> RawExamples:
        """The examples that are to be kept."""
        return replace(
            self,
            texts=[text for text, kept in zip(self.texts, keep, strict=True) if kept],
            pairs=None if self.pairs is None else [text for text, kept in zip(self.pairs, keep, strict=True) if kept],
            labels=[label for label, kept in zip(self.labels, keep, strict=True) if kept],
            places=[place for place, kept in zip(self.places, keep, strict=True) if kept],
            tokens=None if self.tokens is None else [row for row, kept in zip(self.tokens, keep, strict=True) if kept],
        )


def load_raw(
    source: str,
    split: str,
    columns: Columns = Columns(),
    *,
    label: Cell | None = None,
    tokens: Callable[[DataRow, str, str], tuple[str, ...]] | None = None,
    unlabelled: bool = False,
    reads_labels: bool = True,
) -> RawExamples:
    """Read a data file, or the `split` (train or dev) of a GLUE task name; raises `DataError`.

    `label` reads a cell (row, column, place), by default as text; where `tokens` reads the text's, the usual columns
    are those of texts that are split into tokens. With `unlabelled` a file need not have labels, and without
    `reads_labels` nothing looks for them. See `nxm_export.data.label_kinds.load_labelled` for the data of a task.
    """
    path = Path(source)
    if not path.is_file() and source.lower() in GLUE_TASKS:
        path = _glue_file(source.lower(), split)
        columns = _glue_columns(source.lower(), columns)
    if not path.is_file():
        raise DataError(
            f"{source}: {no_file(path)}; give a {', '.join(FORMATS)} file or a GLUE task ({', '.join(GLUE_TASKS)})"
        )
    rows = list(read_rows(path) if tokens is not None else read_table(path))
    if not rows:
        raise DataError(f"{path}: no examples in it; the file is empty or has only a header")
    names, places, read_label = column_names(rows), [place for place, _ in rows], label or label_text
    if tokens is not None:
        first = only_column(columns.text, TOKEN_COLUMNS, names, path, "token", "--text-column")
        split_texts = [tokens(row, first, place) for place, row in rows]
        if not reads_labels or (unlabelled and not (columns.label or set(TAG_COLUMNS) & set(names))):
            tags: list[RawLabel] = [None] * len(rows)
        else:
            third = only_column(columns.label, TAG_COLUMNS, names, path, "tag", "--label-column")
            require_distinct((first, third), path)
            tags = [read_label(row, third, place) for place, row in rows]
        return RawExamples([joined(text) for text in split_texts], None, tags, places, str(path), split_texts)
    first, second = text_columns(columns, names, path)
    third_ = None
    if reads_labels and (not unlabelled or columns.label or set(LABEL_COLUMNS) & set(names)):
        flag = f"--label-column{_columns_of_classes(rows, names)}"
        third_ = only_column(columns.label, LABEL_COLUMNS, names, path, "label", flag)
    require_distinct((first, second, third_), path)
    if second is None:
        note_unread_text(rows, first, columns, path)
    texts = [text_of(row, first, place) for place, row in rows]
    pairs = [second_text_of(row, second, place) for place, row in rows] if second else None
    labels = [read_label(row, third_, place) if third_ else None for place, row in rows]
    # GLUE's single-sentence files as some mirrors write them have an empty second column.
    return RawExamples(texts, pairs if pairs and any(pairs) else None, labels, places, str(path))


def _columns_of_classes(rows: Sequence[tuple[str, DataRow]], names: Sequence[str]) -> str:
    """What to do with a column of 0 and 1 for every class, for an error; empty where there are not several."""
    flags = [
        name for name in names if all(str(row.get(name)).strip() in ("0", "1", "True", "False") for _, row in rows)
    ]
    if len(flags) < 2:
        return ""
    return (
        f"; {some(flags)} look like a column for every class: for --task multi-label, write the names of those that "
        "hold into one column, with ; between them"
    )


def column_names(rows: Sequence[tuple[str, DataRow]]) -> list[str]:
    """The columns of all rows: those of JSON need not have the same."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def class_names(train: RawExamples) -> list[str]:
    """The class labels of a training file, sorted (numerically when all are integers); at least two."""
    texts = {_one_text(label) for label in train.labels}
    names = sorted(texts, key=lambda label: (0, int(label), label) if is_integer(label) else (1, 0, label))
    if len(names) < 2:
        raise DataError(
            f"{train.source}: only one class, {names[0]!r}; a classifier needs at least two. Is --label-column "
            "the right one?"
        )
    fractions = all(real_number(name) is not None for name in names) and not all(is_integer(name) for name in names)
    if len(names) > _MANY_CLASSES and (fractions or len(train.labels) < 2 * len(names)):
        raise DataError(
            f"{train.source}: {len(names)} different labels in {len(train.labels)} rows; is this a regression (--task "
            "regression)?"
        )
    if fractions:
        notice(
            f"{train.source}: labels are numbers such as {next(n for n in names if not is_integer(n))}, and each of "
            f"{len(names)} is taken for a class of its own; scores are for --task regression"
        )
    return names


def index_of(names: Sequence[str]) -> dict[str, int]:
    """Class indices by name; labels have no space around them, and names of a model may."""
    own = {name: i for i, name in enumerate(names)}
    stripped = {name.strip(): i for i, name in enumerate(names)}
    return stripped | own if len(stripped) == len(own) else own


def with_classes(raw: RawExamples, index: Mapping[str, int]) -> Examples:
    """Turn label texts into class indices; a label outside of `index` is a `DataError` with its line."""
    labels = []
    for label, place in zip(map(_one_text, raw.labels), raw.places, strict=True):
        if label not in index:
            raise unknown_label(label, place, index)
        labels.append(index[label])
    return Examples(raw.texts, raw.pairs, labels, raw.source)


def unknown_label(label: str, place: str, index: Mapping[str, int]) -> DataError:
    """The error for a label that is no class of the model."""
    scores = real_number(label) is not None and not is_integer(label)
    return DataError(
        f"{place}: label {label!r} is none of the model's classes {list(index)[:10]}; fix the row, say which class it "
        f"stands for with --label-map, or retrain with these labels{'; scores are for --task regression' * scores}"
    )


def with_scores(raw: RawExamples) -> Examples:
    """The examples with `scores_of` them."""
    return Examples(raw.texts, raw.pairs, scores_of(raw), raw.source)


def scores_of(raw: RawExamples) -> list[float]:
    """Label texts as regression scores; anything that is not a finite number is a `DataError` with its line."""
    scores = []
    for label, place in zip(map(_one_text, raw.labels), raw.places, strict=True):
        score = real_number(label)
        if score is None:
            raise DataError(
                f"{place}: label {label!r:.80} is not a finite number in plain digits, such as 2.5; fix the row, or is "
                "this a classification (--task classification)?"
            )
        scores.append(score)
    return scores


def _one_text(label: RawLabel) -> str:
    """A label that is one text, as `label_text` reads it."""
    assert isinstance(label, str)
    return label


def encode(
    tokenizer: Tokenizer, examples: Examples, max_length: int, inputs: Sequence[str], *, says_cuts: bool = False
) -> list[Features]:
    """Token features per example (per window of one, for questions), not padded: those of `inputs`, ``labels``, and
    ``group`` where examples have one.

    `tokenizer` is a `tokenizers.Tokenizer`: training and serving go through the same code. With `says_cuts` a notice
    says how many texts are cut: of a file somebody should know, a server should not say it for every request. Raises
    `DataError` when `max_length` tokens have no room for text.
    """
    if examples.encoder is not None:
        return examples.encoder(tokenizer, examples, max_length, inputs)
    special = tokenizer.num_special_tokens_to_add(examples.pairs is not None)
    if max_length <= special:  # the tokenizer would then not truncate at all
        raise DataError(
            f"max length {max_length} leaves no room for text beside {special} special tokens; raise --max-length"
        )
    cut_at(tokenizer, max_length)
    encodings = tokenizer.encode_batch(list(as_read(examples.texts, examples.pairs)))
    if says_cuts and (cut := sum(bool(encoding.overflowing) for encoding in encodings)):
        notice(f"{examples.source}: {cut} of {len(encodings)} texts are longer than {max_length} tokens, and cut there")
    labels = examples.labels if examples.tokens is None else _token_labels(examples, examples.tokens, encodings)
    made: list[Features] = [
        {**tokens_of(encoding, inputs), "labels": label} for encoding, label in zip(encodings, labels, strict=True)
    ]
    if examples.groups is None:
        return made
    return [{**sample, "group": group} for sample, group in zip(made, examples.groups, strict=True)]


def as_read(texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[str | tuple[str, str]]:
    """What a model reads of each sample: a text, or a pair of texts; a second text that is empty is none."""
    for text, pair in zip(texts, pairs or [""] * len(texts), strict=True):
        yield (text, pair) if pair else text


def _token_labels(
    examples: Examples, tokens: Sequence[Sequence[str]], encodings: Sequence[Encoding]
) -> list[list[int]]:
    """The labels of all pieces; says how many tokens have no piece."""
    made = [
        piece_labels(encoding, row, cast("list[int]", label))
        for encoding, row, label in zip(encodings, tokens, examples.labels, strict=True)
    ]
    erased = sum(erased_tokens(labels) for labels in made)
    if erased:
        notice(
            f"{examples.source}: the tokenizer leaves nothing of {erased} of {sum(map(len, tokens))} tokens, such as "
            "zero-width ones; they are scored as if the model said O"
        )
    return made


def _glue_file(task: str, split: str) -> Path:
    """Parquet file of a GLUE split on the hub."""
    name = {"train": "train", "dev": "validation_matched" if task == "mnli" else "validation"}[split]
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download("nyu-mll/glue", f"{task}/{name}-00000-of-00001.parquet", repo_type="dataset"))
    except Exception as error:  # offline, proxies and hub errors come as many types
        raise DataError(
            f"GLUE task {task!r} cannot be fetched from the hub ({error}); download it elsewhere and give the file"
        ) from error


def _glue_columns(task: str, columns: Columns) -> Columns:
    text, pair = {
        "cola": ("sentence", None),
        "sst2": ("sentence", None),
        "qqp": ("question1", "question2"),
        "mnli": ("premise", "hypothesis"),
        "qnli": ("question", "sentence"),
    }.get(task, ("sentence1", "sentence2"))
    return replace(columns, text=columns.text or text, pair=columns.pair or pair, label=columns.label or "label")
