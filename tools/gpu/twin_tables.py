"""What `tools.gpu.engine_twins` prints, and puts on its page: the results of a subject in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.cusparselt.report import times
from engines.sparsity.kernel_names import kernel_named
from nxm_export.pipeline.sparsity_twins import DENSE, FLOAT, SPARSE

if TYPE_CHECKING:
    from engines.benchmark.latency import BenchReport
    from engines.cusparselt.profiling import ProfiledRun
    from engines.parity.reports import ParityReport
    from tools.gpu.engine_twins import Result


def tables(results: Sequence[Result]) -> list[str]:
    """Times and kernels of every subject."""
    return [line for result in results for line in table_of(result)]


def table_of(result: Result) -> Iterator[str]:
    """The lines of one subject: verdicts, times, both times of every product, kernels; what failed, too."""
    facts = result.machine
    stand_in = "" if result.kind == "gpu" else " (A STAND-IN: nothing of this is about a GPU)"
    versions = f"torch {facts['torch']}, cuSPARSELt {facts['cusparselt']}"
    yield f"## {result.subject.name} on {facts['gpu']}{stand_in}, {versions}"
    yield ""
    if result.error is not None:
        yield f"- error: {result.error}"
    yield from (f"- {name} could not be built: {why}" for name, why in result.unbuilt.items())
    yield from (f"- not measured: {text}" for report in result.bench for text in report.unmeasured)
    if result.sparsity is not None:
        sparsity = result.sparsity
        yield f"- sparse kernels: {sparsity.chosen} of {sparsity.planned} planned matrices; {sparsity.counts}"
    if loose := [name for name, held in result.captured.items() if not held]:
        yield f"- in no CUDA graph, so that launches are in their times: {', '.join(loose)}"
    yield from (f"- verdict: {result.verdict}", f"- parity: {result.parity}", f"- seconds: {dict(result.seconds)}")
    for one in result.compared.reports if result.compared is not None else ():
        yield f"- parity on {one.samples} samples: {_in_words(one)}"
    for left in result.compared.without_report if result.compared is not None else ():
        yield f"- parity: {left.engine} {'failed when it ran' if left.failed else 'was not run'}: {left.reason}"
    if result.skipped:
        yield f"- not reached: {', '.join(result.skipped)}"
    if result.bench:
        yield from (
            "",
            "| shape | FP16, ms | INT8 dense | INT8 sparse | over dense | over FP16 | all queued | Hugging Face |",
        )
        yield "|---|---:|---:|---:|---:|---:|---|---|"
    for report in result.bench:
        yield _row(report, result)
    if result.choices:
        yield from ("", "K x N to output, rows: sparse and dense -> form", "")
    for choice in result.choices:
        yield f"- {choice.k}x{choice.n} to {choice.output}, {times([choice])} -> {choice.form}"
    for form, problem in dict.fromkeys((m.form, m.problem) for c in result.choices for m in c.measured if m.problem):
        yield f"- {form}: {problem}"
    if result.profiles:
        yield from ("", "Kernels of the sparse engine's products, by the profiler", "")
    for shape, run in result.profiles.items():
        yield f"- {shape}: {kernels_in_words(run)}"
    yield ""


def _in_words(report: ParityReport) -> str:
    """The verdict of a comparison, and both values of the metric."""
    verdict = "passed" if report.passed else f"FAILED ({report.failure or report.reason or 'see the JSON'})"
    engine, checkpoint = (
        "no value" if value is None else f"{value:.4f}" for value in (report.engine_value, report.reference_value)
    )
    name = Path(report.engine).name
    return f"{name} {verdict}; {report.metric} {engine}, checkpoint {checkpoint}"


def kernels_in_words(run: ProfiledRun) -> str:
    """How many products ran a sparse INT8 kernel, and the names of all kernels with the number of their products."""
    names = [sorted({kernel.name for kernel in kernels}) for kernels in run.products.values()]
    sparse = sum(any(_is_sparse(name) for name in each) for each in names)
    shown = [f"{name} ({count})" for name, count in Counter(name for each in names for name in each).most_common()]
    return f"{sparse} of {len(names)} products ran a sparse INT8 kernel; {', '.join(shown) or 'no kernel was seen'}"


def _is_sparse(name: str) -> bool:
    kernel = kernel_named(name)
    return kernel is not None and kernel.sparse and kernel.integer


def _row(report: BenchReport, result: Result) -> str:
    times = {timing.name: timing.median for timing in report.timings}
    shape = f"{report.timings[0].batch}x{report.timings[0].sequence}"
    ratio = next((ratio for ratio in report.ratios if ratio.name == SPARSE), None)
    speed = "-" if ratio is None else f"{ratio.speedup:.2f} ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})"
    shown = [f"{times[name]:.4f}" if name in times else "-" for name in (FLOAT, DENSE, SPARSE)]
    theirs = ", ".join(f"{way} {ms:.4f}" for way, ms in (result.hugging_face or {}).get(shape, {}).items()) or "-"
    over = f"{times[FLOAT] / times[SPARSE]:.2f}" if {FLOAT, SPARSE} <= {*times} else "-"
    by_name = {timing.name: timing.queued for timing in report.timings}
    ms = (by_name.get(name) for name in (FLOAT, DENSE, SPARSE))
    queued = ", ".join("-" if each is None else f"{each:.4f}" for each in ms)
    return f"| {' | '.join([shape, *shown, speed, over, queued, theirs])} |"
