"""From a dense task model to a compressed checkpoint.

``finetune`` makes the dense model, which is the teacher and the yardstick; ``compress`` takes it through the phases
(`compressors.training.phases`), bakes the result into plain weights, and saves it with its plan, scales and metrics.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import nn
from transformers import set_seed

from compressors import distributed
from compressors.models import Source, load_model, load_tokenizer, quiet, resolve
from compressors.process import prepare_process
from compressors.quantization.embedding import tables
from compressors.quantization.fake_quant import bake
from compressors.settings import Settings
from compressors.training.phases import Job, freeze_embeddings, save_every, steps_of
from compressors.training.resume import claim, request_hash
from compressors.training.task_data import TaskData, read_task_data
from compressors.training.trainer import LOG_FILE, Phase, Progress, predict, run_phase
from nxm_export.contract.checkpoint import open_checkpoint, save_plan
from nxm_export.contract.families import size_of
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.pooling import read_pooling, write_pooling
from nxm_export.contract.tasks import task_named
from nxm_export.data.examples import Columns, group_array, label_array
from nxm_export.data.metrics import interval, metric_named, paired_interval
from nxm_export.errors import DataError
from nxm_export.storage.atomic import atomic_dir


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
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Fine-tune a dense task model and save it to `out` with ``metrics.json``; a model whose head fits is kept as it is.

    With `further` a model whose head fits is trained on. `outputs` is a file to keep what the model says on dev in:
    ``logits``, ``labels`` and, where samples are scored in groups, ``groups`` as safetensors.
    Returns the metrics: name, value, 95 % interval, dev samples, training steps.
    """
    prepare_process(settings.threads)
    source, kind = resolve(model, revision), task_named(task)
    tokenizer = load_tokenizer(source)
    data = read_task_data(source, kind, train, dev, settings, columns, tokenizer, train_limit)
    fits = source.head_fits(kind)
    set_seed(settings.seed)
    network = load_model(source, kind, classes=None if fits else data.classes or ["score"])
    if not kind.own_loss and (further or not fits):
        read_pooling(source.path)  # says what is missing
        raise DataError(
            f"{model}: task {task} has no loss to train a dense model by; train it with sentence-transformers first"
        )
    steps = (
        0
        if fits and not further
        else settings.dense_steps or steps_of(data.train, settings.dense_epochs, settings.batch_size)
    )
    out = Path(out)
    work_dir = work_dir or out.with_name(f".{out.name}.work")
    if steps:
        _claim(work_dir, source, data, settings)
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
            save_every=save_every(steps),
            output_kind=kind.output_kind,
        )
    logits, found = _outputs(network, data, progress)
    metrics = found | {"steps": steps, "revision": source.revision}
    if outputs is not None and not distributed.rank():
        _save_outputs(outputs, logits, data)
    if distributed.rank():  # only the first process writes
        distributed.wait()
        return metrics
    with atomic_dir(out) as scratch:
        _save_model(network, tokenizer, scratch, metrics, work_dir, source)
    shutil.rmtree(work_dir, ignore_errors=True)
    distributed.wait()
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
    outputs: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Compress a dense task model under `plan` and save the checkpoint to `out` with ``metrics.json``.

    `model` is a directory whose head fits the task (see `finetune`); it is also the teacher. Interrupted work resumes
    from `work_dir`. `outputs` is as in `finetune`. Returns the metrics: compressed and dense values on the same dev samples, with intervals, the final
    residual, mask hash and step counts.
    """
    prepare_process(settings.threads)
    source, kind = resolve(model), task_named(task)
    if not kind.own_loss and settings.recipe != "one-shot" and (settings.recipe == "paper" or not settings.distill):
        raise DataError(
            f"task {task} is trained by distillation alone, and it is switched off; choose a recipe with a teacher"
        )
    if not source.head_fits(kind):
        raise DataError(
            f"{model} has no {task} head; fine-tune it first (`nxm compress` and `nxm run` do so by themselves)"
        )
    plan.require_fits(source.family.model_type, source.family.weights(source.config))
    tokenizer = load_tokenizer(source)
    data = read_task_data(source, kind, train, dev, settings, columns, tokenizer, train_limit)
    out = Path(out)
    work_dir = work_dir or out.with_name(f".{out.name}.work")
    _claim(work_dir, source, data, settings, plan)
    job = Job(source, data, plan, settings, work_dir, progress)
    student, facts = job.run()
    logits, found = _outputs(student, data, progress)  # with activation quantizers, so before baking
    metrics = facts | found | _table_cost(student, logits, data, progress)
    if outputs is not None and not distributed.rank():
        _save_outputs(outputs, logits, data)
    scales = bake(student, job.plan)
    if distributed.rank():  # only the first process writes
        distributed.wait()
        return metrics
    with atomic_dir(out) as scratch:
        _save_model(student, tokenizer, scratch, metrics, work_dir, source)
        save_plan(scratch, job.plan, scales)
        open_checkpoint(scratch).require_valid()
    shutil.rmtree(work_dir, ignore_errors=True)
    distributed.wait()
    return metrics


def _claim(work_dir: Path, source: Source, data: TaskData, settings: Settings, *plan: CompressionPlan) -> None:
    """Keep what an interrupted run left in `work_dir` if it was of the same model, samples, settings and plan; how many
    threads it had makes no difference."""
    claim(work_dir, request_hash(source, data.train, replace(settings, threads=None), *plan))


def evaluate(model: nn.Module, data: TaskData, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """The task metric on all dev samples, with its 95 % bootstrap interval."""
    return _outputs(model, data, progress)[1]


def _outputs(model: nn.Module, data: TaskData, progress: Progress) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits (samples, classes) of all dev samples, and what `evaluate` returns."""
    logits = predict(model, data.dev, data.pad_id, progress=lambda done, total: progress("evaluate", done, total))
    labels, names, groups = label_array(data.dev), data.classes or (), group_array(data.dev)
    return logits, {
        "metric": data.task.metric,
        "value": metric_named(data.task.metric, names, groups)(logits, labels),
        **{name: metric_named(name, names, groups)(logits, labels) for name in data.task.secondary_metrics},
        "interval": interval(data.task.metric, logits, labels, classes=names, groups=groups),
        "dev_samples": len(labels) if groups is None else len(np.unique(groups)),  # of what is scored
    }


def _table_cost(model: nn.Module, logits: np.ndarray, data: TaskData, progress: Progress) -> dict[str, Any]:
    """What rounding the embedding table costs by itself, where it is planned INT8: the dev metric of the same weights with the
    float table minus that of the `logits` with the rounded one, in points, and its 95 % paired interval."""
    found = tables(model)
    if not found:
        return {}
    for table in found:
        table.rounds = False
    before = predict(model, data.dev, data.pad_id, progress=lambda done, total: progress("evaluate", done, total))
    for table in found:
        table.rounds = True
    metric, labels, names, groups = data.task.metric, label_array(data.dev), data.classes or (), group_array(data.dev)
    value = metric_named(metric, names, groups)
    low, high = paired_interval(metric, before, logits, labels, classes=names, groups=groups)
    drop = 100 * (value(before, labels) - value(logits, labels))
    return {"table_drop": drop, "table_drop_interval": [100 * low, 100 * high]}


def _save_outputs(file: Path, logits: np.ndarray, data: TaskData) -> None:
    groups = group_array(data.dev)
    beside = (
        {"labels": label_array(data.dev)} if groups is None else {"labels": label_array(data.dev), "groups": groups}
    )
    save_file({"logits": logits, **beside}, file)


def _save_model(
    model: nn.Module, tokenizer: Any, directory: Path, metrics: Mapping[str, Any], work_dir: Path, source: Source
) -> None:
    with quiet():
        model.save_pretrained(directory)  # type: ignore[operator]
        tokenizer.save_pretrained(directory)
    pooling = getattr(model, "pooling", None)
    if pooling is not None:
        hidden = size_of(source.config, source.family.hidden_key)
        write_pooling(directory, pooling, hidden, int(tokenizer.model_max_length), source.path)
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if (work_dir / LOG_FILE).is_file():
        shutil.copyfile(work_dir / LOG_FILE, directory / LOG_FILE)
