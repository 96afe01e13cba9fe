"""Render ``docs/results.md`` from the records: protocol, one section per task. Rows that lose stay."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nxm_export.storage.atomic import write_atomic
from tools.results import plots, store
from tools.results.rows import DEFAULT_RECIPE, RECIPE_TITLES, Row, position, row_named
from tools.results.statistics import Difference, Retention, TaskStatistics, deviation, overall

GAP = "–"
PROTOCOL = """\
# Results

Made by `python -m tools.results render` from the records in [`results/`](../results), one JSON file per task, row and
seed; `python -m tools.results run` measures rows that are missing. Every record holds the prediction for every dev
sentence, so every number below can be made again without training.

**Protocol.** One dense model per task and seed is fine-tuned first; every compressed row of that seed starts from it and,
where the recipe distils, has it as teacher, with the same steps and data order, at the learning rate of its recipe (below). Searched plans are
chosen on slices held out of *train*, and so are the dense learning rate and epochs where a *Dense grid* below says so; else they
were given. What hardening costs is watched on another such slice. The dev set is read once per row and seed, for the number in the table
(twice for rows with an INT8 embedding table, which are compared with themselves without it), and once per engine where engines are compared. Records with other settings than most are named below their table. Scores are times 100.

Most rows learn from their teacher alone, 70 % of the sentences being distorted ones, at a learning rate of 1e-4 from a
second-order start (`obs`, and searched plans) and of 3e-4 else. Both rates were compared on CoLA with seed 0 (`obs` and magnitude on rotten tomatoes, too), for `obs`, magnitude and
SR-STE by the rows `-fast` and `-slow`, for ADMM by hand ([search.md](search.md)); where such a row exists, ours are compared with it, too. These defaults (recipe, learning rates, losses, share of distorted sentences,
limit for INT8 outputs) were chosen by experiments that read dev sets many times: CoLA's with seed 0 and, for the recipe, that of
rotten tomatoes with seed 0 ([search.md](search.md)). So rows of seed 0 are no test of them; other seeds are. Rows whose names
hold `-unaugmented` learn from the sentences and labels as they are, and from the teacher, at 1e-4: what goes with that
(`compressors/training/default_recipe.py`). INT8 outputs that cost too much are left in float (`compressors/training/output_sensitivity.py`), but for rows whose names
hold `-int8-outputs`. Paper and one-shot rows have no teacher.

**Intervals** are 95 % percentile bootstraps ({resamples} resamples) over dev sentences and, where a row has several seeds,
over seeds; differences are paired: both rows on the same sentences and seeds. With one seed an interval says nothing
about other seeds. *sd* is the standard deviation over seeds. *Retention* is the ratio of mean scores to the dense row.

**Compression** is 1 - bits/32 over the encoder's matrices, embeddings not included: `values` counts kept values alone,
`packed` the smallest lossless file (index and scales included), `hw` what sparse tensor cores read. *Stored* bytes and
*engine* bytes differ: weights of fewer than 8 bits run as INT8, so a W4 model's engine is no smaller than a W8 one's.
"""


@dataclass(frozen=True)
class Rendered:
    """The text of ``docs/results.md`` and the pictures that were drawn."""

    text: str
    images: list[Path]


def render(results: Path, document: Path) -> Rendered:
    """Write `document` and, where matplotlib is installed, pictures to ``images`` beside it."""
    from nxm_export.data.bootstrap import RESAMPLES

    statistics = [TaskStatistics(task, store.read(results, task)) for task in store.tasks_with_results(results)]
    parts = [PROTOCOL.format(resamples=RESAMPLES)]
    images: list[Path] = []
    glue = [found for found in statistics if found.task.glue]
    if together := _overall(glue):
        parts.append(together)
    for found in statistics:
        drawn = _draw(found, results, document.parent / "images")
        images += drawn
        parts.append(_section(found, results, drawn))
    text = "\n".join(parts)
    document.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(document, text)
    return Rendered(text, images)


def _section(found: TaskStatistics, results: Path, images: Sequence[Path]) -> str:
    """Rows as the recipes are, and then, apart, those that change something: ablations and other training."""
    some = found.records[next(iter(found.records))]
    changed = [row for row in found.rows if row_named(row).changes]
    unchanged = [row for row in found.rows if row not in changed]
    parts = [
        f"## {found.task.title}\n",
        f"{len(some.labels)} dev sentences; score: {found.task.metric_title}; model: {some.facts['model']}.\n",
        *_tables(found, unchanged),
        _grid(found, results / found.task.name / "dense-grid.json"),
        *(f"![{image.stem}](images/{image.name})\n" for image in images),
    ]
    if changed:
        parts += [f"## {found.task.title}: ablations, and rows with other training\n", *_tables(found, changed)]
    return "\n".join(part for part in parts if part)


def _tables(found: TaskStatistics, rows: Sequence[str]) -> list[str]:
    makers = (_scores, _differences, _ours, _sizes, _costs, _plans)
    return [make(found, rows) for make in makers] if rows else []


def _scores(found: TaskStatistics, rows: Sequence[str]) -> str:
    extra = found.task.metrics if len(found.task.metrics) > 1 else ()
    head = ["row", "mean", "95 % interval", "sd", "per seed", *extra, "retention, %", "agreement, %", "KL to dense"]
    lines = []
    for row in rows:
        scores = found.scores(row)
        lines.append(
            [
                f"{row_named(row).title} (`{row}`)" + ("†" if _other_teacher(found, row) else ""),
                _points(float(np.mean(scores))),
                _span(found.interval(row)),
                _points(deviation(scores)),
                ", ".join(f"{_points(score)} ({seed})" for seed, score in zip(found.seeds(row), scores, strict=True)),
                *(_points(float(np.mean(found.metric(row, name)))) for name in extra),
                GAP if row == "dense" else _retention(found.retention(row)),
                GAP if row == "dense" else _points(found.agreement(row)),
                _divergence(found, row),
            ]
        )
    note = (
        "\n† started from another dense model of the same seed than the dense row's (trained again elsewhere).\n"
        if any(_other_teacher(found, row) for row in rows)
        else ""
    )
    said = "*agreement*: answers that are the dense model's; *KL*: mean KL(dense || row) over dev, in nats."
    return (
        f"### Scores\n\nPer seed: score (seed). Means over seeds: {said}\n\n"
        + _table(head, lines)
        + note
        + _other_settings(found, rows)
    )


def _divergence(found: TaskStatistics, row: str) -> str:
    known = [found.records[row, seed].facts.get("kl_to_dense") for seed in found.seeds(row)]
    values = [value for value in known if value is not None]
    return _mean(values, ".3f") if values else GAP


def _differences(found: TaskStatistics, rows: Sequence[str]) -> str:
    lines = []
    for row in rows:
        baseline = row_named(row).baseline
        against_dense = found.difference(row, "dense")
        against_magnitude = found.difference(row, baseline) if baseline in found.rows and baseline else None
        if against_dense or against_magnitude:
            name = f" (`{baseline}`)" if against_magnitude else ""
            lines.append([f"`{row}`", _difference(against_dense), _difference(against_magnitude) + name])
    if not lines:
        return ""
    return (
        "### Paired differences\n\nPoints, with the 95 % interval and the number of seeds that both rows have. An interval that holds 0 says "
        "that these sentences and seeds do not tell the rows apart.\n\n"
        + _table(["row", "minus dense", "minus fixed magnitude mask"], lines)
    )


def _ours(found: TaskStatistics, rows: Sequence[str]) -> str:
    """The default recipe and ADMM against every other at their option, searched plans against the nearest uniform one and the
    paper's search."""
    lines = []
    for row in rows:
        for other in _others(found, row_named(row)):
            difference = found.difference(row, other)
            if difference is not None:
                lines.append([f"`{row}`", f"`{other}`", _difference(difference)])
    if not lines:
        return ""
    return "### Ours against the others\n\n" + _table(["row", "against", "difference"], lines)


def _others(found: TaskStatistics, row: Row) -> list[str]:
    if row.recipe not in (DEFAULT_RECIPE, "nxm") or not row.is_plain:
        return []
    if row.option is not None:
        rivals = ["-".join([recipe, row.option, *row.training]) for recipe in RECIPE_TITLES if recipe != row.recipe]
        paces = [f"{rival}-{pace}" for rival in rivals for pace in ("slow", "fast")]  # at the other learning rate
        return [name for name in ("dense-longer", *rivals, *paces) if name in found.rows]
    assert row.search is not None
    method, counting, compression = row.search
    if method == "paper":
        return []

    def size(name: str) -> float:
        return float(found.records[name, found.seeds(name)[0]].facts["compression"][counting])

    plain = [
        other.name
        for other in map(row_named, found.rows)
        if other.recipe == row.recipe and other.training == row.training and other.is_plain
    ]
    uniform = sorted(
        (name for name in plain if row_named(name).option), key=lambda name: abs(size(name) - size(row.name))
    )
    return [*uniform[:1], *(name for name in plain if row_named(name).search == ("paper", counting, compression))]


def _sizes(found: TaskStatistics, rows: Sequence[str]) -> str:
    lines = []
    for row in rows:
        facts = [found.records[row, seed].facts for seed in found.seeds(row)]
        if "compression" in facts[0]:
            shares = [
                f"{100 * float(np.mean([fact['compression'][counting] for fact in facts])):.2f}"
                for counting in ("values", "packed", "hw")
            ]
            sizes = [
                f"{float(np.mean([fact['bytes'][key] for fact in facts])) / 1e6:.2f}"
                for key in ("fp32", "packed", "engine_sparse", "engine_dense", "file")
            ]
            lines.append([f"`{row}`", *shares, *sizes])
    if not lines:
        return ""
    head = [
        "row",
        "`values` %",
        "`packed` %",
        "`hw` %",
        "FP32 MB",
        "stored MB",
        "engine MB, 2:4 storage",
        "engine MB, dense",
        "packed file MB",
    ]
    return (
        "### Compression\n\nMB of the encoder's matrices; the packed file, written by `nxm pack`, holds the whole model, embeddings in FP32 included.\n\n"
        + _table(head, lines)
    )


def _costs(found: TaskStatistics, rows: Sequence[str]) -> str:
    machines: dict[str, None] = {}
    lines = []
    for row in rows:
        facts = [found.records[row, seed].facts for seed in found.seeds(row)]
        searches = [fact["search"]["cost"] for fact in facts if "search" in fact]
        whole = [cost["seconds"]["all"] for cost in searches if not cost["resumed"]]
        for fact in facts:
            machines[_machine(fact["machine"])] = None
        lines.append(
            [
                f"`{row}`",
                _mean([fact["epochs"] for fact in facts], ".1f"),
                _mean([fact["steps"] for fact in facts], ".0f"),
                f"{facts[0]['samples']['train']}",
                _rate(facts[0]),
                _mean([fact["seconds"] for fact in facts], ".0f"),
                _mean(whole, ".0f") if whole else "resumed" if searches else GAP,
                str(sum(fact["dev_reads"] for fact in facts)),
            ]
        )
    head = ["row", "epochs", "steps", "trained on", "learning rate", "seconds", "search seconds", "dev read, times"]
    return (
        "### Cost\n\nMeans over seeds; seconds are of the row alone, the dense model not included: wall time, pauses and other "
        "work on the machine included. A search that was resumed is not counted. "
        f"Machine: {'; '.join(machines)}.\n\n" + _table(head, lines) + _changed_trees(found, rows)
    )


def _changed_trees(found: TaskStatistics, rows: Sequence[str]) -> str:
    """Which records come from a commit plus changes that were not committed: their commit alone does not give the code."""
    names = [
        f"`{row}` ({seed})"
        for row in rows
        for seed in found.seeds(row)
        if found.records[row, seed].facts["versions"]["commit"].endswith("-dirty")
    ]
    said = "Measured in a tree with changes that were not committed (a rewritten table under `results/` was one, then)"
    return f"\n{said}: {', '.join(names)}.\n" if names else ""


def _plans(found: TaskStatistics, rows: Sequence[str]) -> str:
    lines = []
    for row in rows:
        for seed in found.seeds(row):
            facts = found.records[row, seed].facts
            if "search" in facts:
                counts = ", ".join(f"{count} x {option}" for option, count in sorted(facts["plan"]["options"].items()))
                lines.append([f"`{row}`", str(seed), counts, str(facts["search"]["best"]["origin"])])
    if not lines:
        return ""
    return "### Searched plans\n\nThe option of every weight is in the record.\n\n" + _table(
        ["row", "seed", "weights x option", "found by"], lines
    )


def _grid(found: TaskStatistics, file: Path) -> str:
    if not file.is_file():
        return ""
    grid = json.loads(file.read_text(encoding="utf-8"))
    best = max(grid["tried"], key=lambda entry: entry["score"])
    used = {
        (record.facts["settings"]["dense_learning_rate"], record.facts["settings"]["dense_epochs"])
        for (row, _), record in found.records.items()
        if row == "dense"
    }
    chosen = ", ".join(f"{rate:g} and {epochs:g} epochs" for rate, epochs in sorted(used))
    said = (
        "the best one is what every dense row uses"
        if used <= {(best["learning_rate"], best["epochs"])}
        else f"dense rows use {chosen}, which this grid did not choose"
    )
    lines = [
        [f"{entry['learning_rate']:g}", f"{entry['epochs']:g}", _points(entry["score"]), f"{entry['seconds']:.0f}"]
        for entry in grid["tried"]
    ]
    return f"### Dense grid\n\nScores on {grid['held_out']} sentences held out of train, seed 0; {said}.\n\n" + _table(
        ["learning rate", "epochs", "score", "seconds"], lines
    )


def _overall(glue: Sequence[TaskStatistics]) -> str:
    """The rows that at least two tasks have (of one task alone its own table says all); empty if there are none."""
    lines = []
    rows = sorted({row for found in glue for row in found.rows if row != "dense"}, key=position)
    for row in rows:
        having = [found for found in glue if row in found.rows]
        result = overall(having, row)
        if len(having) > 1 and result is not None:
            named = [f"{found.task.title} ({len(found.seeds(row))})" for found in having]
            lines.append([f"`{row}`", ", ".join(named), _retention(result[0]), f"{100 * result[1]:.2f}"])
    if not lines:
        return ""
    head = ["row", "tasks (seeds)", "ratio of mean scores, %", "mean of ratios, %"]
    return "## GLUE tasks together\n\nRows that several tasks have.\n\n" + _table(head, lines)


def _draw(found: TaskStatistics, results: Path, directory: Path) -> list[Path]:
    """Pictures of a task; those already there when matplotlib is not installed."""
    curve = directory / f"{found.task.name}-compression.svg"
    tables = sorted((results / found.task.name).glob("sensitivity-s*.csv"))
    heat = directory / f"{found.task.name}-sensitivity.svg"
    if find_spec("matplotlib") is None:
        return [file for file in (curve, heat) if file.is_file()]
    drawn = [curve] if plots.accuracy_against_compression(found, "hw", curve) else []
    if tables:
        plots.sensitivity_map(tables[0], heat)
        drawn.append(heat)
    return drawn


def _other_teacher(found: TaskStatistics, row: str) -> bool:
    """True if a seed of the row started from another dense model than the dense row of that seed."""
    return any(
        ("dense", seed) in found.records
        and found.records[row, seed].facts.get("teacher_sha256", "")
        not in ("", found.records["dense", seed].facts.get("weights_sha256"))
        for seed in found.seeds(row)
    )


def _other_settings(found: TaskStatistics, rows: Sequence[str]) -> str:
    """One line per record of `rows` that was measured with other settings than most compressed ones, but for what its row is about."""
    shared = {}
    for key, record in found.records.items():
        if "compression" in record.facts:
            by_row = {"recipe", "seed"} | row_named(key[0]).moved
            shared[key] = {
                name: json.dumps(value) for name, value in record.facts["settings"].items() if name not in by_row
            }
    names = sorted({name for settings in shared.values() for name in settings})
    usual = {
        name: Counter(settings[name] for settings in shared.values() if name in settings).most_common(1)[0][0]
        for name in names
    }
    lines = []
    for row, seed, settings in ((*key, settings) for key, settings in shared.items() if key[0] in rows):
        differ = [
            f"{name} {settings[name]} (usual {usual[name]})" for name in settings if settings[name] != usual[name]
        ]
        if differ:
            lines.append(f"\n`{row}`, seed {seed}, was measured with other settings: {', '.join(differ)}.\n")
    return "".join(lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in _table_lines(head, lines))


def _table_lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for line in lines:
        yield f"| {' | '.join(line)} |"


def _points(value: float | None) -> str:
    return GAP if value is None else f"{100 * value:.2f}"


def _span(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


def _retention(found: Retention | None) -> str:
    if found is None:
        return GAP
    return f"{100 * found.value:.2f} ({_span(found.interval) if found.interval else 'undefined'})"


def _difference(found: Difference | None) -> str:
    if found is None:
        return GAP
    low, high = found.interval
    return f"{100 * found.value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}; {len(found.seeds)})"


def _mean(values: Sequence[float], form: str) -> str:
    return format(float(np.mean(values)), form)


def _rate(facts: dict[str, Any] | Any) -> str:
    settings = facts["settings"]
    rate = settings.get("learning_rate", settings.get("dense_learning_rate"))
    return f"{rate:g}" if facts["steps"] else GAP


def _machine(machine: dict[str, Any]) -> str:
    parts = [machine["cpu"], machine["features"], machine.get("gpu"), f"{machine['threads']} threads"]
    return ", ".join(part for part in parts if part)
