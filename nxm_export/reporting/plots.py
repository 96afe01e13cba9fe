"""Pictures of a run as inline SVG: accuracy against compression, the plan, its weights, and training; those of engines
are in `engine_plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from nxm_export.contract.tasks import TASKS
from nxm_export.reporting import engine_plots
from nxm_export.reporting.drawing import STYLE, WIDTH, Picture, logarithmic, picture
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.svg import INK, LINE, MUTED, SERIES
from nxm_export.reporting.verdicts import compressed_value, compression, dense_value, main_engine, metric

if TYPE_CHECKING:
    from matplotlib.typing import ColorType

# What a divergence of a model's outputs is measured in, by the task's kind of output.
_UNITS = {"softmax": "nats", "sigmoid": "nats", "span": "nats", "vector": "share of |v|^2", "identity": "score^2"}
# Signed codes, with a step at zero: the smallest must not look like the empty cells beside them, on white or on black.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, "#8c2d04"), (0.4999, "#fdbe85"), (0.5, "#9ecae1"), (1.0, "#08519c")]
)


def pictures(run: Run) -> dict[str, Picture]:
    """Every picture that the run has the numbers for, by key."""
    of_engines = (engine_plots.differences, engine_plots.latency, engine_plots.parity, engine_plots.blocks)
    makers = (_tradeoff, _sensitivity, _plan_map, _sample, *of_engines, _curves)
    with mpl.rc_context(STYLE):
        made = [maker(run) for maker in makers]
    return {drawn.key: drawn for drawn in made if drawn is not None}


def _tradeoff(run: Run) -> Picture | None:
    dense, compressed, hw = dense_value(run), compressed_value(run), compression(run, "hw")
    if dense is None or compressed is None or hw is None:
        return None
    if dense.number is None or compressed.number is None or hw.number is None:
        return None  # a metric that is NaN has no place in a picture
    name, front = metric(run), _front(run)
    canvas = Canvas(figsize=(WIDTH, 4.6 if front else 2.3), layout="constrained")
    panels = canvas.subplots(2 if front else 1, 1, squeeze=False)[:, 0]
    points = [
        ("dense, FP32", 0.0, dense.number, dense.shown("score").text, _interval(run, False)),
        (_plan_text(run), hw.number, compressed.number, compressed.shown("score").text, _interval(run, True)),
    ]
    for number, (label, x, y, text, bounds) in enumerate(points):
        if bounds:
            panels[0].vlines(x * 100, bounds[0], bounds[1], color=SERIES[number], linewidth=1.6)
        panels[0].plot([x * 100], [y], "os"[number], color=SERIES[number], markersize=7)
        side = -1 if x > 0.5 else 1  # the name stands on the side with room
        panels[0].annotate(
            f"{label}\n{text}",
            (x * 100, y),
            xytext=(8 * side, 5),
            textcoords="offset points",
            ha="left" if side == 1 else "right",
            color=INK,
        )
    panels[0].axhline(dense.number, color=SERIES[0], linewidth=0.8, linestyle=(0, (4, 3)))
    panels[0].set(ylabel=f"{name} (no unit)", xlim=(-6, 108))
    panels[0].margins(y=0.15)
    description = "; ".join(f"{label}: {text} at {x:.2%} compression" for label, x, _, text, _ in points)
    if front:
        _draw_front(panels[1], run, front)
        description += f"; below, {len(front)} plans of the search, by divergence from the dense model without training"
    panels[-1].set_xlabel("compression of the matrices (hw), %")
    caption = "The dense model and the plan of this run. Bars are 95 % intervals of each model by itself; the paired "
    caption += "interval of the difference is tighter and stands in the table."
    if front:
        caption += " Below, the plans of the search, compressed one-shot: it ranks them, and says nothing of accuracy."
    return picture("tradeoff", f"{name.capitalize()} against compression", description, caption, canvas)


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
    axes.set(ylabel=f"divergence, {_divergence_unit(run)}")
    if all(y > 0 for _, y, _ in front):
        logarithmic(axes, "y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.2, columnspacing=1)


def _divergence_unit(run: Run) -> str:
    task = TASKS.get(run.spec.task) if run.spec else None
    return _UNITS.get(task.output_kind, "no unit") if task else "unit not known"


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
        text = _short(value) if measured else f"{value * 100:.1f}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=_cell_size(roles))
    unit = f"divergence, {_divergence_unit(run)}" if measured else "squared weights lost, %"
    axes.set_xlabel(f"number and colour: {unit}{', log scale' if spread else ''}")
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
    return picture("sensitivity", f"{what.capitalize()} by layer and matrix", description, caption, canvas)


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
        place = (roles.index(role) + 0.5, blocks.index(block) + 0.5)
        size = _cell_size(roles, max(len(option) for option in options))
        axes.text(*place, str(matrix.spec), ha="center", va="center", color="#111111", fontsize=size)
    axes.set_xlabel("N:M pattern and bits of the weights")
    description = f"The plan of every matrix, one row per encoder block, one column per matrix: {_plan_text(run)}."
    return picture("plan", "The plan, matrix by matrix", description, "A cell for every matrix.", canvas)


def _short(value: float) -> str:
    """Two digits in the fewest characters, as in ``3e-5``."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.2g}"


def _cell_size(roles: Sequence[str], characters: int = 6) -> float:
    """The size of text that fits into a cell, in points: a character is about 0.6 of it wide."""
    return min(7.5, 0.87 * WIDTH * 72 / len(roles) / (0.66 * characters))


def _map_axes(blocks: Sequence[int], roles: Sequence[str]) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(WIDTH, 0.85 + 0.22 * len(blocks)), layout="constrained")
    axes = canvas.subplots()
    axes.set(xlim=(0, len(roles)), ylim=(len(blocks), 0), ylabel="block")
    names = [role.replace("_", "\n") for role in roles]
    axes.set_xticks(np.arange(len(roles)) + 0.5, names, fontsize=_cell_size(roles, 8))
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
    codes = above.imshow(
        np.ma.masked_equal(values, 0),
        cmap=_SIGNED,
        norm=TwoSlopeNorm(0, -largest, largest),
        interpolation="none",
        aspect="equal",
    )
    bar = canvas.colorbar(codes, ax=[above, below], shrink=0.5, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label("integer code" if spec.weight_bits else "weight (no unit)")
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
        axes.set(ylabel="output, index")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if spec.pattern:
            for edge in range(0, columns + 1, spec.pattern.m):
                axes.axvline(edge - 0.5, color=LINE, linewidth=0.5)
    below.set_xlabel("input along K, index")
    zeros = int((values == 0).sum())
    description = f"The first {rows} output channels and {columns} inputs of {run.sample.name}: "
    description += f"{zeros} of {values.size} stored {what} are zero."
    caption = f"{run.sample.name}, planned {spec}: read back from the checkpoint, rows are output channels."
    return picture("sample", "Weights and mask of one matrix", description, caption, canvas)


def _curves(run: Run) -> Picture | None:
    series, phases, end = _training_series(run)
    if "loss" not in series:
        return None
    labels = {"loss": "loss (no unit)", "residual": "|W - Z| / |W|", "flips": "mask flips, %"}
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
    caption += "|W - Z| / |W| is how far the weights are from their projection, flips the share of mask entries that "
    caption += "changed at a dual update."
    return picture("curves", "Training", description, caption, canvas)


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
