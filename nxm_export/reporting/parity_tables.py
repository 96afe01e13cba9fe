"""The tables of parity: outputs, engines against each other, blocks, probes, gates, and what else a comparison says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nxm_export.reporting.figures import Figure, Source
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Cell, Code, Table, or_dash, pair
from nxm_export.reporting.verdicts import Piece, metric

_KNOWN_PARITY = {
    "schema", "passed", "engine", "engine_sha256", "backend", "samples", "outputs", "metric", "reference_value",
    "reference_interval", "engine_value", "engine_interval", "reason", "pairs", "secondary_metrics",
}  # fmt: skip
_VERDICTS = {True: "pass", False: "FAIL", None: "does not apply"}
_KNOWN_OUTPUT = {
    "output", "max_abs", "mean_abs", "cosine", "agreement", "worst_sample", "max_tolerance", "mean_tolerance",
    "unexcused_flips", "passed", "unchanged_share", "unchanged_required", "nonfinite",
}  # fmt: skip
_EXTRA_ROWS = 200  # of one comparison; what is beyond stays in its file


def parity_tables(run: Run) -> Iterator[Table]:
    """All of them; one without rows is not shown."""
    rows: list[tuple[Cell, ...]] = []
    for engine in run.engines:
        report = engine.parity
        outputs = report.at("outputs") if report else None
        if report is None or outputs is None:
            continue
        for number in range(len(outputs.value) if isinstance(outputs.value, list) else 0):
            only = len(outputs.value) == 1  # a summary has one number for all outputs

            def at(
                key: str,
                kind: str,
                number: int = number,
                report: Source = report,
                only: bool = only,
                name: str = engine.name,
            ) -> Cell:
                return or_dash(
                    (run.figure("parity", name, key) if only else None) or report.at("outputs", number, key), kind
                )

            value = run.figure("parity", engine.name, "value") or report.at("engine_value")
            passed = report.at("outputs", number, "passed")
            rows.append(
                (
                    Code(engine.name),
                    Code(str(report.data["outputs"][number].get("output"))),
                    at("agreement", "share"),
                    (at("max_abs", "error"), " of ", at("max_tolerance", "error")),  # type: ignore[arg-type]
                    (at("mean_abs", "error"), " of ", at("mean_tolerance", "error")),  # type: ignore[arg-type]
                    at("unchanged_share", "share"),
                    at("cosine", "general"),
                    at("unexcused_flips", "general"),
                    or_dash(value, "score"),
                    "pass" if passed and passed.value is True else "FAIL",
                )
            )
    columns = ("engine", "output", "#equal argmax", "#max |diff| of tolerated", "#mean |diff| of tolerated", "#equal samples", "#cosine", "#flips beyond tolerance", f"#{metric(run)}", "verdict")  # fmt: skip
    yield Table("Parity: engine against its own checkpoint in PyTorch, same samples", columns, rows)
    yield Table(
        "Engines against each other, same samples: two that round differently differ lawfully",
        ("engine", "and", "output", "#max |diff|", "#mean |diff|", "#cosine", "#equal argmax", f"#{metric(run)}, 95 % paired"),
        list(_pairs(run)),
    )  # fmt: skip
    blocks = [
        (
            Code(engine.name),
            Code(block.block),
            (block.max_abs.shown("error"), " of ", _piece(block.tolerance)),
            (_piece(block.own), " of ", _piece(block.own_tolerance)) if block.own else "-",
            {True: "pass", False: "PARTS", None: "not judged"}[block.passed] if block.own else "-",
        )
        for engine in run.engines
        for block in engine.blocks
    ]
    yield Table(
        "Parity by block: the accumulated error, and the isolated one of the block itself, which decides",
        ("engine", "block", "#max |diff| of tolerated", "#isolated max |diff| of tolerated", "verdict"),
        blocks,
    )
    beside = [
        (
            Code(engine.name),
            name,
            or_dash(engine.parity.at("secondary_metrics", name, 0), "score"),
            or_dash(engine.parity.at("secondary_metrics", name, 1), "score"),
        )
        for engine in run.engines
        if engine.parity
        for name in (engine.parity.data.get("secondary_metrics") or {})
    ]
    yield Table("Other metrics of the task", ("engine", "metric", "#checkpoint", "#engine"), beside)
    for caption, key, name, limit in (
        ("Probes: inputs that break engines", "probes", "name", "tolerated"),
        ("Gates that were asked for", "gates", "gate", "limit"),
    ):
        titles = ("engine", key.removesuffix("s"), "#found", f"#{limit}", "verdict", "what is asked")
        yield Table(caption, titles, list(_checks(run, key, name, limit)))
    for engine in run.engines:
        extra = list(_extra(engine.parity))[:_EXTRA_ROWS] if engine.parity else []
        yield Table(f"{engine.name}: what else its parity.json says", ("what", "found"), extra)


def _piece(figure: Figure | None) -> Piece:
    return figure.shown("error") if figure else "-"


def _pairs(run: Run) -> Iterator[tuple[Cell, ...]]:
    """Every two engines once, by the comparison of the one that stands first."""
    names = {engine.passport.data["engine_sha256"]: engine.name for engine in reversed(run.engines) if engine.passport}
    seen: set[tuple[str, ...]] = set()
    for engine in run.engines:
        report = engine.parity
        entries = report.data.get("pairs") if report is not None else None
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            assert report is not None
            other = names.get(entry.get("other_sha256"), entry["other"])
            if (other, engine.name, entry["output"]) in seen:
                continue
            seen.add((engine.name, other, entry["output"]))
            yield (
                Code(engine.name),
                Code(other),
                Code(entry["output"]),
                or_dash(report.at("pairs", number, "max_abs"), "error"),
                or_dash(report.at("pairs", number, "mean_abs"), "error"),
                or_dash(report.at("pairs", number, "cosine"), "general"),
                or_dash(report.at("pairs", number, "agreement"), "share"),
                pair(
                    report.at("pairs", number, "difference_interval", 0),
                    report.at("pairs", number, "difference_interval", 1),
                    "signed",
                ),
            )


def _checks(run: Run, key: str, name: str, limit: str) -> Iterator[tuple[Cell, ...]]:
    """A row for each entry of a list in every engine's parity.json, under `key`: what it is called (`name`), what was found,
    what would have been too much (`limit`), whether it passed, and why it is asked."""
    for engine in run.engines:
        report = engine.parity
        entries = report.data.get(key) if report is not None else None
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            assert report is not None
            passed = report.at(key, number, "passed")
            yield (
                Code(engine.name),
                str(entry.get(name, "")) if isinstance(entry, Mapping) else "",
                *(
                    "-"
                    if passed is not None and passed.value is None
                    else or_dash(report.at(key, number, part), "error")
                    for part in ("actual", limit)
                ),
                _VERDICTS.get(passed.value, "FAIL") if passed is not None else "FAIL",
                str(entry.get("reason", "")) if isinstance(entry, Mapping) else "",
            )


def _extra(report: Source) -> Iterator[tuple[Cell, Cell]]:
    """What a comparison says beyond what the tables above have, such as other backends; named by path."""
    for keys in _leaves(report.data, ()):
        known = keys[0] in _KNOWN_PARITY and not (
            keys[0] == "outputs" and len(keys) > 2 and keys[2] not in _KNOWN_OUTPUT
        )
        known = known or (keys[0] in ("probes", "gates") and isinstance(report.data[str(keys[0])], list))
        figure = report.at(*keys)
        if not known and keys[0] not in ("blocks", "layers") and figure is not None:
            yield Code(".".join(map(str, keys))), figure.shown("general")


def _leaves(value: Any, keys: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*keys, key))
    elif keys:
        yield keys
