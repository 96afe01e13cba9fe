"""Tables of engines: how they were built, what is in them, and how fast they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from nxm_export.cli.tables import print_facts, print_table, speed_text

if TYPE_CHECKING:
    from engines.benchmark.fastest_backend import Choice
    from engines.benchmark.http_load import LoadReport
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from engines.cusparselt.program import Choice as ProductChoice
    from engines.sparsity.advice import Advice
    from engines.sparsity.judgement import SparsityReport, WeightSparsity
    from nxm_export.pipeline.inspection import EngineInspection, FileDiagnosis, GraphFacts, RunInspection


def print_choice(choice: Choice, facts: Mapping[str, object]) -> None:
    """The candidates' timings, which was kept and why, then the facts of its passport."""
    shapes = [f"{batch}x{sequence}, ms" for batch, sequence in choice.shapes]
    rows = [
        (
            candidate.backend,
            *(f"{value:.3g}" for value in candidate.latency_ms),
            f"{candidate.speedup:.2f}x" if number else "reference",
        )
        for number, candidate in enumerate(choice.candidates)
    ]
    print_table("candidates, medians of interleaved rounds", ("backend", *shapes, "speed"), rows)
    for name, why in choice.left_out.items():
        click.echo(f"left out: {name}: {why}")
    click.echo(f"kept {choice.backend}: {choice.why}")
    print_facts("built", facts)


def print_inspection(title: str, facts: GraphFacts | EngineInspection | RunInspection) -> None:
    """What `nxm inspect` found: a table of facts, and one of the matrices where sparse kernels are known; of a run,
    those of every engine."""
    from nxm_export.pipeline.inspection import EngineInspection, GraphFacts

    if isinstance(facts, GraphFacts):
        print_table(title, ("what", "value"), list(facts.to_dict().items()))
    elif isinstance(facts, EngineInspection):
        from engines.cusparselt.backend import CusparseltFacts

        _print_facts(title, facts.to_dict())
        if facts.sparsity is not None:
            _print_matrices(facts.sparsity)
        if isinstance(facts.facts, CusparseltFacts):
            _print_choices(facts.facts.choices)
    else:
        for name, engine in facts.engines.items():
            print_inspection(f"{title}: {name}", engine)


def print_diagnosis(diagnosis: FileDiagnosis) -> None:
    """What `nxm doctor` says of a file: facts, its matrices, advice for them, and its problems."""
    _print_facts(diagnosis.file, diagnosis.to_dict())
    _print_matrices(diagnosis.sparsity)
    _print_advice(diagnosis.advice)
    for problem in diagnosis.problems:
        click.echo(f"problem: {problem}")
    if diagnosis.parsed is not None:
        verdict = "takes it, which proves no sparse kernel" if diagnosis.parsed.accepted else "refuses it"
        click.echo(f"{diagnosis.parsed.parser}'s parser {verdict}")
        for warning in diagnosis.parsed.warnings:
            click.echo(f"it warns: {warning}")


def _print_facts(title: str, facts: Mapping[str, object]) -> None:
    apart = (
        "choices",
        "profiled",
        "weights",
        "advice",
        "problems",
        "parsed",
        "products",
        "unread",
        "passport",
        "schema",
    )
    rows = [(key, value) for key, value in facts.items() if key not in apart]
    print_table(title, ("what", "value"), rows)


def _print_matrices(report: SparsityReport) -> None:
    columns = ("weight", "K x N", "planned", "float > INT8", "eligible", "sparse", "kernel", "saved ms", "why not")
    print_table("weights", columns, [_matrix_row(_label(matrix, report.weights), matrix) for matrix in report.weights])
    click.echo(str(report.products))
    for product in report.unread:
        click.echo(f"not read: {product}")
    for reason, detail in {matrix.reason: matrix.detail for matrix in report.weights if matrix.reason}.items():
        click.echo(f"{reason}: {detail}")
    for hint in dict.fromkeys(matrix.hint for matrix in report.weights if matrix.hint):
        click.echo(f"hint: {hint}")


def _print_choices(choices: Sequence[ProductChoice]) -> None:
    """Both times of products of equal sizes, and the form that was chosen."""
    from engines.cusparselt.report import dense_time, sparse_time

    rows = [
        (
            f"{choice.k}x{choice.n} to {choice.output}",
            str(choice.rows),
            *(
                ("none is right" if time is None else f"{time:.1f}")
                for time in (sparse_time(choice), dense_time(choice))
            ),
            choice.form,
        )
        for choice in choices
    ]
    if rows:
        print_table("products, measured when it was built", ("K x N", "rows", "sparse, us", "dense, us", "runs"), rows)


def _label(one: WeightSparsity | Advice, all_rows: Sequence[WeightSparsity | Advice]) -> str:
    """A matrix's name, and the product that reads it where other products read it, too."""
    name = one.name.removesuffix(".weight")
    shared = sum(other.name == one.name for other in all_rows) > 1
    return f"{name} ({one.node})" if shared and one.node else name


def _matrix_row(label: str, matrix: WeightSparsity) -> tuple[str, ...]:
    return (
        label,
        f"{matrix.k}x{matrix.n} {matrix.form}",
        matrix.planned or "-",
        f"{matrix.pattern_float or 'dense'} > {matrix.pattern_int8 or 'dense'}",
        _known(matrix.eligible),
        _known(matrix.chosen),
        (matrix.kernel or "-").split("_tilesize")[0],
        "-" if matrix.saved_ms is None else f"{matrix.saved_ms:.4f}",
        matrix.reason or "-",
    )


def _known(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _print_advice(advice: Sequence[Advice]) -> None:
    if advice:
        rows = [
            (_label(entry, advice), "ready" if entry.ready else "yes" if entry.one_fix_away else "no", entry.advice)
            for entry in advice
        ]
        print_table("advice", ("weight", "one fix away", "what to do"), rows)


def print_latency(report: BenchReport) -> None:
    """Timings with speed-ups, the clock, what was not measured, and the verdict on 2:4 where there is one."""
    speed = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in report.ratios}
    rows = []
    for timing in report.timings:
        ratio = speed.get((timing.name, timing.batch, timing.sequence))
        rows.append(
            (
                timing.name,
                f"{timing.batch}x{timing.sequence}",
                timing.median,
                f"{timing.quartiles[0]:.3g} to {timing.quartiles[1]:.3g}",
                speed_text(ratio.speedup, ratio.interval) if ratio else "reference",
            )
        )
    print_table("latency, milliseconds", ("engine", "batch x sequence", "median", "middle half", "speed"), rows)
    click.echo(f"clock: {report.timings[0].clock}")
    for missing in report.unmeasured:
        click.echo(f"not measured: {missing}")
    if report.verdict:
        click.echo(f"verdict: {report.verdict}")


def print_text_throughput(report: TextReport) -> None:
    """Sentences a second of every engine, by the order of batches."""
    rows = [
        (
            timing.name,
            timing.order,
            f"{timing.padding:.0%}",
            f"{timing.sentences_per_second:.1f}",
            f"{timing.quartiles[0]:.1f} to {timing.quartiles[1]:.1f}",
            f"{timing.without_tokenisation:.1f}",
            "reference"
            if timing.speedup is None or timing.interval is None
            else speed_text(timing.speedup, timing.interval),
        )
        for timing in report.timings
    ]
    columns = ("engine", "order", "padding", "sentences a second", "middle half", "engine alone", "speed")
    print_table(f"{report.sentences} sentences in batches of {report.batch}", columns, rows)
    click.echo(
        f"{report.tokens[0]:.1f} tokens a sentence, at most {report.tokens[1]}; fixed pads to {report.fixed}; "
        f"the tokenizer alone: {report.tokenised_per_second:.0f} sentences a second"
    )


def print_load(report: LoadReport, model: str, rounds: int) -> None:
    """Answers a second and latencies of every server, by the number of clients."""
    columns = ("server", "clients", "answers a second", "lowest to highest", "p50 ms", "p99 ms", "errors")
    rows = [
        (
            result.name,
            result.clients,
            f"{result.throughput:.1f}",
            f"{result.throughput_range[0]:.1f} to {result.throughput_range[1]:.1f}",
            f"{result.p50:.2f}",
            f"{result.p99:.2f}",
            ", ".join(f"{count} x {kind}" for kind, count in result.errors.items()) or "none",
        )
        for result in report.results
    ]
    print_table(f"load on {model}, medians of {rounds} rounds", columns, rows)
