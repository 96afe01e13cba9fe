"""Where records lie: ``TASK.jsonl`` with a line per row and seed, beside it ``TASK/`` with labels, grid and
sensitivities.

A line is written as soon as its row is measured, and the file is replaced as a whole, under a lock: whatever is
interrupted or runs at the same time, no line is lost. Lines are in the order of rows and seeds, so that a new one is
one line of a diff.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from nxm_export.errors import ArtifactError, DataError
from nxm_export.storage.atomic import make_directory, write_atomic
from nxm_export.storage.json_files import decode, encode, encode_line, read_record
from tools import ROOT
from tools.results.records import Grid, LabelledRecord, Labels, Record, decode_classes, digest
from tools.results.rows import position
from tools.results.tasks import TASKS, Task

SCHEMA, LABELS_SCHEMA, GRID_SCHEMA = "nxm-result/2", "nxm-result-labels/1", "nxm-result-grid/1"
RESULTS = ROOT / "results"
ENCODERS = {"MiniLM-L6": ".", "MPNet-base": "mpnet-base"}  # where the records of an encoder lie, under `RESULTS`


class TaskStore:
    """The records of one task, under a directory of results."""

    def __init__(self, results: Path, task: Task) -> None:
        self.task, self.results = task, results
        self.file = results / f"{task.name}.jsonl"
        self.directory = results / task.name

    @property
    def labels_file(self) -> Path:
        return self.directory / "labels.json"

    @property
    def grid_file(self) -> Path:
        return self.directory / "dense-grid.json"

    def sensitivity_file(self, seed: int) -> Path:
        """The sensitivities that the searches of this seed measured: a CSV file with a line per weight and option."""
        return self.directory / f"sensitivity-s{seed}.csv"

    def sensitivity_files(self) -> list[Path]:
        """Those that are there, in the order of seeds."""
        return sorted(self.directory.glob("sensitivity-s*.csv"))

    def records(self) -> list[Record]:
        """Every record, in the order of rows and seeds; raises `ArtifactError` that names the line that is damaged."""
        if not self.file.is_file():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return [self._decode(line, number) for number, line in enumerate(lines, start=1)]

    def labelled_records(self) -> list[LabelledRecord]:
        """Every record with the task's labels; one whose predictions are for other dev sentences is refused."""
        labels = self.labels()
        for number, record in enumerate(self.records(), start=1):
            if record.labels_sha256 != digest(labels) or len(record.predictions) != len(labels):
                raise ArtifactError(
                    f"{self.file}:{number}: its predictions are for other dev sentences than {self.labels_file}; "
                    "delete the line"
                )
        return [LabelledRecord(record, decode_classes(labels)) for record in self.records()]

    def find(self, row: str, seed: int) -> Record | None:
        """The record of a row and seed, or None."""
        return next((record for record in self.records() if (record.row, record.seed) == (row, seed)), None)

    def add(self, record: Record, labels: str) -> None:
        """Write a record at its place, and the task's labels with the first one; labels other than those kept are
        refused."""
        with in_turn(self.directory):
            if not self.labels_file.is_file():
                write_atomic(self.labels_file, encode(Labels(digest(labels), labels), LABELS_SCHEMA))
            elif self.labels() != labels:
                raise DataError(
                    f"{self.labels_file}: the dev set is another one than the results there are of; "
                    f"move {self.file} and {self.directory} away"
                )
            others = [old for old in self.records() if (old.row, old.seed) != (record.row, record.seed)]
            self._write([*others, record])

    def labels(self) -> str:
        """The dev labels, one character each."""
        known = read_record(self.labels_file, Labels, schema=LABELS_SCHEMA, way_out="restore the file")
        if digest(known.labels) != known.sha256:
            raise ArtifactError(f"{self.labels_file}: the labels are not those of its sha256; restore the file")
        return known.labels

    def grid(self) -> Grid | None:
        """The dense grid, or None where none was tried."""
        if not self.grid_file.is_file():
            return None
        return read_record(
            self.grid_file, Grid, schema=GRID_SCHEMA, way_out="restore it, or delete it and measure again"
        )

    def write_grid(self, grid: Grid) -> None:
        """Replace the dense grid."""
        make_directory(self.directory)
        write_atomic(self.grid_file, encode(grid, GRID_SCHEMA))

    def _decode(self, line: str, number: int) -> Record:
        source = f"{self.file}:{number}"
        return decode(
            line, Record, schema=SCHEMA, source=source, way_out="restore the line, or delete it and measure again"
        )

    def _write(self, records: Sequence[Record]) -> None:
        ordered = sorted(records, key=lambda record: (position(record.row), record.seed))
        # `asdict` first: a decoded record then has the fields, too, that stood there with their default or not at all
        lines = (encode_line({"schema": SCHEMA, **asdict(record)}) for record in ordered)
        write_atomic(self.file, "".join(lines))


@contextlib.contextmanager
def in_turn(directory: Path, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the block no other process is in such a block with this directory; `wait` is called before waiting for
    one."""
    make_directory(directory)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def stores(results: Path, encoder: str = "MiniLM-L6") -> list[TaskStore]:
    """The tasks that have records of this encoder."""
    results = results / ENCODERS[encoder]
    return [store for task in TASKS.values() if (store := TaskStore(results, task)).file.is_file()]
