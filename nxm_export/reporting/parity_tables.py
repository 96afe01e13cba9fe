"""The tables of parity: outputs, engines against each other, blocks, probes, gates, and what else a comparison says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nxm_export.reporting.engine_facts import EngineEntry
from nxm_export.reporting.figures import Figure, Key, RunFile
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Cell, Code, PageTable, of, or_dash, pair
from nxm_export.reporting.verdicts import metric

if TYPE_CHECKING:
    from engines.parity.reports import ParityReport

_VERDICTS = {True: "pass", False: "FAIL", None: "does not apply"}
# What the tables above show already of parity.json, and of each of its outputs.
_SHOWN = {
    "passed", "engine", "engine_sha256", "backend", "samples", "metric", "reference_value", "reference_interval",
    "engine_value", "engine_interval", "reason", "failure", "pairs", "secondary_metrics", "probes", "gates",
}  # fmt: skip
_SHOWN_OF_OUTPUT = {
    "output", "max_abs", "mean_abs", "cosine", "agreement", "worst_sample", "max_tolerance", "mean_tolerance",
    "unexcused_flips", "passed", "unchanged_share", "unchanged_required",
}  # fmt: skip
_REST_ROWS = 200  # of one comparison; what is beyond stays in its file


def parity_tables(run: Run) -> Iterator[PageTable]:
    """All of them; one without rows is not shown."""
    compared = [comparison for engine in run.engines for comparison in engine.comparisons]
    yield PageTable(
        "Parity: engine against its own checkpoint in PyTorch, same samples",
        (
            "engine", "output", "#equal argmax", "#max |diff| of tolerated", "#mean |diff| of tolerated",
            "#equal samples", "#cosine", "#flips beyond tolerance", f"#{metric(run)}", "verdict",
        ),
        [row for name, report in compared for row in _outputs(run, name, report)],
    )  # fmt: skip
    yield PageTable(
        "Engines against each other, same samples: two that round differently differ lawfully",
        (
            "engine", "and", "output", "#max |diff|", "#mean |diff|", "#cosine", "#equal argmax",
            f"#{metric(run)}, 95 % paired",
        ),
        list(_pairs(run)),
    )  # fmt: skip
    yield PageTable(
        "Parity by block: the error accumulated so far, and what the block adds by itself, which decides",
        ("engine", "block", "#max |diff| of tolerated", "#isolated max |diff| of tolerated", "verdict"),
        [row for engine in run.engines for row in _blocks(engine)],
    )
    secondary = [
        (
            Code(name),
            of_task,
            or_dash(report.figure("secondary_metrics", of_task, 0), "score"),
            or_dash(report.figure("secondary_metrics", of_task, 1), "score"),
        )
        for name, report in compared
        for of_task in report.content.secondary_metrics
    ]
    yield PageTable("Other metrics of the task", ("engine", "metric", "#checkpoint", "#engine"), secondary)
    yield from _probe_tables([row for name, report in compared for row in _probes(name, report)])
    yield PageTable(
        "Gates that were asked for",
        ("engine", "gate", "#actual", "#limit", "verdict", "what is asked"),
        [row for name, report in compared for row in _gates(name, report)],
    )
    for name, report in compared:
        rest = list(_rest(report))[:_REST_ROWS]
        caption = f"{name}: what else its parity.json says"
        yield PageTable(caption, ("what", "value"), rest, folded=f"{caption} ({len(rest)} values)")


def _outputs(run: Run, name: str, report: RunFile[ParityReport]) -> Iterator[tuple[Cell, ...]]:
    """A row for each output of a comparison, with the summary's numbers where it has them: under the names of engines,
    which a comparison that the run did not make does not stand under."""
    outputs = report.content.outputs
    value = run.figure("parity", name, "value") or report.figure("engine_value")
    for number, output in enumerate(outputs):

        def at(key: str, number: int = number) -> Figure | None:
            return report.figure("outputs", number, key)

        def summed(key: str, number: int = number) -> Figure | None:
            """The summary's number, which is the worst of all outputs: that of an only one."""
            return (run.figure("parity", name, key) if len(outputs) == 1 else None) or at(key, number)

        yield (
            Code(name),
            Code(output.output),
            or_dash(summed("agreement"), "share"),
            of(summed("max_abs"), at("max_tolerance"), "error"),
            of(at("mean_abs"), at("mean_tolerance"), "error"),
            or_dash(at("unchanged_share"), "share"),
            or_dash(at("cosine"), "general"),
            or_dash(at("unexcused_flips"), "general"),
            or_dash(value, "score"),
            "pass" if output.passed else "FAIL",
        )


def _pairs(run: Run) -> Iterator[tuple[Cell, ...]]:
    """Every two engines once, by the comparison of the one that stands first."""
    names = {engine.passport.content.engine_sha256: engine.name for engine in reversed(run.engines) if engine.passport}
    seen: set[tuple[str, str, str]] = set()
    for engine in run.engines:
        report = engine.parity
        for number, entry in enumerate(report.content.pairs if report else ()):
            assert report is not None
            other = names.get(entry.other_sha256, entry.other)
            if (other, engine.name, entry.output) in seen:
                continue
            seen.add((engine.name, other, entry.output))
            yield (
                Code(engine.name),
                Code(other),
                Code(entry.output),
                or_dash(report.figure("pairs", number, "max_abs"), "error"),
                or_dash(report.figure("pairs", number, "mean_abs"), "error"),
                or_dash(report.figure("pairs", number, "cosine"), "general"),
                or_dash(report.figure("pairs", number, "agreement"), "share"),
                pair(
                    report.figure("pairs", number, "difference_interval", 0),
                    report.figure("pairs", number, "difference_interval", 1),
                    "signed",
                ),
            )


def _blocks(engine: EngineEntry) -> Iterator[tuple[Cell, ...]]:
    for number, block in enumerate(engine.blocks):

        def at(key: str, number: int = number) -> Figure | None:
            return engine.bisection.figure("blocks", number, key) if engine.bisection else None

        yield (
            Code(engine.name),
            Code(block.block),
            of(at("accumulated_max_abs"), at("accumulated_max_tolerance"), "error"),
            of(at("isolated_max_abs"), at("isolated_max_tolerance"), "error"),
            {True: "pass", False: "PARTS", None: "not judged"}[block.passed],
        )


def _probe_tables(rows: Sequence[tuple[bool | None, tuple[Cell, ...]]]) -> Iterator[PageTable]:
    """Probes that failed, for all to see, and the others, folded."""
    columns = ("engine", "probe", "#actual", "#tolerated", "verdict", "what is asked")
    yield PageTable("Probes that failed", columns, [row for passed, row in rows if passed is False])
    passing, idle = (sum(passed is verdict for passed, _ in rows) for verdict in (True, None))
    counts = f"{passing} of {len(rows)} pass" + (f", {idle} do not apply" if idle else "")
    rest = [row for passed, row in rows if passed is not False]
    yield PageTable(
        "Probes: inputs that break engines", columns, rest, folded=f"Probes, inputs that break engines: {counts}"
    )


def _probes(name: str, report: RunFile[ParityReport]) -> Iterator[tuple[bool | None, tuple[Cell, ...]]]:
    """(whether it passed, row) of every probe."""
    for number, probe in enumerate(report.content.probes):
        applies = probe.passed is not None
        row: tuple[Cell, ...] = (
            Code(name),
            probe.name,
            or_dash(report.figure("probes", number, "actual"), "error") if applies else "-",
            or_dash(report.figure("probes", number, "tolerated"), "error") if applies else "-",
            _VERDICTS[probe.passed],
            probe.reason,
        )
        yield probe.passed, row


def _gates(name: str, report: RunFile[ParityReport]) -> Iterator[tuple[Cell, ...]]:
    for number, gate in enumerate(report.content.gates):
        yield (
            Code(name),
            gate.gate,
            or_dash(report.figure("gates", number, "actual"), "error"),
            or_dash(report.figure("gates", number, "limit"), "error"),
            _VERDICTS[gate.passed],
            gate.reason,
        )


def _rest(report: RunFile[ParityReport]) -> Iterator[tuple[Cell, Cell]]:
    """What a comparison says beyond what the tables above have, named by path."""
    for keys, figure in report.figures():
        if not _is_shown(keys):
            yield Code(".".join(map(str, keys))), figure.shown("general")


def _is_shown(keys: tuple[Key, ...]) -> bool:
    return keys[0] in _SHOWN or (keys[0] == "outputs" and keys[2] in _SHOWN_OF_OUTPUT)
