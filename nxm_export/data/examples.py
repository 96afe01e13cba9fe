"""Task data: local files (`nxm_export.data.readers`) or a GLUE task from the hub, to token batches.

A file is read once into `Examples` (texts and labels, in file order), with every complaint naming the file and line. A
label counts without the spaces around it, and a whole number is the same class however it is written (1 and 1.0).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from nxm_export.data.readers import FORMATS, read_rows
from nxm_export.errors import ArtifactError, DataError, NxmError
from nxm_export.storage.json_files import read_text

DataRow = Mapping[str, object]  # of a data file: cells by column
Cell = Callable[[DataRow, str, str], "RawLabel"]  # row, column and place to what the cell holds
# A label as the file has it: text, several texts, or answers (text and where it begins); None where the file has none.
RawLabel = str | tuple[str, ...] | tuple[tuple[str, int], ...] | None
# A label as a number: class, score, a row of 0 and 1 or of shares, tags by token; answers stay as they are.
Label = int | float | list[int] | list[float] | tuple[tuple[str, int], ...]
Features = Mapping[str, Any]  # of one sample: token lists by input name, and of `ANNOTATIONS` what there is
ANNOTATIONS = ("labels", "group", "span")  # its label, the number of the group it is scored with, its answer's place

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
    ("sentence", "sentence2"),
    ("sentence", None),
    ("text", None),
    ("sentence1", None),
)
LABEL_COLUMNS = ("label", "labels", "score", "relevance")
TOKEN_COLUMNS, TAG_COLUMNS = ("tokens", "words"), ("tags", "ner_tags", "labels")
GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
NO_LABEL = -100  # of a token that is not scored: the value that PyTorch's cross entropy ignores


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text, the second text and the label; None means the usual names."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Examples:
    """Texts (with a second text each, for pair tasks) and labels: class indices, floats for regression, a row of 0 and
    1 for several classes. With `per_token` a label is the list of class indices of the text's tokens, which one space
    separates.

    `groups` are numbers of what is scored together, such as the candidates of one query; None where every example is
    scored by itself. No part of the examples ever splits a group. `encoder` makes samples of them in a way of its own,
    with the parameters of `encode`: that of questions makes several of one example (see
    `nxm_export.data.question_answering`)."""

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[Label]
    source: str
    per_token: bool = False
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
        """At most `count` examples (whole groups), drawn by `seed`, in file order; `DataError` where no group is that
        small."""
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
    """Examples whose labels are still the text of the file, or tuples of such; None where the file has no labels."""

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[RawLabel]
    places: list[str]
    source: str


def load_raw(
    source: str,
    split: str,
    columns: Columns = Columns(),
    *,
    text: Callable[[DataRow, str, str], str] | None = None,
    label: Cell | None = None,
    per_token: bool = False,
    unlabelled: bool = False,
) -> RawExamples:
    """Read a data file, or the `split` (train or dev) of a GLUE task name; raises `DataError`.

    `text` and `label` read a cell (row, column, place), by default as text; with `per_token` the usual columns are
    those of texts that are split into tokens, and with `unlabelled` a file need not have labels. See
    `nxm_export.data.label_kinds.load_labelled` for the data of a task.
    """
    read_text, read_label = text or text_of, label or label_text
    path = Path(source)
    if not path.is_file() and source.lower() in GLUE_TASKS:
        path = _glue_file(source.lower(), split)
        columns = _glue_columns(source.lower(), columns)
    if not path.is_file():
        raise DataError(
            f"{source}: no such file; give a {', '.join(FORMATS)} file or a GLUE task ({', '.join(GLUE_TASKS)})"
        )
    rows = list(read_rows(path))
    if not rows:
        raise DataError(f"{path}: no examples in it; the file is empty or has only a header")
    names = list(rows[0][1])
    if per_token:
        first, second = _only_column(columns.text, TOKEN_COLUMNS, names, path, "token", "--text"), None
        third: str | None = _only_column(columns.label, TAG_COLUMNS, names, path, "tag", "--label")
    else:
        first, second = text_columns(columns, names, path)
        third = None
        if not unlabelled or columns.label or set(LABEL_COLUMNS) & set(names):
            third = _only_column(columns.label, LABEL_COLUMNS, names, path, "label", "--label")
    texts = [read_text(row, first, place) for place, row in rows]
    pairs = [read_text(row, second, place) for place, row in rows] if second else None
    labels = [read_label(row, third, place) if third else None for place, row in rows]
    # GLUE's single-sentence files as some mirrors write them have an empty second column.
    return RawExamples(texts, pairs if pairs and any(pairs) else None, labels, [place for place, _ in rows], str(path))


def class_names(train: RawExamples) -> list[str]:
    """The class labels of a training file, sorted (numerically when all are integers); at least two."""
    texts = {_one_text(label) for label in train.labels}
    names = sorted(texts, key=lambda label: (0, int(label), label) if _is_integer(label) else (1, 0, label))
    if len(names) < 2:
        raise DataError(
            f"{train.source}: only one class, {names[0]!r}; a classifier needs at least two. Is --label the right "
            "column?"
        )
    if len(names) > max(100, len(train.labels) // 4):
        raise DataError(
            f"{train.source}: {len(names)} different labels in {len(train.labels)} rows; is this a regression (--task "
            "regression)?"
        )
    return names


def with_classes(raw: RawExamples, classes: Sequence[str]) -> Examples:
    """Turn label texts into class indices; a label outside `classes` is a `DataError` with its line."""
    index = {name: i for i, name in enumerate(classes)}
    labels = []
    for label, place in zip(map(_one_text, raw.labels), raw.places, strict=True):
        if label not in index:
            raise DataError(
                f"{place}: label {label!r} is none of the model's classes {list(classes)[:10]}; fix the row, or "
                "retrain with these labels"
            )
        labels.append(index[label])
    return Examples(raw.texts, raw.pairs, labels, raw.source)


def with_scores(raw: RawExamples) -> Examples:
    """The examples with `scores_of` them."""
    return Examples(raw.texts, raw.pairs, scores_of(raw), raw.source)


def scores_of(raw: RawExamples) -> list[float]:
    """Label texts as regression scores; anything that is not a finite number is a `DataError` with its line."""
    scores = []
    for label, place in zip(map(_one_text, raw.labels), raw.places, strict=True):
        try:
            score = float(label)
        except ValueError as error:
            raise DataError(
                f"{place}: label {label!r} is not a number; is this a classification (--task classification)?"
            ) from error
        if not math.isfinite(score):
            raise DataError(f"{place}: label {label!r} is not a finite number; fix the row")
        scores.append(score)
    return scores


def _one_text(label: RawLabel) -> str:
    """A label that is one text, as `label_text` reads it."""
    assert isinstance(label, str)
    return label


class Encoding(Protocol):
    """What `tokenizers` makes of one text, or of a pair of texts: lists with an entry for every token."""

    @property
    def ids(self) -> list[int]:
        """Numbers of the tokens."""

    @property
    def attention_mask(self) -> list[int]:
        """1 for a token, 0 for padding."""

    @property
    def type_ids(self) -> list[int]:
        """0 for tokens of the first text, 1 for those of the second."""

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Character ranges in the token's own text."""

    @property
    def word_ids(self) -> list[int | None]:
        """Which word of its text a token belongs to, as the tokenizer splits it; None for special tokens."""

    @property
    def sequence_ids(self) -> list[int | None]:
        """Which text a token belongs to; None for special tokens."""

    @property
    def overflowing(self) -> Sequence[Encoding]:
        """The encodings of what a truncation left over."""


class Tokenizer(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        """How many special tokens a text, or a pair of texts, gets."""

    def no_padding(self) -> None:
        """Make encodings as long as their texts."""

    def no_truncation(self) -> None:
        """Keep every token."""

    def enable_truncation(self, max_length: int, *, stride: int = 0, strategy: str = "longest_first") -> None:
        """Cut encodings at `max_length` tokens; what overflows shares `stride` tokens with what went before."""

    def encode(self, sequence: str, pair: str | None = None) -> Encoding:
        """The encoding of a text, or of a pair of texts."""

    def encode_batch(
        self, input: Sequence[str | tuple[str, str]], *, add_special_tokens: bool = True
    ) -> Sequence[Encoding]:
        """The encodings of texts, or of pairs of texts."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a checkpoint, graph or engine directory; raises `ArtifactError`."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; copy it from the model, or save its fast tokenizer there")
    return parse_tokenizer(read_text(file, "copy it from the model"), file)


def parse_tokenizer(text: str, file: Path) -> Tokenizer:
    """The `tokenizers.Tokenizer` that `text`, read from `file`, holds; raises `ArtifactError`."""
    import tokenizers

    with tokenizer_failures(f"{file}: not a readable tokenizer"):
        made = cast("Tokenizer", tokenizers.Tokenizer.from_str(text))
    with tokenizer_failures(f"{file}: not a usable tokenizer"), contextlib.suppress(Exception):
        made.encode_batch(["a", ("a", "a")])  # a panic is no Exception; a vocabulary without "a" gives one
    return made


@contextlib.contextmanager
def tokenizer_failures(what: str) -> Iterator[None]:
    """Turn what the tokenizers library fails with into an `ArtifactError` that begins with `what`.

    It raises plain Exception, and what its Rust code panics with is not even one.
    """
    try:
        yield
    except NxmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ArtifactError(f"{what} ({' '.join(str(error).split())})") from error


def encode(tokenizer: Tokenizer, examples: Examples, max_length: int, inputs: Sequence[str]) -> list[Features]:
    """Token features per example (per window of one, for questions), not padded: those of `inputs`, ``labels``, and
    ``group`` where examples have one.

    `tokenizer` is a `tokenizers.Tokenizer`: training and serving go through the same code. Raises `DataError` when
    `max_length` tokens have no room for text.
    """
    if examples.encoder is not None:
        return examples.encoder(tokenizer, examples, max_length, inputs)
    special = tokenizer.num_special_tokens_to_add(examples.pairs is not None)
    if max_length <= special:  # the tokenizer would then not truncate at all
        raise DataError(
            f"max length {max_length} leaves no room for text beside {special} special tokens; raise --max-length"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    encodings = tokenizer.encode_batch(
        examples.texts if examples.pairs is None else list(zip(examples.texts, examples.pairs, strict=True))
    )
    made: list[Features] = [
        {
            **{name: getattr(encoding, names[name]) for name in inputs},
            "labels": _first_pieces(encoding.offsets, text, cast("list[int]", label)) if examples.per_token else label,
        }
        for encoding, text, label in zip(encodings, examples.texts, examples.labels, strict=True)
    ]
    if examples.groups is None:
        return made
    return [{**sample, "group": group} for sample, group in zip(made, examples.groups, strict=True)]


def _first_pieces(offsets: Sequence[tuple[int, int]], text: str, tags: Sequence[int]) -> list[int]:
    """A label for every piece that the tokenizer made: the tag where a token of the text begins, `NO_LABEL` elsewhere.

    `offsets` are the pieces' character ranges in `text`, (0, 0) for special tokens. Some tokenizers count the space
    before a token to it, so the first character that is no space decides.
    """
    token_at, token = [], 0
    for character in text:
        token += character == " "
        token_at.append(token)
    labels, latest = [], -1
    for start, end in offsets:
        while start < end and text[start] == " ":
            start += 1
        begins = start < end and token_at[start] != latest
        if begins:
            latest = token_at[start]
        labels.append(tags[latest] if begins else NO_LABEL)
    return labels


def members(groups: Iterable[int] | None, samples: int) -> list[list[int]]:
    """The indices of the samples of each group, in order of its first; without groups every sample is one of its
    own."""
    if groups is None:
        return [[i] for i in range(samples)]
    indices: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        indices.setdefault(int(group), []).append(i)
    return list(indices.values())


def group_array(features: Sequence[Features]) -> np.ndarray | None:
    """The group of every sample (samples,) int64, or None where samples are scored by themselves."""
    return np.array([sample["group"] for sample in features], np.int64) if "group" in features[0] else None


def split_indices(features: Sequence[Features], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices in an order drawn by `seed`: (`count` of them and the rest of their last group, all others)."""
    units = members(group_array(features), len(features)) if features else []
    order, picked = list(np.random.default_rng(seed).permutation(len(units))), list[int]()
    while order and len(picked) < count:
        picked += units[order.pop(0)]
    return picked, [i for unit in order for i in units[unit]]


def inputs_of(sample: Features) -> dict[str, list[int]]:
    """What a model reads of a sample."""
    return {name: value for name, value in sample.items() if name not in ANNOTATIONS}


def label_array(features: Sequence[Features]) -> np.ndarray:
    """The labels of samples in one array (samples, ...); those of tokens are filled up with `NO_LABEL`, and texts are
    bytes filled up with 0."""
    if isinstance(features[0]["labels"], str):
        return filled([np.frombuffer(sample["labels"].encode(), np.uint8) for sample in features], 0)
    return filled([np.asarray(sample["labels"]) for sample in features], NO_LABEL)


def filled(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays stacked to one (samples, ...), the shorter ones filled up along their first axis."""
    if not arrays or arrays[0].ndim == 0 or len({len(array) for array in arrays}) == 1:
        return np.stack(arrays)
    made = np.full((len(arrays), max(len(array) for array in arrays), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, array in zip(made, arrays, strict=True):
        row[: len(array)] = array
    return made


def pad(samples: Sequence[Features], pad_id: int, length: int | None = None) -> dict[str, np.ndarray]:
    """One batch: every input as int64 (batch, sequence), padded on the right to the longest sample or to `length`."""
    longest = length or max(len(sample["input_ids"]) for sample in samples)
    batch = {}
    for name in inputs_of(samples[0]):
        array = np.full((len(samples), longest), pad_id if name == "input_ids" else 0, np.int64)
        for row, sample in zip(array, samples, strict=True):
            row[: len(sample[name])] = sample[name]
        batch[name] = array
    return batch


def sorted_batches(features: Sequence[Features], batch_size: int) -> list[list[int]]:
    """Index batches by length, longest first: little padding, and running out of memory happens at once."""
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def text_columns(asked: Columns, names: list[str], path: Path) -> tuple[str, str | None]:
    """The columns of text and second text: as asked, else the first usual ones that are all there."""
    for column in filter(None, (asked.text, asked.pair)):
        _require_column(column, names, path)
    if asked.text:
        usual = next((second for first, second in TEXT_COLUMNS if first == asked.text and second in names), None)
        return asked.text, asked.pair or usual
    for first, second in TEXT_COLUMNS:
        if first in names and (second is None or second in names):
            return first, asked.pair or second
    usual_names = ", ".join(dict.fromkeys(first for first, _ in TEXT_COLUMNS))
    raise DataError(
        f"{path}: none of the usual text columns ({usual_names}) among {', '.join(names)}; name it with --text"
    )


def _only_column(asked: str | None, usual: Sequence[str], names: list[str], path: Path, what: str, flag: str) -> str:
    if asked is not None:
        _require_column(asked, names, path)
        return asked
    for name in usual:
        if name in names:
            return name
    raise DataError(
        f"{path}: none of the usual {what} columns ({', '.join(usual)}) among {', '.join(names)}; name it with {flag}"
    )


def _require_column(name: str, names: list[str], path: Path) -> None:
    if name not in names:
        raise DataError(f"{path}: no column {name!r}; it has {', '.join(names)}")


def text_of(row: DataRow, column: str, place: str) -> str:
    """A cell that holds text; raises `DataError`."""
    value = value_of(row, column, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} holds {value!r}, which is no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: column {column!r} holds half a surrogate pair, which is no text; fix the row"
        ) from error
    return value


def label_text(row: DataRow, column: str, place: str) -> str:
    """The label as text; whole numbers without the point that some tools write."""
    value = value_of(row, column, place)
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: label {value!r} is neither a name nor a number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text.endswith(".0") and _is_integer(text[:-2]):
        text = text[:-2]
    if not text or text.lower() == "nan":
        raise DataError(f"{place}: the label is missing ({value!r}); fix the row or remove it")
    return text


def value_of(row: DataRow, column: str, place: str) -> object:
    """What a cell holds; a missing one is a `DataError`."""
    if row.get(column) is None:
        raise DataError(f"{place}: column {column!r} is missing in this row; every row needs it")
    return row[column]


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal()


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
    return Columns(columns.text or text, columns.pair or pair, columns.label or "label")
