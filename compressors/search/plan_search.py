"""``nxm search``: a plan with a different (pattern, bits) per weight, under a compression constraint, for one task model.

The training data is cut into a held-out slice, which judges, and the rest, which calibrates and trains; the dev set is
not even opened. After the one-shot selection (see `compressors.search.selection`) finalists may go through short compression
runs, half of them staying after each round: what does best one-shot is not always what trains best.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressors import distributed
from compressors.models import Source, load_model, load_tokenizer, resolve
from compressors.process import prepare_process
from compressors.quantization.fake_quant import prepare
from compressors.search.selection import Selection, Selector, Trial, write_trials
from compressors.search.sensitivity import Batches, Entry, Probe, divergence, real_logits, write_table
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.default_recipe import training_of
from compressors.training.phases import Job, freeze_embeddings, steps_of
from compressors.training.resume import claim, request_hash
from compressors.training.task_data import TaskData, read_task_data
from compressors.training.trainer import Progress, Student, collate, schedule, wants_bf16
from nxm_export.contract.families import size_of
from nxm_export.contract.tasks import task_named
from nxm_export.data.examples import Columns, Features, cut, sorted_batches
from nxm_export.errors import ArtifactError, DataError
from nxm_export.storage.atomic import atomic_dir
from nxm_export.storage.json_files import json_text

TABLE_FILE = "sensitivity.csv"
_MARKS = {"plan.json", "search.json"}  # that make a directory one of a search
_TIMED_STEPS = 5


def search(
    model: str | Path,
    *,
    task: str,
    train: str,
    out: str | Path,
    settings: SearchSettings = SearchSettings(),
    training: Settings = Settings(),
    columns: Columns = Columns(),
    work_dir: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Search a plan for a dense task model and write ``plan.json`` and its evidence to the directory `out`.

    `training` is how the plan is going to be trained: short runs use it, and the cost is compared with it. Interrupted
    work resumes from `work_dir` where model, data and settings are the same. Returns what ``search.json`` holds.
    """
    began = time.monotonic()
    prepare_process(training.threads)
    source, kind = resolve(model), task_named(task)
    if not source.head_fits(kind):
        raise DataError(f"{model} has no {task} head; fine-tune it first (`nxm run` and `nxm compress` do)")
    out = Path(out)
    replace_any = {file.name for file in out.glob("*")} >= _MARKS  # an earlier search
    new_or_empty = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    if not (replace_any or new_or_empty):
        raise ArtifactError(f"{out} exists and holds no earlier search; choose another --out, or remove it")
    work_dir = work_dir or out.with_name(f".{out.name}.work")
    data = read_task_data(source, kind, train, None, training, columns, load_tokenizer(source))
    full_steps = training.steps or steps_of(data.train, training.epochs, training.batch_size)
    blocks = len(source.family.blocks(source.config))
    settings = settings.sized(blocks, len(data.train), full_steps * training.batch_size)
    held_out, rest = _cut(data.train, settings)
    data = replace(data, train=rest, dev=held_out)
    dense = load_model(source, kind).to(distributed.device())
    probe = Probe(dense, source.family, source.config, kind.output_kind)
    batches = [_batches(part, data.pad_id, settings.batch_size) for part in (rest[: settings.samples], held_out)]
    selector = Selector(probe, source.config, settings, batches[0], batches[1], progress)
    # Only now: what is refused above leaves nothing behind.
    resumed = claim(work_dir, request_hash(source, [*data.dev, *data.train], settings, training))
    if settings.method == "paper":
        if not kind.own_loss and any(np.isnan(sample["labels"]) for sample in held_out):
            raise DataError(
                f"{train}: method paper scores plans by {kind.metric}, which needs scored pairs to train on"
            )
        ordered = [held_out[i] for batch in sorted_batches(held_out, settings.batch_size) for i in batch]
        selection = selector.paper(kind.metric, ordered, data.classes or ())
    else:
        selection = selector.run(work_dir)
    selection = distributed.agreed(selection)
    seconds = dict(selection.seconds)
    finalists, rounds = selection.finalists, []
    for number, steps in enumerate(settings.halving):
        started = time.monotonic()
        scores = distributed.agreed(
            [
                _short_run(
                    source,
                    data,
                    dense,
                    trial,
                    replace(training, steps=steps),
                    work_dir / f"round{number}-{i}",
                    progress,
                )
                for i, trial in enumerate(finalists)
            ]
        )
        order = np.argsort(scores, kind="stable")
        ranking = {finalists[i].origin: scores[i] for i in order}
        finalists = [finalists[i] for i in order[: max(1, len(order) // 2)]]
        seconds[f"short runs of {steps} steps"] = round(time.monotonic() - started, 3)
        rounds.append({"steps": steps, "scores": ranking})
    full_seconds = full_steps * _step_seconds(source, data, dense, finalists[0], training)
    seconds["all"] = round(time.monotonic() - began, 3)
    cost = {
        "seconds": seconds,
        "full_run": {"steps": full_steps, "estimated_seconds": round(full_seconds, 3)},
        "resumed": resumed,  # from an interrupted search, whose seconds are not counted
        "share_of_full_run": None if resumed else round(seconds["all"] / full_seconds, 4),
    }
    facts = _facts(selection, finalists, rounds, settings) | {"cost": cost}
    if not distributed.rank():  # only the first process writes
        with atomic_dir(out, replace_any=replace_any) as scratch:
            _write(scratch, selection, finalists, selector.table, facts)
        shutil.rmtree(work_dir, ignore_errors=True)
    distributed.wait()
    return facts


def _write(
    directory: Path, selection: Selection, finalists: Sequence[Trial], table: Sequence[Entry], facts: Mapping[str, Any]
) -> None:
    (directory / "plan.json").write_text(finalists[0].plan.to_json(), encoding="utf-8")
    for i, trial in enumerate(finalists):
        (directory / f"finalist-{i + 1}.json").write_text(trial.plan.to_json(), encoding="utf-8")
    for tie, trial in selection.tied.items():
        (directory / f"tied-{tie.replace(' ', '-')}.json").write_text(trial.plan.to_json(), encoding="utf-8")
    for i, trial in enumerate(selection.front):
        (directory / f"pareto-{i + 1}.json").write_text(trial.plan.to_json(), encoding="utf-8")
    write_trials(directory / "trials.csv", selection.trials)
    if table:
        write_table(directory / TABLE_FILE, table)
    (directory / "search.json").write_text(json_text(facts), encoding="utf-8")


def _cut(features: Sequence[Features], settings: SearchSettings) -> tuple[list[Features], list[Features]]:
    """(held-out slice, rest in random order); with the same seed, the slice begins with what `compress` holds out."""
    assert settings.samples is not None
    assert settings.held_out is not None
    if len(features) < settings.samples + settings.held_out:
        raise DataError(
            f"{len(features)} training samples are too few for {settings.samples} calibration and {settings.held_out} held-out samples; "
            "lower --samples and --held-out, or give more data"
        )
    held_out, rest = cut(features, settings.held_out, settings.seed)
    return [features[i] for i in held_out], [features[i] for i in rest]


def _batches(features: Sequence[Features], pad_id: int, batch_size: int) -> Batches:
    return [collate([features[i] for i in batch], pad_id) for batch in sorted_batches(features, batch_size)]


def _short_run(
    source: Source,
    data: TaskData,
    dense: nn.Module,
    trial: Trial,
    training: Settings,
    work_dir: Path,
    progress: Progress,
) -> float:
    """Divergence from the dense model on the held-out slice after a compression run."""
    student, _ = Job(source, replace(data, dev=[]), trial.plan, training, work_dir, progress).run()
    student.eval()
    device, total = next(student.parameters()).device, 0.0
    with torch.no_grad():
        for batch in _batches(data.dev, data.pad_id, 64):
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            wanted, found = (
                real_logits(m(**inputs).logits, inputs["attention_mask"], data.task.output_kind)
                for m in (dense, student)
            )
            total += divergence(wanted, found, data.task.output_kind)
    return total / len(data.dev)


def _step_seconds(source: Source, data: TaskData, dense: nn.Module, trial: Trial, training: Settings) -> float:
    """Seconds of one optimizer step of a compression run under this plan, timed over a few steps on this process's part."""
    model = load_model(source, data.task)
    prepare(model, trial.plan, source.family, source.config)
    if training.freeze_embeddings:
        freeze_embeddings(model)
    width = size_of(source.config, source.family.hidden_key)
    losses = training_of(training, data.task, width).losses
    student = Student(model, losses, dense if training.distill else None, None, data.task.output_kind)
    student.to(distributed.device())
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], fused=True)
    size = max(1, training.batch_size // distributed.world_size())
    times = []
    for samples in _typical_batches(data.train, size, training.seed):
        batch = {key: value.to(distributed.device()) for key, value in collate(samples, data.pad_id).items()}
        began = time.perf_counter()
        with torch.autocast(distributed.device().type, torch.bfloat16, enabled=wants_bf16(training.precision)):
            loss = student(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return float(np.mean(times[1:]))


def _typical_batches(features: Sequence[Features], size: int, seed: int) -> list[list[Features]]:
    """Batches as training makes them, of similar length: the middles of `_TIMED_STEPS` equal parts of an epoch ordered by
    length, whose mean stands for the epoch's, behind one to warm up on."""
    order = schedule(features, max(1, len(features) // size), size, seed)
    batches = [[features[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    batches.sort(key=lambda batch: max(len(sample["input_ids"]) for sample in batch))
    chosen = [batches[(2 * part + 1) * len(batches) // (2 * _TIMED_STEPS)] for part in range(_TIMED_STEPS)]
    return [chosen[-1], *chosen]


def _facts(
    selection: Selection, finalists: Sequence[Trial], rounds: Sequence[Mapping[str, Any]], settings: SearchSettings
) -> dict[str, Any]:
    return {
        "schema": "nxm-search/1",
        "method": settings.method,
        "budget": {
            "counting": settings.counting,
            "compression": settings.compression,
            "bytes": settings.bytes,
            "latency_ms": settings.latency_ms,
        },
        "best": finalists[0].row(),
        "finalists": [trial.row() for trial in finalists],
        "pareto": [
            {"asked": asked, **trial.row()} for asked, trial in zip(settings.pareto, selection.front, strict=True)
        ],
        "tied": {tie: trial.row() for tie, trial in selection.tied.items()},
        "rounds": list(rounds),
        "plans_evaluated": selection.evaluated,
        "samples": {"calibration": settings.samples, "held_out": settings.held_out},
        "seed": settings.seed,
    }
