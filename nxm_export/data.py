"""Task data: local TSV, CSV, JSON-lines or Parquet files, or a GLUE task from the hub, to token batches.

A file is read once into `Examples` (texts and labels, in file order), with every complaint naming the file and line.
TSV is read as GLUE writes it: no quoting, a tab always separates. CSV follows the usual quoting rules.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nxm_export.errors import ArtifactError, DataError

Features = Mapping[str, Any]  # token lists by input name, and "labels"

TEXT_COLUMNS = ("sentence", "sentence1", "text", "question", "premise")
PAIR_COLUMNS = ("sentence2", "text2", "hypothesis")
LABEL_COLUMNS = ("label", "labels", "score")
GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text, the second text and the label; None means the usual names."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Examples:
    """Texts (with a second text each, for pair tasks) and labels: class indices, or floats for regression."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Examples([self.texts[i] for i in indices], pairs, [self.labels[i] for i in indices], self.source)

    def split(self, held_out: int, seed: int) -> tuple[Examples, Examples]:
        """(rest, held-out slice of `held_out` examples), shuffled by `seed`."""
        order = random.Random(seed).sample(range(len(self)), len(self))
        return self.subset(order[held_out:]), self.subset(sorted(order[:held_out]))

    def sample(self, count: int, seed: int) -> Examples:
        """At most `count` examples, drawn by `seed`, in file order."""
        if count >= len(self):
            return self
        return self.subset(sorted(random.Random(seed).sample(range(len(self)), count)))


@dataclass(frozen=True)
class RawExamples:
    """Examples whose labels are still the text of the file."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    places: list[str]
    source: str


def load_raw(source: str, split: str, columns: Columns = Columns()) -> RawExamples:
    """Read a data file, or the `split` (train or dev) of a GLUE task name; raises `DataError`."""
    path = Path(source)
    if not path.is_file() and source.lower() in GLUE_TASKS:
        path = _glue_file(source.lower(), split)
        columns = _glue_columns(source.lower(), columns)
    if not path.is_file():
        raise DataError(
            f"{source}: no such file; give a {', '.join(FORMATS)} file or a GLUE task ({', '.join(GLUE_TASKS)})"
        )
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path}: no examples in it; the file is empty or has only a header")
    names = list(rows[0][1])
    text = _column(columns.text, TEXT_COLUMNS, names, path, "text") or ""
    pair = _column(columns.pair, PAIR_COLUMNS, names, path, None)
    label = _column(columns.label, LABEL_COLUMNS, names, path, "label") or ""
    texts, pairs, labels, places = [], [], [], []
    for place, row in rows:
        for column in filter(None, (text, pair, label)):
            if row.get(column) is None:
                raise DataError(
                    f"{place}: column {column!r} is missing in this row; every row needs {text!r} and {label!r}"
                )
        texts.append(str(row[text]))
        pairs.append(str(row[pair]) if pair else "")
        labels.append(str(row[label]))
        places.append(place)
    return RawExamples(texts, pairs if any(pairs) else None, labels, places, str(path))


def class_names(train: RawExamples) -> list[str]:
    """The class labels of a training file, sorted (numerically when all are integers); at least two."""
    found = sorted(
        set(train.labels), key=lambda label: (0, int(label), "") if label.lstrip("-").isdecimal() else (1, 0, label)
    )
    if len(found) < 2:
        raise DataError(
            f"{train.source}: only one class, {found[0]!r}; a classifier needs at least two. Is --label the right column?"
        )
    if len(found) > max(100, len(train.labels) // 4):
        raise DataError(
            f"{train.source}: {len(found)} different labels in {len(train.labels)} rows; is this a regression (--task regression)?"
        )
    return found


def with_classes(raw: RawExamples, classes: Sequence[str]) -> Examples:
    """Turn label texts into class indices; a label outside `classes` is a `DataError` with its line."""
    index = {name: i for i, name in enumerate(classes)}
    labels = []
    for label, place in zip(raw.labels, raw.places, strict=True):
        if label not in index:
            raise DataError(
                f"{place}: label {label!r} is none of the model's classes {list(classes)[:10]}; fix the row, or retrain with these labels"
            )
        labels.append(index[label])
    return Examples(raw.texts, raw.pairs, labels, raw.source)


def with_scores(raw: RawExamples) -> Examples:
    """Turn label texts into regression scores; anything that is not a finite number is a `DataError` with its line."""
    labels = []
    for label, place in zip(raw.labels, raw.places, strict=True):
        try:
            score = float(label)
        except ValueError as error:
            raise DataError(
                f"{place}: label {label!r} is not a number; is this a classification (--task classification)?"
            ) from error
        if not math.isfinite(score):
            raise DataError(f"{place}: label {label!r} is not a finite number; fix the row")
        labels.append(score)
    return Examples(raw.texts, raw.pairs, labels, raw.source)


def load_tokenizer(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint, graph or engine directory; raises `ArtifactError`."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; copy it from the model, or save its fast tokenizer there")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ArtifactError(f"{file}: not a readable tokenizer ({error})") from error


def encode(tokenizer: Any, examples: Examples, max_length: int, inputs: Sequence[str]) -> list[Features]:
    """Token features per example, not padded: those of `inputs`, and ``labels``.

    `tokenizer` is a `tokenizers.Tokenizer`: training and serving go through the same code.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    rows: Any = examples.texts if examples.pairs is None else list(zip(examples.texts, examples.pairs, strict=True))
    names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    encodings = tokenizer.encode_batch(rows)
    return [
        {**{name: getattr(encoding, names[name]) for name in inputs}, "labels": label}
        for encoding, label in zip(encodings, examples.labels, strict=True)
    ]


def pad(samples: Sequence[Features], pad_id: int, length: int | None = None) -> dict[str, np.ndarray]:
    """One batch: every input as int64 (batch, sequence), padded on the right to the longest sample or to `length`."""
    longest = length or max(len(sample["input_ids"]) for sample in samples)
    batch = {}
    for name in samples[0]:
        if name != "labels":
            array = np.full((len(samples), longest), pad_id if name == "input_ids" else 0, np.int64)
            for row, sample in zip(array, samples, strict=True):
                row[: len(sample[name])] = sample[name]
            batch[name] = array
    return batch


def sorted_batches(features: Sequence[Features], batch_size: int) -> list[list[int]]:
    """Index batches by length, longest first: little padding, and running out of memory happens at once."""
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a data file; the place is ``file:line``."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with path.open(encoding="utf-8", newline="") as stream:
            if suffix in (".jsonl", ".json"):
                yield from _json_rows(path, stream)
            elif suffix == ".tsv":
                yield from _table_rows(path, csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
            elif suffix == ".csv":
                yield from _table_rows(path, csv.reader(stream, strict=True))
            else:
                raise DataError(f"{path}: unknown format {suffix or 'without suffix'}; use {', '.join(FORMATS)}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); convert it, for example with iconv") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _table_rows(path: Path, reader: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{path}: empty file; the first line must name the columns")
        header = [name.lstrip("\ufeff").strip() for name in header]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(row)} columns where the header has {len(header)} ({', '.join(header)})"
                )
            yield f"{path}:{reader.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: malformed line ({error})") from error


def _json_rows(path: Path, stream: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; one object a line")
        yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; pip install 'nxm-export[parquet]', or convert the file to CSV"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises several kinds for a damaged file
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row


def _column(asked: str | None, usual: Sequence[str], names: list[str], path: Path, needed: str | None) -> str | None:
    if asked is not None:
        if asked not in names:
            raise DataError(f"{path}: no column {asked!r}; it has {', '.join(names)}")
        return asked
    for name in usual:
        if name in names:
            return name
    if needed:
        raise DataError(
            f"{path}: none of the usual {needed} columns ({', '.join(usual)}) among {', '.join(names)}; name it with --{needed}"
        )
    return None


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
