"""Measure what is missing: per seed one dense model, and every other row from that same model.

Training lies in a work directory (never in the repository); an interrupted row goes on from there. A row whose record is
there is left alone, whatever else has changed: delete its file to measure it again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressors.models import resolve
from compressors.search.plan_search import SENSITIVITY_FILE, search
from compressors.search.settings import SearchSettings
from compressors.settings import DENSE_FIELDS, Settings
from compressors.training.compress import compress, finetune
from compressors.training.default_recipe import training_of
from compressors.training.divergence import divergence
from nxm_export.contract.checkpoint_metrics import CompressionMetrics, read_metrics
from nxm_export.contract.families import size_of
from nxm_export.contract.packed_checkpoint import pack
from nxm_export.contract.plan import COUNTINGS, CompressionPlan, WeightSpec
from nxm_export.contract.search_result import SEARCH_FILE, read_search_result
from nxm_export.contract.tasks import task_named
from nxm_export.data.metrics import metric_named
from nxm_export.errors import ArtifactError, DataError
from nxm_export.progress import Progress
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.hashing import file_hash
from tools.results import store, tasks
from tools.results.bootstrap import resampled
from tools.results.rows import Row
from tools.results.statistics import percentiles

GRID_SCHEMA = "nxm-result-grid/1"
ROOT = Path(__file__).parents[2]
Bars = Callable[[], contextlib.AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Protocol:
    """How rows are measured. `grid` holds the dense (learning rate, epochs) to choose from; one entry is not chosen."""

    model: Path
    model_name: str
    settings: Settings
    grid: Sequence[tuple[float, float]]
    held_out: int = 512
    search: SearchSettings = field(default_factory=SearchSettings)
    discard: bool = False


class Measure:
    """The measurements of one task."""

    def __init__(
        self, task: tasks.Task, files: tasks.TaskFiles, protocol: Protocol, results: Path, work: Path, bars: Bars
    ) -> None:
        self.task, self.files, self.protocol, self.bars = task, files, protocol, bars
        self.results, self.work = results, work / task.name

    def run(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Path]:
        """Measure the rows whose records are missing; returns the records written."""
        written = []
        for seed in seeds:
            for row in rows:
                file = store.file_of(self.results, self.task, row, seed)
                if file.is_file():
                    self._note_changes(file, row, seed)
                    continue
                say(f"{self.task.name}: {row.name}, seed {seed}")
                facts, labels = self._dense(row, seed) if row.is_dense else self._compressed(row, seed)
                written.append(store.write(self.results, self.task, row, seed, facts, labels))
        return written

    def _dense(self, row: Row, seed: int) -> tuple[dict[str, Any], str]:
        teacher = self._teacher(seed)
        if row.name == "dense":
            facts, labels = self._facts(teacher.path, teacher.settings.dense_part(), teacher.seconds)
            return facts | {"weights_sha256": teacher.sha256}, labels
        longer = replace(
            teacher.settings,
            dense_epochs=self.protocol.settings.epochs,
            dense_steps=self.protocol.settings.steps,
        )
        out = self._directory(seed) / row.slug
        with self._timed(out, seed) as (clock, progress):
            finetune(teacher.path, out=out, settings=longer, further=True, progress=progress, **self._data(out))
        facts, labels = self._facts(out, longer.dense_part(), clock.seconds)
        self._drop(out)
        return facts | {"teacher_sha256": teacher.sha256}, labels

    def _compressed(self, row: Row, seed: int) -> tuple[dict[str, Any], str]:
        teacher, settings = self._teacher(seed), self._settings(row, seed)
        plan, search_facts = self._plan(row, seed, teacher.path)
        out = self._directory(seed) / row.slug
        with self._timed(out, seed) as (clock, progress):
            metrics = compress(
                teacher.path, plan=plan, out=out, settings=settings, progress=progress, **self._data(out)
            )
        facts, labels = self._facts(out, _compress_part(settings), clock.seconds)
        facts |= {
            "recipe": metrics.recipe,
            "kl_to_dense": _kl(teacher.path, out),
            "teacher_sha256": teacher.sha256,
            "training": _training_part(metrics),
            "mask_sha256": metrics.mask_hash,
            "compression": {counting: plan.compression(counting) for counting in COUNTINGS},
            "bytes": _bytes(plan, out),
            "plan": {
                "options": plan.pattern_counts,
                "weights": {name: str(spec) for name, spec in plan.weights.items()},
            },
        }
        self._drop(out)
        return facts | search_facts, labels

    def _settings(self, row: Row, seed: int) -> Settings:
        source = resolve(self.protocol.model)
        width = size_of(source.config, source.family.hidden_key)
        return changed(replace(self.protocol.settings, seed=seed), row.settings, width)

    def _plan(self, row: Row, seed: int, teacher: Path) -> tuple[CompressionPlan, dict[str, Any]]:
        """The row's plan, and for a searched one what the search says."""
        if row.option is not None:
            source = resolve(teacher)
            return source.family.uniform_plan(source.config, WeightSpec.parse(row.option), **row.plan), {}
        assert row.search is not None
        method, counting, compression = row.search
        out = self._directory(seed) / f"{row.slug}.search"
        if not (out / SEARCH_FILE).is_file():
            wanted: dict[str, Any] = {"method": method, "counting": counting, "compression": compression, "seed": seed}
            chosen = replace(self.protocol.search, **wanted | row.searching)
            with self.bars() as progress:
                search(
                    teacher,
                    task="classification",
                    train=str(self.files.train),
                    out=out,
                    settings=chosen,
                    training=self._settings(row, seed),
                    progress=progress,
                )
        if (out / SENSITIVITY_FILE).is_file():
            (self.results / self.task.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / SENSITIVITY_FILE, self.results / self.task.name / f"sensitivity-s{seed}.csv")
        result = read_search_result(out / SEARCH_FILE).to_dict()
        facts = {key: result[key] for key in ("method", "budget", "best", "samples", "cost")}
        plan = CompressionPlan.from_json((out / "plan.json").read_text(encoding="utf-8"), source=str(out / "plan.json"))
        return plan, {"search": facts}

    def _teacher(self, seed: int) -> Teacher:
        """The dense model of a seed, trained if it is not there; every row of the seed starts from it."""
        settings = self._dense_settings(seed)
        made_by = {
            "model": self.protocol.model_name,
            "data_sha256": self.files.digest,
            "settings": _json(settings.dense_part()),
        }
        out = self._directory(seed) / "dense"
        note = out.with_name("dense.json")
        if not (out / "metrics.json").is_file() or not note.is_file():
            with self._timed(out, seed) as (clock, progress):
                finetune(self.protocol.model, out=out, settings=settings, progress=progress, **self._data(out))
            write_atomic(note, json.dumps(made_by | {"seconds": clock.seconds}, indent=1) + "\n")
        known = json.loads(note.read_text(encoding="utf-8"))
        if {key: known[key] for key in made_by} != made_by:
            raise ArtifactError(
                f"{out} was trained with other settings, data or from another model; give another --work, or remove it "
                f"and {note} and the records of {self.task.name} with seed {seed}"
            )
        return Teacher(out, settings, known["seconds"], file_hash(out / "model.safetensors"))

    def _dense_settings(self, seed: int) -> Settings:
        grid = self.protocol.grid
        rate, epochs = grid[0] if len(grid) == 1 else self._choose(grid)
        return replace(self.protocol.settings, dense_learning_rate=rate, dense_epochs=epochs, seed=seed)

    def _choose(self, grid: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The (learning rate, epochs) that do best on a held-out slice of train, with seed 0; kept beside the records."""
        file = self.results / self.task.name / "dense-grid.json"
        head = {
            "schema": GRID_SCHEMA,
            "model": self.protocol.model_name,
            "data_sha256": self.files.digest,
            "held_out": self.protocol.held_out,
        }
        known: dict[str, Any] = head | {"tried": []}
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
        if {key: known.get(key) for key in head} != head:
            raise ArtifactError(f"{file} was measured with another model, data or --held-out; move it away")
        tried = {(entry["learning_rate"], entry["epochs"]): entry for entry in known["tried"]}
        slices = tasks.cut(self.files.train, self.work / "grid" / "data", self.protocol.held_out, seed=0)
        for rate, epochs in grid:
            if (rate, epochs) in tried:
                continue
            say(f"{self.task.name}: dense grid, learning rate {rate:g}, {epochs:g} epochs")
            settings = replace(self.protocol.settings, dense_learning_rate=rate, dense_epochs=epochs, seed=0)
            out = self.work / "grid" / f"{rate:g}-{epochs:g}"
            with self._timed(out, 0) as (clock, progress):
                finetune(
                    self.protocol.model,
                    task="classification",
                    train=str(slices.train),
                    dev=str(slices.dev),
                    out=out,
                    settings=settings,
                    outputs=_outputs_file(out),
                    progress=progress,
                )
            predictions, labels, classes = _outputs(out)
            values = [
                metric_named(name)(store.one_hot(predictions, classes), store.decode(labels))
                for name in self.task.metrics
            ]
            score = sum(values) / len(values)
            entry = {"learning_rate": rate, "epochs": epochs, "score": score, "seconds": round(clock.seconds, 1)}
            tried[rate, epochs] = entry
            shutil.rmtree(out)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(head | {"tried": list(tried.values())}, indent=1) + "\n")
        return max(grid, key=lambda pair: tried[pair]["score"])  # of equals the first

    def _facts(self, out: Path, settings: Mapping[str, Any], seconds: float) -> tuple[dict[str, Any], str]:
        """What every record holds, from a finished checkpoint; and the dev labels."""
        predictions, labels, classes = _outputs(out)
        metrics = read_metrics(out)
        logits, wanted = store.one_hot(predictions, classes), store.decode(labels)
        trained = metrics.train_samples if isinstance(metrics, CompressionMetrics) else _lines(self.files.train)
        facts = {
            "model": self.protocol.model_name,
            "data_sha256": self.files.digest,
            "settings": _json(settings),
            "metrics": {
                name: {
                    "value": metric_named(name)(logits, wanted),
                    "interval": percentiles(resampled(name, store.decode(predictions), wanted, classes)),
                }
                for name in self.task.metrics
            },
            "samples": {"train": trained, "dev": len(labels)},
            "steps": metrics.steps,
            "epochs": round(metrics.steps * settings["batch_size"] / trained, 3),
            "seconds": round(seconds, 1),
            "dev_reads": 2
            if getattr(metrics, "table_drop", None) is not None
            else 1,  # the second time without the INT8 table
            "versions": versions(),
            "machine": machine(),
            "classes": classes,
            "labels_sha256": store.digest(labels),
            "predictions": predictions,
        }
        return facts, labels

    def _note_changes(self, file: Path, row: Row, seed: int) -> None:
        """Say so when a record was made with other settings than those asked for now."""
        if row.is_dense:
            return
        known = DEFAULTS | json.loads(file.read_text(encoding="utf-8")).get("settings", {})
        asked = _json(_compress_part(self._settings(row, seed)))
        differ = sorted(key for key in asked if known[key] != asked[key])
        if differ:
            say(f"kept as it is, though measured with another {', '.join(differ)}: {file}")

    @contextlib.contextmanager
    def _timed(self, out: Path, seed: int) -> Iterator[tuple[Clock, Progress]]:
        """A clock that counts on where a killed run stopped, and the progress that keeps it."""
        self._directory(seed).mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        clock = Clock(out.with_name(f".{out.name}.seconds"))
        with self.bars() as progress:

            def both(what: str, done: int, total: int) -> None:
                clock.keep()
                progress(what, done, total)

            yield clock, both
        clock.stop()

    def _data(self, out: Path) -> dict[str, Any]:
        files = {"train": str(self.files.train), "dev": str(self.files.dev), "outputs": _outputs_file(out)}
        return {"task": "classification", **files}

    def _directory(self, seed: int) -> Path:
        return self.work / f"s{seed}"

    def _drop(self, out: Path) -> None:
        if self.protocol.discard:
            shutil.rmtree(out)


@dataclass(frozen=True)
class Teacher:
    """The dense model of one seed."""

    path: Path
    settings: Settings
    seconds: float
    sha256: str


class Clock:
    """Seconds of work on something, over all the processes that worked on it; kept in a file every few seconds."""

    EVERY = 5.0

    def __init__(self, file: Path) -> None:
        self.file, self.began, self.kept = file, time.monotonic(), 0.0
        self.before = float(file.read_text(encoding="utf-8")) if file.is_file() else 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self.began

    def keep(self) -> None:
        """Write the seconds down, if that was not done just now."""
        if time.monotonic() - self.kept > self.EVERY:
            self.kept = time.monotonic()
            write_atomic(self.file, f"{self.seconds:.1f}\n")

    def stop(self) -> None:
        """The work is complete."""
        self.file.unlink(missing_ok=True)


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def versions(
    names: Sequence[str] = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn"),
) -> dict[str, str]:
    """Of the packages that numbers depend on, and the commit of this source tree, ``-dirty`` where code was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("describe", "--always", "--exclude=*")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!docs")
    return {name: version(name) for name in names} | {"commit": f"{commit or 'unknown'}{'-dirty' if changed else ''}"}


def machine() -> dict[str, Any]:
    """CPU model and instruction sets, GPU if there is one, and the threads that torch uses."""
    import torch

    from engines.passport import cpu_device

    cpu = cpu_device()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu.get("name", "unknown"),
        "features": cpu.get("features", ""),
        **gpu,
        "threads": torch.get_num_threads(),
    }


def _outputs_file(directory: Path) -> Path:
    """Where what a model says on dev is kept: beside its directory."""
    return directory.with_name(f"{directory.name}.outputs.safetensors")


def _outputs(directory: Path) -> tuple[str, str, int]:
    """(predictions, labels, classes) of a finished checkpoint."""
    from safetensors.numpy import load_file

    file = _outputs_file(directory)
    if not file.is_file():
        raise DataError(f"{file} is missing: what {directory} says on dev is not known; remove both")
    arrays = load_file(file)
    return store.encode(arrays["logits"].argmax(axis=-1)), store.encode(arrays["labels"]), arrays["logits"].shape[-1]


def _kl(dense: Path, checkpoint: Path) -> float:
    """Mean KL(dense || checkpoint) of the answers on dev, in nats."""
    from safetensors.torch import load_file

    wanted, found = (load_file(_outputs_file(directory))["logits"] for directory in (dense, checkpoint))
    return divergence(wanted, found) / len(found)


def _bytes(plan: CompressionPlan, checkpoint: Path) -> dict[str, int]:
    """Of the planned matrices: FP32, stored (`packed`), in an INT8 engine; of the whole model: the file of ``nxm pack``."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = pack(checkpoint, Path(scratch) / "packed.safetensors")
    elements = sum(out * in_ for out, in_ in plan.shapes.values())
    return {
        "fp32": 4 * elements,
        "packed": -(-plan.stored_bits("packed") // 8),
        "engine_sparse": plan.engine_bytes(sparse=True),
        "engine_dense": plan.engine_bytes(sparse=False),
        "file": packed.file_bytes,
    }


def changed(settings: Settings, changes: Mapping[str, Any], width: int) -> Settings:
    """`settings` with a row's changes, those of a loss by the names of its terms, and with what both leave open for a model
    of this hidden size."""
    plain = replace(settings, **{name: value for name, value in changes.items() if name != "losses"})
    training = training_of(plain, task_named("classification"), width)
    losses = replace(training.losses, **changes.get("losses", {}))
    return replace(plain, learning_rate=training.learning_rate, losses=losses, augment=training.augment)


def _training_part(metrics: CompressionMetrics) -> dict[str, Any]:
    """What a record says of the training itself: what its recipe has of these."""
    names = (
        *("admm", "admm_steps", "sr_ste_steps", "qat_steps", "residual", "residual_gate_passed", "permutation"),
        *("outputs_in_float", "table_drop", "table_drop_interval", "held_out_samples"),
    )
    values = metrics.to_dict()
    return {name: values[name] for name in names if values[name] not in (None, {})}


def _compress_part(settings: Settings) -> dict[str, Any]:
    """The settings that compression reads; threads are told with the machine."""
    return {key: value for key, value in asdict(settings).items() if key not in (*DENSE_FIELDS, "threads")}


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back out of a JSON file."""
    return dict(json.loads(json.dumps(value)))


# Of compression. A record made before there was a setting was made without what it brought.
DEFAULTS: dict[str, Any] = _json(_compress_part(Settings(augment=0.0, output_limit=None)))


def _lines(file: Path) -> int:
    return file.read_text(encoding="utf-8").count("\n") - 1
