"""Runs for tests of the report, put together from records: no stage runs, no file is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engines.parity.probes import ProbeResult
from engines.parity.reports import ParityReport, verdict
from engines.parity.tolerance import OutputParity
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget, WeightSparsity
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.run_summary import RunSummary
from nxm_export.reporting.engine_facts import EngineEntry
from nxm_export.reporting.figures import Figure, RunFile
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.run_facts import Run
from tests.support.records import PASSPORT, SUMMARY

OUTPUT = OutputParity(
    output="logits",
    max_abs=0.001,
    mean_abs=0.0001,
    cosine=1.0,
    nonfinite=0,
    agreement=1.0,
    worst_sample=0,
    max_tolerance=0.01,
    mean_tolerance=0.001,
    unexcused_flips=0,
    passed=True,
    unchanged_share=1.0,
    unchanged_required=0.5,
    one_step_shift=None,
    max_steps=None,
    mean_steps=None,
    flips=0,
    worst_flips=(),
)


def parity(*, passed: bool = True, probes: tuple[ProbeResult, ...] = ()) -> RunFile[ParityReport]:
    """A comparison of one output, which fails where it should."""
    outputs = (replace(OUTPUT, passed=passed),)
    report = ParityReport(
        passed=verdict(outputs, probes, ()),
        engine="engine",
        engine_sha256=PASSPORT.engine_sha256,
        backend="ort",
        samples=64,
        outputs=outputs,
        metric="accuracy",
        reference_value=0.5,
        reference_interval=(0.4, 0.6),
        engine_value=0.5,
        engine_interval=(0.4, 0.6),
        reason="measured",
        difference=0.0,
        difference_interval=(-0.125, 0.25),
        probes=probes,
        gates=(),
        pairs=(),
        secondary_metrics={},
    )
    return RunFile("compare/ort-cpu-int8/parity.json", report, report.to_dict())


def engine(name: str = "ort-cpu-int8", compared: RunFile[ParityReport] | None = None) -> EngineEntry:
    """An engine with a passport and a file."""
    passport = RunFile(f"engines/{name}/passport.json", PASSPORT, {})
    return EngineEntry(name, passport, Figure(1000, f"engines/{name}/model.onnx"), compared, None, None)


def on_kernels(entry: EngineEntry, chosen: tuple[bool | None, ...]) -> EngineEntry:
    """The engine with a matrix that is planned 2:4 for each of `chosen`: whether a sparse kernel runs."""
    weights = tuple(
        WeightSparsity(
            name=f"layer.{number}.weight",
            k=64,
            n=64,
            form="matmul",
            planned="2:4+W8",
            planned_sparse=True,
            pattern_float="2:4",
            pattern_int8="2:4",
            sparse_along_k=True,
            eligible=True,
            chosen=sparse,
            kernel=None,
            reason=None if sparse else "no-gpu",
            detail="",
        )
        for number, sparse in enumerate(chosen)
    )
    report = SparsityReport(SparsityTarget("trt", "10.0", "8.9"), weights)
    return replace(entry, sparsity=report, sparse_kernels=True)


def matrix(block: int, role: str = "query", *, zeros: float = 0.5, problems: tuple[str, ...] = ()) -> Matrix:
    """A matrix of a 2:4+W8 plan, found as planned in one graph."""
    return Matrix(
        name=f"encoder.layer.{block}.{role}.weight",
        block=block,
        role=role,
        shape=(64, 64),
        spec=WeightSpec.parse("2:4+W8"),
        stored={"cpu": "INT8"},
        pattern={"cpu": "2:4"},
        zeros={"cpu": Figure(zeros, "onnx/cpu/verify.json", f"/weights/{block}/zeros")},
        problems=problems,
        sensitivity=None,
        projection=0.125 + block / 64,
    )


def made_run(*engines: EngineEntry, summary: RunSummary | None = SUMMARY) -> Run:
    """A run with a summary and engines."""
    source = RunFile("summary/summary.json", summary, summary.to_dict()) if summary else None
    return Run(root=Path("my runs") / "run", stages={}, summary=source, engines=engines)
