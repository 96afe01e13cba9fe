"""The tasks that are measured, and their data in one form: ``sentence1, sentence2, label`` in two TSV files."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nxm_export.data.columns import Columns
from nxm_export.data.examples import RawExamples, load_raw
from nxm_export.errors import ArtifactError, DataError
from nxm_export.pipeline.demo import SETTINGS, write_data
from nxm_export.storage.atomic import atomic_dir, disk_errors, make_directory, write_atomic
from tools.results.phrases import held_out, unrelated, whole_texts


@dataclass(frozen=True)
class Task:
    """A task: its metrics (their mean is its score, as in GLUE) and the columns of its files as GLUE ships them.

    `held_out` whole sentences of a training file of phrases are judged on besides the dev set, and nothing that they
    contain is trained on (`tools.results.phrases`).
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    glue: bool = True
    max_length: int = 128
    columns: Columns | None = None
    held_out: int = 0

    @property
    def metric_title(self) -> str:
        """What the score is, in words."""
        return " and ".join({"mcc": "MCC", "f1": "F1"}.get(name, name) for name in self.metrics)


SPLITS = ("train", "dev")
HELD_OUT_SEED = 0
_MRPC = Columns("#1 String", "#2 String", "Quality")
TASKS = {
    task.name: task
    for task in (
        Task("rotten_tomatoes", "rotten tomatoes", ("accuracy",), glue=False, max_length=int(SETTINGS["max_length"])),
        Task("cola", "CoLA", ("mcc",)),
        Task("mrpc", "MRPC", ("f1", "accuracy"), columns=_MRPC),
        Task("rte", "RTE", ("accuracy",)),
        Task("sst2", "SST-2", ("accuracy",), held_out=1000),
    )
}


def task_named(name: str) -> Task:
    """The task of this name, or `DataError` with the list."""
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class TaskFiles:
    """Training and dev file of a task in the common form, and the sha256 over both."""

    train: Path
    dev: Path
    digest: str


def prepare(task: Task, data: Path | None, out: Path) -> TaskFiles:
    """Write ``train.tsv`` and ``dev.tsv`` to `out`, from a GLUE directory `data` or from the demo's package."""
    if task.glue and data is None:
        raise DataError(f"{task.title} needs --data: a directory with GLUE's train.tsv and dev.tsv")
    if not task.glue and data is not None:
        raise DataError(f"{task.title} comes out of a package; --data is for GLUE tasks")
    with atomic_dir(out, replace_any=True) as scratch:
        if data is None:
            write_data(scratch)
        train, dev = (_read(task, (scratch if data is None else data) / f"{split}.tsv", split) for split in SPLITS)
        if task.held_out:
            train, dev = _hold_out(train, dev, task.held_out)
        for split, raw in zip(SPLITS, (train, dev), strict=True):
            _write(raw, scratch / f"{split}.tsv")
    return files(out)


def kept(folder: Path, write: Callable[[Path], TaskFiles]) -> TaskFiles:
    """The files that `write` writes to a directory, in one of their own in `folder`, named by their digest.

    It is written once and never again: what one command trains on is whole, and stays, while others write the same or
    other data. Raises `ArtifactError` where someone changed it.
    """
    make_directory(folder)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        made = write(Path(scratch) / "data")
        out = folder / made.digest[:16]
        with disk_errors(out):
            try:
                made.train.parent.rename(out)
            except OSError:
                if not out.is_dir():  # else it was there
                    raise
    try:
        known = files(out)
    except OSError as error:
        raise ArtifactError(f"{out}: its files cannot be read ({error.strerror}); remove it") from error
    if known.digest != made.digest:
        raise ArtifactError(f"{out}: its files are not those that were written there; remove it")
    return known


def _hold_out(train: RawExamples, dev: RawExamples, count: int) -> tuple[RawExamples, RawExamples]:
    """(train without what whole sentences drawn from it contain, dev with these sentences behind it); says how many
    rows are left."""
    drawn, rest = held_out(train.texts, count, HELD_OUT_SEED)
    if len(drawn) < count or not rest:
        raise DataError(f"{train.source}: {len(drawn)} whole sentences, and {count} are held out; give the whole file")
    print(
        f"{train.source}: {count} whole sentences are held out (seed {HELD_OUT_SEED}); of {len(train.texts)} rows "
        f"{len(rest)} are left, which none of them contains",
        file=sys.stderr,
    )
    left, judged = set(rest), set(drawn)
    more = train.kept([row in judged for row in range(len(train.texts))])
    both = replace(
        dev,
        texts=[*dev.texts, *more.texts],
        pairs=None if dev.pairs is None or more.pairs is None else [*dev.pairs, *more.pairs],
        labels=[*dev.labels, *more.labels],
        places=[*dev.places, *more.places],
    )
    return train.kept([row in left for row in range(len(train.texts))]), both


def files(out: Path) -> TaskFiles:
    """The files that `prepare` wrote to `out`."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update((out / f"{split}.tsv").read_bytes())
    return TaskFiles(out / "train.tsv", out / "dev.tsv", digest.hexdigest())


def other_texts(files: TaskFiles, sources: Sequence[Path], out: Path, *, whole: bool = False) -> tuple[int, int]:
    """Write the texts of data files of other sets to `out`, one a line, but for those that a dev text contains or that
    contain one, and those of train; returns how many are written and how many different ones there were. `whole`:
    without phrases that another text contains."""
    train, dev = (load_raw(str(file), split) for file, split in ((files.train, "train"), (files.dev, "dev")))
    found: dict[str, None] = {}
    for source in sources:
        raw = _read(TASKS["mrpc"], source, "train")  # which reads common columns, and those of its own
        found |= dict.fromkeys(" ".join(text.split()) for text in [*raw.texts, *(raw.pairs or ())])
    found = dict.fromkeys(whole_texts(list(found))) if whole else found
    known = {" ".join(text.split()).lower() for text in train.texts}
    left = [text for text in unrelated(list(found), dev.texts) if text.lower() not in known]
    write_atomic(out, "\n".join(left) + "\n")
    return len(left), len(found)


def cut(whole: Path, out: Path, held_out: int, seed: int) -> TaskFiles:
    """Cut a training file into ``train.tsv`` and a held-out slice, ``dev.tsv``: what settings are chosen on."""
    header, *lines = whole.read_text(encoding="utf-8").split("\n")[:-1]
    if held_out < 2 or held_out > len(lines) // 2:
        raise DataError(f"cannot hold out {held_out} of {len(lines)} training sentences; set --held-out")
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(lines))
    with atomic_dir(out, replace_any=True) as scratch:
        for split, picked in (("dev", order[:held_out]), ("train", order[held_out:])):
            text = "\n".join([header, *(lines[i] for i in sorted(picked))]) + "\n"
            (scratch / f"{split}.tsv").write_text(text, encoding="utf-8")
    return files(out)


def _read(task: Task, file: Path, split: str) -> RawExamples:
    """One file, as GLUE ships it or with a header of the usual column names."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; --data is a directory with train.tsv and dev.tsv")
    if task.name == "cola" and (examples := _headless_cola(file)) is not None:
        return examples
    first = file.open(encoding="utf-8-sig").readline().rstrip("\r\n").split("\t")
    if task.columns is not None and {task.columns.text, task.columns.pair, task.columns.label} <= set(first):
        return load_raw(str(file), split, task.columns)
    return load_raw(str(file), split)


def _headless_cola(file: Path) -> RawExamples | None:
    """CoLA as its authors ship it: source, label, the original's mark, sentence; no header. None for any other file."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").split("\n") if line]
    if not rows or len(rows[0]) != 4 or rows[0][1] not in ("0", "1"):
        return None
    for number, row in enumerate(rows, start=1):
        if len(row) != 4:
            raise DataError(f"{file}:{number}: {len(row)} columns where CoLA has 4")
    places = [f"{file}:{number}" for number in range(1, len(rows) + 1)]
    return RawExamples([row[3].rstrip("\r") for row in rows], None, [row[1] for row in rows], places, str(file))


def _write(raw: RawExamples, file: Path) -> None:
    pairs = raw.pairs if raw.pairs is not None else [""] * len(raw.texts)
    lines = [
        "\t".join((text, pair, str(label))) for text, pair, label in zip(raw.texts, pairs, raw.labels, strict=True)
    ]
    file.write_text("\n".join(["sentence1\tsentence2\tlabel", *lines]) + "\n", encoding="utf-8")
