"""Measure what is missing: per seed one dense model, and every other row from that same model.

Training lies in a work directory (never in the repository); an interrupted row goes on from there. A row whose record
is there is left alone, whatever else has changed: delete its line to measure it again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import numpy as np

from compressors.models import resolve
from compressors.search.plan_search import SENSITIVITY_FILE, search
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.default_recipe import training_of
from nxm_export.contract.config_values import size_of
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics
from nxm_export.contract.records.search_result import SEARCH_FILE, read_search_result
from nxm_export.contract.tasks import task_named
from nxm_export.data.more_text import MoreText
from nxm_export.errors import ArtifactError, DataError
from nxm_export.progress import Progress
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import convert, encode, read_json
from tools import provenance
from tools.results import tasks
from tools.results.clock import Clock
from tools.results.finished import Answers, divergences, outputs_file, sizes, training_facts
from tools.results.records import (
    DEFAULTS,
    Compression,
    CompressionFacts,
    Grid,
    GridEntry,
    Machine,
    MetricValue,
    PlanFacts,
    Record,
    Samples,
    SearchFacts,
    compress_part,
    digest,
)
from tools.results.rows import Row
from tools.results.store import TaskStore, in_turn

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")
Bars = Callable[[], contextlib.AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Protocol:
    """How rows are measured. `grid` holds the dense (learning rate, epochs) to choose from; one entry is not chosen.
    `commit` is of this tree, where it lies without its history; `more_text` are the files of rows that train on texts
    without labels."""

    model: Path
    model_name: str
    settings: Settings
    grid: Sequence[tuple[float, float]]
    held_out: int = 512
    search: SearchSettings = field(default_factory=SearchSettings)
    discard: bool = False
    commit: str | None = None
    more_text: Sequence[str] = ()


class Measure:
    """The measurements of one task."""

    def __init__(self, store: TaskStore, files: tasks.TaskFiles, protocol: Protocol, work: Path, bars: Bars) -> None:
        self.store, self.task, self.files, self.protocol, self.bars = store, store.task, files, protocol, bars
        self.work = work / store.task.name

    def run(self, rows: Sequence[Row], seeds: Sequence[int]) -> int:
        """Measure the rows whose records are missing; returns how many there were."""
        written = 0
        if not self.protocol.more_text and (lacking := [row.name for row in rows if row.more_text]):
            raise DataError(f"{', '.join(lacking)} train on texts without labels; name their file with --more-text")
        for seed in seeds:
            for row in rows:
                known = self.store.find(row.name, seed)
                if known is not None:
                    self._note_changes(known, row, seed)
                    continue
                say(f"{self.task.name}: {row.name}, seed {seed}")
                record, labels = self._dense(row, seed) if row.is_dense else self._compressed(row, seed)
                self.store.add(record, labels)
                written += 1
        return written

    def _dense(self, row: Row, seed: int) -> tuple[Record, str]:
        teacher = self._teacher(seed)
        if row.name == "dense":
            record, labels = self._record(row, seed, teacher.path, teacher.settings, teacher.seconds)
            return replace(record, weights_sha256=teacher.sha256), labels
        longer = replace(
            teacher.settings,
            dense_epochs=self.protocol.settings.epochs,
            dense_steps=self.protocol.settings.steps,
        )
        out = self._directory(seed) / row.slug
        with self._timed(out, seed, longer) as (clock, progress):
            finetune(teacher.path, out=out, settings=longer, further=True, progress=progress, **self._data(out))
        record, labels = self._record(row, seed, out, longer, clock.seconds)
        self._drop(out)
        return replace(record, teacher_sha256=teacher.sha256), labels

    def _compressed(self, row: Row, seed: int) -> tuple[Record, str]:
        teacher, settings = self._teacher(seed), self._settings(row, seed)
        plan, searched = self._plan(row, seed, teacher)
        out = self._directory(seed) / row.slug
        with self._timed(out, seed, settings) as (clock, progress):
            metrics = compress(
                teacher.path,
                plan=plan,
                out=out,
                settings=settings,
                more_text=None if row.more_text is None else MoreText(tuple(self.protocol.more_text), row.more_text),
                progress=progress,
                **self._data(out),
            )
        record, labels = self._record(row, seed, out, settings, clock.seconds)
        kl = divergences(teacher.path, out)
        facts = CompressionFacts(
            recipe=metrics.recipe,
            kl_to_dense=float(np.mean(kl)),
            training=training_facts(metrics),
            mask_sha256=metrics.mask_hash,
            compression=Compression(*(plan.compression(counting) for counting in ("hw", "packed", "values"))),
            bytes=sizes(plan, out),
            plan=PlanFacts(dict(plan.pattern_counts), {name: str(spec) for name, spec in plan.weights.items()}),
            search=searched,
            kl_by_sentence=tuple(float(f"{value:.5g}") for value in kl),
        )
        self._drop(out)
        return replace(record, teacher_sha256=teacher.sha256, compressed=facts), labels

    def _settings(self, row: Row, seed: int) -> Settings:
        source = resolve(self.protocol.model)
        width = size_of(source.config, source.family.hidden_key)
        return changed(replace(self.protocol.settings, seed=seed), row, width)

    def _plan(self, row: Row, seed: int, teacher: Teacher) -> tuple[CompressionPlan, SearchFacts | None]:
        """The row's plan, and for a searched one what the search says: an earlier one, where that asked the same of the
        same model."""
        if row.option is not None:
            source = resolve(teacher.path)
            return source.family.uniform_plan(source.config, WeightSpec.parse(row.option), **row.plan), None
        assert row.search is not None
        method, counting, compression = row.search
        out = self._directory(seed) / f"{row.slug}.search"
        asked = replace(self.protocol.search, method=method, counting=counting, compression=compression, seed=seed)
        asked, training = replace(asked, **row.searching), self._settings(row, seed)
        note = out.with_name(f"{out.name}.json")
        made_by = encode(SearchNote(teacher.sha256, self.files.digest, asdict(asked), compress_part(training)))
        known = note.is_file() and note.read_text(encoding="utf-8") == made_by
        if not (known and (out / SEARCH_FILE).is_file()):
            note.unlink(missing_ok=True)
            with self.bars() as progress:
                search(
                    teacher.path,
                    task="classification",
                    train=str(self.files.train),
                    out=out,
                    settings=asked,
                    training=training,
                    progress=progress,
                )
            write_atomic(note, made_by)
        if (out / SENSITIVITY_FILE).is_file():
            sensitivities = self.store.sensitivity_file(seed)
            sensitivities.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(sensitivities, (out / SENSITIVITY_FILE).read_bytes())
        result = read_search_result(out / SEARCH_FILE)
        plan = CompressionPlan.from_json((out / "plan.json").read_text(encoding="utf-8"), source=str(out / "plan.json"))
        return plan, SearchFacts(result.method, result.budget, result.best, result.samples, result.cost)

    def _teacher(self, seed: int) -> Teacher:
        """The dense model of a seed, trained if it is not there; every row of the seed starts from it. Of commands that
        run at once one trains it, and the others wait."""
        settings = self._dense_settings(seed)
        with in_turn(self._directory(seed), lambda: say(f"waiting for the dense model of seed {seed}")):
            return self._trained(seed, settings)

    def _trained(self, seed: int, settings: Settings) -> Teacher:
        made_by = DenseNote(self.protocol.model_name, self.files.digest, _json(settings.dense_part()))
        out = self._directory(seed) / "dense"
        note = out.with_name("dense.json")
        if not (out / "metrics.json").is_file() or not note.is_file():
            with self._timed(out, seed, settings) as (clock, progress):
                finetune(self.protocol.model, out=out, settings=settings, progress=progress, **self._data(out))
            write_atomic(note, encode(replace(made_by, seconds=clock.seconds)))
        way_out = f"remove it and {out}"
        known = convert(read_json(note, way_out), DenseNote, source=str(note), way_out=way_out)
        if replace(known, seconds=0.0) != made_by:
            raise ArtifactError(
                f"{out} was trained with other settings, data or from another model; give another --work, or remove it "
                f"and {note} and the lines of {self.store.file} with seed {seed}"
            )
        return Teacher(out, settings, known.seconds, file_hash(out / "model.safetensors"))

    def _dense_settings(self, seed: int) -> Settings:
        grid = self.protocol.grid
        if len(grid) == 1:
            rate, epochs = grid[0]
        else:
            with in_turn(self.work / "grid", lambda: say(f"waiting for the dense grid of {self.task.name}")):
                rate, epochs = self._choose(grid)
        return replace(self.protocol.settings, dense_learning_rate=rate, dense_epochs=epochs, seed=seed)

    def _choose(self, choices: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The (learning rate, epochs) that do best on a slice held out of train, with seed 0; kept with the records."""
        empty = Grid(self.protocol.model_name, self.files.digest, self.protocol.held_out)
        grid = self.store.grid() or empty
        if replace(grid, tried=()) != empty:
            raise ArtifactError(
                f"{self.store.grid_file} was measured with another model, data or --held-out; move it away"
            )
        slices = tasks.kept(
            self.work / "grid" / "data",
            lambda out: tasks.cut(self.files.train, out, self.protocol.held_out, seed=0),
        )
        for rate, epochs in choices:
            if (rate, epochs) not in grid.scores:
                grid = replace(grid, tried=(*grid.tried, self._try(slices, rate, epochs)))
                self.store.write_grid(grid)
        return max(choices, key=lambda choice: grid.scores[choice])  # of equals the first

    def _try(self, slices: tasks.TaskFiles, rate: float, epochs: float) -> GridEntry:
        """Train a dense model on a slice of train and score it on the rest."""
        say(f"{self.task.name}: dense grid, learning rate {rate:g}, {epochs:g} epochs")
        settings = replace(self.protocol.settings, dense_learning_rate=rate, dense_epochs=epochs, seed=0)
        out = self.work / "grid" / f"{rate:g}-{epochs:g}"
        with self._timed(out, 0, settings) as (clock, progress):
            finetune(
                self.protocol.model,
                task="classification",
                train=str(slices.train),
                dev=str(slices.dev),
                out=out,
                settings=settings,
                outputs=outputs_file(out),
                progress=progress,
            )
        answers = Answers.of(out)
        score = sum(answers.metric(name) for name in self.task.metrics) / len(self.task.metrics)
        shutil.rmtree(out)
        return GridEntry(rate, epochs, score, round(clock.seconds, 1))

    def _record(self, row: Row, seed: int, out: Path, settings: Settings, seconds: float) -> tuple[Record, str]:
        """What every record holds, from a finished checkpoint; and the dev labels."""
        answers, metrics = Answers.of(out), read_metrics(out)
        trained = metrics.train_samples if isinstance(metrics, CompressionMetrics) else _lines(self.files.train)
        twice = isinstance(metrics, CompressionMetrics) and metrics.embedding_table_drop is not None
        record = Record(
            task=self.task.name,
            row=row.name,
            seed=seed,
            model=self.protocol.model_name,
            data_sha256=self.files.digest,
            settings=_json(settings.dense_part() if row.is_dense else compress_part(settings)),
            metrics={name: MetricValue(answers.metric(name), answers.interval(name)) for name in self.task.metrics},
            samples=Samples(trained, len(answers.labels)),
            steps=metrics.steps,
            epochs=round(metrics.steps * settings.batch_size / trained, 3),
            seconds=round(seconds, 1),
            dev_reads=2 if twice else 1,  # the second time without the INT8 table
            versions=provenance.versions(PACKAGES, self.protocol.commit),
            machine=machine(),
            classes=answers.classes,
            labels_sha256=digest(answers.labels),
            predictions=answers.predictions,
        )
        return record, answers.labels

    def _note_changes(self, known: Record, row: Row, seed: int) -> None:
        """Say so when a record was made with other settings than those asked for now."""
        if row.is_dense:
            return
        then = DEFAULTS | known.settings
        asked = _json(compress_part(self._settings(row, seed)))
        differ = sorted(key for key in asked if then[key] != asked[key])
        if differ:
            say(f"left as it is, though measured with another {', '.join(differ)}: {self.store.file}, {row.name}")

    @contextlib.contextmanager
    def _timed(self, out: Path, seed: int, settings: Settings) -> Iterator[tuple[Clock, Progress]]:
        """A clock that counts on where a killed run with these settings stopped, and the progress that keeps it."""
        self._directory(seed).mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        work = digest(f"{replace(settings, threads=None)} {self.files.digest}")
        clock = Clock(out.with_name(f".{out.name}.seconds"), work)
        with self.bars() as progress:

            def both(what: str, done: int, total: int) -> None:
                clock.keep()
                progress(what, done, total)

            yield clock, both
        clock.stop()

    def _data(self, out: Path) -> DataArguments:
        return {
            "task": "classification",
            "train": str(self.files.train),
            "dev": str(self.files.dev),
            "outputs": outputs_file(out),
        }

    def _directory(self, seed: int) -> Path:
        return self.work / f"s{seed}"

    def _drop(self, out: Path) -> None:
        if self.protocol.discard:
            shutil.rmtree(out)


class DataArguments(TypedDict):
    """The arguments that `finetune` and `compress` share: what is learned, from which files, and where answers go."""

    task: str
    train: str
    dev: str
    outputs: Path


@dataclass(frozen=True)
class DenseNote:
    """The file ``dense.json``: what a dense model was trained from, and in how many seconds."""

    model: str
    data_sha256: str
    settings: dict[str, object]
    seconds: float = 0.0


@dataclass(frozen=True)
class SearchNote:
    """The file beside a search: sha256 of the dense model's weights, the data, and what was asked, for which
    training."""

    teacher_sha256: str
    data_sha256: str
    settings: dict[str, object]
    training: dict[str, object]


@dataclass(frozen=True)
class Teacher:
    """The dense model of one seed."""

    path: Path
    settings: Settings
    seconds: float
    sha256: str


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def machine() -> Machine:
    """CPU model and instruction sets, GPU if there is one, and the threads that torch uses."""
    import torch

    from engines.devices import cpu_device

    cpu = cpu_device()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(cpu.get("name", "unknown"), cpu.get("features", ""), torch.get_num_threads(), gpu)


def changed(settings: Settings, row: Row, width: int) -> Settings:
    """`settings` with a row's changes, and with what both leave open for a model of this hidden size."""
    plain = replace(replace(settings, average=0.0), **row.settings)  # rows say it where weights are averaged
    training = training_of(plain, task_named("classification"), width, more_text=row.more_text is not None)
    losses = replace(training.losses, **row.losses)
    return replace(
        plain,
        learning_rate=training.learning_rate,
        losses=losses,
        augment=training.augment,
        percentile=plain.range_percentile,
    )


def _json(value: Mapping[str, object]) -> dict[str, object]:
    """As it comes back out of a JSON file."""
    return dict(json.loads(json.dumps(value)))


def _lines(file: Path) -> int:
    return file.read_text(encoding="utf-8").count("\n") - 1
