"""From a dense task model to a compressed checkpoint: the recipes, phase by phase.

``finetune`` makes the dense model, which is the teacher and the yardstick. ``compress`` takes it through

    calibrate -> ADMM -> harden (hard projection) -> masked QAT -> bake

Recipes (`RECIPES`): ``nxm`` is ours; ``magnitude`` fixes the mask by magnitude at the start and spends all steps on
masked QAT, with the same teacher, steps and learning rates; ``paper`` follows what is known of the authors' recipe.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from compressors.admm import Admm
from compressors.fake_quant import QuantLinear, bake, calibrate, prepare, quant_linears, require_invariants
from compressors.memory import keep_freed_memory
from compressors.models import Source, load_model, load_tokenizer, max_length, quiet, resolve
from compressors.train import LOG_FILE, JsonLog, Losses, Phase, Progress, collate, mean_loss, predict, run_phase
from nxm_export.checkpoint import open_checkpoint, save_plan
from nxm_export.data import (
    Columns,
    Examples,
    Features,
    RawExamples,
    class_names,
    encode,
    load_raw,
    sorted_batches,
    with_classes,
    with_scores,
)
from nxm_export.errors import DataError, PlanError
from nxm_export.families import Task, task_named
from nxm_export.metrics import interval, metric_named
from nxm_export.plan import CompressionPlan
from nxm_export.run_dir import atomic_dir

MAX_DUAL_UPDATES = 20
RECIPES = ("nxm", "magnitude", "paper")
PAPER_DIFFERENCES = (
    "as the authors: dual update per epoch, undamped, constant penalty, no distillation, no training after projection, embeddings, norms and head frozen",
    "not as the authors: static per-tensor activations (theirs: dynamic per token), one weight scale per channel (theirs: per 32 rows), "
    "narrow weight range, exactly N kept per group",
)


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train. Steps win over epochs where both are given."""

    dense_epochs: float = 3.0
    dense_steps: int | None = None
    dense_learning_rate: float = 5e-5
    dense_freeze_embeddings: bool = False
    epochs: float = 6.0
    steps: int | None = None
    learning_rate: float = 1e-4
    batch_size: int = 32
    max_length: int | None = None
    recipe: str = "nxm"
    admm: str = "mask"
    admm_share: float = 0.4
    dual_updates: int | None = None
    damping: float = 0.5
    strength: tuple[float, float] = (0.3, 5.0)
    residual_gate: float = 0.1
    distill: bool = True
    losses: Losses = Losses(task=0.5, logits=1.0, hidden=1.0)
    calibration_samples: int = 512
    percentile: float = 99.99
    freeze_embeddings: bool = True
    precision: str = "auto"
    seed: int = 0
    threads: int | None = None
    gelu: str | None = None  # erf or tanh; None keeps the model's own

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise PlanError(f"unknown recipe {self.recipe!r}; choose one of {', '.join(RECIPES)}")
        if self.batch_size < 1 or self.calibration_samples < 1:
            raise DataError("batch size and calibration samples must be at least 1")
        if not 0 < self.percentile <= 100:
            raise DataError(f"the calibration percentile must be in (0, 100], got {self.percentile}")


@dataclass(frozen=True)
class TaskData:
    """Training and evaluation data of one task, tokenized."""

    task: Task
    train: list[Features]
    dev: list[Features]
    pad_id: int
    classes: list[str] | None


def read_data(
    source: Source,
    task: Task,
    train: str,
    dev: str,
    settings: Settings,
    columns: Columns,
    tokenizer: Any,
    train_limit: int | None = None,
) -> TaskData:
    """Read and tokenize both files; class names come from the model's head where it fits the task, else from train."""
    raw_train, raw_dev = load_raw(train, "train", columns), load_raw(dev, "dev", columns)
    if (raw_train.pairs is None) != (raw_dev.pairs is None):
        raise DataError(
            f"{raw_train.source} and {raw_dev.source} differ: only one of them has a second text; name the columns with --text and --text-pair"
        )
    classes = None
    if task.name == "classification":
        classes = _head_classes(source, raw_train) if source.head_fits(task) else class_names(raw_train)
    label = (lambda raw: with_classes(raw, classes)) if classes is not None else with_scores
    examples: tuple[Examples, Examples] = (label(raw_train), label(raw_dev))
    if train_limit:
        examples = (examples[0].sample(train_limit, settings.seed), examples[1])
    length = tokenizer.model_max_length = max_length(source, tokenizer, settings.max_length)  # saved with the model
    backend, inputs = tokenizer.backend_tokenizer, source.family.inputs
    features = [encode(backend, part, length, inputs) for part in examples]
    return TaskData(task, features[0], features[1], int(tokenizer.pad_token_id or 0), classes)


def _head_classes(source: Source, raw: RawExamples) -> list[str]:
    """The head's class names, or their indices when the data labels classes by number."""
    names = source.classes()
    if set(raw.labels) <= set(names):
        return names
    return [str(i) for i in range(len(names))]


def finetune(
    model: str | Path,
    *,
    task: str,
    train: str,
    dev: str,
    out: str | Path,
    settings: Settings = Settings(),
    columns: Columns = Columns(),
    revision: str | None = None,
    train_limit: int | None = None,
    work_dir: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Fine-tune a dense task model and save it to `out` with ``metrics.json``; a model whose head fits is kept as it is.

    Returns the metrics: name, value, 95 % interval, dev samples, training steps.
    """
    _prepare_process(settings)
    source, kind = resolve(model, revision), task_named(task)
    tokenizer = load_tokenizer(source)
    data = read_data(source, kind, train, dev, settings, columns, tokenizer, train_limit)
    fits = source.head_fits(kind)
    set_seed(settings.seed)
    network = load_model(source, kind, classes=None if fits else data.classes or ["score"])
    steps = 0 if fits else settings.dense_steps or _steps(data.train, settings.dense_epochs, settings.batch_size)
    out = Path(out)
    work_dir = work_dir or out.with_name(f".{out.name}.work")
    if steps:
        phase = Phase("dense", steps, settings.dense_learning_rate, settings.batch_size)
        if settings.dense_freeze_embeddings:
            freeze_embeddings(network)
        run_phase(
            network,
            data.train,
            data.pad_id,
            phase,
            work_dir=work_dir,
            seed=settings.seed,
            precision=settings.precision,
            progress=progress,
            save_every=_save_every(steps),
        )
    metrics = evaluate(network, data, progress) | {"steps": steps, "revision": source.revision}
    with atomic_dir(out) as scratch:
        _save_model(network, tokenizer, scratch, metrics, work_dir)
    shutil.rmtree(work_dir, ignore_errors=True)
    return metrics


def compress(
    model: str | Path,
    *,
    task: str,
    train: str,
    dev: str,
    plan: CompressionPlan,
    out: str | Path,
    settings: Settings = Settings(),
    columns: Columns = Columns(),
    train_limit: int | None = None,
    work_dir: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Compress a dense task model under `plan` and save the checkpoint to `out` with ``metrics.json``.

    `model` is a directory whose head fits the task (see `finetune`); it is also the teacher. Interrupted work resumes
    from `work_dir`. Returns the metrics: compressed and dense values on the same dev samples, with intervals, the final
    residual, mask hash and step counts.
    """
    _prepare_process(settings)
    source, kind = resolve(model), task_named(task)
    if not source.head_fits(kind):
        raise DataError(
            f"{model} has no {task} head; fine-tune it first (`nxm compress` and `nxm run` do so by themselves)"
        )
    plan.require_fits(source.family.model_type, source.family.weights(source.config))
    tokenizer = load_tokenizer(source)
    data = read_data(source, kind, train, dev, settings, columns, tokenizer, train_limit)
    out = Path(out)
    work_dir = work_dir or out.with_name(f".{out.name}.work")
    job = _Job(source, data, plan, settings, work_dir, progress)
    student, facts = job.run()
    metrics = facts | evaluate(student, data, progress)  # with activation quantizers, so before baking
    scales = bake(student)
    with atomic_dir(out) as scratch:
        _save_model(student, tokenizer, scratch, metrics, work_dir)
        save_plan(scratch, plan, scales)
        open_checkpoint(scratch).require_valid()
    shutil.rmtree(work_dir, ignore_errors=True)
    return metrics


def evaluate(model: nn.Module, data: TaskData, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """The task metric on all dev samples, with its 95 % bootstrap interval."""
    logits = predict(model, data.dev, data.pad_id, progress=lambda done, total: progress("evaluate", done, total))
    labels = np.array([sample["labels"] for sample in data.dev])
    value = metric_named(data.task.metric)(logits, labels)
    return {
        "metric": data.task.metric,
        "value": value,
        "interval": interval(data.task.metric, logits, labels),
        "dev_samples": len(labels),
    }


class _Job:
    """One compression run: holds what the phases share."""

    def __init__(
        self,
        source: Source,
        data: TaskData,
        plan: CompressionPlan,
        settings: Settings,
        work_dir: Path,
        progress: Progress,
    ) -> None:
        self.source, self.data, self.plan = source, data, plan
        self.settings, self.work_dir, self.progress = settings, work_dir, progress
        # A slice of train that no phase trains on: it tells what hardening would cost, and dev is never asked.
        order = np.random.default_rng(settings.seed).permutation(len(data.train))
        count = min(256, len(data.train) // 20)
        self.held_out = [data.train[i] for i in sorted(order[:count])]
        self.train = [data.train[i] for i in sorted(order[count:])]
        self.steps = settings.steps or _steps(self.train, settings.epochs, settings.batch_size)

    def run(self) -> tuple[nn.Module, dict[str, Any]]:
        """Calibrate, ADMM, harden, masked QAT; returns the trained student (not yet baked) and facts for the metrics."""
        settings = self.settings
        set_seed(settings.seed)
        student = load_model(self.source, self.data.task, gelu=settings.gelu)
        teacher = (
            load_model(self.source, self.data.task).requires_grad_(False)
            if settings.distill and settings.recipe != "paper"
            else None
        )
        _without_dropout(student)
        prepare(student, self.plan, self.source.family, self.source.config)
        self._freeze(student)
        self._calibrate(student)
        layers = quant_linears(student)
        facts: dict[str, Any] = {
            "recipe": settings.recipe,
            "steps": self.steps,
            "train_samples": len(self.train),
            "held_out_samples": len(self.held_out),
        }
        if settings.recipe != "magnitude":
            facts |= self._admm(student, layers, teacher)
        for layer in layers.values():
            layer.harden()
        qat_steps = 0 if settings.recipe == "paper" else self.steps - facts.get("admm_steps", 0)
        if qat_steps > 0:
            phase = Phase("qat", qat_steps, settings.learning_rate, settings.batch_size, losses=self._losses(teacher))
            self._run(student, phase, teacher)
        require_invariants(student)
        return student, facts | {"qat_steps": qat_steps, "mask_hash": mask_hash(layers)}

    def _admm(self, student: nn.Module, layers: Mapping[str, QuantLinear], teacher: nn.Module | None) -> dict[str, Any]:
        """The ADMM phase; goes on, up to twice a tenth of all steps, while the residual is above the gate."""
        settings = self.settings
        paper = settings.recipe == "paper"
        admm = Admm.of(layers, settings.admm, 1.0 if paper else settings.damping, warm_dual=paper)
        steps = self.steps if paper else max(1, round(self.steps * settings.admm_share))
        schedule: _Schedule = (
            _PaperSchedule(_steps(self.train, 1.0, settings.batch_size))
            if paper
            else _Ramp(admm, steps, settings, settings.dual_updates)
        )
        done = 0
        for name, count in (("admm", steps), ("admm-more-1", self.steps // 10), ("admm-more-2", self.steps // 10)):
            if name != "admm" and (paper or count < 1 or admm.residual() <= settings.residual_gate):
                break
            phase = Phase(
                name,
                count,
                settings.learning_rate,
                settings.batch_size,
                losses=self._losses(teacher),
                scheduler="linear" if paper else "constant_with_warmup",
            )
            watch = _AdmmCallback(
                admm, schedule, JsonLog(self.work_dir / LOG_FILE, name), lambda: self._projected_loss(student, admm)
            )
            self._run(student, phase, teacher, admm, watch)
            done += count
            schedule = _Ramp(admm, max(1, count), replace(settings, strength=(settings.strength[1],) * 2), 1)
        residual = admm.residual()
        return {
            "admm": settings.admm,
            "admm_steps": done,
            "residual": residual,
            "residual_gate_passed": residual <= settings.residual_gate,
        }

    def _run(
        self,
        student: nn.Module,
        phase: Phase,
        teacher: nn.Module | None,
        admm: Admm | None = None,
        *callbacks: TrainerCallback,
    ) -> None:
        run_phase(
            student, self.train, self.data.pad_id, phase, work_dir=self.work_dir, seed=self.settings.seed, precision=self.settings.precision,
            teacher=teacher, admm=admm, callbacks=callbacks, progress=self.progress, save_every=_save_every(phase.steps),
        )  # fmt: skip
        require_invariants(student)

    def _losses(self, teacher: nn.Module | None) -> Losses:
        return self.settings.losses if teacher is not None else Losses()

    def _projected_loss(self, student: nn.Module, admm: Admm) -> float | None:
        if not self.held_out:
            return None
        with admm.projected():
            return mean_loss(student, self.held_out, self.data.pad_id)

    def _freeze(self, student: nn.Module) -> None:
        if self.settings.recipe == "paper":
            compressed = {id(p) for layer in quant_linears(student).values() for p in layer.parameters()}
            for parameter in student.parameters():
                parameter.requires_grad_(id(parameter) in compressed)
        elif self.settings.freeze_embeddings:
            freeze_embeddings(student)

    def _calibrate(self, student: nn.Module) -> None:
        pick = np.random.default_rng(self.settings.seed).permutation(len(self.train))[
            : self.settings.calibration_samples
        ]
        samples = [self.train[i] for i in sorted(pick)]
        batches = sorted_batches(samples, 32)
        done = iter(range(1, len(batches) + 1))
        student.eval()
        calibrate(
            student,
            (collate([samples[i] for i in batch], self.data.pad_id) for batch in batches),
            self.settings.percentile,
            lambda: self.progress("calibrate", next(done), len(batches)),
        )


class _Schedule(Protocol):
    """When ADMM updates its dual, and how hard it pulls at a step (counted from 1)."""

    def penalize(self, admm: Admm, step: int) -> None: ...

    def updates_at(self, step: int) -> bool: ...


class _Ramp:
    """Evenly spaced dual updates; after each, rho for a strength that grows geometrically from first to last.

    Under Adam a weight moves by at most the learning rate a step, whatever pulls it. Where the number of updates is not
    set, they are spaced so that between two of them a weight can travel the distance that a dropped one has to go:
    updating the dual more often only piles up U before W has followed, and the mask flips back and forth.
    """

    def __init__(self, admm: Admm, steps: int, settings: Settings, updates: int | None) -> None:
        self.steps, (self.first, self.last) = steps, settings.strength
        if updates is None:
            updates = round(steps * settings.learning_rate / max(admm.mean_gap(), 1e-12))
        updates = max(1, min(updates, steps, MAX_DUAL_UPDATES))
        self.dual_steps = {round((i + 1) * steps / updates) for i in range(updates)}

    def penalize(self, admm: Admm, step: int) -> None:
        if step == 1 or step - 1 in self.dual_steps:
            admm.set_strength(self.first * (self.last / self.first) ** (step / self.steps))
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        return step in self.dual_steps


class _PaperSchedule:
    """The authors': a constant penalty and one dual update at the end of every epoch."""

    rho = 4e-3  # the middle of their grid

    def __init__(self, epoch_steps: int) -> None:
        self.epoch_steps = epoch_steps

    def penalize(self, admm: Admm, step: int) -> None:
        if step == 1:
            admm.set_rho(self.rho)
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        return step % self.epoch_steps == 0


class _AdmmCallback(TrainerCallback):
    """The penalty before every optimizer step (the Trainer has clipped by then), and the dual updates after some."""

    def __init__(
        self, admm: Admm, schedule: _Schedule, log: JsonLog, projected_loss: Callable[[], float | None]
    ) -> None:
        self.admm, self.schedule, self.log, self.projected_loss = admm, schedule, log, projected_loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the penalty to the clipped task gradient."""
        self.schedule.penalize(self.admm, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the dual where the schedule says so, and log what it did."""
        if not self.schedule.updates_at(state.global_step):
            return
        update = self.admm.dual_update()
        loss = self.projected_loss()
        if state.is_world_process_zero:
            self.log.write(state.global_step, residual=update.residual, flips=update.flips, projected_loss=loss)


def mask_hash(layers: Mapping[str, QuantLinear]) -> str:
    """sha256 over all masks, in model order."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        if layer.mask is not None:
            digest.update(name.encode())
            digest.update(np.packbits(layer.mask.cpu().numpy()).tobytes())
    return digest.hexdigest()


def freeze_embeddings(model: nn.Module) -> None:
    """Stop training of every embedding table."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def _without_dropout(model: nn.Module) -> None:
    """Quantization is regularisation enough, and distillation wants a student without noise of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _steps(samples: Sequence[Any], epochs: float, batch_size: int) -> int:
    return max(1, math.ceil(epochs * len(samples) / batch_size))


def _save_every(steps: int) -> int:
    return max(1, math.ceil(steps / 10))


def _prepare_process(settings: Settings) -> None:
    keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


def _save_model(model: nn.Module, tokenizer: Any, directory: Path, metrics: Mapping[str, Any], work_dir: Path) -> None:
    with quiet():
        model.save_pretrained(directory)  # type: ignore[operator]
        tokenizer.save_pretrained(directory)
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if (work_dir / LOG_FILE).is_file():
        shutil.copyfile(work_dir / LOG_FILE, directory / LOG_FILE)
