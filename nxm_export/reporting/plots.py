"""Pictures of a run as inline SVG: drawn by matplotlib, then made fit for a page with a strict content security policy.

matplotlib writes inline styles, which such a policy refuses, and fixed colours, which suit one theme. `svg.inline`
turns styles into attributes, and the placeholder colours below into classes that the page's style sheet colours in both
themes. Text stays text, ids are unique within the page, and every picture carries a title and a description for who
cannot see it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from nxm_export.reporting.figures import FORMATS
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.svg import INK, LINE, MUTED, SERIES, inline
from nxm_export.reporting.verdicts import compressed_value, compression, dense_value, main_engine, metric

if TYPE_CHECKING:
    from matplotlib.typing import ColorType, RcKeyType

    from engines.benchmark.latency import Timing
    from engines.parity.tolerance import OutputParity

_STYLE: dict[RcKeyType, object] = {
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
    if dense.number is None or compressed.number is None or hw.number is None:
        return None  # a metric that is NaN has no place in a picture
    name, front = metric(run), _front(run)
    canvas = Canvas(figsize=(WIDTH, 4.6 if front else 2.9), layout="constrained")
    panels = canvas.subplots(2 if front else 1, 1, squeeze=False)[:, 0]
    points = [
        ("dense, FP32", 0.0, dense.number, dense.shown("score").text, _interval(run, False)),
        (_plan_text(run), hw.number, compressed.number, compressed.shown("score").text, _interval(run, True)),
    ]
    for number, (label, x, y, text, bounds) in enumerate(points):
        if bounds:
            panels[0].vlines(x * 100, bounds[0], bounds[1], color=SERIES[number], linewidth=1.6)
        panels[0].plot([x * 100], [y], "os"[number], color=SERIES[number], markersize=7, label=label)
        panels[0].annotate(text, (x * 100, y), xytext=(8, 5), textcoords="offset points", color=INK)
    panels[0].axhline(dense.number, color=SERIES[0], linewidth=0.8, linestyle=(0, (4, 3)))
    panels[0].set(ylabel=f"{name}, 95 % interval", xlim=(-6, 108))
    panels[0].margins(y=0.25)
    panels[0].legend(loc="lower left", ncols=2, handletextpad=0.3)
    description = "; ".join(f"{label}: {text} at {x:.2%} compression" for label, x, _, text, _ in points)
    if front:
        _draw_front(panels[1], run, front)
        description += f"; below, {len(front)} plans of the search, by divergence from the dense model without training"
    panels[-1].set_xlabel("compression of the encoder's matrices against FP32 (hw), %")
    caption = "The dense model and the plan of this run. Bars are 95 % intervals of each model by itself; the paired "
    caption += "interval of the difference is tighter and stands in the table."
    if front:
        caption += " Below, the plans of the search, compressed one-shot: it ranks them, and says nothing of accuracy."
    return _picture("tradeoff", f"{name.capitalize()} against compression", description, caption, canvas)


def _front(run: Run) -> list[tuple[float, float, bool]]:
    """(compression, one-shot divergence, whether it is of the Pareto front) of every plan that the search tried."""
    if run.search is None:
        return []
    points = []
    for row in run.search.trials:
        try:
            points.append((float(row["hw"]), float(row["joint"]), False))
        except (KeyError, TypeError, ValueError):
            continue
    pareto = run.search.result.content.pareto
    return points + [(plan.hw, plan.joint, True) for plan in pareto if plan.joint is not None]


def _draw_front(axes: Axes, run: Run, front: Sequence[tuple[float, float, bool]]) -> None:
    for pareto, color, marker, label in (
        (False, SERIES[2], ".", "tried"),
        (True, SERIES[3], "D", "best at a compression"),
    ):
        points = [(x, y) for x, y, is_pareto in front if is_pareto is pareto]
        if points:
            xs, ys = [x * 100 for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, marker, color=color, label=label, markersize=5)
    planned = run.search is not None and run.search.planned
    best = run.search.result.content.best if run.search else None
    if best is not None and best.joint is not None:
        chosen = "chosen, and this run's plan" if planned else "chosen by the search"
        axes.plot([best.hw * 100], [best.joint], "*", color=SERIES[1], markersize=11, label=chosen)
    hw = compression(run, "hw")
    if hw is not None and hw.number is not None and not planned:
        axes.axvline(hw.number * 100, color=SERIES[1], linewidth=0.9, linestyle=(0, (4, 3)), label="this run's plan")
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
    if engine and engine.parity:
        return engine.parity.content.engine_interval
    source = run.compressed if compressed else run.dense
    return source.content.interval if source else None


def _plan_text(run: Run) -> str:
    counts = run.plan.pattern_counts if run.plan else {}
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _grid(run: Run) -> tuple[list[int], list[str], dict[tuple[int, str], Matrix]] | None:
    """(blocks, roles in the order in which a block runs them, matrices by both)"""
    cells = {(m.block, m.role): m for m in run.matrices if m.block is not None and m.role is not None}
    roles = list(dict.fromkeys(role for _, role in cells))
    return (sorted({block for block, _ in cells}), roles, cells) if cells else None


def _sensitivity(run: Run) -> Picture | None:
    grid = _grid(run)
    if grid is None:
        return None
    blocks, roles, cells = grid
    measured = any(matrix.sensitivity is not None for matrix in run.matrices)
    values = {key: m.sensitivity if measured else m.projection for key, m in cells.items()}
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return None
    grid_values = np.array([[values.get((block, role)) for role in roles] for block in blocks], dtype=float)
    canvas, axes = _map_axes(blocks, roles)
    positive = grid_values[np.isfinite(grid_values) & (grid_values > 0)]
    spread = len(positive) > 1 and positive.max() / positive.min() > 50
    norm: mpl.colors.Normalize = (
        mpl.colors.LogNorm(positive.min(), positive.max())
        if spread
        else mpl.colors.Normalize(0, np.nanmax(grid_values) or 1)
    )
    colors = ListedColormap(mpl.colormaps["YlGnBu"](np.linspace(0, 0.75, 256)))  # its dark end drowns the grid
    axes.pcolormesh(np.ma.masked_invalid(grid_values), cmap=colors, norm=norm, edgecolor="none")
    for row, column in np.argwhere(np.isfinite(grid_values)):
        value = grid_values[row, column]
        ink = _contrast(colors(float(norm(value))))
        text = f"{value:.2g}" if measured else f"{value:.1%}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink)
    worst = max(known, key=lambda key: known[key])
    what = "measured sensitivity" if measured else "projection error"
    description = f"Heat map of {what}, one row per encoder block, one column per matrix; "
    description += f"largest at block {worst[0]}, {worst[1]}."
    caption = (
        "Divergence of the model's outputs when this one matrix is compressed as planned and all others stay dense "
        "(sensitivity.csv of the search)."
        if measured
        else "Not a sensitivity: the share of each dense matrix's squared weights that its planned N:M and bits lose, "
        "when projected without training. A search measures what that does to the outputs."
    )
    return _picture("sensitivity", f"{what.capitalize()} by layer and matrix", description, caption, canvas)


def _plan_map(run: Run) -> Picture | None:
    grid = _grid(run)
    if grid is None:
        return None
    blocks, roles, cells = grid
    options = list(dict.fromkeys(str(matrix.spec) for matrix in cells.values()))
    palette = [
        f"#{shade}" for shade in ("9ecae1", "fdd0a2", "c7e9c0", "dadaeb", "fcbba1", "d9d9d9", "ffffb3", "ccebc5")
    ]
    indices = np.array(
        [
            [options.index(str(cells[block, role].spec)) if (block, role) in cells else np.nan for role in roles]
            for block in blocks
        ],
        dtype=float,
    )
    canvas, axes = _map_axes(blocks, roles)
    colors = ListedColormap([palette[i % len(palette)] for i in range(len(options))])
    axes.pcolormesh(
        np.ma.masked_invalid(indices),
        cmap=colors,
        vmin=-0.5,
        vmax=len(options) - 0.5,
        edgecolor="#ffffff",
        linewidth=1.5,
    )
    for (block, role), matrix in cells.items():
        text = str(matrix.spec)
        axes.text(roles.index(role) + 0.5, blocks.index(block) + 0.5, text, ha="center", va="center", color="#111111")
    description = f"The plan of every matrix, one row per encoder block, one column per matrix: {_plan_text(run)}."
    return _picture("plan", "The plan, matrix by matrix", description, "N:M pattern and bits of the weights.", canvas)


def _map_axes(blocks: Sequence[int], roles: Sequence[str]) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(WIDTH, 0.7 + 0.27 * len(blocks)), layout="constrained")
    axes = canvas.subplots()
    axes.set(xlim=(0, len(roles)), ylim=(len(blocks), 0), ylabel="block")
    axes.set_xticks(np.arange(len(roles)) + 0.5, [role.replace("_", "\n") for role in roles])
    axes.set_yticks(np.arange(len(blocks)) + 0.5, [str(block) for block in blocks])
    axes.xaxis.tick_top()
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return canvas, axes


def _contrast(color: ColorType) -> str:
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
    bar.outline.set_visible(False)
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
    description = f"The first {rows} output channels and {columns} inputs of {run.sample.name}: "
    description += f"{zeros} of {values.size} stored {what} are zero."
    caption = f"{run.sample.name}, planned {spec}: read back from the checkpoint, rows are output channels."
    return _picture("sample", "Weights and mask of one matrix", description, caption, canvas)


def _latency(run: Run) -> Picture | None:
    timings = [(bench.file, timing) for bench in run.benches for timing in bench.content.timings]
    if not timings:
        return None
    shapes = list(dict.fromkeys((file, timing.batch, timing.sequence) for file, timing in timings))
    names = list(dict.fromkeys(timing.name for _, timing in timings))
    several = len({file for file, _ in timings}) > 1
    canvas = Canvas(figsize=(WIDTH, 0.55 + len(shapes) * (0.3 + 0.2 * len(names))), layout="constrained")
    panels = canvas.subplots(len(shapes), 1, squeeze=False)[:, 0]
    for axes, shape in zip(panels, shapes, strict=True):
        file, batch, sequence = shape
        _draw_latency(axes, [t for f, t in timings if (f, t.batch, t.sequence) == shape], names)
        axes.set_title(f"batch {batch} x {sequence} tokens" + (f", {file}" if several else ""))
    panels[-1].set_xlabel("milliseconds, median and middle half")
    clocks = sorted({timing.clock for _, timing in timings})
    description = "Bars of median milliseconds by shape and engine: " + "; ".join(
        f"{timing.name} {timing.batch}x{timing.sequence} {FORMATS['milliseconds'](timing.median)}"
        for _, timing in timings
    )
    caption = f"Engines take turns in every round, so that slow spells hit all alike. Clock: {', '.join(clocks)}."
    return _picture("latency", "Latency by shape and engine", description, caption, canvas)


def _draw_latency(axes: Axes, timings: Sequence[Timing], names: Sequence[str]) -> None:
    """The bars of one shape; an engine has the same colour at every shape."""
    for at, timing in enumerate(timings):
        axes.barh([at], [timing.median], color=SERIES[names.index(timing.name) % len(SERIES)], height=0.62)
        low, high = timing.quartiles
        axes.hlines([at], low, high, color=INK, linewidth=1.2)
        text = f"{FORMATS['milliseconds'](timing.median)} ms"
        axes.annotate(text, (max(high, timing.median), at), xytext=(4, -3), textcoords="offset points")
    axes.set_yticks(range(len(timings)), [timing.name for timing in timings])
    axes.set_xlim(0, 1.25 * max(max(timing.quartiles) for timing in timings))
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def _parity(run: Run) -> Picture | None:
    outputs = [
        (f"{engine.name}, {output.output}", errors)
        for engine in run.engines
        if engine.parity
        for output in engine.parity.content.outputs
        if (errors := _errors(output))
    ]
    if not outputs:
        return None
    canvas = Canvas(figsize=(WIDTH, 0.8 + 0.42 * len(outputs)), layout="constrained")
    axes = canvas.subplots()
    for at, (_, errors) in enumerate(outputs):
        for shift, (kind, actual, tolerated), color in zip((-0.16, 0.16), errors, SERIES, strict=False):
            axes.hlines(at + shift, actual, tolerated, color=LINE, linewidth=1)
            label = f"{kind} error" if at == 0 else None
            axes.plot([actual], [at + shift], "o", color=color, markersize=5, label=label)
            label = f"{kind}, tolerated" if at == 0 else None
            axes.plot([tolerated], [at + shift], "|", color=color, markersize=10, markeredgewidth=2, label=label)
    axes.set_yticks(range(len(outputs)), [label for label, _ in outputs])
    _logarithmic(axes, "x")
    axes.set(xlabel="|engine - checkpoint|, logarithmic")
    axes.invert_yaxis()
    canvas.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1)
    description = "Largest and mean error of every output against its tolerance: " + "; ".join(
        f"{label} {actual:.2g} of {tolerated:.2g}" for label, ((_, actual, tolerated), _) in outputs
    )
    return _picture(
        "parity",
        "Parity error and tolerance by output",
        description,
        "A dot left of its bar of the same colour is within the tolerance.",
        canvas,
    )


ErrorAndLimit = tuple[str, float, float]  # (kind, error, tolerated)


def _errors(output: OutputParity) -> tuple[ErrorAndLimit, ErrorAndLimit] | None:
    """The largest and the mean error, each with what is tolerated; None where a logarithmic axis has no place for
    them."""
    largest, mean = output.max_abs, output.mean_abs
    if not (largest and mean and output.max_tolerance and output.mean_tolerance):
        return None
    return ("max", largest, output.max_tolerance), ("mean", mean, output.mean_tolerance)


def _blocks(run: Run) -> Picture | None:
    """Accumulated error by block. A block without an error is not drawn: the axis is logarithmic."""
    engines = [(engine, [b for b in engine.blocks if b.accumulated_max_abs]) for engine in run.engines]
    engines = [(engine, blocks) for engine, blocks in engines if blocks]
    if not engines:
        return None
    canvas = Canvas(figsize=(WIDTH, 2.8), layout="constrained")
    axes = canvas.subplots()
    names = list(dict.fromkeys(block.block for engine in run.engines for block in engine.blocks))
    for number, (engine, blocks) in enumerate(engines):
        color = SERIES[number % len(SERIES)]
        xs = [names.index(block.block) for block in blocks]
        ys = [block.accumulated_max_abs or 0.0 for block in blocks]
        axes.plot(xs, ys, "o-", color=color, label=engine.name, markersize=4)
        tolerances = [(x, b.accumulated_max_tolerance) for x, b in zip(xs, blocks, strict=True)]
        drawn = [(x, tolerance) for x, tolerance in tolerances if tolerance]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), "_", color=color, markersize=10, markeredgewidth=1.5)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    _logarithmic(axes, "y")
    axes.set(ylabel="largest |difference|")
    axes.legend(loc="best")
    description = "Largest difference behind each block: " + "; ".join(
        f"{engine.name} {block.block} {FORMATS['error'](block.accumulated_max_abs or 0.0)}"
        for engine, blocks in engines
        for block in blocks
    )
    caption = "Where two backends part; a dash is what is tolerated there."
    return _picture("blocks", "Parity error by block", description, caption, canvas)


def _curves(run: Run) -> Picture | None:
    series, phases, end = _training_series(run)
    if "loss" not in series:
        return None
    labels = {"loss": "training loss", "residual": "ADMM residual", "flips": "mask flips, %"}
    canvas = Canvas(figsize=(WIDTH, 1.0 + 1.15 * len(series)), layout="constrained")
    panels = canvas.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axes, (key, points)) in enumerate(zip(panels, series.items(), strict=True)):
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
    description = f"Curves over {end:.0f} steps in the phases {', '.join(name for _, name in phases)}. "
    description += "; ".join(
        f"{labels[key]} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for key, points in series.items()
        if key != "flips"
    )
    caption = "The loss of each phase is a sum of its own terms, so levels of two phases do not compare. "
    caption += "The residual is how far the weights are from their projection, flips the share of mask entries that "
    caption += "changed at a dual update."
    return _picture("curves", "Training", description, caption, canvas)


def _training_series(run: Run) -> tuple[dict[str, list[tuple[float, float]]], list[tuple[float, str]], float]:
    """(points (step, value) of each curve that has some, first step and name of every phase, last step) of the logs."""
    series: dict[str, list[tuple[float, float]]] = {"loss": [], "residual": [], "flips": []}
    phases: list[tuple[float, str]] = []
    start = end = 0.0
    for stage, lines in run.logs.items():
        phase = None
        for line in lines:
            if line.phase != phase:
                phase, start = line.phase, end
                phases.append((start, phase or stage))
            end = max(end, start + line.step)
            for key, points in series.items():
                value: float | None = getattr(line, key)
                if value is not None:
                    points.append((start + line.step, value))
    return {key: points for key, points in series.items() if points}, phases, end


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
