"""``nxm search``: a plan with a different (pattern, bits) per weight, under a compression constraint, for one task model.

The training data is cut into a held-out slice, which judges, and the rest, which calibrates and trains; the dev set is
not even opened. After the one-shot selection (see `compressors.selection`) finalists may go through short compression
runs, half of them staying after each round: what does best one-shot is not always what trains best.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressors.models import Source, load_model, load_tokenizer, resolve
from compressors.phases import Job
from compressors.selection import SearchSettings, Selection, Selector, Trial, write_trials
from compressors.sensitivity import Batches, Probe, divergence
from compressors.settings import Settings, prepare_process
from compressors.task_data import TaskData, read_task_data
from compressors.train import Progress, collate
from nxm_export.data import Columns, Features, sorted_batches
from nxm_export.errors import DataError
from nxm_export.families import task_named
from nxm_export.run_dir import atomic_dir

TABLE_FILE = "sensitivity.csv"


def search(
    model: str | Path,
    *,
    task: str,
    train: str,
    out: str | Path,
    settings: SearchSettings = SearchSettings(),
    training: Settings = Settings(),
    halving_steps: Sequence[int] = (),
    pareto: Sequence[float] = (),
    columns: Columns = Columns(),
    work_dir: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Search a plan for a dense task model and write ``plan.json``, ``trials.csv``, ``sensitivity.csv``, ``search.json``.

    `halving_steps` are the optimizer steps of each round of short runs (empty: none); after a round the better half
    stays. `pareto` are further compressions to report from the same table. Returns what ``search.json`` holds.
    """
    prepare_process(training)
    source, kind = resolve(model), task_named(task)
    if not source.head_fits(kind):
        raise DataError(f"{model} has no {task} head; fine-tune it first (`nxm run` and `nxm compress` do)")
    out = Path(out)
    work_dir = work_dir or out.with_name(f".{out.name}.work")
    work_dir.mkdir(parents=True, exist_ok=True)
    data = read_task_data(source, kind, train, None, training, columns, load_tokenizer(source))
    held_out, rest = _cut(data.train, settings)
    data = replace(data, train=rest, dev=held_out)
    probe = Probe(load_model(source, kind), source.family, source.config)
    batches = [_batches(part, data.pad_id, settings.batch_size) for part in (rest[: settings.samples], held_out)]
    selector = Selector(probe, source.config, settings, batches[0], batches[1], progress)
    if settings.method == "paper":
        labels = [batch["labels"].numpy() for batch in batches[1]]
        selection = selector.paper(kind.metric, labels)
    else:
        selection = selector.run(work_dir / TABLE_FILE)
    front = selector.pareto(pareto) if settings.method == "nxm" else []
    finalists, rounds = selection.finalists, []
    for number, steps in enumerate(halving_steps):
        began = time.monotonic()
        scores = [
            _short_run(source, data, trial, training, steps, work_dir / f"round{number}-{i}", progress)
            for i, trial in enumerate(finalists)
        ]
        order = np.argsort(scores)
        rounds.append(
            {
                "steps": steps,
                "seconds": round(time.monotonic() - began, 1),
                "scores": {finalists[i].origin: scores[i] for i in order},
            }
        )
        finalists = [finalists[i] for i in order[: max(1, len(order) // 2)]]
    facts = _facts(selection, finalists, front, rounds, settings)
    with atomic_dir(out) as scratch:
        (scratch / "plan.json").write_text(finalists[0].plan.to_json(), encoding="utf-8")
        for i, trial in enumerate(finalists):
            (scratch / f"finalist-{i + 1}.json").write_text(trial.plan.to_json(), encoding="utf-8")
        write_trials(scratch / "trials.csv", selection.trials)
        if front:
            write_trials(scratch / "pareto.csv", front)
        if (work_dir / TABLE_FILE).is_file():
            (scratch / TABLE_FILE).write_bytes((work_dir / TABLE_FILE).read_bytes())
        (scratch / "search.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work_dir, ignore_errors=True)
    return facts


def _cut(features: Sequence[Features], settings: SearchSettings) -> tuple[list[Features], list[Features]]:
    """(held-out slice, rest in random order): the same slice that `compress` keeps from training with the same seed."""
    if len(features) < settings.samples + settings.held_out:
        raise DataError(
            f"{len(features)} training samples are too few for {settings.samples} calibration and {settings.held_out} held-out samples; "
            "lower --samples and --held-out, or give more data"
        )
    order = np.random.default_rng(settings.seed).permutation(len(features))
    return [features[i] for i in order[: settings.held_out]], [features[i] for i in order[settings.held_out :]]


def _batches(features: Sequence[Features], pad_id: int, batch_size: int) -> Batches:
    return [collate([features[i] for i in batch], pad_id) for batch in sorted_batches(features, batch_size)]


def _short_run(
    source: Source, data: TaskData, trial: Trial, training: Settings, steps: int, work_dir: Path, progress: Progress
) -> float:
    """Divergence from the dense model on the held-out slice after a compression run of `steps`."""
    job = Job(source, replace(data, dev=[]), trial.plan, replace(training, steps=steps), work_dir, progress)
    student, _ = job.run()
    student.eval()
    dense = load_model(source, data.task).eval()
    total = 0.0
    with torch.no_grad():
        for batch in _batches(data.dev, data.pad_id, 64):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            total += divergence(dense(**inputs).logits, student(**inputs).logits)
    return total / len(data.dev)


def _facts(
    selection: Selection,
    finalists: Sequence[Trial],
    front: Sequence[Trial],
    rounds: Sequence[Mapping[str, Any]],
    settings: SearchSettings,
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
        "pareto": [trial.row() for trial in front],
        "rounds": list(rounds),
        "trials": len(selection.trials),
        "samples": {"calibration": settings.samples, "held_out": settings.held_out},
        "seconds": selection.seconds,
        "seed": settings.seed,
    }
