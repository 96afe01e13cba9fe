"""Tables of comparisons: an engine against its checkpoint, engines against each other, and block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.cli.tables import print_rows, print_table, score_text, share_text

if TYPE_CHECKING:
    from engines.parity.bisect_reports import BisectReport
    from engines.parity.decisions import Flip, Pair
    from engines.parity.reports import Comparison, NotCompared, ParityReport
    from engines.parity.tolerance import OutputParity

_VERDICTS = {True: "pass", False: "FAIL", None: "does not apply"}


def print_comparison(comparison: Comparison, everything: bool = False) -> None:
    """The verdict on every engine, outputs, probes and gates, then the engines in pairs, and those without a report.
    Probes that pass are counted, and outputs that pass are a row each where there are several engines, unless
    `everything` is asked for."""
    for report in comparison.reports:
        print(_verdict(report))
    together = len(comparison.reports) > 1 and not everything
    if together:
        _print_together(comparison.reports)
    for report in comparison.reports:
        for output in report.outputs:
            if not (together and output.passed):
                _print_output(report, output)
        _print_checks(report, everything, counted=not together)
        if everything:
            print(f"tolerance: {report.reason}")
    _print_pairs(comparison.reports, everything)
    _print_without_report(comparison.without_report)


def _print_together(reports: Sequence[ParityReport]) -> None:
    """A row for every output of every engine."""
    names = _short_names(reports)
    rows = [
        (
            names[report.engine],
            output.output,
            f"{_error(output.max_abs)} of {output.max_tolerance:.3g}",
            share_text(output.agreement),
            score_text(report.engine_value),
            f"{sum(passed is True for passed in checks)} of {len(checks)}",
        )
        for report in reports
        for checks in [[*(probe.passed for probe in report.probes), *(gate.passed for gate in report.gates)]]
        for output in report.outputs
    ]
    print()
    print_rows(("engine", "output", "max |diff|", "equal argmax", reports[0].metric, "checks pass"), rows)
    values = dict.fromkeys(f"{report.metric} {score_text(report.reference_value)}" for report in reports)
    print(f"in PyTorch the checkpoint has {', '.join(values)}; every number: --all")


def _short_names(reports: Sequence[ParityReport]) -> dict[str, str]:
    """The last part of each engine's path, if that tells all of them apart."""
    paths = [report.engine for report in reports]
    short = [Path(path).name for path in paths]
    return dict(zip(paths, short if len(set(short)) == len(set(paths)) else paths, strict=True))


def _print_output(report: ParityReport, output: OutputParity) -> None:
    steps = "" if output.max_steps is None else f", {output.max_steps:.2f} steps"
    mean_steps = "" if output.mean_steps is None else f", {output.mean_steps:.3f} steps"
    rows: list[tuple[str, object, str]] = [
        ("largest |difference|", f"{_error(output.max_abs)}{steps}", f"at most {output.max_tolerance:.4g}"),
        ("mean |difference|", f"{_error(output.mean_abs)}{mean_steps}", f"at most {output.mean_tolerance:.4g}"),
        ("equal samples", f"{output.unchanged_share:.1%}", f"at least {output.unchanged_required:.1%}"),
        ("cosine", "-" if output.cosine is None else f"{output.cosine:.8f}", ""),
        ("NaN or infinity", output.nonfinite, "none"),
        ("equal argmax", share_text(output.agreement), ""),
        ("changes not excused", output.unexcused_flips, "none"),
        *[
            (
                "changed class",
                f"sample {flip.sample}: {flip.reference} to {flip.engine}",
                f"margin {_margin(flip)}, {'excused' if flip.excused else 'NOT excused'}",
            )
            for flip in output.worst_flips
        ],
        ("worst sample", output.worst_sample, ""),
        (
            f"{report.metric}, 95 %",
            f"{score_text(report.engine_value)}{_bounds(report.engine_interval)}",
            f"checkpoint {score_text(report.reference_value)}",
        ),
        *[
            (name, score_text(ours), f"checkpoint {score_text(theirs)}")
            for name, (theirs, ours) in report.secondary_metrics.items()
        ],
        ("difference, 95 %", _difference(report), ""),
        ("verdict", "pass" if output.passed else "FAIL", ""),
    ]
    title = f"{report.engine}: {output.output} of {report.samples} samples against the checkpoint in PyTorch"
    print_table(title, ("what", "actual", "required"), rows)


def _verdict(report: ParityReport) -> str:
    """Whether an engine is its checkpoint, in a line."""
    if report.passed:
        return f"pass: {report.engine} computes what its checkpoint computes, on {report.samples} samples"
    failed = [f"output {output.output}" for output in report.outputs if not output.passed]
    failed += [f"probe {probe.name}" for probe in report.probes if probe.passed is False]
    failed += [f"gate {gate.gate}" for gate in report.gates if not gate.passed]
    return f"FAIL: {report.engine} on {report.samples} samples: {', '.join(failed)}"


def _print_checks(report: ParityReport, everything: bool, *, counted: bool) -> None:
    probes = [probe for probe in report.probes if everything or not probe.passed]
    if (passing := len(report.probes) - len(probes)) and counted:
        print(f"probes: {passing} pass")
    rows = [
        (
            check.name,
            _VERDICTS[check.passed],
            "" if check.actual is None else f"{check.actual:.4g}, at most {check.tolerated:.4g}",
            check.reason,
        )
        for check in probes
    ]
    gates = [gate for gate in report.gates if counted or everything or not gate.passed]
    rows += [(f"gate {gate.gate}", _VERDICTS[gate.passed], "", gate.reason) for gate in gates]
    if rows:
        print_table(f"{report.engine}: probes and gates", ("what", "verdict", "actual", "about"), rows)


def _print_pairs(reports: Sequence[ParityReport], everything: bool) -> None:
    """Every two engines once; nothing for a single engine. Mean and cosine are shown where `everything` is."""
    names = _short_names(reports)
    rows = [
        (
            names[report.engine],
            names[pair.other],
            pair.output,
            _error(pair.max_abs),
            *([_error(pair.mean_abs), "-" if pair.cosine is None else f"{pair.cosine:.6f}"] if everything else []),
            share_text(pair.agreement),
            _difference(pair),
        )
        for number, report in enumerate(reports)
        for pair in report.pairs
        if pair.other in [later.engine for later in reports[number + 1 :]]
    ]
    if rows:
        more = ("mean", "cosine") if everything else ()
        columns = ("engine", "and", "output", "max |diff|", *more, "equal argmax", "metric difference, 95 %")
        print("\nengines against each other")
        print_rows(columns, rows)


def _print_without_report(engines: Sequence[NotCompared]) -> None:
    for failed, title in ((True, "FAILED when they ran"), (False, "skipped: not run here, so not compared")):
        rows = [(engine.engine, engine.backend, engine.reason) for engine in engines if engine.failed is failed]
        if rows:
            print_table(title, ("engine", "backend", "why"), rows)


def print_bisects(reports: Sequence[BisectReport]) -> None:
    """The blocks of every engine, and what the comparison says about the engine that was built for it."""
    for report in reports:
        _print_bisect(report)


def _print_bisect(report: BisectReport) -> None:
    rows = [
        (
            block.block,
            _error(block.accumulated_max_abs),
            _steps_text(block.accumulated_steps),
            _error(block.isolated_max_abs),
            _steps_text(block.isolated_steps),
            f"{block.isolated_unchanged_share:.1%}",
            {True: "pass", False: "PARTS", None: "not judged"}[block.passed],
            "" if block.passed else block.reason,
        )
        for block in report.blocks
    ]
    first = report.first_diverging
    if first:
        print(f"FAIL: {report.engine} parts from its checkpoint: {first}")
    elif report.outputs_problem is not None:
        print(f"FAIL: what was looked at in place of {report.engine} is not the engine: {report.outputs_problem}")
    else:
        near = "" if report.outputs_equal else ", in a copy whose outputs are those of the engine but for rounding"
        print(f"pass: no block of {report.engine} parts{near}")
    columns = ("behind", "accumulated max", "steps", "isolated max", "steps", "tokens equal", "verdict", "why")
    print_table(f"{report.engine}: {report.tokens} tokens against the checkpoint, block by block", columns, rows)
    print(f"tolerance: {report.reason}")
    if report.kernels is None:
        print("whether block outputs changed kernels is not known for this backend")
    else:
        changed = ", ".join(f"{name} {before} to {after}" for name, (before, after) in report.kernels.items())
        print(f"kernels changed by block outputs: {changed or 'none'}")
    equal = "yes" if report.outputs_equal else "NO"
    print(f"outputs of the engine with block outputs equal the engine's bit for bit: {equal}")


def _steps_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    """An error; NaN and infinity leave none."""
    return "not finite" if value is None else f"{value:.4g}"


def _margin(flip: Flip) -> str:
    return "without a rival" if flip.margin is None else f"{flip.margin:.4g}"


def _difference(of: ParityReport | Pair) -> str:
    """A metric's difference with its interval."""
    return "NaN" if of.difference is None else f"{of.difference:+.4f}{_bounds(of.difference_interval, '+.4f')}"


def _bounds(interval: tuple[float, float] | None, form: str = ".4f") -> str:
    """An interval in brackets; too few samples have none."""
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"
