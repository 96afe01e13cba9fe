"""What is kept of a measurement: one JSON file per (task, row, seed), and the dev labels of a task once.

Predictions are one character per dev sentence (`DIGITS`), in file order. No file holds a path of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nxm_export.errors import ArtifactError, DataError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import require_schema
from tools.results.rows import Row, position
from tools.results.tasks import TASKS, Task

SCHEMA, LABELS_SCHEMA = "nxm-result/1", "nxm-result-labels/1"
RESULTS = Path(__file__).parents[2] / "results"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Record:
    """One measurement, with the labels that belong to its predictions."""

    task: Task
    facts: Mapping[str, Any]
    labels: np.ndarray

    @property
    def row(self) -> str:
        """Name of the row."""
        return str(self.facts["row"])

    @property
    def seed(self) -> int:
        """Seed of data order, heads and everything else."""
        return int(self.facts["seed"])

    @cached_property
    def logits(self) -> np.ndarray:
        """Predictions as one-hot (samples, classes): metrics ask for the highest output only."""
        return one_hot(self.facts["predictions"], int(self.facts["classes"]))


def file_of(results: Path, task: Task, row: Row, seed: int) -> Path:
    """Where the record of a measurement lies."""
    return results / task.name / f"{row.slug}-s{seed}.json"


def encode(classes: np.ndarray) -> str:
    """Class indices as one character each."""
    if classes.size and int(classes.max()) >= len(DIGITS):
        raise DataError(f"more than {len(DIGITS)} classes cannot be stored")
    return "".join(DIGITS[int(found)] for found in classes)


def decode(text: str) -> np.ndarray:
    """Class indices, int64, of a string that `encode` made."""
    return np.array([DIGITS.index(digit) for digit in text], np.int64)


def one_hot(text: str, classes: int) -> np.ndarray:
    """Float64 (samples, classes) with 1 at each prediction."""
    return np.eye(classes)[decode(text)]


def digest(text: str) -> str:
    """sha256 of predictions or labels."""
    return sha256(text.encode()).hexdigest()


def write(results: Path, task: Task, row: Row, seed: int, facts: Mapping[str, Any], labels: str) -> Path:
    """Write a record, and the task's labels with the first one; labels that differ from those kept are refused."""
    file, kept = file_of(results, task, row, seed), results / task.name / "labels.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not kept.is_file():
        write_atomic(kept, _text({"schema": LABELS_SCHEMA, "sha256": digest(labels), "labels": labels}))
    elif read_labels(results, task) != labels:
        raise DataError(f"{kept}: the dev set is another one than the results there are of; move {kept.parent} away")
    write_atomic(file, _text({"schema": SCHEMA, "task": task.name, "row": row.name, "seed": seed, **facts}))
    return file


def read_labels(results: Path, task: Task) -> str:
    """The dev labels of a task, one character each."""
    file = results / task.name / "labels.json"
    data = _json(file, LABELS_SCHEMA)
    if digest(data["labels"]) != data["sha256"]:
        raise ArtifactError(f"{file}: the labels are not those of its sha256; restore the file")
    return str(data["labels"])


def read(results: Path, task: Task) -> list[Record]:
    """Every record of a task, in the order of rows and seeds."""
    found = list(_records(results, task))
    return sorted(found, key=lambda record: (position(record.row), record.seed))


def tasks_with_results(results: Path) -> list[Task]:
    """The tasks that have a record."""
    return [task for task in TASKS.values() if list((results / task.name).glob("*-s[0-9]*.json"))]


def _records(results: Path, task: Task) -> Iterator[Record]:
    labels = read_labels(results, task)
    for file in sorted((results / task.name).glob("*-s[0-9]*.json")):
        facts = _json(file, SCHEMA)
        if facts["labels_sha256"] != digest(labels) or len(facts["predictions"]) != len(labels):
            raise ArtifactError(f"{file}: its predictions are for other dev sentences than labels.json; delete it")
        yield Record(task, facts, decode(labels))


def _json(file: Path, schema: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not readable ({error}); restore it, or delete it and measure again") from error
    require_schema(data, schema, str(file), ArtifactError)
    return dict(data)


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"
