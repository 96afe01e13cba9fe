"""The stages as functions on paths. Each does what the command of its name does, and returns what that command prints
as a record.

Keyword arguments are many, because a stage has many choices and every one has a default; what belongs together is one
object (`PlanOptions`, ``Settings``, ``Columns``, ``BuildOptions``). Errors are those of `nxm_export.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.api.requests import (
    DEFAULT,
    Default,
    PlanArguments,
    PlanOptions,
    names_of,
    pattern_of,
    planned,
    with_data,
)
from nxm_export.contract.choices import (
    COMPUTE_CAPABILITY,
    LOWERING,
    TARGET,
    TASK,
    TENSORRT_BACKENDS,
    WEIGHT_STORAGE,
)
from nxm_export.contract.plan import CompressionPlan, NMPattern
from nxm_export.data.columns import Columns
from nxm_export.data.more_text import MoreText
from nxm_export.pipeline.graph_file import onnx_file
from nxm_export.progress import Progress, silent

if TYPE_CHECKING:
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings
    from nxm_export.contract.packed_checkpoint import PackedSizes
    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, DenseMetrics
    from nxm_export.contract.records.run_summary import RunSummary
    from nxm_export.contract.records.search_result import SearchResult
    from nxm_export.contract.records.verify_report import VerifyReport
    from nxm_export.graph.exporter import Exported
    from nxm_export.pipeline.environment import MachineReport
    from nxm_export.pipeline.estimate import RunEstimate
    from nxm_export.pipeline.file_diagnosis import FileDiagnosis
    from nxm_export.pipeline.inspection import CheckpointFacts, EngineInspection, GraphFacts, RunInspection


def run(
    model: str | Path,
    *,
    train: str | Path,
    dev: str | Path,
    out: str | Path,
    task: str = TASK,
    pattern: str | NMPattern | Default | None = DEFAULT,
    weight_bits: int | Default | None = DEFAULT,
    plan: CompressionPlan | str | Path | None = None,
    search: float | SearchSettings | None = None,
    settings: Settings | None = None,
    columns: Columns = Columns(),
    options: PlanOptions = PlanOptions(),
    revision: str | None = None,
    train_limit: int | None = None,
    more_text: MoreText | None = None,
    weights_stored: str = WEIGHT_STORAGE,
    backend: str | Sequence[str] = (),
    progress: Progress = silent,
) -> RunSummary:
    """Compress, export, build, compare and time a model, into the run directory `out`; stages that are up to date are
    skipped.

    `require_passed` of the summary raises where an engine differs from its checkpoint. Parameters are those of
    `compress`, and `weights_stored` as `export` has it, for the graphs that can store weights so. `search` finds the
    plan: the share of bits that it saves, such as 0.875, or all settings of a search. `backend` is a backend, several,
    or ``auto`` (all that run here): their engines are built, and the fastest that passes is kept; by default those of
    ONNX Runtime and for GPUs. Raises `EngineUnavailable` before anything is trained for a backend that cannot run here.
    """
    from nxm_export.pipeline.run import run as run_all

    request, choice = planned(
        PlanArguments(pattern, weight_bits, plan, search, options), model, train, dev, task, settings, columns
    )
    request = replace(
        with_data(request, revision, train_limit, more_text), weights_stored=weights_stored, backends=names_of(backend)
    )
    return run_all(request, out, choice, progress=progress)


def estimate(
    model: str | Path,
    *,
    train: str | Path,
    dev: str | Path,
    task: str = TASK,
    pattern: str | NMPattern | Default | None = DEFAULT,
    weight_bits: int | Default | None = DEFAULT,
    plan: CompressionPlan | str | Path | None = None,
    search: float | SearchSettings | None = None,
    settings: Settings | None = None,
    columns: Columns = Columns(),
    options: PlanOptions = PlanOptions(),
    revision: str | None = None,
    train_limit: int | None = None,
    more_text: MoreText | None = None,
    weights_stored: str = WEIGHT_STORAGE,
    backend: str | Sequence[str] = (),
) -> RunEstimate:
    """What `run` would do, how long it would take here, roughly, and how large the results are; writes nothing."""
    from nxm_export.pipeline.estimate import estimate as estimate_run

    request, choice = planned(
        PlanArguments(pattern, weight_bits, plan, search, options), model, train, dev, task, settings, columns
    )
    request = replace(
        with_data(request, revision, train_limit, more_text), weights_stored=weights_stored, backends=names_of(backend)
    )
    return estimate_run(request, choice)


def finetune(
    model: str | Path,
    *,
    train: str | Path,
    dev: str | Path,
    out: str | Path,
    task: str = TASK,
    settings: Settings | None = None,
    columns: Columns = Columns(),
    revision: str | None = None,
    train_limit: int | None = None,
    further: bool = False,
    progress: Progress = silent,
) -> DenseMetrics:
    """Train a dense model with a task head and write it to the directory `out`, with what it scores on `dev`.

    A model whose head fits the task already is written as it is, unless it is to be trained `further`. `compress` does
    this by itself where there is no head; the dense settings (`Settings.dense_steps` and its like) are for it.
    """
    from compressors.settings import Settings
    from compressors.training.compress import finetune as finetune_model

    return finetune_model(
        model,
        task=task,
        train=str(train),
        dev=str(dev),
        out=out,
        settings=settings or Settings(),
        columns=columns,
        revision=revision,
        train_limit=train_limit,
        further=further,
        progress=progress,
    )


def compress(
    model: str | Path,
    *,
    train: str | Path,
    dev: str | Path | None = None,
    out: str | Path,
    task: str = TASK,
    pattern: str | NMPattern | Default | None = DEFAULT,
    weight_bits: int | Default | None = DEFAULT,
    plan: CompressionPlan | str | Path | None = None,
    settings: Settings | None = None,
    columns: Columns = Columns(),
    options: PlanOptions = PlanOptions(),
    revision: str | None = None,
    train_limit: int | None = None,
    more_text: MoreText | None = None,
    progress: Progress = silent,
) -> CompressionMetrics:
    """Compress a model (a directory or hub id) to the checkpoint directory `out`, fine-tuning it first where it has no
    head.

    `train` and `dev` are data files (docs/tasks.md). Without training (``Settings(steps=0)``) `train` needs no labels,
    and `dev` may be left out: then nothing is scored. Every weight gets `pattern` (N kept of every M, by default 2:4;
    None: dense) and `weight_bits` (2 to 8, by default 8; None: unquantized) with INT8 inputs, or what a `plan` or its
    file says, which stands instead of pattern, bits and `options`. `settings` say how to train; `more_text` names files
    without labels, which the dense model answers in training. Raises `DataError`,
    `PlanError` and `ArtifactError` before anything is trained.
    """
    from nxm_export.pipeline.run import compress_model

    request, choice = planned(
        PlanArguments(pattern, weight_bits, plan, None, options), model, train, dev, task, settings, columns
    )
    return compress_model(
        with_data(request, revision, train_limit, more_text), out, plan=choice.file, progress=progress
    )


def search(
    model: str | Path,
    *,
    train: str | Path,
    out: str | Path,
    task: str = TASK,
    settings: SearchSettings | None = None,
    training: Settings | None = None,
    columns: Columns = Columns(),
    train_limit: int | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Search a different (pattern, bits) for every weight of a model with its task head; ``out/plan.json`` is the best
    plan.

    `settings` hold the budget, by default 87.5 % compression; `training` is the compression that the plan is for.
    """
    from compressors.search.plan_search import search as search_plan
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings

    return search_plan(
        str(model),
        task=task,
        train=str(train),
        out=Path(out),
        settings=settings or SearchSettings(),
        training=training or Settings(),
        columns=columns,
        train_limit=train_limit,
        progress=progress,
    )


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    target: str = TARGET,
    task: str | None = None,
    dtype: str | None = None,
    placement: str | None = None,
    lowering: str = LOWERING,
    precision_overrides: str | None = None,
    max_length: int | None = None,
    weights_stored: str = WEIGHT_STORAGE,
) -> Exported:
    """Write a checkpoint directory as a Q/DQ ONNX graph directory, a dense one as a float graph.

    `target` is ``cpu`` (float32), ``trt`` (float16, for TensorRT 10 and later and RTX) or ``trt8`` (for TensorRT 8.6);
    `dtype`, `placement`, `lowering`, `precision_overrides` (the dtype of LayerNorm and softmax) and `max_length`
    override what it means. `weights_stored` is ``int8`` or ``int4``, which stores weights of 4 bits or fewer in half a
    byte each.
    """
    from nxm_export.graph.exporter import export as export_graph

    return export_graph(
        checkpoint,
        out,
        target=target,
        task=task,
        dtype=dtype,
        placement=placement,
        lowering=lowering,
        precision_overrides=precision_overrides,
        max_length=max_length,
        weights_stored=weights_stored,
    )


def verify(graph: str | Path, *, pattern: str | NMPattern | None = None) -> VerifyReport:
    """Check an ONNX file, or the one in a graph directory, by itself: N:M along K on the stored integers, scales, Q/DQ
    pairs.

    `pattern` is required of every quantized weight, beside what a plan in the file says. `require` of the report raises
    for problems.
    """
    from nxm_export.graph.verifier import verify as verify_graph

    return verify_graph(onnx_file(graph), pattern=pattern_of(pattern))


def pack(checkpoint: str | Path, out: str | Path) -> PackedSizes:
    """Write a checkpoint directory as one file at its true size: packed bits, N:M indices, scales."""
    from nxm_export.contract.packed_checkpoint import pack as pack_checkpoint

    return pack_checkpoint(checkpoint, out)


def unpack(file: str | Path, out: str | Path) -> Path:
    """Write a packed file back as the checkpoint directory that it was, bit by bit; returns its path."""
    from nxm_export.contract.packed_checkpoint import unpack as unpack_file

    return unpack_file(file, out)


def inspect(
    path: str | Path, *, twin: str | Path | None = None, measure: bool = False
) -> GraphFacts | EngineInspection | RunInspection | CheckpointFacts:
    """Facts of an ONNX file, a graph, checkpoint or engine directory, or a run; for TensorRT, which weights run
    sparse and why the others do not."""
    from nxm_export.pipeline.inspection import inspect_path

    return inspect_path(path, twin=None if twin is None else Path(twin), measure=measure)


def doctor() -> MachineReport:
    """What this machine can build and run, and what to install for the rest."""
    from nxm_export.pipeline.environment import report as machine_report

    return machine_report()


def diagnose(
    graph: str | Path,
    *,
    backend: str = TENSORRT_BACKENDS[0],
    version: str | None = None,
    compute_capability: str = COMPUTE_CAPABILITY,
    parse: bool = False,
) -> FileDiagnosis:
    """Judge any ONNX file, or the one in a graph directory, for a TensorRT version and a GPU without building it: which
    matrices can run sparse, and what to do.

    `version` is by default the backend's newest that is known here; `compute_capability` may be a name, too
    (``8.9``, ``L4``); `parse` asks the parser of the installed TensorRT-RTX as well.
    """
    from nxm_export.pipeline.file_diagnosis import diagnose_file

    return diagnose_file(Path(graph), backend, version, compute_capability, parse=parse)


def show(run_directory: str | Path) -> RunSummary:
    """The summary of a run that is complete; an engine that failed a later comparison has not passed in it."""
    from nxm_export.pipeline.later_comparisons import summary_now

    return summary_now(run_directory)


def report(
    run_directory: str | Path,
    out: str | Path | None = None,
    *,
    search: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write one HTML page of a run, finished or not, by default ``report.html`` in it; returns its path. A file at
    `out` is replaced with `force` alone."""
    from nxm_export.reporting import report as write_report

    return write_report(run_directory, out, search=search, force=force)


def card(
    source: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Write a Hugging Face model card of a run, a checkpoint or an engine directory; returns its path. A file at `out`
    is replaced with `force` alone. `base_model` and `license` are for its head: no file says them."""
    from nxm_export.reporting import card as write_card

    return write_card(source, out, force=force, base_model=base_model, license=license)
