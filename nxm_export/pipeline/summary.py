"""What a run comes to: every number read back from the file of the stage that measured it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nxm_export.contract.io_spec import IOSpec, load_spec
from nxm_export.contract.plan import COUNTINGS, CompressionPlan
from nxm_export.contract.records.checkpoint_metrics import (
    METRICS_FILE,
    CompressionMetrics,
    DenseMetrics,
    finite,
    read_metrics_of,
)
from nxm_export.contract.records.run_summary import DIRECTORY as SUMMARY_DIRECTORY
from nxm_export.contract.records.run_summary import (
    ChosenEngine,
    EngineParity,
    Likeness,
    OneClass,
    RtxBuild,
    RunSummary,
    ShapeLatency,
    TrainingFacts,
)
from nxm_export.contract.tasks import TASKS
from nxm_export.pipeline.run_engines import AHEAD_OF_TIME, BASELINE, QUANTIZED
from nxm_export.storage.json_files import convert
from nxm_export.storage.run_dir import RunDir
from nxm_export.storage.versions import installed_versions, other_versions

if TYPE_CHECKING:
    from engines.benchmark.latency import BenchReport
    from engines.parity.reports import ParityReport

BENCH_FILE = "latency.json"  # in bench/: of engines on the CPU; beside it one of each backend on a GPU


def kind_of(plan: CompressionPlan) -> str:
    """What the engines of the plan are called: ``int8``, or ``sparse`` where it leaves all weights in float."""
    return QUANTIZED if any(spec.weight_bits for spec in plan.weights.values()) else "sparse"


@dataclass(frozen=True)
class BuildResults:
    """What became of the engines of a run: `graphs` holds the graph of each that was built, `missing` why others cannot
    be built or run here, `failed` why others could not be built or failed when they ran, `compared` which were compared
    with their checkpoint."""

    graphs: Mapping[str, str]
    missing: Mapping[str, str]
    failed: Mapping[str, str]
    compared: tuple[str, ...] = ()


def summarize(
    directory: RunDir, plan: CompressionPlan, graphs: Sequence[str], engines: BuildResults, chosen: ChosenEngine
) -> RunSummary:
    """The numbers of the run; paths are relative to it."""
    from engines.benchmark.latency import read_bench_report
    from engines.parity.reports import PARITY_FILE, read_parity_report

    dense = read_metrics_of(DenseMetrics, directory.path("dense"))
    compressed = read_metrics_of(CompressionMetrics, directory.path("checkpoint"))
    files = sorted(directory.path("bench").glob("*.json"), key=lambda file: file.name != BENCH_FILE)
    benches = {file.stem: read_bench_report(file) for file in files}
    reports = {name: read_parity_report(directory.path("compare", name, PARITY_FILE)) for name in engines.compared}
    spec = load_spec(directory.path("onnx", "cpu"))
    ours, theirs = (_outputs(directory, name) for name in (chosen.name, BASELINE))
    interval, similarity = _against_dense(spec, dense.metric, ours, theirs)
    blind = _one_class(spec, dense.metric, theirs)
    rtx = next((name for name in engines.graphs if name == f"{AHEAD_OF_TIME}-fp16-{kind_of(plan)}"), None)
    return RunSummary(
        metric=dense.metric,
        dev_samples=dense.dev_samples,
        dense=dense.value,
        compressed=reports[chosen.name].engine_value,
        difference_interval=interval,
        cosine_to_dense=similarity,
        one_class=blind,
        checkpoint=compressed.value,
        compression={counting: plan.compression(counting) for counting in COUNTINGS},
        plan=plan.pattern_counts,
        embedding=plan.embedding,
        parity={name: _parity(report) for name, report in reports.items()},
        latency_ms={name: timing for bench in benches.values() for name, timing in _latency(bench).items()},
        speedup=tuple(ratio for bench in benches.values() for ratio in bench.ratios),
        onnx_bytes={name: _graph_bytes(directory.path("onnx", name)) for name in graphs},
        trt_rtx=_rtx_build(directory.path("engines", rtx)) if rtx else None,
        missing=dict(engines.missing),
        failed=dict(engines.failed),
        chosen=chosen,
        sparse_verdicts={backend: bench.verdict for backend, bench in benches.items() if bench.verdict},
        training=_training(compressed),
        versions=installed_versions(),
        other_versions=_other_versions(directory),
        artifacts={
            "dense": "dense",
            "checkpoint": "checkpoint",
            **{f"onnx {name}": f"onnx/{name}/model.onnx" for name in graphs},
            **{f"engine {name}": f"engines/{name}" for name in engines.graphs},
            **{f"parity {name}": f"compare/{name}/{PARITY_FILE}" for name in engines.compared},
        },
    )


def summarized_files(directory: RunDir, engines: BuildResults) -> dict[str, Path]:
    """What the summary is read from, by label: with any of these, it goes."""
    from engines.parity.reports import PARITY_FILE

    return {
        "dense": directory.path("dense", METRICS_FILE),
        "checkpoint": directory.path("checkpoint", METRICS_FILE),
        "bench": directory.path("bench"),
        **{f"parity {name}": directory.path("compare", name, PARITY_FILE) for name in engines.compared},
    }


def _graph_bytes(directory: Path) -> int:
    """Bytes of a graph, and of the file beside it that has its weights where they are too large for one."""
    return sum(file.stat().st_size for file in directory.glob("model.onnx*"))


def _other_versions(directory: RunDir) -> dict[str, dict[str, str]]:
    """The versions that made a model, a graph or an engine of this run, where they are not those that are here now;
    what was compared and timed was so by those."""
    stages = {stage: record for stage, record in directory.manifest.stages.items() if stage != SUMMARY_DIRECTORY}
    others = {stage: other_versions(record.versions, installed_versions()) for stage, record in stages.items()}
    return {stage: versions for stage, versions in others.items() if versions}


def _outputs(directory: RunDir, engine: str) -> dict[str, np.ndarray]:
    """What an engine said on dev, by output, and the labels beside it."""
    from engines.parity.reports import OUTPUTS_FILE

    with np.load(directory.path("compare", engine, OUTPUTS_FILE)) as file:
        return dict(file)


def _against_dense(
    spec: IOSpec, metric: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[tuple[float | None, float | None], Likeness | None]:
    """(paired 95 % interval of the compressed minus the dense metric, how alike their embeddings are), from the outputs
    of both."""
    from engines.parity.decisions import cosines
    from nxm_export.data.metrics import paired_interval, scored_outputs

    task = TASKS[spec.task]
    low, high = paired_interval(
        metric,
        scored_outputs(task, ours),
        scored_outputs(task, theirs),
        ours["labels"],
        classes=spec.labels,
        groups=ours.get("groups"),
    )
    if task.output_kind != "vector":
        return (finite(low), finite(high)), None
    first = next(iter(task.outputs))
    alike = cosines(theirs[first], ours[first])
    return (finite(low), finite(high)), Likeness(float(alike.mean()), float(alike.min()))


def _one_class(spec: IOSpec, metric: str, outputs: Mapping[str, np.ndarray]) -> OneClass | None:
    """What the same answer for every sample reaches, against the `outputs` of the dense model; None where no answer can
    be the same."""
    from nxm_export.data.metrics import blind_answer, metric_named, paired_interval, scored_outputs

    task, labels, groups = TASKS[spec.task], outputs["labels"], outputs.get("groups")
    dense = scored_outputs(task, outputs)
    blind = blind_answer(task, dense, labels, spec.labels, groups)
    if blind is None:
        return None
    low, high = paired_interval(metric, dense, blind.outputs, labels, classes=spec.labels, groups=groups)
    value = metric_named(metric, spec.labels, groups)(blind.outputs, labels)
    return OneClass(blind.label, value, (finite(low), finite(high)), blind.what)


def _rtx_build(directory: Path) -> RtxBuild:
    from engines.passport import PASSPORT_FILE, load_passport

    options = load_passport(directory).options
    source, way_out = str(directory / PASSPORT_FILE), "run the same `nxm run` again"
    return convert(options, RtxBuild, source=source, way_out=way_out, foreign=True)


def _parity(report: ParityReport) -> EngineParity:
    outputs = report.outputs
    return EngineParity(
        agreement=_worst([output.agreement for output in outputs], min),
        max_abs=_worst([output.max_abs for output in outputs], max),
        passed=report.passed,
        value=report.engine_value,
    )


def _worst(values: Sequence[float | None], choose: Callable[[Sequence[float]], float]) -> float | None:
    """The worst of the outputs' values; None where one of them has none."""
    numbers = [value for value in values if value is not None]
    return choose(numbers) if len(numbers) == len(values) else None


def _latency(report: BenchReport) -> dict[str, ShapeLatency]:
    return {
        f"{timing.name} {timing.batch}x{timing.sequence}": ShapeLatency(
            timing.batch, timing.sequence, timing.median, timing.quartiles
        )
        for timing in report.timings
    }


def _training(metrics: CompressionMetrics) -> TrainingFacts:
    return TrainingFacts(
        recipe=metrics.recipe,
        admm_steps=metrics.admm_steps,
        qat_steps=metrics.qat_steps,
        residual=metrics.residual,
        residual_gate_passed=metrics.residual_gate_passed,
        mask_hash=metrics.mask_hash,
        embedding_table_drop=metrics.embedding_table_drop,
    )
