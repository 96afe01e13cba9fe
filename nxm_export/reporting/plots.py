"""Pictures of a run as inline SVG: drawn by matplotlib, then made fit for a page with a strict content security policy.

matplotlib writes inline styles, which such a policy refuses, and fixed colours, which suit one theme. `svg.inline` turns
styles into attributes, and the placeholder colours below into classes that the page's style sheet colours in both themes.
Text stays text, ids are unique within the page, and every picture carries a title and a description for who cannot see it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from nxm_export.contract.families import ROLES
from nxm_export.reporting.figures import Figure, Shown
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.svg import INK, LINE, MUTED, SERIES, inline
from nxm_export.reporting.verdicts import compressed_value, compression, dense_value, main_engine, metric

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nxm-report",
    "text.parse_math": False,  # names come from users, and may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# Signed codes, with a step at zero: the smallest must not look like the empty cells beside them, on white or on black.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, "#8c2d04"), (0.4999, "#fdbe85"), (0.5, "#9ecae1"), (1.0, "#08519c")]
)
WIDTH = 5.4  # inches; a page shows a picture between 0.9 and 1.6 times as large


@dataclass(frozen=True)
class Picture:
    """One SVG with what it shows in words: `title`, `description` for who cannot see it, `caption` below it."""

    key: str
    title: str
    description: str
    caption: str
    svg: str


def pictures(run: Run) -> dict[str, Picture]:
    """Every picture that the run has the numbers for, by key."""
    makers = (_tradeoff, _sensitivity, _plan_map, _sample, _latency, _parity, _blocks, _curves)
    with mpl.rc_context(_STYLE):
        made = [maker(run) for maker in makers]
    return {picture.key: picture for picture in made if picture is not None}


def _tradeoff(run: Run) -> Picture | None:
    dense, compressed, hw = dense_value(run), compressed_value(run), compression(run, "hw")
    if dense is None or compressed is None or hw is None:
        return None
    if not all(isinstance(figure.value, (int, float)) for figure in (dense, compressed)):
        return None  # a metric that is NaN has no place in a picture
    name, front = metric(run), _front(run)
    canvas = Canvas(figsize=(WIDTH, 4.6 if front else 2.9), layout="constrained")
    panels = canvas.subplots(2 if front else 1, 1, squeeze=False)[:, 0]
    points = [
        ("dense, FP32", 0.0, dense, _interval(run, False)),
        (_plan_text(run), hw.value, compressed, _interval(run, True)),
    ]
    for number, (label, x, value, bounds) in enumerate(points):
        if bounds:
            panels[0].vlines(x * 100, bounds[0], bounds[1], color=SERIES[number], linewidth=1.6)
        panels[0].plot([x * 100], [value.value], "os"[number], color=SERIES[number], markersize=7, label=label)
        panels[0].annotate(
            value.shown("score").text, (x * 100, value.value), xytext=(8, 5), textcoords="offset points", color=INK
        )
    panels[0].axhline(dense.value, color=SERIES[0], linewidth=0.8, linestyle=(0, (4, 3)))
    panels[0].set(ylabel=f"{name}, 95 % interval", xlim=(-6, 108))
    panels[0].margins(y=0.25)
    panels[0].legend(loc="lower left", ncols=2, handletextpad=0.3)
    said = "; ".join(f"{label}: {value.shown('score').text} at {x:.2%} compression" for label, x, value, _ in points)
    if front:
        _draw_front(panels[1], run, front)
        said += f"; below, {len(front)} plans of the search, by divergence from the dense model without training"
    panels[-1].set_xlabel("compression of the encoder's matrices against FP32 (hw), %")
    caption = "The dense model and the plan of this run. Bars are 95 % intervals of each model by itself; the paired interval "
    caption += "of the difference is tighter and stands in the table."
    if front:
        caption += " Below, the plans of the search, compressed one-shot: it ranks them, and says nothing of accuracy."
    return _picture("tradeoff", f"{name.capitalize()} against compression", said, caption, canvas)


def _front(run: Run) -> list[tuple[float, float, bool]]:
    """(compression, one-shot divergence, whether it is of the Pareto file) of every plan that the search tried."""
    found = []
    for rows, pareto in ((run.search.trials, False), (run.search.front, True)) if run.search else ():
        for row in rows:
            try:
                found.append((float(row["hw"]), float(row["joint"]), pareto))
            except (KeyError, TypeError, ValueError):
                continue
    return found


def _draw_front(axes: Axes, run: Run, front: Sequence[tuple[float, float, bool]]) -> None:
    for pareto, color, marker, label in (
        (False, SERIES[2], ".", "tried"),
        (True, SERIES[3], "D", "best at a compression"),
    ):
        rows = [(x, y) for x, y, is_pareto in front if is_pareto is pareto]
        if rows:
            axes.plot([x * 100 for x, _ in rows], [y for _, y in rows], marker, color=color, label=label, markersize=5)
    best = run.search.source.at("best") if run.search else None
    row = best.value if best is not None and isinstance(best.value, dict) else {}
    if isinstance(row.get("hw"), float) and isinstance(row.get("joint"), float):
        chosen = "chosen, and this run's plan" if run.search and run.search.planned else "chosen by the search"
        axes.plot([row["hw"] * 100], [row["joint"]], "*", color=SERIES[1], markersize=11, label=chosen)
    hw = compression(run, "hw")
    if hw is not None and not (run.search and run.search.planned):
        axes.axvline(hw.value * 100, color=SERIES[1], linewidth=0.9, linestyle=(0, (4, 3)), label="this run's plan")
    axes.set(ylabel="divergence, one-shot")
    if all(y > 0 for _, y, _ in front):
        _logarithmic(axes, "y")
    axes.legend(loc="best", handletextpad=0.3)


def _logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain labels: matplotlib's own are formulas."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _interval(run: Run, compressed: bool) -> tuple[float, float] | None:
    engine = main_engine(run) if compressed else None
    source = engine.parity if engine and engine.parity else run.compressed if compressed else run.dense
    found = source.at("engine_interval" if engine and engine.parity else "interval") if source else None
    value = found.value if found else None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(bound, float) for bound in value):
        return value[0], value[1]
    return None


def _plan_text(run: Run) -> str:
    counts = run.plan.pattern_counts if run.plan else {}
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _grid(run: Run) -> tuple[list[int], dict[tuple[int, str], Matrix]] | None:
    cells = {(m.block, m.role): m for m in run.matrices if m.block is not None and m.role is not None}
    return (sorted({block for block, _ in cells}), cells) if cells else None


def _sensitivity(run: Run) -> Picture | None:
    grid = _grid(run)
    if grid is None:
        return None
    blocks, cells = grid
    measured = any(matrix.sensitivity is not None for matrix in run.matrices)
    values = {key: m.sensitivity if measured else m.projection for key, m in cells.items()}
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return None
    table = np.array([[values.get((block, role)) for role in ROLES] for block in blocks], dtype=float)
    canvas, axes = _map_axes(blocks)
    positive = table[np.isfinite(table) & (table > 0)]
    spread = len(positive) > 1 and positive.max() / positive.min() > 50
    norm: Any = (
        mpl.colors.LogNorm(positive.min(), positive.max()) if spread else mpl.colors.Normalize(0, np.nanmax(table) or 1)
    )
    colors = ListedColormap(mpl.colormaps["YlGnBu"](np.linspace(0, 0.75, 256)))  # its dark end drowns the grid
    axes.pcolormesh(np.ma.masked_invalid(table), cmap=colors, norm=norm, edgecolor="none")
    for row, column in np.argwhere(np.isfinite(table)):
        ink = _contrast(colors(float(norm(table[row, column]))))
        text = f"{table[row, column]:.2g}" if measured else f"{table[row, column]:.1%}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink)
    worst = max(known, key=lambda key: known[key])
    what = "measured sensitivity" if measured else "projection error"
    said = f"Heat map of {what}, one row per encoder block, one column per matrix; largest at block {worst[0]}, {worst[1]}."
    caption = (
        "Divergence of the model's outputs when this one matrix is compressed as planned and all others stay dense "
        "(sensitivity.csv of the search)."
        if measured
        else "Not a sensitivity: the share of each dense matrix's squared weights that its planned N:M and bits lose, when "
        "projected without training. A search measures what that does to the outputs."
    )
    return _picture("sensitivity", f"{what.capitalize()} by layer and matrix", said, caption, canvas)


def _plan_map(run: Run) -> Picture | None:
    grid = _grid(run)
    if grid is None:
        return None
    blocks, cells = grid
    options = list(dict.fromkeys(str(matrix.spec) for matrix in cells.values()))
    palette = [
        f"#{shade}" for shade in ("9ecae1", "fdd0a2", "c7e9c0", "dadaeb", "fcbba1", "d9d9d9", "ffffb3", "ccebc5")
    ]
    table = np.array(
        [
            [options.index(str(cells[block, role].spec)) if (block, role) in cells else np.nan for role in ROLES]
            for block in blocks
        ],
        dtype=float,
    )
    canvas, axes = _map_axes(blocks)
    colors = ListedColormap([palette[i % len(palette)] for i in range(len(options))])
    axes.pcolormesh(
        np.ma.masked_invalid(table), cmap=colors, vmin=-0.5, vmax=len(options) - 0.5, edgecolor="#ffffff", linewidth=1.5
    )
    for (block, role), matrix in cells.items():
        text = str(matrix.spec)
        axes.text(ROLES.index(role) + 0.5, blocks.index(block) + 0.5, text, ha="center", va="center", color="#111111")
    said = "The plan of every matrix, one row per encoder block, one column per matrix: " + _plan_text(run) + "."
    return _picture("plan", "The plan, matrix by matrix", said, "N:M pattern and bits of the weights.", canvas)


def _map_axes(blocks: Sequence[int]) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(WIDTH, 0.7 + 0.27 * len(blocks)), layout="constrained")
    axes = canvas.subplots()
    axes.set(xlim=(0, len(ROLES)), ylim=(len(blocks), 0), ylabel="block")
    axes.set_xticks(np.arange(len(ROLES)) + 0.5, [role.replace("_", "\n") for role in ROLES])
    axes.set_yticks(np.arange(len(blocks)) + 0.5, [str(block) for block in blocks])
    axes.xaxis.tick_top()
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return canvas, axes


def _contrast(color: Any) -> str:
    red, green, blue = to_rgb(color)
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


def _sample(run: Run) -> Picture | None:
    if run.sample is None or not run.sample.values.size:
        return None
    values, spec = run.sample.values.astype(float), run.sample.spec
    rows, columns = values.shape
    canvas = Canvas(figsize=(WIDTH, 0.9 + 2 * WIDTH * 0.82 * rows / columns), layout="constrained")
    above, below = canvas.subplots(2, 1)
    largest = float(np.abs(values).max()) or 1.0
    picture = above.imshow(
        np.ma.masked_equal(values, 0),
        cmap=_SIGNED,
        norm=TwoSlopeNorm(0, -largest, largest),
        interpolation="none",
        aspect="equal",
    )
    bar = canvas.colorbar(picture, ax=[above, below], shrink=0.5, pad=0.015)
    bar.outline.set_visible(False)  # type: ignore[operator]
    what = "integer codes" if spec.weight_bits else "values"
    above.set_title(f"stored {what}; empty is zero")
    below.imshow(
        np.where(values != 0, 1.0, np.nan),
        cmap=ListedColormap(["#3b7dbd"]),
        vmin=0.5,
        vmax=1.5,
        interpolation="none",
        aspect="equal",
    )
    below.set_title(f"what is kept{f'; lines every {spec.pattern.m} along K' if spec.pattern else ''}")
    for axes in (above, below):
        axes.grid(False)
        axes.set(ylabel="output channel")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if spec.pattern:
            for edge in range(0, columns + 1, spec.pattern.m):
                axes.axvline(edge - 0.5, color=LINE, linewidth=0.5)
    below.set_xlabel("input, along K")
    zeros = int((values == 0).sum())
    said = f"The first {rows} output channels and {columns} inputs of {run.sample.name}: {zeros} of {values.size} stored {what} are zero."
    caption = f"{run.sample.name}, planned {spec}: read back from the checkpoint, rows are output channels."
    return _picture("sample", "Weights and mask of one matrix", said, caption, canvas)


def _latency(run: Run) -> Picture | None:
    timings = [
        (bench.file, row)
        for bench in run.benches
        for row in (bench.data.get("timings") or [])
        if isinstance(row, dict) and isinstance(row.get("median"), float)
    ]
    if not timings:
        return None
    shapes = list(dict.fromkeys((file, row["batch"], row["sequence"]) for file, row in timings))
    names = list(dict.fromkeys(row["name"] for _, row in timings))
    several = len({file for file, _ in timings}) > 1
    canvas = Canvas(figsize=(WIDTH, 0.55 + len(shapes) * (0.3 + 0.2 * len(names))), layout="constrained")
    panels = canvas.subplots(len(shapes), 1, squeeze=False)[:, 0]
    for axes, (file, batch, sequence) in zip(panels, shapes, strict=True):
        rows = [row for f, row in timings if (f, row["batch"], row["sequence"]) == (file, batch, sequence)]
        for at, row in enumerate(rows):
            color = SERIES[names.index(row["name"]) % len(SERIES)]
            axes.barh([at], [row["median"]], color=color, height=0.62)
            low, high = row.get("quartiles") or (row["median"],) * 2
            axes.hlines([at], low, high, color=INK, linewidth=1.2)
            text = Shown(Figure(row["median"], file), "milliseconds").text
            axes.annotate(f"{text} ms", (max(high, row["median"]), at), xytext=(4, -3), textcoords="offset points")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_title(f"batch {batch} x {sequence} tokens" + (f", {file}" if several else ""))
        axes.set_xlim(0, 1.25 * max(max(row.get("quartiles") or [row["median"]]) for row in rows))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    panels[-1].set_xlabel("milliseconds, median and middle half")
    clocks = sorted({str(row.get("clock")) for _, row in timings if row.get("clock")})
    said = "Bars of median milliseconds by shape and engine: " + "; ".join(
        f"{row['name']} {row['batch']}x{row['sequence']} {Shown(Figure(row['median'], file), 'milliseconds').text}"
        for file, row in timings
    )
    caption = f"Engines take turns in every round, so that slow spells hit all alike. Clock: {', '.join(clocks) or 'not recorded'}."
    return _picture("latency", "Latency by shape and engine", said, caption, canvas)


def _parity(run: Run) -> Picture | None:
    rows = []
    for engine in run.engines:
        for output in (engine.parity.data.get("outputs") or []) if engine.parity else []:
            if isinstance(output, dict):
                rows.append((f"{engine.name}, {output.get('output', '')}", output))
    numbers = ("max_abs", "max_tolerance", "mean_abs", "mean_tolerance")
    rows = [(label, output) for label, output in rows if all(_positive(output.get(key)) for key in numbers)]
    if not rows:
        return None
    canvas = Canvas(figsize=(WIDTH, 0.8 + 0.42 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for at, (_, output) in enumerate(rows):
        for shift, kind, color in ((-0.16, "max", SERIES[0]), (0.16, "mean", SERIES[1])):
            found, allowed = output[f"{kind}_abs"], output[f"{kind}_tolerance"]
            axes.hlines(at + shift, found, allowed, color=LINE, linewidth=1)
            axes.plot([found], [at + shift], "o", color=color, markersize=5, label=f"{kind} error" if at == 0 else None)
            axes.plot(
                [allowed],
                [at + shift],
                "|",
                color=color,
                markersize=10,
                markeredgewidth=2,
                label=f"{kind}, tolerated" if at == 0 else None,
            )
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    _logarithmic(axes, "x")
    axes.set(xlabel="|engine - checkpoint|, logarithmic")
    axes.invert_yaxis()
    canvas.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1)
    said = "Largest and mean error of every output against its tolerance: " + "; ".join(
        f"{label} {output['max_abs']:.2g} of {output['max_tolerance']:.2g}" for label, output in rows
    )
    return _picture(
        "parity",
        "Parity error and tolerance by output",
        said,
        "A dot left of its bar of the same colour is within the tolerance.",
        canvas,
    )


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _blocks(run: Run) -> Picture | None:
    engines = [(engine, [b for b in engine.blocks if _positive(b.max_abs.value)]) for engine in run.engines]
    engines = [(engine, blocks) for engine, blocks in engines if blocks]
    if not engines:
        return None
    canvas = Canvas(figsize=(WIDTH, 2.8), layout="constrained")
    axes = canvas.subplots()
    names = list(dict.fromkeys(b.block for engine in run.engines for b in engine.blocks))
    for number, (engine, blocks) in enumerate(engines):
        color = SERIES[number % len(SERIES)]
        places = [names.index(b.block) for b in blocks]  # a block without error is not drawn: the axis is logarithmic
        axes.plot(places, [b.max_abs.value for b in blocks], "o-", color=color, label=engine.name, markersize=4)
        tolerances = [
            (at, b.tolerance.value)
            for at, b in zip(places, blocks, strict=True)
            if b.tolerance and _positive(b.tolerance.value)
        ]
        if tolerances:
            axes.plot(*zip(*tolerances, strict=True), "_", color=color, markersize=10, markeredgewidth=1.5)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    _logarithmic(axes, "y")
    axes.set(ylabel="largest |difference|")
    axes.legend(loc="best")
    said = "Largest difference behind each block: " + "; ".join(
        f"{engine.name} {b.block} {b.max_abs.shown('error').text}" for engine, blocks in engines for b in blocks
    )
    return _picture(
        "blocks", "Parity error by block", said, "Where two backends part; a dash is what is tolerated there.", canvas
    )


def _curves(run: Run) -> Picture | None:
    steps: dict[str, list[tuple[float, float]]] = {"loss": [], "residual": [], "flips": []}
    phases: list[tuple[float, str]] = []
    start = end = 0.0
    for stage, lines in run.logs.items():
        phase = None
        for line in lines:
            if not isinstance(line.get("step"), int):
                continue
            if line.get("phase") != phase:
                phase, start = line.get("phase"), end
                phases.append((start, str(phase or stage)))
            end = max(end, start + line["step"])
            for key, points in steps.items():
                if isinstance(line.get(key), float) and math.isfinite(line[key]):
                    points.append((start + line["step"], line[key]))
    drawn = {key: points for key, points in steps.items() if points}
    if "loss" not in drawn:
        return None
    labels = {"loss": "training loss", "residual": "ADMM residual", "flips": "mask flips, %"}
    canvas = Canvas(figsize=(WIDTH, 1.0 + 1.15 * len(drawn)), layout="constrained")
    panels = canvas.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axes, (key, points)) in enumerate(zip(panels, drawn.items(), strict=True)):
        x, y = [at for at, _ in points], [value * (100 if key == "flips" else 1) for _, value in points]
        axes.plot(x, y, "-" if key == "loss" else "o-", color=SERIES[number], linewidth=1.1, markersize=3.5)
        axes.set_ylabel(labels[key])
        axes.set_ylim(0, 1.08 * max(y) or 1)
        for at, _ in phases[1:]:
            axes.axvline(at, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    for at, name in _apart(phases, end):
        panels[0].annotate(
            name, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points", color=INK
        )
    panels[-1].set_xlabel("optimizer steps, all phases in a row")
    panels[-1].set_xlim(0, end)
    said = f"Curves over {end:.0f} steps in the phases {', '.join(name for _, name in phases)}. " + "; ".join(
        f"{labels[key]} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for key, points in drawn.items()
        if key != "flips"
    )
    caption = "The loss of each phase is a sum of its own terms, so levels of two phases do not compare. The residual is how far "
    caption += "the weights are from their projection, flips the share of mask entries that changed at a dual update."
    return _picture("curves", "Training", said, caption, canvas)


def _apart(phases: Sequence[tuple[float, str]], end: float) -> list[tuple[float, str]]:
    """The phases whose names fit side by side, long ones first; each is (first step, name)."""
    until = [*(at for at, _ in phases[1:]), end]
    chosen: list[tuple[float, str]] = []
    for (at, name), _ in sorted(zip(phases, until, strict=True), key=lambda item: item[0][0] - item[1]):
        width = 0.018 * end  # of a character
        if all(at + width * len(name) < other or other + width * len(text) < at for other, text in chosen):
            chosen.append((at, name))
    return chosen


def _picture(key: str, title: str, description: str, caption: str, canvas: Canvas) -> Picture:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(key, title, description, caption, inline(buffer.getvalue(), key, title, description))
