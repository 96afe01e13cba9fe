"""Tables of a run, of what a run would do, and of a search."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from nxm_export.cli.folding import joined, short_names, shortened
from nxm_export.cli.output import print_next, quoted
from nxm_export.cli.tables import (
    busy_note,
    print_rows,
    print_table,
    score_text,
    share_text,
    speed_text,
    terminal_width,
)
from nxm_export.contract.plan import COUNTINGS

if TYPE_CHECKING:
    from pathlib import Path

    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics
    from nxm_export.contract.records.run_summary import RunSummary
    from nxm_export.contract.records.search_result import PlanScore, SearchResult
    from nxm_export.pipeline.estimate import RunEstimate


def print_estimate(estimate: RunEstimate) -> None:
    """What a run would do, the time of all of it first."""
    seconds = (estimate.dense_seconds, estimate.search_seconds, estimate.prepare_seconds, estimate.seconds)
    click.echo(f"about {_duration(sum(seconds) + estimate.other_seconds)}, good to a factor of two")
    rows = [
        ("training samples", str(estimate.train_samples)),
        *([("texts without labels", str(estimate.more_texts))] if estimate.more_texts else []),
        ("held-out samples", str(estimate.dev_samples)),
        ("longest input", f"{estimate.max_length} tokens"),
        ("plan", _counts(estimate.plan, estimate.embedding)),
        ("compression", ", ".join(f"{counting} {value:.2%}" for counting, value in estimate.compression.items())),
        (
            "dense fine-tuning",
            _steps(estimate.dense_steps, estimate.dense_seconds, "the model has a head for this task"),
        ),
        *([("search", f"about {_duration(estimate.search_seconds)}")] if estimate.search_seconds else []),
        ("calibration, output costs, masks", f"about {_duration(estimate.prepare_seconds)}"),
        ("compression training", _steps(estimate.steps, estimate.seconds, "one-shot")),
        ("engines", ", ".join(estimate.engines)),
        ("export, build, compare, time", f"about {_duration(estimate.other_seconds)}"),
        ("dense model and checkpoint", f"about {estimate.checkpoint_bytes / 1e6:.0f} MB"),
        ("FP32 graph", f"about {estimate.fp32_onnx_bytes / 1e6:.0f} MB"),
        ("compressed graph", f"about {estimate.onnx_bytes / 1e6:.0f} MB"),
    ]
    print_table("what `nxm run` would do", ("stage", "estimate"), rows)


def _steps(steps: int, seconds: float, why_none: str) -> str:
    return f"{steps} steps, about {_duration(seconds)}" if steps else f"none: {why_none}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _counts(plan: Mapping[str, int], embedding: str = "float") -> str:
    counts = [f"{count} x {name}" for name, count in plan.items()]
    return ", ".join([*counts, *(["INT8 embedding table"] if embedding == "int8" else [])])


def print_compression(title: str, metrics: CompressionMetrics, head: str) -> None:
    """What a compression did beside its verdict. Hashes and the rest are in ``metrics.json``."""
    rows: list[tuple[str, object]] = [
        *((name, score_text(value)) for name, value in metrics.secondary_metrics.items()),
        ("recipe", metrics.recipe),
        ("head", "the model's" if head == "kept" else "fine-tuned first"),
        ("training steps", metrics.steps),
        ("training samples", metrics.train_samples),
        ("kept for checks", metrics.held_out_samples),
    ]
    if metrics.more_text is not None:
        more = metrics.more_text
        rows.append(("texts without labels", f"{more.texts}, in {more.share:.0%} of the places but each batch's first"))
    if metrics.outputs_in_float:
        rows.append(("outputs in float", joined(short_names(list(metrics.outputs_in_float)))))
    if metrics.embedding_table_drop is not None:
        rows.append(("the INT8 table costs", f"{metrics.embedding_table_drop:.2f} points"))
    if metrics.residual_gate_passed is not None:
        rows.append(("ADMM converged", "yes" if metrics.residual_gate_passed else "no"))
    print_table(title, ("what", "value"), rows)


def print_search(result: SearchResult, out: Path, *, everything: bool) -> None:
    """The finalists of a search and its cost; with `everything` also tied plans, its Pareto front and the cost of each
    step."""
    from nxm_export.contract.records.search_result import SEARCH_FILE

    timed = result.best.milliseconds is not None
    _print_plans("finalists", [(plan.origin, plan) for plan in result.finalists], timed)
    if timed:
        print(f"Milliseconds: {result.budget.latency_source or 'of a table by hand, which does not say where from'}.")
    cost = result.cost
    if everything:
        _print_plans("tied", [(f"{tie}: {plan.origin}", plan) for tie, plan in result.tied.items()], timed)
        _print_plans("at other compressions", [(plan.origin, plan) for plan in result.pareto], timed)
        print_table("cost", ("step", "seconds"), list(cost.seconds.items()))
    elif others := len(result.tied) + len(result.pareto):
        print(f"and {others} more, tied or at other compressions: --all, or {out / SEARCH_FILE}")
    if not cost.full_run.steps:
        print(f"The search took {cost.seconds['all']:.0f} seconds; the compression that it is for trains nothing.")
        return
    share = "an unknown part (resumed)" if cost.share_of_full_run is None else f"{cost.share_of_full_run:.1%}"
    print(
        f"The search took {cost.seconds['all']:.0f} seconds, {share} of a compression run\n"
        f"({cost.full_run.steps} steps, about {cost.full_run.estimated_seconds:.0f} seconds here)."
    )


def _print_plans(title: str, plans: Sequence[tuple[str, PlanScore]], timed: bool) -> None:
    """A table of (label, plan), with milliseconds where they were `timed`; nothing for no plans."""
    if plans:
        columns = ("plan", "divergence one-shot", *COUNTINGS, *(["ms"] if timed else []), "options")
        rows = [
            (
                label,
                plan.joint,
                *(f"{plan.compression(counting):.2%}" for counting in COUNTINGS),
                *([plan.milliseconds] if timed else []),
                _counts(plan.options),
            )
            for label, plan in plans
        ]
        print_table(title, columns, rows)


def print_summary(summary: RunSummary, everything: bool = False) -> None:
    """The verdict of a run and its tables; without `everything` those that fit on a screen."""
    for line in _verdict(summary):
        click.echo(line)
    click.echo()
    if everything:
        _print_all(summary)
    else:
        _print_quality(summary)
        click.echo()
        compression, megabytes = summary.compression["hw"], {n: size / 1e6 for n, size in summary.onnx_bytes.items()}
        click.echo(
            f"{compression:.2%} of the matrices' bits saved, as tensor cores store them; {_counts(summary.plan)}"
        )
        click.echo(f"graphs, MB: {', '.join(f'{name} {size:.1f}' for name, size in megabytes.items())}\n")
        _print_speed(summary)
        for line in _about_engines(summary):
            click.echo(shortened(line, terminal_width()))
        for name, why in {**summary.missing, **summary.failed}.items():
            click.echo(f"{name}: {shortened(why, max(20, terminal_width() - len(name) - 2))}")
    if note := busy_note([timing.quartiles for timing in summary.latency_ms.values() if timing.quartiles]):
        click.echo(note)
    _print_next(summary)


def _verdict(summary: RunSummary) -> list[str]:
    """What a run came to, in two sentences, and where to look for what failed."""
    differing = [name for name, report in summary.parity.items() if not report.passed]
    if differing:
        engines = f"FAILED: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''} from the checkpoint."
    elif summary.failed:
        engines = f"FAILED: {', '.join(summary.failed)} could not be built or run."
    elif not summary.parity:
        engines = "Nothing proven: no engine was compared with its checkpoint."
    elif len(summary.parity) == 1:
        engines = f"Passed: {next(iter(summary.parity))} computes what its checkpoint computes."
    else:
        engines = f"Passed: {len(summary.parity)} engines compute what their checkpoints compute."
    low, high = summary.difference_interval
    if (chosen := summary.chosen) is not None:
        engines += f" Kept: {chosen.name}."
    quality = f"{summary.metric} {score_text(summary.dense)} dense, {score_text(summary.compressed)} compressed"
    rest = [f"See {summary.artifacts[f'parity {name}']}." for name in differing]
    rest += [*_dense_not_shown(summary), *_mixed_versions(summary)]
    if low is None or high is None:
        return [engines, f"{quality}.", *rest]
    found = "no difference found" if low <= 0 <= high else "better" if low > 0 else "worse"
    return [engines, f"{quality}: {found}.", *rest]  # the interval stands in the table below


def _dense_not_shown(summary: RunSummary) -> list[str]:
    """That no difference to the dense model says little, where that is not shown to know more than one answer."""
    blind = summary.one_class
    if blind is None or blind.dense_is_better is not False:
        return []
    return [f"But dense is not shown to beat {blind.what} for all ({score_text(blind.value)})."]


def _mixed_versions(summary: RunSummary) -> list[str]:
    """What versions of packages made a stage, where they are not those that compared and timed the engines."""
    stages: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for stage, versions in summary.other_versions.items():
        stages.setdefault(tuple(versions.items()), []).append(stage)
    return [
        f"Versions differ: {', '.join(names)} made by "
        f"{', '.join(f'{package} {version} (now {summary.versions[package]})' for package, version in versions)}."
        for versions, names in stages.items()
    ]


def _about_engines(summary: RunSummary) -> list[str]:
    """Why the engine was kept, where there was a choice, and what twins say about 2:4."""
    from nxm_export.contract.records.run_summary import NO_CHOICE

    verdicts = [f"2:4 on {backend}: {verdict}" for backend, verdict in summary.sparse_verdicts.items()]
    chosen = summary.chosen
    return verdicts if chosen is None or chosen.why == NO_CHOICE else [f"kept {chosen.name}: {chosen.why}", *verdicts]


def _print_next(summary: RunSummary) -> None:
    of_ort = (name for name in summary.parity if name.startswith("ort-cpu-") and name != "ort-cpu-fp32")
    engine = summary.chosen.name if summary.chosen is not None else next(of_ort, None)
    if engine is None or f"engine {engine}" not in summary.artifacts:
        return
    path, checkpoint = summary.artifacts[f"engine {engine}"], summary.artifacts["checkpoint"]
    if summary.parity[engine].passed:
        print_next(f"nxm serve {quoted(path)} --text", "or: nxm report, a page")
    else:
        command = f"nxm compare {quoted(path)} --checkpoint {quoted(checkpoint)} --data DEV --bisect"
        print_next(command, "the block that parts")


def _print_speed(summary: RunSummary) -> None:
    """Engines by parity and by their latency at every shape."""
    shapes = list(dict.fromkeys((timing.batch, timing.seq) for timing in summary.latency_ms.values()))
    rows = []
    timed = {name.rpartition(" ")[0] for name in summary.latency_ms}
    for name in [*summary.parity, *sorted(timed - summary.parity.keys())]:
        report = summary.parity.get(name)
        row = [name, "not compared" if report is None else "pass" if report.passed else "FAIL"]
        for batch, sequence in shapes:
            timing = summary.latency_ms.get(f"{name} {batch}x{sequence}")
            row.append("-" if timing is None else f"{timing.median:.2f}{_times(summary, name, batch, sequence)}")
        rows.append(row)
    columns = ("engine", "parity", *(f"{batch}x{sequence}, ms" for batch, sequence in shapes))
    print_rows(columns, rows)


def _times(summary: RunSummary, name: str, batch: int, sequence: int) -> str:
    """The ratio of two medians; nothing for the reference."""
    ratio = next((r for r in summary.speedup if (r.name, r.batch, r.sequence) == (name, batch, sequence)), None)
    if ratio is None:
        return ""
    reference = summary.latency_ms.get(f"{ratio.reference} {batch}x{sequence}")
    own = summary.latency_ms[f"{name} {batch}x{sequence}"]
    return f" ({reference.median / own.median:.2f}x)" if reference is not None else ""


def _print_all(summary: RunSummary) -> None:
    """Every number of a run."""
    _print_quality(summary)
    compression = summary.compression
    print_table(
        "compression of the encoder's matrices, against FP32",
        ("counting", "compression", "what is counted"),
        [
            ("hw", f"{compression['hw']:.2%}", "2:4 as tensor cores store it, index and scales included"),
            ("packed", f"{compression['packed']:.2%}", "as nxm pack stores it, index and scales included"),
            ("values", f"{compression['values']:.2%}", "kept values alone, as papers count"),
        ],
    )
    sizes = [(name, f"{size / 1e6:.1f}") for name, size in summary.onnx_bytes.items()]
    print_table("graphs", ("graph", "MB"), sizes)
    _print_engine_parity(summary)
    _print_latency(summary)
    print_table("TensorRT-RTX", ("what", "value"), _rtx_rows(summary))
    root = os.path.commonpath(summary.artifacts.values())
    paths = [(name, os.path.relpath(path, root)) for name, path in summary.artifacts.items()]
    print_table(f"where everything lies, in {root}", ("what", "path"), paths)


def _print_quality(summary: RunSummary) -> None:
    low, high = summary.difference_interval
    known = low is not None and high is not None  # not for too few samples, nor with NaN in the outputs
    rows = [
        ("dense, FP32", score_text(summary.dense), ""),
        ("compressed, PyTorch", score_text(summary.checkpoint), _counts(summary.plan, summary.embedding)),
        (
            f"compressed, {summary.chosen.name if summary.chosen else 'ONNX Runtime'}",
            score_text(summary.compressed),
            f"to dense: {low:+.4f} to {high:+.4f} (paired 95 %)" if known else "no interval",
        ),
    ]
    if blind := summary.one_class:
        low, high = blind.dense_gain
        above = "" if low is None or high is None else f"dense {low:+.4f} to {high:+.4f} from it (paired 95 %)"
        note = "; ".join(filter(None, (repr(blind.label) if blind.label else "", above)))
        rows.append((f"no model: {blind.what} for all", score_text(blind.value), note))
    if alike := summary.cosine_to_dense:
        rows.append(("its cosine to the dense embeddings", f"{alike.mean:.4f}", f"the least {alike.least:.4f}"))
    click.echo(f"{summary.metric} on {summary.dev_samples} held-out samples")
    print_rows(("model", summary.metric, "note"), rows)


def _print_engine_parity(summary: RunSummary) -> None:
    rows = [
        (
            name,
            share_text(report.agreement),
            "NaN" if report.max_abs is None else f"{report.max_abs:.2g}",
            score_text(report.value),
            "pass" if report.passed else "FAIL",
        )
        for name, report in summary.parity.items()
    ]
    print_table(
        "parity: engine against its own checkpoint in PyTorch, same samples",
        ("engine", "equal argmax", "max |diff|", summary.metric, "verdict"),
        rows,
    )


def _print_latency(summary: RunSummary) -> None:
    speedups = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in summary.speedup}
    references = {ratio.reference for ratio in summary.speedup}
    rows = []
    for name, timing in summary.latency_ms.items():
        engine, _, shape = name.rpartition(" ")
        ratio = speedups.get((engine, timing.batch, timing.seq))
        note = "reference" if engine in references else "not compared"
        note = speed_text(ratio.speedup, ratio.interval) if ratio else note
        rows.append((engine, shape, f"{timing.median:.2f}", note))
    columns = ("engine", "batch x seq", "median ms", "paired rounds against the first (95 %)")
    print_table("latency, engines interleaved", columns, rows)
    for line in _about_engines(summary):
        click.echo(line)


def _rtx_rows(summary: RunSummary) -> list[tuple[str, str]]:
    rtx, absent = summary.trt_rtx, {**summary.missing, **summary.failed}
    why = [reason for name, reason in absent.items() if name.startswith("trt_rtx")]
    if rtx is None:
        return [("engine", why[0] if why else "not built")]
    return [
        ("engine", "built ahead of time, without a GPU"),
        ("INT8 matrix products", f"{rtx.integer_products} of {rtx.planned_products} planned"),
        ("2:4 kernels", rtx.sparse_kernels),
        *[("run here", reason) for reason in why],
    ]
