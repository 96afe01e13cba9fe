"""What `nxm doctor`, `nxm inspect` and `nxm verify` print about matrices: the verdict, then the matrices, equal ones in
one row; with ``--all`` every one."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from nxm_export.cli.folding import Row, counted, folded, shortened
from nxm_export.cli.output import print_next, quoted
from nxm_export.cli.tables import GAP, print_rows, print_table, terminal_width

if TYPE_CHECKING:
    from engines.sparsity.advice import Advice
    from engines.sparsity.sparsity_report import SparsityReport, WeightSparsity
    from nxm_export.contract.records.matrix_facts import UnreadProduct
    from nxm_export.contract.records.verify_report import VerifyReport
    from nxm_export.pipeline.file_diagnosis import FileDiagnosis

# How much of a kind is shown without --all, so that the whole stays on one screen.
ROWS, FIXES, PROBLEMS = 5, 2, 2


def print_diagnosis(diagnosis: FileDiagnosis, everything: bool = False) -> None:
    """What `nxm doctor` reports about a file."""
    report, advice = diagnosis.sparsity, diagnosis.advice
    target = report.target
    click.echo(
        f"{diagnosis.file} for {target.backend} {target.version} on compute capability {target.compute_capability}"
    )
    _echo(f"{_readiness(diagnosis)}.", everything)
    if diagnosis.parsed is not None:
        verdict = "takes it, which proves no sparse kernel" if diagnosis.parsed.accepted else "refuses it"
        warnings = len(diagnosis.parsed.warnings)
        more = f", with {warnings} warnings: --all" if warnings and not everything else ""
        click.echo(f"{diagnosis.parsed.parser}'s parser {verdict}{more}")
    click.echo()
    if everything:
        print_all_matrices(report)
        _print_all_advice(advice)
    else:
        _print_folded(report.weights)
        click.echo(str(report.products))
        _print_unread(report.unread)
        if advice:
            click.echo()
            texts = Counter(entry.advice for entry in advice).most_common()
            _print_some([f"{count} x {text}" for text, count in texts], "to do", FIXES)
    _print_some(diagnosis.problems, "problem", len(diagnosis.problems) if everything else PROBLEMS)
    for warning in diagnosis.parsed.warnings if diagnosis.parsed is not None and everything else ():
        click.echo(f"it warns: {warning}")
    file = quoted(diagnosis.file)
    if diagnosis.problems:
        print_next(f"nxm verify {file}", "what is wrong with it")
    elif any(weight.ready for weight in report.weights):
        print_next(f"nxm build {file} --backend {target.backend} --out engine", "on the GPU")
    elif not everything:
        print_next(f"nxm doctor {file} --all", "every matrix, and all advice")


def _readiness(diagnosis: FileDiagnosis) -> str:
    """The verdict of `nxm doctor` on a file, in a sentence without its stop."""
    weights, advice = diagnosis.sparsity.weights, diagnosis.advice
    why = counted([weight.outcome for weight in weights]) or "no products with weights"
    ready, near = sum(weight.ready for weight in weights), sum(entry.one_fix_away for entry in advice)
    away = f"; {near} are one fix away" if near else ""
    if diagnosis.problems:
        count = len(diagnosis.problems)
        return f"refused: {count} problem{'s' if count != 1 else ''} to mend first ({why}{away})"
    if ready:
        return f"ready: {ready} of {len(weights)} matrices; the engine says whether sparse kernels run ({why}{away})"
    return f"not ready: none of {len(weights)} matrices ({why}{away})"


def print_sparsity(report: SparsityReport, everything: bool = False) -> None:
    """What `nxm inspect` reports about the matrices of an engine."""
    share = report.sparse_share
    proven = "nothing was planned sparse" if share is None else f"{share:.1%} of the planned-sparse weights"
    why = counted([weight.outcome for weight in report.weights])
    _echo(f"proven to run sparse: {proven} ({why})", everything)
    click.echo()
    if everything:
        print_all_matrices(report)
        return
    _print_folded(report.weights)
    click.echo(str(report.products))
    _print_unread(report.unread)
    details = {weight.reason: weight.detail for weight in report.weights if weight.reason}
    _print_some([f"{reason}: {detail}" for reason, detail in details.items()], "", FIXES)


def _print_folded(weights: Sequence[WeightSparsity]) -> None:
    columns = ("matrices", "n", "K x N", "planned", "stored", "why not sparse")
    _print_groups(columns, [weight.name for weight in weights], [_short_row(weight) for weight in weights])


def _short_row(weight: WeightSparsity) -> Row:
    return (
        f"{weight.k}x{weight.n}",
        weight.planned or "-",
        _pattern(weight),
        f"it is: {shortened(weight.kernel or 'sparse', 22)}" if weight.chosen is True else weight.outcome,
    )


def _pattern(weight: WeightSparsity) -> str:
    """The N:M of the floats, and that of the integers where it is another one."""
    floats, integers = weight.pattern_float or "dense", weight.pattern_int8 or "dense"
    return floats if floats == integers else f"{floats} > {integers}"


def _print_groups(columns: Row, names: Sequence[str], rows: Sequence[Row]) -> None:
    """A table of the largest groups of equal rows, a line each, as wide as the terminal; of no rows, nothing."""
    if not rows:
        return
    groups = folded([name.removesuffix(".weight") for name in names], rows)
    shown = groups[:ROWS]
    others = [(str(count), *row) for _, count, row in shown]
    widths = [max(len(columns[place + 1]), *(len(row[place]) for row in others)) for place in range(len(columns) - 1)]
    room = max(12, terminal_width() - sum(widths) - GAP * len(widths))
    print_rows(columns, [(shortened(name, room), *row) for (name, _, _), row in zip(shown, others, strict=True)])
    if len(groups) > len(shown):
        rest = sum(count for _, count, _ in groups[len(shown) :])
        click.echo(f"and {rest} more in {len(groups) - len(shown)} rows: --all")


def _print_some(texts: Sequence[str], word: str, limit: int) -> None:
    """The first texts, each in two lines at most unless all are shown, and how many more there are."""
    for text in texts[:limit]:
        _echo(f"{word}: {text}" if word else text, everything=limit >= len(texts) > FIXES)
    if len(texts) > limit:
        click.echo(f"and {len(texts) - limit} more{f' ({word})' if word else ''}: --all")


def _print_unread(unread: Sequence[UnreadProduct]) -> None:
    """The first product that was not read, with the reason, and how many more there are."""
    if unread:
        click.echo(shortened(f"not read: {unread[0]}", terminal_width()))
    if len(unread) > 1:
        click.echo(f"and {len(unread) - 1} more not read: --all")


def _echo(text: str, everything: bool) -> None:
    """A text in lines of the terminal's width: two, unless it is shown whole."""
    width = terminal_width()
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False)
    if len(lines) > 2 and not everything:
        lines = [lines[0], shortened(f"{lines[1]} {lines[2].strip()}", width)]
        lines[1] = lines[1] if lines[1].endswith("...") else f"{lines[1][: width - 3]}..."
    click.echo("\n".join(lines))


def print_all_matrices(report: SparsityReport) -> None:
    """Every matrix in a row of its own, then what the reasons mean."""
    columns = ("weight", "K x N", "planned", "float > INT8", "eligible", "sparse", "kernel", "saved ms", "why not")
    print_table("weights", columns, [_matrix_row(_label(matrix, report.weights), matrix) for matrix in report.weights])
    click.echo(str(report.products))
    for product in report.unread:
        click.echo(f"not read: {product}")
    for reason, detail in {matrix.reason: matrix.detail for matrix in report.weights if matrix.reason}.items():
        click.echo(f"{reason}: {detail}")
    for hint in dict.fromkeys(matrix.hint for matrix in report.weights if matrix.hint):
        click.echo(f"hint: {hint}")


def _label(one: WeightSparsity | Advice, all_rows: Sequence[WeightSparsity | Advice]) -> str:
    """A matrix's name, and the product that reads it where other products read it, too."""
    name = one.name.removesuffix(".weight")
    shared = sum(other.name == one.name for other in all_rows) > 1
    return f"{name} ({one.node})" if shared and one.node else name


def _matrix_row(label: str, matrix: WeightSparsity) -> Row:
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


def _print_all_advice(advice: Sequence[Advice]) -> None:
    if advice:
        rows = [
            (_label(entry, advice), "ready" if entry.ready else "yes" if entry.one_fix_away else "no", entry.advice)
            for entry in advice
        ]
        print_table("advice", ("weight", "one fix away", "what to do"), rows)


def print_verification(title: str, report: VerifyReport, everything: bool = False) -> None:
    """What `nxm verify` found in a file."""
    problems = report.all_problems
    click.echo(title)
    click.echo(
        f"{f'{len(problems)} problems' if problems else 'no problem found'}: {report.products}; "
        f"{report.quantize_nodes} Q and {report.dequantize_nodes} DQ nodes"
    )
    if report.embedding:
        tokens, features = report.embedding
        click.echo(f"word-embedding table: INT8, {tokens}x{features}, one scale per row")
    click.echo()
    columns = ("op", "K x N", "stored", "scales", "N:M", "planned")
    rows = [
        (
            weight.op,
            f"{weight.k}x{weight.n}",
            weight.stored,
            f"per {weight.scale_axis}" if weight.scale_axis else "none",
            weight.pattern or "dense",
            weight.planned or "",
        )
        for weight in report.weights
    ]
    if everything:
        whole = zip(report.labels, rows, report.weights, strict=True)
        print_table(
            "weights",
            ("weight", *columns, "zeros"),
            [(label.removesuffix(".weight"), *row, f"{weight.zeros:.1%}") for label, row, weight in whole],
        )
    else:
        _print_groups(("matrices", "n", *columns), report.labels, rows)
    if everything:
        _print_some([str(product) for product in report.unread], "not read", len(report.unread))
    else:
        _print_unread(report.unread)
    _print_some(problems, "problem", len(problems) if everything else ROWS)
    if report.passed:
        print_next(f"nxm build {quoted(title)} --backend auto --out engine")
    else:
        print_next(f"nxm doctor {quoted(title)}", "what to do about it")
