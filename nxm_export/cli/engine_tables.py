"""Tables of engines: how they were built, what is in them, and how fast they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nxm_export.cli import first_lines
from nxm_export.cli.folding import counted, shortened
from nxm_export.cli.output import print_next, quoted
from nxm_export.cli.sparsity_tables import print_sparsity
from nxm_export.cli.tables import busy_note, print_facts, print_rows, print_table, speed_text
from nxm_export.contract.token_budget import THREAD_BATCH_TOKENS

if TYPE_CHECKING:
    from engines.benchmark.fastest_backend import Choice
    from engines.benchmark.http_load import LoadReport
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from engines.cusparselt.program import Choice as ProductChoice
    from engines.sparsity.sparsity_report import SparsityReport
    from nxm_export.contract.records.latency_table import LatencyTable
    from nxm_export.pipeline.inspection import EngineInspection, GraphFacts, Inspection

# What `nxm inspect` shows without --all: no hashes and names of formats, notes of a graph as long as two lines.
_UNASKED_METRICS = {
    "schema",
    "kind",
    "mask_hash",
    "qat_steps",
    "held_out_samples",
    "average",
    "distance_measure",
    "dev_labelled",
}
_IN_FIRST_LINE = ("model_type", "task", "weight_bytes")  # of a checkpoint
_UNASKED_NOTES = ("nxm.schema", "nxm.weights", "nxm.gelu", "nxm.lowering", "nxm.precision_overrides")
_NOTE, _NOTES = 100, 6


def print_machine(facts: Mapping[str, str], everything: bool) -> None:
    """Every fact of a machine; without `everything` the version of the first package alone, of what is ready."""
    rows = [
        (what, said if everything or not said.startswith("ready: ") else re.sub(r", .*?(?=$| \()", "", said))
        for what, said in facts.items()
    ]
    print_rows(("this machine", ""), rows)


def print_choice(choice: Choice, facts: Mapping[str, object]) -> None:
    """The candidates' timings, which was kept and why, then the facts of its passport."""
    shapes = [f"{batch}x{sequence}, ms" for batch, sequence in choice.shapes]
    rows = [
        (
            candidate.backend,
            *(f"{value:.3g}" for value in candidate.latency_ms),
            f"{candidate.speedup:.2f}x (paired)" if number else "reference",
        )
        for number, candidate in enumerate(choice.candidates)
    ]
    click.echo(f"kept {choice.backend}: {choice.why}")
    print_table("candidates, medians of interleaved rounds", ("backend", *shapes, "speed"), rows)
    for name, why in choice.left_out.items():
        click.echo(f"left out: {name}: {why}")
    print_built(facts)


def print_built(facts: Mapping[str, object], *, twins: bool = False) -> None:
    """What a build made: the parts of the passport that people ask for; ``--json`` and the file have all of it."""
    click.echo(first_lines.of_build(facts, twins=twins))
    print_facts("built", facts if twins else _told(facts))
    path = quoted(facts["path"])
    print_next(f"nxm bench {path}" if twins else f"nxm compare {path} --data DEV")


def _told(facts: Mapping[str, object]) -> dict[str, object]:
    """What people ask of a passport: no hashes, and nothing that the first line says."""
    told = {key: facts[key] for key in ("engine", "graph", "plan", "profiles", "requires") if facts.get(key)}
    for part, kept in (("graph", ("task", "target", "placement")), ("plan", ("options", "compression"))):
        if isinstance(facts_of := told.get(part), Mapping):
            told[part] = {key: facts_of[key] for key in kept if key in facts_of}
    return told


def print_inspection(title: str, facts: Inspection, everything: bool = False) -> None:
    """What `nxm inspect` found: a table of facts, and one of the matrices where sparse kernels are known; of a run,
    those of every engine."""
    from nxm_export.pipeline.inspection import CheckpointFacts, EngineInspection, GraphFacts

    path = quoted(title)
    if isinstance(facts, GraphFacts):
        click.echo(first_lines.of_graph(facts))
        _print_graph(title, facts, everything)
        print_next(f"nxm doctor {path}", "which of its matrices can run sparse")
    elif isinstance(facts, CheckpointFacts):
        click.echo(first_lines.of_checkpoint(facts))
        known = {key: value for key, value in facts.metrics.items() if value is not None}
        metrics = {key: value for key, value in known.items() if everything or key not in _UNASKED_METRICS}
        told = {key: fact for key, fact in facts.to_dict().items() if everything or key not in _IN_FIRST_LINE}
        print_facts(title, {**told, "metrics": metrics})
        print_next(f"nxm export {path} --out graph")
    elif isinstance(facts, EngineInspection):
        _print_engine(title, facts, everything)
        print_next(f"nxm bench {path}")
    elif everything:
        for name, engine in facts.engines.items():
            _print_engine(f"{title}: {name}", engine, everything)
        print_next(f"nxm show {path}")
    else:
        _print_engines(facts.engines)
        if facts.engines:
            print_next(
                f"nxm inspect {quoted(Path(title) / 'engines' / next(iter(facts.engines)))}", "what one is made of"
            )


def _print_graph(title: str, facts: GraphFacts, everything: bool) -> None:
    """Every fact of a graph in a row of its own; without `everything` operators in one, and no hashes."""
    if everything:
        print_facts(title, facts.to_dict())
        return
    noted = {key: shortened(value, _NOTE) for key, value in facts.metadata.items() if key not in _UNASKED_NOTES}
    rows = [(key, facts.to_dict()[key]) for key in ("opset", "inputs", "outputs", "operators")]
    print_table(title, ("what", "value"), [*rows, *list(noted.items())[:_NOTES]])
    if len(noted) > _NOTES:
        click.echo(f"and {len(noted) - _NOTES} more: --all")


def _print_engines(engines: Mapping[str, EngineInspection]) -> None:
    """A row for each engine, and of those with sparse kernels how much is proven."""
    click.echo(f"{len(engines)} engines.\n" if len(engines) != 1 else "1 engine.\n")
    rows = [
        (
            name,
            engine.passport.backend,
            engine.facts.to_dict().get("integer_products"),
            "no sparse kernels" if engine.sparsity is None else _proven(engine.sparsity),
        )
        for name, engine in engines.items()
    ]
    print_rows(("engine", "backend", "INT8 products", "2:4"), rows)


def _proven(report: SparsityReport) -> str:
    share = report.sparse_share
    why = counted([weight.outcome for weight in report.weights])
    return f"nothing was planned sparse ({why})" if share is None else f"{share:.1%} proven to run sparse ({why})"


def _print_engine(title: str, facts: EngineInspection, everything: bool) -> None:
    from engines.cusparselt.backend import CusparseltFacts
    from engines.openvino.backend import OpenVinoFacts

    click.echo(first_lines.of_engine(facts))
    _print_facts(title, facts.to_dict())
    if facts.sparsity is not None:
        print_sparsity(facts.sparsity, everything)
    if isinstance(facts.facts, CusparseltFacts):
        _print_choices(facts.facts.choices)
    if isinstance(facts.facts, OpenVinoFacts) and facts.facts.shapes:
        rows = [
            (f"{shape.batch}x{shape.sequence}", str(shape.integer_products), str(shape.layers))
            for shape in facts.facts.shapes
        ]
        print_table("compiled shapes", ("batch x length", "integer products", "layers"), rows)


def _print_facts(title: str, facts: Mapping[str, object]) -> None:
    apart = (
        "weights",
        "passport",
        "schema",
        "counts",
        "products",
        "unread",
        "sparse_share",
        "choices",
        "profiled",
        "shapes",
    )
    rows = [(key, value) for key, value in facts.items() if key not in apart]
    print_table(title, ("what", "value"), rows)


def _print_choices(choices: Sequence[ProductChoice]) -> None:
    """Both times of products of equal sizes, and the form that was chosen."""
    from engines.cusparselt.report import dense_form, in_words, sparse_form

    rows = [
        (
            f"{choice.k}x{choice.n} to {choice.output}",
            str(choice.rows),
            in_words(sparse_form(choice)),
            in_words(dense_form(choice)),
            choice.form,
        )
        for choice in choices
    ]
    if rows:
        print_table("products, measured when it was built", ("K x N", "rows", "sparse, us", "dense, us", "runs"), rows)


def print_latency(report: BenchReport) -> None:
    """The verdict, then timings with speeds, the clock and what was not measured."""
    click.echo(f"{report.verdict or first_lines.of_bench(report)}\n")
    medians = {(timing.name, timing.batch, timing.sequence): timing.median for timing in report.timings}
    ratios = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in report.ratios}
    for batch, sequence in dict.fromkeys((timing.batch, timing.sequence) for timing in report.timings):
        rows = []
        for timing in report.timings:
            if (timing.batch, timing.sequence) != (batch, sequence):
                continue
            ratio = ratios.get((timing.name, batch, sequence))
            speed = "reference" if timing.name == report.reference else "not compared"
            if ratio is not None:
                speed = speed_text(medians[ratio.reference, batch, sequence] / timing.median, ratio.interval)
            tail = (timing.p95, timing.p99)
            rows.append((timing.name, timing.median, *tail, f"{timing.samples_per_second:.0f}", speed))
        click.echo(f"batch {batch} x {sequence} tokens, milliseconds of {report.timings[0].rounds} rounds")
        print_rows(("engine", "median", "p95", "p99", "sentences/s", "speed, 95 %"), rows)
        click.echo()
    click.echo(f"clock: {report.timings[0].clock}")
    if any(timing.queued is not None for timing in report.timings):
        click.echo("sentences/s: of runs in a queue, each launched before the last has ended")
    if one_by_one := dict.fromkeys(timing.name for timing in report.timings if timing.launches_graph is False):
        click.echo(f"launched kernel by kernel, not as a CUDA graph: {', '.join(one_by_one)}")
    if note := busy_note([timing.quartiles for timing in report.timings]):
        click.echo(note)
    for missing in report.unmeasured:
        click.echo(f"not measured: {missing}")


def print_text_throughput(report: TextReport) -> None:
    """Sentences a second of every engine, by the order of batches."""
    arrival = {timing.name: timing.sentences_per_second for timing in report.timings if timing.order == "arrival"}
    rows = [
        (
            timing.name,
            timing.order,
            f"{timing.padding:.0%}",
            f"{timing.sentences_per_second:.1f}",
            f"{timing.quartiles[0]:.1f} to {timing.quartiles[1]:.1f}",
            f"{timing.without_tokenisation:.1f}",
            "reference"
            if timing.interval is None
            else speed_text(timing.sentences_per_second / arrival[timing.name], timing.interval),
        )
        for timing in report.timings
    ]
    columns = ("engine", "order", "padding", "sentences a second", "middle half", "engine alone", "speed")
    click.echo(first_lines.of_text(report))
    print_table(f"{report.sentences} sentences in batches of {report.batch}", columns, rows)
    click.echo(
        f"{report.tokens[0]:.1f} tokens a sentence, at most {report.tokens[1]}; fixed pads to {report.fixed}; "
        f"throughput runs {report.runs_at_once} batches at once, of at most {THREAD_BATCH_TOKENS} tokens; "
        f"the tokenizer alone: {report.tokenised_per_second:.0f} sentences a second"
    )


def print_load(report: LoadReport, model: str, rounds: int) -> None:
    """Answers a second and latencies of every server, by the number of clients."""
    columns = ("server", "clients", "answers a second", "lowest to highest", "p50 ms", "p95 ms", "p99 ms", "errors")
    rows = [
        (
            result.name,
            result.clients,
            f"{result.throughput:.1f}",
            f"{result.throughput_range[0]:.1f} to {result.throughput_range[1]:.1f}",
            f"{result.p50:.2f}",
            f"{result.p95:.2f}",
            f"{result.p99:.2f}",
            ", ".join(f"{count} x {kind}" for kind, count in result.errors.items()) or "none",
        )
        for result in report.results
    ]
    click.echo(first_lines.of_load(report))
    print_table(f"load on {model}, medians of {rounds} rounds", columns, rows)


def print_latency_table(table: LatencyTable, title: str) -> None:
    """Milliseconds of a matrix by role and option, and where they are from."""
    options = list(dict.fromkeys(option for row in table.milliseconds.values() for option in row))
    rows = [(role, *(row.get(option) for option in options)) for role, row in table.milliseconds.items()]
    click.echo(f"Milliseconds of one matrix: {table.source}.")
    print_table(title, ("role", *options), rows)
