"""``nxm search``: a plan with a different (pattern, bits) per weight, under a compression constraint, for one task
model.

The training data is cut into a held-out slice, which judges, and the rest, which calibrates and trains; the dev set is
not even opened. After the one-shot selection (see `compressors.search.plan_selection`) finalists may go through short
compression runs, half of them staying after each round: what does best one-shot is not always what trains best.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compressors import distributed
from compressors.models import ModelSource, load_model, load_tokenizer, resolve
from compressors.process_setup import prepare_process
from compressors.pruning.layer_inputs import count_with_tokens, require_enough_tokens
from compressors.pruning.layerwise import DRAFTS, MAGNITUDE, SECOND_ORDER, Solver
from compressors.quantization.prepare_bake import prepare
from compressors.search.one_shot import MOMENTS_IN_MEMORY
from compressors.search.plan_selection import Selection, Selector, Trial, write_trials
from compressors.search.probe import Batches, SensitivityProbe
from compressors.search.sensitivity import Sensitivity, write_sensitivities
from compressors.search.settings import SearchSettings
from compressors.search.weight_options import WeightOptions
from compressors.settings import REFITTING, Settings
from compressors.training.default_recipe import training_of
from compressors.training.distillation import Student
from compressors.training.output_divergence import divergence, real_logits
from compressors.training.phases import Job, freeze_embeddings
from compressors.training.resume import claimed, request_hash, take_ownership, work_beside
from compressors.training.task_data import TaskData, TaskDataRequest, read_task_data
from compressors.training.trainer import collate, require_counted_alike, schedule, steps_of, wants_bf16
from nxm_export.contract.config_values import size_of
from nxm_export.contract.records.checkpoint_metrics import finite
from nxm_export.contract.records.search_result import (
    SEARCH_FILE,
    FullRun,
    HalvingRound,
    ParetoPlan,
    SampleCounts,
    SearchBudget,
    SearchCost,
    SearchResult,
)
from nxm_export.contract.tasks import task_named
from nxm_export.data.columns import Columns
from nxm_export.data.features import Features, sorted_batches, split_indices
from nxm_export.errors import ArtifactError, DataError, notice
from nxm_export.progress import Progress, silent
from nxm_export.storage.atomic import require_apart
from nxm_export.storage.json_files import encode

SENSITIVITY_FILE = "sensitivity.csv"
_MARKS = {"plan.json", SEARCH_FILE}  # that make a directory one of a search
_TIMED_STEPS = 5
TOKENS_PER_INPUT = 2
# A weight that reads n values is solved for one option in the time in which it multiplies so many times n tokens. The
# whole solver takes 55 n: 52 to 58 at 11 to 53 tokens a sentence (CPU time on one thread, shapes of MiniLM-L6, against
# forward passes of the dense model). A draft takes two fifths of that.
SOLVED_TOKENS = 22


def search(
    model: str | Path,
    *,
    task: str,
    train: str,
    out: str | Path,
    settings: SearchSettings = SearchSettings(),
    training: Settings = Settings(),
    columns: Columns = Columns(),
    train_limit: int | None = None,
    work_dir: Path | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Search a plan for a dense task model and write ``plan.json`` and its evidence to the directory `out`.

    `training` is how the plan is going to be trained: short runs use it, and the cost is compared with it. It takes at
    most `train_limit` samples, those that training takes. Interrupted
    work resumes from `work_dir` where model, data and settings are the same. Every argument but `model` is by keyword,
    as a command line has it. Returns what ``search.json`` holds.
    """
    began = time.monotonic()
    prepare_process(training.threads)
    source, kind, out = resolve(model), task_named(task), Path(out)
    require_searchable(source, settings, training)
    if not source.head_fits(kind):
        raise DataError(f"{model} has no {task} head; fine-tune it first (`nxm run` and `nxm compress` do)")
    replace_any = _require_replaceable(out)
    require_apart(out, source.path, train, within=False)
    work_dir = work_dir or work_beside(out)
    request = TaskDataRequest(kind, train, columns=columns, train_limit=train_limit)
    data = read_task_data(source, request, load_tokenizer(source), training)
    # Also where the plan is not going to be trained: then a search may take as long as one that is.
    usual_steps = training.steps or steps_of(data.train, training.epochs, training.batch_size)
    settings = _sized(settings, source, data, training.recipe, usual_steps * training.batch_size)
    held_out, rest = _cut(data.train, settings)
    settings = replace(settings, held_out=len(held_out))  # more than were asked for, where groups stay together
    data = replace(data, train=rest, dev=held_out)
    dense = load_model(source, kind)
    require_counted_alike(dense, data, train)
    _notice_unpriced(training)
    probe = SensitivityProbe(dense, source.family, source.config, kind.output_kind)
    judged, known = (_batches(part, data.pad_id, settings.batch_size) for part in (held_out, rest[: settings.samples]))
    read = known
    if settings.method != "paper" and training.recipe in REFITTING:
        widths = {weight: wide for weight, (_, wide) in source.family.weights(source.config).items()}
        samples = _enough(rest, settings, max(widths.values()))
        require_enough_tokens(widths, samples)
        read = _batches(samples, data.pad_id, settings.batch_size)
    selector = Selector(
        probe,
        source.config,
        settings,
        known,
        judged,
        progress,
        solver_of(training.recipe),
        read,
        percentile=training.range_percentile,
        even=not training.trains,
        bfloat16=wants_bf16(training.precision),
    )
    with claimed(out, work_dir, replace_any=replace_any) as scratch:
        # Only now: what is refused above leaves nothing behind.
        resumed = take_ownership(work_dir, request_hash(source, [*data.dev, *data.train], settings, training))
        selection = distributed.agreed(_select(selector, settings, data, train, work_dir))
        runs = _Runs(source, data, dense, training, work_dir, progress)
        seconds = dict(selection.seconds)
        finalists, rounds = runs.halved(selection.finalists, settings.halving, seconds)
        full_steps = usual_steps if training.trains else 0
        full_seconds = full_steps * runs.step_seconds(finalists[0]) if full_steps else 0.0
        seconds["all"] = round(time.monotonic() - began, 3)
        # Of a resumed search, the seconds before it was interrupted are not counted.
        share = None if resumed or not full_steps else round(seconds["all"] / full_seconds, 4)
        cost = SearchCost(seconds, FullRun(full_steps, round(full_seconds, 3)), resumed, share)
        result = _result(selection, finalists, rounds, settings, cost)
        if not distributed.rank():  # only the first process writes
            _write(scratch, selection, finalists, selector.sensitivities, result)
    return result


def require_searchable(source: ModelSource, settings: SearchSettings, training: Settings) -> None:
    """Raise `PlanError` and `DataError` for what no search of a model of this form can find, whatever its weights and
    its data are."""
    if settings.halving and not training.trains:
        raise DataError("short runs (--halving) train, and the compression that is asked for does not; leave them out")
    WeightOptions(source.family, source.config, settings)


def _notice_unpriced(training: Settings) -> None:
    """Say which choices of a compression run no plan is judged by."""
    asked = {"--permute": training.permute, "--mask-scores": training.mask_scores != "magnitude"}
    if unpriced := [option for option, given in asked.items() if given]:
        notice(
            f"the search judges plans without {' and '.join(unpriced)}: by masks from |W| alone, with channels in "
            "their own order; what the run makes of the best plan may cost less"
        )


def solver_of(recipe: str) -> Solver:
    """What makes the weights that a candidate is judged by: a draft of the recipe's own start; for recipes that find
    masks in training, second-order pruning stands for what they will find."""
    return MAGNITUDE if recipe in ("magnitude", "one-shot") else DRAFTS.get(recipe, SECOND_ORDER)


def _sized(settings: SearchSettings, source: ModelSource, data: TaskData, recipe: str, trained: int) -> SearchSettings:
    """The settings with both numbers of samples, for a run that trains on `trained` in all."""
    blocks, shapes = len(source.family.blocks(source.config)), source.family.weights(source.config).values()
    solving = 0.0
    if settings.method != "paper" and recipe in REFITTING and data.train:
        tokens = float(np.mean([len(sample["input_ids"]) for sample in data.train]))
        passes = min(blocks, -(-4 * sum(wide**2 for _, wide in shapes) // MOMENTS_IN_MEMORY))
        read = TOKENS_PER_INPUT * max(wide for _, wide in shapes) * (passes + 1)  # and their products
        width = sum(out * wide * wide for out, wide in shapes) / sum(out * wide for out, wide in shapes)
        solving = (read + SOLVED_TOKENS * settings.compressing * width) / tokens
    return settings.sized(blocks, len(source.family.linears), len(data.train), trained, solving)


def _enough(features: Sequence[Features], settings: SearchSettings, widest: int) -> Sequence[Features]:
    """The first of `features`, at least as many as calibrate, with twice as many tokens as the `widest` layer reads
    values.

    A weight that is refitted for fewer fits them by heart: the table would price something that no compression makes.
    """
    assert settings.samples is not None
    return features[: max(settings.samples, count_with_tokens(features, TOKENS_PER_INPUT * widest))]


def _require_replaceable(out: Path) -> bool:
    """Whether `out` holds an earlier search, which is replaced; raises `ArtifactError` where it holds anything else."""
    earlier = {file.name for file in out.glob("*")} >= _MARKS
    new_or_empty = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    if not (earlier or new_or_empty):
        raise ArtifactError(f"{out} exists and holds no earlier search; choose another --out, or remove it")
    return earlier


def _select(selector: Selector, settings: SearchSettings, data: TaskData, train: str, work_dir: Path) -> Selection:
    """The one-shot selection by the method that was asked for."""
    if settings.method != "paper":
        return selector.run(work_dir)
    if not data.task.own_loss and any(np.isnan(sample["labels"]) for sample in data.dev):
        raise DataError(
            f"{train}: method paper scores plans by {data.task.metric}, which needs scored pairs to train on"
        )
    ordered = [data.dev[i] for batch in sorted_batches(data.dev, settings.batch_size) for i in batch]
    return selector.paper(data.task.metric, ordered, data.classes or ())


def _write(
    directory: Path,
    selection: Selection,
    finalists: Sequence[Trial],
    sensitivities: Sequence[Sensitivity],
    result: SearchResult,
) -> None:
    (directory / "plan.json").write_text(finalists[0].plan.to_json(), encoding="utf-8")
    for i, trial in enumerate(finalists):
        (directory / f"finalist-{i + 1}.json").write_text(trial.plan.to_json(), encoding="utf-8")
    for tie, trial in selection.tied.items():
        (directory / f"tied-{tie.replace(' ', '-')}.json").write_text(trial.plan.to_json(), encoding="utf-8")
    for i, trial in enumerate(selection.front):
        (directory / f"pareto-{i + 1}.json").write_text(trial.plan.to_json(), encoding="utf-8")
    write_trials(directory / "trials.csv", selection.trials)
    if sensitivities:
        write_sensitivities(directory / SENSITIVITY_FILE, sensitivities)
    (directory / SEARCH_FILE).write_text(encode(result.to_dict()), encoding="utf-8")


def _cut(features: Sequence[Features], settings: SearchSettings) -> tuple[list[Features], list[Features]]:
    """(held-out slice, rest in random order), groups undivided; with the same seed, the slice begins with what
    `compress` holds out."""
    assert settings.samples is not None
    assert settings.held_out is not None
    if len(features) < settings.samples + settings.held_out:
        raise DataError(
            f"{len(features)} training samples are too few for {settings.samples} calibration and {settings.held_out} "
            "held-out samples; "
            "lower --samples and --held-out, or give more data"
        )
    held_out, rest = split_indices(features, settings.held_out, settings.seed)
    if len(rest) < settings.samples:
        raise DataError(
            f"{len(held_out)} training samples are held out, as groups are not divided, and {len(rest)} are too few "
            f"for {settings.samples} calibration samples; lower --samples and --held-out, or give more groups"
        )
    return [features[i] for i in held_out], [features[i] for i in rest]


def _batches(features: Sequence[Features], pad_id: int, batch_size: int) -> Batches:
    return [collate([features[i] for i in batch], pad_id) for batch in sorted_batches(features, batch_size)]


@dataclass(frozen=True)
class _Runs:
    """Compression runs from one dense model, short or timed, that judge plans or tell what a full one takes."""

    source: ModelSource
    data: TaskData  # whose dev is the held-out slice
    dense: nn.Module
    training: Settings
    work_dir: Path
    progress: Progress

    def halved(
        self, finalists: Sequence[Trial], halving: Sequence[int], seconds: dict[str, float]
    ) -> tuple[list[Trial], list[HalvingRound]]:
        """(the finalists that are left after rounds of short runs, best first; the rounds). Adds the `seconds` of each
        round.

        A run whose divergence is no number comes last.
        """
        left, rounds = list(finalists), []
        for number, steps in enumerate(halving):
            started = time.monotonic()
            scores = distributed.agreed(
                [self._short(trial, steps, self.work_dir / f"round{number}-{i}") for i, trial in enumerate(left)]
            )
            order = np.argsort(scores, kind="stable")
            rounds.append(HalvingRound(steps, {left[i].origin: finite(scores[i]) for i in order}))
            left = [left[i] for i in order[: max(1, len(order) // 2)]]
            seconds[f"short runs of {steps} steps"] = round(time.monotonic() - started, 3)
        return left, rounds

    def _short(self, trial: Trial, steps: int, work_dir: Path) -> float:
        """Divergence from the dense model on the held-out slice after a compression run of so many steps."""
        settings, data = replace(self.training, steps=steps), replace(self.data, dev=[])
        take_ownership(work_dir, request_hash(self.source, data.train, settings, trial.plan))  # ranks may have changed
        student, _ = Job(self.source, data, trial.plan, settings, work_dir, self.progress).run()
        student.eval()
        device, kind, total = next(student.parameters()).device, self.data.task.output_kind, 0.0
        with torch.no_grad():
            for batch in _batches(self.data.dev, self.data.pad_id, 64):
                inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
                reference, actual = (
                    real_logits(model(**inputs).logits, inputs["attention_mask"], kind)
                    for model in (self.dense, student)
                )
                total += divergence(reference, actual, kind)
        return total / len(self.data.dev)

    def step_seconds(self, trial: Trial) -> float:
        """Seconds of one optimizer step of a compression run under a plan, timed over a few steps on this process's
        part."""
        source, task, training = self.source, self.data.task, self.training
        model = load_model(source, task)
        prepare(model, trial.plan, source.family, source.config)
        if training.freeze_embeddings:
            freeze_embeddings(model)
        losses = training_of(training, task, size_of(source.config, source.family.hidden_key)).losses
        student = Student(model, losses, self.dense if training.has_teacher else None, None, task.output_kind)
        student.to(distributed.device())
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], fused=True)
        size = max(1, training.batch_size // distributed.world_size())
        times = []
        for samples in _typical_batches(self.data.train, size, training.seed):
            batch = {key: value.to(distributed.device()) for key, value in collate(samples, self.data.pad_id).items()}
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
    """Batches as training makes them, of similar length: the middles of `_TIMED_STEPS` equal parts of an epoch ordered
    by length, whose mean stands for the epoch's, behind one to warm up on."""
    order = schedule(features, max(1, len(features) // size), size, seed)
    batches = [[features[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    batches.sort(key=lambda batch: max(len(sample["input_ids"]) for sample in batch))
    chosen = [batches[(2 * part + 1) * len(batches) // (2 * _TIMED_STEPS)] for part in range(_TIMED_STEPS)]
    return [chosen[-1], *chosen]


def _result(
    selection: Selection,
    finalists: Sequence[Trial],
    rounds: Sequence[HalvingRound],
    settings: SearchSettings,
    cost: SearchCost,
) -> SearchResult:
    assert settings.samples is not None
    assert settings.held_out is not None
    return SearchResult(
        method=settings.method,
        budget=SearchBudget(
            settings.counting, settings.compression, settings.bytes, settings.latency_ms, settings.latency_source
        ),
        best=finalists[0].score(),
        finalists=tuple(trial.score() for trial in finalists),
        pareto=tuple(
            ParetoPlan(**vars(trial.score()), asked=compression)
            for compression, trial in zip(settings.pareto, selection.front, strict=True)
        ),
        tied={tie: trial.score() for tie, trial in selection.tied.items()},
        rounds=tuple(rounds),
        plans_evaluated=selection.evaluated,
        samples=SampleCounts(settings.samples, settings.held_out),
        seed=settings.seed,
        cost=cost,
    )
