"""Render ``docs/results.md`` from the records: protocol, one section per task. Rows that lose stay. Text:
``page.md.j2``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations, product
from pathlib import Path

import numpy as np

from nxm_export.data.bootstrap_intervals import RESAMPLES
from nxm_export.storage.atomic import make_directory, write_atomic
from tools import rendering
from tools.charts import Chart
from tools.results import plots
from tools.results.pooled import CHOSEN_ON, MARGIN, Cell, Comparison, Estimate, Pool
from tools.results.records import DEFAULTS, CompressionFacts, Interval, Machine, Record
from tools.results.rows import RECIPE_TITLES, Row, position, row_named
from tools.results.statistics import Difference, Retention, TaskStatistics, deviation, overall
from tools.results.store import ENCODERS, TaskStore, stores
from tools.results.tasks import TASKS

GAP = "–"
FIRST = next(iter(ENCODERS))  # all rows are of it; others have a few
Cells = list[list[str]]


@dataclass(frozen=True)
class Rendered:
    """The text of ``docs/results.md`` and the pictures that were drawn."""

    text: str
    images: list[Path]


@dataclass(frozen=True)
class OtherSettings:
    """A record that was measured with other settings than most, and which."""

    row: str
    seed: int
    differences: str


@dataclass(frozen=True)
class GridTable:
    """The dense grid of a task, and whether the dense rows use its best choice."""

    held_out: int
    verdict: str
    rows: Cells


@dataclass(frozen=True)
class RowGroup:
    """The tables of some rows of a task, a list of cells for every line."""

    metrics: list[str]
    scores: Cells
    other_teacher: bool
    other_settings: list[OtherSettings]
    differences: Cells
    rivals: Cells
    sizes: Cells
    costs: Cells
    machines: list[str]
    uncommitted: list[str]
    plans: Cells


@dataclass(frozen=True)
class TaskSection:
    """What stands in the section of a task; `changed` are rows that change something: ablations and other training."""

    title: str
    sentences: int
    metric: str
    model: str
    unchanged: RowGroup | None
    changed: RowGroup | None
    grid: GridTable | None
    images: list[str]


# What docs/comparison.md compares: starts after training, with the last weights or their average, at a stronger
# pattern, after little training, and without any; and plans that were searched for, by the default and as before it.
STARTS = ("admm-2:4+W4", "obs-refit-2:4+W4", "obs-2:4+W4", "magnitude-2:4+W4")
AVERAGED = tuple(f"{row}-averaged" for row in STARTS)
STRONGER = tuple(row.replace("2:4", "1:4") for row in AVERAGED)
SHORT = tuple(f"{row}-one-epoch-averaged" for row in STARTS)
UNTRAINED = tuple(f"{row}-untrained" for row in STARTS)
SEARCHED = (
    "searched-hw-87.5-by-admm-judged-by-64-averaged",
    "searched-hw-87.5-by-admm-averaged",
    "searched-hw-87.5",
)


@dataclass(frozen=True)
class Starts:
    """The tables of the comparison of starts over all cells, or over those that no default was chosen on."""

    title: str
    retention: Cells
    differences: Cells


def render(results: Path, document: Path) -> Rendered:
    """Write `document` and, where matplotlib is installed, pictures to ``images`` beside it."""
    images: list[Path] = []
    sections: list[TaskSection] = []
    by_encoder: dict[str, list[TaskStatistics]] = {}
    for encoder in ENCODERS:
        for store in stores(results, encoder):
            statistics = TaskStatistics(store.task, store.labelled_records())
            by_encoder.setdefault(encoder, []).append(statistics)
            name = store.task.name if encoder == FIRST else f"{ENCODERS[encoder]}-{store.task.name}"
            title = statistics.task.title if encoder == FIRST else f"{encoder}: {statistics.task.title}"
            drawn = _draw(statistics, store, document.parent / "images", name, title)
            images += [file for chart in drawn for file in chart.files(document.parent / "images")]
            sections.append(_section(statistics, store, title, drawn))
    measured = by_encoder.get(FIRST, [])
    together = _together([statistics for statistics in measured if statistics.task.glue])
    starts = _starts(measured)
    page = rendering.render("results/page.md.j2", resamples=RESAMPLES, starts=starts, together=together, tasks=sections)
    text = f"{page}\n"
    make_directory(document.parent)
    write_atomic(document, text)
    return Rendered(text, images)


def _section(statistics: TaskStatistics, store: TaskStore, title: str, drawn: Sequence[Chart]) -> TaskSection:
    first = next(iter(statistics.records.values()))
    changed = [row for row in statistics.rows if row_named(row).changes]
    unchanged = [row for row in statistics.rows if row not in changed]
    return TaskSection(
        title=title,
        sentences=len(first.labels),
        metric=statistics.task.metric_title,
        model=first.record.model,
        unchanged=_group(statistics, unchanged) if unchanged else None,
        changed=_group(statistics, changed) if changed else None,
        grid=_grid(statistics, store),
        images=[chart.markup() for chart in drawn],
    )


def _group(statistics: TaskStatistics, rows: Sequence[str]) -> RowGroup:
    metrics = list(statistics.task.metrics) if len(statistics.task.metrics) > 1 else []
    records = [record for row in rows for record in statistics.of(row)]
    return RowGroup(
        metrics=metrics,
        scores=[_score(statistics, row, metrics) for row in rows],
        other_teacher=any(_other_teacher(statistics, row) for row in rows),
        other_settings=_other_settings(statistics, rows),
        differences=list(_differences(statistics, rows)),
        rivals=list(_rivals(statistics, rows)),
        sizes=list(_sizes(statistics, rows)),
        costs=[_cost(statistics, row) for row in rows],
        machines=list(dict.fromkeys(_machine(record.machine) for record in records)),
        uncommitted=[f"`{r.row}` ({r.seed})" for r in records if r.versions["commit"].endswith("-dirty")],
        plans=[
            _plan(record, record.compressed) for record in records if record.compressed and record.compressed.search
        ],
    )


def _score(statistics: TaskStatistics, row: str, metrics: Sequence[str]) -> list[str]:
    scores = statistics.scores(row)
    per_seed = zip(statistics.seeds(row), scores, strict=True)
    divergences = [_kl(record) for record in statistics.of(row)]
    known = [value for value in divergences if value is not None]
    return [
        f"{row_named(row).title} (`{row}`)" + ("†" if _other_teacher(statistics, row) else ""),
        _points(float(np.mean(scores))),
        _span(statistics.interval(row)),
        _points(deviation(scores)),
        ", ".join(f"{_points(score)} ({seed})" for seed, score in per_seed),
        *(_points(float(np.mean(statistics.metric(row, name)))) for name in metrics),
        GAP if row == "dense" else _retention(statistics.retention(row)),
        GAP if row == "dense" else _points(statistics.agreement(row)),
        _mean(known, ".3f") if known else GAP,
    ]


def _kl(record: Record) -> float | None:
    return record.compressed.kl_to_dense if record.compressed else None


def _differences(statistics: TaskStatistics, rows: Sequence[str]) -> Iterable[list[str]]:
    for row in rows:
        baseline = row_named(row).baseline
        against_dense = statistics.difference(row, "dense")
        against_magnitude = statistics.difference(row, baseline) if baseline in statistics.rows and baseline else None
        if against_dense or against_magnitude:
            name = f" (`{baseline}`)" if against_magnitude else ""
            yield [f"`{row}`", _difference(against_dense), _difference(against_magnitude) + name]


def _rivals(statistics: TaskStatistics, rows: Sequence[str]) -> Iterable[list[str]]:
    """Layer-wise ADMM, second-order pruning and ADMM on the loss against every other at their option, searched plans
    against the nearest uniform one and the paper's search."""
    for row in rows:
        for other in _others(statistics, row_named(row)):
            difference = statistics.difference(row, other)
            if difference is not None:
                yield [f"`{row}`", f"`{other}`", _difference(difference)]


def _others(statistics: TaskStatistics, row: Row) -> list[str]:
    if row.recipe not in ("admm", "obs", "nxm") or not row.is_plain:
        return []
    if row.option is not None:
        rivals = ["-".join([recipe, row.option, *row.training]) for recipe in RECIPE_TITLES if recipe != row.recipe]
        paces = [f"{rival}-{pace}" for rival in rivals for pace in ("slow", "fast")]  # at the other learning rate
        return [name for name in ("dense-longer", *rivals, *paces) if name in statistics.rows]
    assert row.search is not None
    method, counting, compression = row.search
    if method == "paper":
        return []

    def size(name: str) -> float:
        return statistics.compressed(name)[0].compression.by(counting)

    plain = [
        other.name
        for other in map(row_named, statistics.rows)
        if other.recipe == row.recipe and other.training == row.training and other.is_plain
    ]
    uniform = sorted(
        (name for name in plain if row_named(name).option), key=lambda name: abs(size(name) - size(row.name))
    )
    return [*uniform[:1], *(name for name in plain if row_named(name).search == ("paper", counting, compression))]


def _sizes(statistics: TaskStatistics, rows: Sequence[str]) -> Iterable[list[str]]:
    for row in rows:
        facts = statistics.compressed(row)
        if facts:
            shares = ([fact.compression.by(counting) for fact in facts] for counting in ("values", "packed", "hw"))
            sizes = (
                [fact.bytes.fp32 for fact in facts],
                [fact.bytes.packed for fact in facts],
                [fact.bytes.engine_sparse for fact in facts],
                [fact.bytes.engine_dense for fact in facts],
                [fact.bytes.file for fact in facts],
            )
            yield [
                f"`{row}`",
                *(f"{100 * float(np.mean(values)):.2f}" for values in shares),
                *(f"{float(np.mean(values)) / 1e6:.2f}" for values in sizes),
            ]


def _cost(statistics: TaskStatistics, row: str) -> list[str]:
    records = statistics.of(row)
    searches = [fact.search.cost for fact in statistics.compressed(row) if fact.search]
    whole = [cost.seconds["all"] for cost in searches if not cost.resumed]
    return [
        f"`{row}`",
        _mean([record.epochs for record in records], ".1f"),
        _mean([record.steps for record in records], ".0f"),
        f"{records[0].samples.train}",
        _rate(records[0]),
        _mean([record.seconds for record in records], ".0f"),
        _mean(whole, ".0f") if whole else "resumed" if searches else GAP,
        str(sum(record.dev_reads for record in records)),
    ]


def _plan(record: Record, facts: CompressionFacts) -> list[str]:
    assert facts.search is not None
    counts = ", ".join(f"{count} x {option}" for option, count in sorted(facts.plan.options.items()))
    return [f"`{record.row}`", str(record.seed), counts, facts.search.best.origin]


def _grid(statistics: TaskStatistics, store: TaskStore) -> GridTable | None:
    grid = store.grid()
    if grid is None:
        return None
    best = max(grid.tried, key=lambda entry: entry.score)
    used = {
        (record.settings["dense_learning_rate"], record.settings["dense_epochs"]) for record in statistics.of("dense")
    }
    chosen = ", ".join(f"{rate:g} and {epochs:g} epochs" for rate, epochs in sorted(used))
    verdict = (
        "the best one is what every dense row uses"
        if used <= {(best.learning_rate, best.epochs)}
        else f"dense rows use {chosen}, which this grid did not choose"
    )
    rows = [[f"{e.learning_rate:g}", f"{e.epochs:g}", _points(e.score), f"{e.seconds:.0f}"] for e in grid.tried]
    return GridTable(grid.held_out, verdict, rows)


def _together(glue: Sequence[TaskStatistics]) -> Cells:
    """The rows that at least two tasks have, beside a dense one: of one task alone its own table says all."""
    cells = []
    for row in sorted({row for statistics in glue for row in statistics.rows if row != "dense"}, key=position):
        having = [statistics for statistics in glue if statistics.retention(row) is not None]
        result = overall(having, row)
        if len(having) > 1 and result is not None:
            named = [f"{task.task.title} ({len(task.common_seeds(row))})" for task in having]
            cells.append([f"`{row}`", ", ".join(named), _retention(result[0]), f"{100 * result[1]:.2f}"])
    return cells


def _starts(tasks: Sequence[TaskStatistics]) -> list[Starts]:
    """Where two of the starts have been measured on one cell."""
    sections = []
    for title, without in (
        ("All cells", frozenset[Cell]()),
        ("Without those that defaults were chosen on (seed 0 of CoLA and of rotten tomatoes)", CHOSEN_ON),
    ):
        pool = Pool(tasks, without)
        groups = (AVERAGED, STARTS, STRONGER, SHORT, UNTRAINED, SEARCHED)
        pairs = [pair for rows in groups for pair in combinations(rows, 2)]
        pairs += [*zip(AVERAGED, STARTS, strict=True), *product(SHORT, AVERAGED)]
        compared = [pool.compare(row, other) for row, other in pairs]
        differences = [_compared(comparison) for comparison in compared if comparison is not None]
        if differences:
            sections.append(Starts(title, list(_retentions(pool)), differences))
    return sections


def _retentions(pool: Pool) -> Iterable[list[str]]:
    for row in (*AVERAGED, *STARTS, *STRONGER, *SHORT, *UNTRAINED, *SEARCHED):
        retention = pool.retention(row)
        if retention is not None:
            below = {-1: "yes", 1: "no", 0: "undecided"}[retention.side(MARGIN)]
            cells, width = pool.cells(row, "dense"), _points(retention.half_width)
            floor = f"{100 * pool.one_answer(cells):.1f}"
            telling = pool.telling(cells)
            kept = pool.retention(row, telling)
            alone = "the same" if telling == cells else GAP if kept is None else _estimate(kept)
            yield [f"`{row}`", _cells(cells), _estimate(retention), width, below, floor, alone]


def _compared(comparison: Comparison) -> list[str]:
    """A line for a comparison: difference in points, ratio of divergences, and what either decides."""
    difference, ratio = comparison.difference, comparison.ratio
    span = (
        "" if difference.interval is None else " ({:+.2f} to {:+.2f})".format(*(100 * b for b in difference.interval))
    )
    cells = [
        f"`{comparison.row}`",
        f"`{comparison.other}`",
        _cells(comparison.cells),
        f"{100 * difference.value:+.2f}{span}",
        {1: "better", -1: "worse", 0: "no difference found"}[difference.side(0.0)],
    ]
    if ratio is None or ratio.interval is None:
        return [*cells, GAP if ratio is None else f"{ratio.value:.3f}", GAP]
    low, high = ratio.interval
    nearer = {-1: "nearer", 1: "farther", 0: "no difference found"}[ratio.side(1.0)]
    return [*cells, f"{ratio.value:.3f} ({low:.3f} to {high:.3f})", nearer]


def _cells(cells: Sequence[Cell]) -> str:
    """Tasks with their seeds, as in ``CoLA (0, 1)``."""
    seeds: dict[str, list[str]] = {}
    for task, seed in cells:
        seeds.setdefault(TASKS[task].title, []).append(str(seed))
    return ", ".join(f"{title} ({', '.join(numbers)})" for title, numbers in seeds.items())


def _estimate(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f}" + (f" ({_span(estimate.interval)})" if estimate.interval else "")


def _draw(statistics: TaskStatistics, store: TaskStore, directory: Path, name: str, title: str) -> list[Chart]:
    """Charts of a task, whose files begin with `name`; those already there when matplotlib is not installed."""
    curve = Chart(f"{name}-compression", f"{title}: difference of every row to the dense model, against a line at zero")
    heat = Chart(f"{name}-sensitivity", f"{title}: divergence from the dense model by weight and option")
    if find_spec("matplotlib") is None:
        return [chart for chart in (curve, heat) if all(file.is_file() for file in chart.files(directory))]
    drawn = [curve] if plots.cost_of_compression(statistics, "hw", title, curve, directory) else []
    if sensitivities := store.sensitivity_files():
        plots.sensitivity_map(sensitivities[0], heat, directory)
        drawn.append(heat)
    return drawn


def _other_teacher(statistics: TaskStatistics, row: str) -> bool:
    """True if a seed of the row started from another dense model than the dense row of that seed."""
    dense = {record.seed: record.weights_sha256 for record in statistics.of("dense")}
    return any(
        record.seed in dense and record.teacher_sha256 is not None and record.teacher_sha256 != dense[record.seed]
        for record in statistics.of(row)
    )


def _other_settings(statistics: TaskStatistics, rows: Sequence[str]) -> list[OtherSettings]:
    """The records of `rows` that were measured with other settings than most compressed ones, but for what their row is
    about."""
    settings_of: dict[tuple[str, int], dict[str, str]] = {}
    for key, labelled in statistics.records.items():
        if labelled.record.compressed is not None:
            moved = {"recipe", "seed"} | row_named(key[0]).moved
            recorded = DEFAULTS | labelled.record.settings
            settings_of[key] = {name: json.dumps(value) for name, value in recorded.items() if name not in moved}
    names = sorted({name for settings in settings_of.values() for name in settings})
    usual = {
        name: Counter(settings[name] for settings in settings_of.values() if name in settings).most_common(1)[0][0]
        for name in names
    }
    notes = []
    for (row, seed), settings in settings_of.items():
        differ = [f"{name} {value} (usual {usual[name]})" for name, value in settings.items() if value != usual[name]]
        if row in rows and differ:
            notes.append(OtherSettings(row, seed, ", ".join(differ)))
    return notes


def _points(value: float | None) -> str:
    return GAP if value is None else f"{100 * value:.2f}"


def _span(bounds: Interval) -> str:
    return f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


def _retention(retention: Retention | None) -> str:
    if retention is None:
        return GAP
    return f"{100 * retention.value:.2f} ({_span(retention.interval) if retention.interval else 'undefined'})"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return GAP
    low, high = difference.interval
    return f"{100 * difference.value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}; {len(difference.seeds)})"


def _mean(values: Sequence[float], form: str) -> str:
    return format(float(np.mean(values)), form)


def _rate(record: Record) -> str:
    rate = record.settings.get("learning_rate", record.settings.get("dense_learning_rate"))
    return f"{rate:g}" if record.steps else GAP


def _machine(machine: Machine) -> str:
    return ", ".join(
        part for part in (machine.cpu, machine.features, machine.gpu, f"{machine.threads} threads") if part
    )
