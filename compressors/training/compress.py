"""From a dense task model to a compressed checkpoint.

``finetune`` makes the dense model, which is the teacher and the baseline; ``compress`` takes it through the phases
(`compressors.training.phases`), bakes the result into plain weights, and saves it with its plan, scales and metrics.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from safetensors.numpy import save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from compressors import distributed
from compressors.models import ModelSource, load_model, load_tokenizer, resolve
from compressors.process_setup import prepare_process
from compressors.quantization.embedding import quant_embeddings
from compressors.quantization.prepare_bake import bake, round_as_stored
from compressors.settings import Settings
from compressors.training.distance_to_dense import distance_to_dense
from compressors.training.phases import Job, freeze_embeddings
from compressors.training.resume import claimed, request_hash, take_ownership, work_beside
from compressors.training.task_data import TaskData, TaskDataRequest, read_task_data
from compressors.training.trainer import Phase, PhaseData, predict, require_counted_alike, run_phase, steps_of
from nxm_export.contract.checkpoint import open_checkpoint, save_plan
from nxm_export.contract.config_values import size_of
from nxm_export.contract.no_answer import THRESHOLD_KEY
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.pooling import read_pooling, write_pooling
from nxm_export.contract.records.checkpoint_metrics import (
    METRICS_FILE,
    CompressionMetrics,
    DenseMetrics,
    Scores,
    finite,
    finite_interval,
)
from nxm_export.contract.records.train_log import TRAIN_LOG_FILE
from nxm_export.contract.tasks import Task, task_named
from nxm_export.data.columns import Columns
from nxm_export.data.features import group_array, label_array
from nxm_export.data.metrics import ScoredOutputs
from nxm_export.data.more_text import MoreText
from nxm_export.errors import DataError
from nxm_export.hf.model_loading import quiet_transformers
from nxm_export.hf.protocols import FastTokenizer, SavedModel
from nxm_export.progress import Progress, silent
from nxm_export.storage.atomic import require_apart
from nxm_export.storage.json_files import encode


@dataclass(frozen=True)
class Result:
    """Where a finished model goes, and what is saved with it.

    `outputs` is a file to keep what the model says on dev in: ``logits``, ``labels`` and, where samples are scored in
    groups, ``groups`` as safetensors.
    """

    directory: Path
    work_dir: Path
    outputs: Path | None

    @classmethod
    def at(cls, out: str | Path, work_dir: Path | None, outputs: Path | None) -> Result:
        """A result in `out`, worked on beside it where no other directory is given."""
        out = Path(out)
        return cls(out, work_dir or work_beside(out), outputs)


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
    further: bool = False,
    outputs: Path | None = None,
    progress: Progress = silent,
) -> DenseMetrics:
    """Fine-tune a dense task model and save it to `out` with ``metrics.json``; a model whose head fits is kept as it
    is.

    With `further` a model whose head fits is trained on. Where nothing trains, nor will (``steps=0``), `train` needs no
    labels. `outputs` is a file to keep what the model says on dev in:
    ``logits``, ``labels`` and, where samples are scored in groups, ``groups`` as safetensors. Every argument but
    `model` is by keyword, as a command line has it: so many are no burden.
    """
    prepare_process(settings.threads)
    source, kind, result = resolve(model, revision), task_named(task), Result.at(out, work_dir, outputs)
    require_apart(result.directory, source.path, train, dev, within=False)
    tokenizer, fits = load_tokenizer(source), source.head_fits(kind)
    texts_alone = fits and not further and not settings.trains  # then neither this nor what follows learns from labels
    request = TaskDataRequest(kind, train, dev, columns, train_limit, texts_alone)
    data = read_task_data(source, request, tokenizer, settings)
    set_seed(settings.seed)
    network = load_model(source, kind, classes=None if fits else data.classes or ["score"])
    if not kind.own_loss and (further or not fits):
        read_pooling(source.path)  # says what is missing
        raise DataError(
            f"{model}: task {task} has no loss to train a dense model by; train it with sentence-transformers first"
        )
    require_counted_alike(network, data, dev)
    with claimed(result.directory, result.work_dir) as scratch:
        steps = 0
        _take_ownership(result.work_dir, source, data, settings)  # also of a log that another request left
        if further or not fits:
            steps = settings.dense_steps or steps_of(data.train, settings.dense_epochs, settings.batch_size)
            if settings.dense_freeze_embeddings:
                freeze_embeddings(network)
            phase = Phase("dense", steps, settings.dense_learning_rate, settings.batch_size)
            work = PhaseData(
                data.train,
                data.pad_id,
                result.work_dir,
                settings.seed,
                settings.precision,
                kind.output_kind,
                progress=progress,
            )
            run_phase(network, phase, work)
        logits = _dev_logits(network, data, progress)
        metrics = DenseMetrics.of(_scores(logits, data), steps=steps, revision=source.revision)
        _save(network, tokenizer, source, scratch, result, metrics, logits, data)
    return metrics


def compress(
    model: str | Path,
    *,
    task: str,
    train: str,
    dev: str | None = None,
    plan: CompressionPlan,
    out: str | Path,
    settings: Settings = Settings(),
    columns: Columns = Columns(),
    train_limit: int | None = None,
    more_text: MoreText | None = None,
    work_dir: Path | None = None,
    outputs: Path | None = None,
    progress: Progress = silent,
) -> CompressionMetrics:
    """Compress a dense task model under `plan` and save the checkpoint to `out` with ``metrics.json``.

    `model` is a directory whose head fits the task (see `finetune`); it is also the teacher. Where nothing trains
    (``steps=0``), `train` is calibration text and needs no labels, and without `dev` there is no score: how far answers
    are from the dense model's is then measured on texts of `train` that are held out. `more_text` has no labels; the
    dense model answers it in training. Interrupted work resumes from `work_dir`. `outputs` is as in `finetune`. Every
    argument but `model` is by keyword, as a command line has it.
    """
    prepare_process(settings.threads)
    source, kind, result = resolve(model), task_named(task), Result.at(out, work_dir, outputs)
    read: list[str | Path] = [
        source.path,
        train,
        *([] if dev is None else [dev]),
        *(more_text.files if more_text else ()),
    ]
    require_apart(result.directory, *read, within=False)
    if more_text is not None:
        settings.require_taught("--more-text")
    settings.require_dev(dev)
    _require_trainable(source, kind, settings, str(model))
    plan.require_fits(source.family.model_type, source.family.weights(source.config))
    tokenizer = load_tokenizer(source)
    request = TaskDataRequest(kind, train, dev, columns, train_limit, not settings.trains, more_text, dev is None)
    data = read_task_data(source, request, tokenizer, settings)
    if data.numbered and dev is not None:
        require_counted_alike(load_model(source, kind), data, dev)
    job = Job(source, data, plan, settings, result.work_dir, progress)
    with claimed(result.directory, result.work_dir) as scratch:
        _take_ownership(result.work_dir, source, data, settings, plan)
        student, facts = job.run()
        round_as_stored(student, job.plan)  # what is scored is what is saved
        logits = _dev_logits(student, data, progress)  # with activation quantizers, so before baking
        scores = _scores(logits, data)
        cost = _embedding_cost(student, logits, data, progress)
        dense_logits = _dev_logits(load_model(source, kind), data, progress)
        metrics = CompressionMetrics.of(
            scores,
            facts,
            distance_to_dense(dense_logits, logits, data),
            embedding_table_drop=None if cost is None else cost.drop,
            embedding_table_drop_interval=None if cost is None else cost.interval,
        )
        scales = bake(student, job.plan)
        _save(student, tokenizer, source, scratch, result, metrics, logits, data, (job.plan, scales))
    return metrics


def _require_trainable(source: ModelSource, task: Task, settings: Settings, name: str) -> None:
    """Raise `DataError` where the recipe cannot train for the task, or the model has no head for it."""
    if not task.own_loss and settings.trains and (settings.recipe == "paper" or not settings.distill):
        raise DataError(
            f"task {task.name} is trained by distillation alone, and it is switched off; choose a recipe with a teacher"
        )
    if not source.head_fits(task):
        raise DataError(
            f"{name} has no {task.name} head; fine-tune it first (`nxm compress` and `nxm run` do so by themselves)"
        )


def _take_ownership(
    work_dir: Path, source: ModelSource, data: TaskData, settings: Settings, *plan: CompressionPlan
) -> None:
    """Keep what an interrupted run left in `work_dir` if it was of the same model, samples, settings and plan; how many
    threads it had makes no difference."""
    more = [] if data.more_text_facts is None else [data.more_text_facts]
    samples = [*data.train, *data.more_text]
    take_ownership(work_dir, request_hash(source, samples, replace(settings, threads=None), *plan, *more))


def _dev_logits(model: nn.Module, data: TaskData, progress: Progress) -> np.ndarray:
    """Logits (samples, classes) of all dev samples."""
    return predict(model, data.dev, data.pad_id, progress=lambda done, total: progress("evaluate", done, total))


def _scores(logits: np.ndarray, data: TaskData) -> Scores:
    """The task metric of all dev samples, with its 95 % bootstrap interval, and the task's further metrics; none where
    dev has no labels.

    Raises `DataError` where a model answers with what is no number: such a model is never saved.
    """
    task = data.task
    broken = [row for row, answers in enumerate(logits) if not np.isfinite(answers).all()]
    if broken:
        raise DataError(
            f"the model's answers to {len(broken)} of {len(logits)} dev samples are NaN or infinite (the first is "
            f"sample {broken[0] + 1}), so nothing is saved; look for NaN in the model that came in, or for numbers "
            "that float16 cannot hold"
        )
    if not data.dev_labelled:
        return Scores(metric=task.metric, value=None, interval=None, dev_samples=len(data.dev), dev_labelled=False)
    scored = ScoredOutputs(logits, label_array(data.dev), data.classes or (), group_array(data.dev))
    return Scores(
        metric=task.metric,
        value=finite(scored.value(task.metric)),
        interval=finite_interval(*scored.interval(task.metric)),
        dev_samples=scored.units(task.metric),
        secondary_metrics={name: finite(scored.value(name)) for name in task.secondary_metrics},
    )


@dataclass(frozen=True)
class _EmbeddingCost:
    """Points of the metric that rounding the embedding table costs, and their 95 % paired interval."""

    drop: float | None
    interval: tuple[float, float] | None


def _embedding_cost(model: nn.Module, logits: np.ndarray, data: TaskData, progress: Progress) -> _EmbeddingCost | None:
    """What rounding the embedding table costs by itself, None where it is not planned INT8 or nothing is scored: the
    dev metric of the same weights with the float table minus that of the `logits` with the rounded one."""
    embeddings = quant_embeddings(model)
    if not embeddings or not data.dev_labelled:
        return None
    for embedding in embeddings:
        embedding.rounds = False
    before = _dev_logits(model, data, progress)
    for embedding in embeddings:
        embedding.rounds = True
    metric, labels, names, groups = data.task.metric, label_array(data.dev), data.classes or (), group_array(data.dev)
    unrounded, rounded = (ScoredOutputs(outputs, labels, names, groups) for outputs in (before, logits))
    low, high = unrounded.interval_against(rounded, metric)
    drop = 100 * (unrounded.value(metric) - rounded.value(metric))
    return _EmbeddingCost(finite(drop), finite_interval(100 * low, 100 * high))


def _save(
    model: nn.Module,
    tokenizer: FastTokenizer,
    source: ModelSource,
    scratch: Path,
    result: Result,
    metrics: DenseMetrics | CompressionMetrics,
    logits: np.ndarray,
    data: TaskData,
    compressed: tuple[CompressionPlan, dict[str, np.ndarray]] | None = None,
) -> None:
    """Write everything that a finished run leaves: the checkpoint into `scratch`, with its plan and scales where it is
    `compressed`, and the outputs on dev. The first process alone writes. (What it writes is what it takes: nine
    things.)"""
    if distributed.rank():
        return
    if result.outputs is not None:
        _save_outputs(result.outputs, logits, data)
    if data.no_answer_threshold is not None:
        cast(PreTrainedModel, model).config.update({THRESHOLD_KEY: data.no_answer_threshold})
    with quiet_transformers():
        cast(SavedModel, model).save_pretrained(scratch, save_original_format=False)  # by the names of a plan
        tokenizer.save_pretrained(scratch)
    pooling = getattr(model, "pooling", None)
    if pooling is not None:
        hidden = size_of(source.config, source.family.hidden_key)
        write_pooling(scratch, pooling, hidden, int(tokenizer.model_max_length), source.path)
    (scratch / METRICS_FILE).write_text(encode(metrics.to_dict()), encoding="utf-8")
    if (result.work_dir / TRAIN_LOG_FILE).is_file():
        shutil.copyfile(result.work_dir / TRAIN_LOG_FILE, scratch / TRAIN_LOG_FILE)
    if compressed is not None:
        save_plan(scratch, *compressed)
        open_checkpoint(scratch).require_valid()


def _save_outputs(file: Path, logits: np.ndarray, data: TaskData) -> None:
    arrays, groups = {"logits": logits, "labels": label_array(data.dev)}, group_array(data.dev)
    if groups is not None:
        arrays["groups"] = groups
    save_file(arrays, file)
