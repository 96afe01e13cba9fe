"""Pictures of engines: what they differ by, latency, parity by output and by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from nxm_export.reporting.drawing import WIDTH, Picture, logarithmic, picture
from nxm_export.reporting.figures import FORMATS
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.svg import INK, LINE, PANEL, SERIES
from nxm_export.reporting.verdicts import compressed_value, dense_value, main_engine, metric

if TYPE_CHECKING:
    from engines.benchmark.latency import Timing
    from engines.parity.bisect_reports import BlockParity
    from engines.parity.tolerance import OutputParity

Difference = tuple[str, float, tuple[float, float]]  # (of what, value, 95 % interval)


def differences(run: Run) -> Picture | None:
    """The paired differences of a metric against a line at zero."""
    rows = _differences(run)
    if not rows:
        return None
    description = f"Differences in {metric(run)} with their paired 95 % intervals, against a line at zero: "
    description += "; ".join(f"{name} {value:+.4f} ({low:+.4f} to {high:+.4f})" for name, value, (low, high) in rows)
    caption = (
        "Bars are paired 95 % intervals: both models on the same samples. Where a bar crosses the line at zero, no "
    )
    caption += "difference was found, which is no proof that there is none."
    return picture("difference", f"Difference in {metric(run)}", description, caption, draw_differences(run, rows))


def _differences(run: Run) -> list[Difference]:
    """The compressed engine minus the dense model, and every engine minus its own checkpoint."""
    rows: list[Difference] = []
    dense, compressed, engine = dense_value(run), compressed_value(run), main_engine(run)
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    ends = [f.number for f in (dense, compressed, low, high) if f is not None and f.number is not None]
    if len(ends) == 4:
        name = engine.name if engine else "compressed"
        rows.append((f"{name} minus the dense model", ends[1] - ends[0], (ends[2], ends[3])))
    for entry in run.engines:
        report = entry.parity.content if entry.parity else None
        if report and report.difference is not None and report.difference_interval is not None:
            rows.append((f"{entry.name} minus its checkpoint", report.difference, report.difference_interval))
    return rows


def draw_differences(run: Run, rows: Sequence[Difference]) -> Canvas:
    """One bar a row, its name above it, and the line at zero that it is read against."""
    canvas = Canvas(figsize=(WIDTH, 0.75 + 0.38 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    axes.axvline(0, color=INK, linewidth=1.1)
    reach = max(abs(end) for _, value, interval in rows for end in (value, *interval)) or 0.01
    for at, (name, value, (low, high)) in enumerate(rows):
        color = SERIES[1 if name.endswith("dense model") else 0]
        axes.hlines([at], low, high, color=color, linewidth=2.2)
        axes.plot([value], [at], "o", color=color, markersize=5)
        axes.annotate(
            f"{name}: {value:+.4f}",
            (-1.1 * reach, at),
            xytext=(0, 4),
            textcoords="offset points",
            va="bottom",
            color=INK,
            bbox={"facecolor": PANEL, "edgecolor": "none", "pad": 0.6},  # the lines behind it end before the text
        )
    axes.set(xlim=(-1.15 * reach, 1.15 * reach), ylim=(len(rows) - 0.6, -0.75), yticks=[])
    axes.set_xlabel(f"difference in {metric(run)} (no unit); right of 0 is better")
    axes.locator_params(axis="x", nbins=5)
    return canvas


def latency(run: Run) -> Picture | None:
    """Bars of median times, by shape."""
    timings = [(bench.file, timing) for bench in run.benches for timing in bench.content.timings]
    if not timings:
        return None
    shapes = list(dict.fromkeys((file, timing.batch, timing.sequence) for file, timing in timings))
    names = list(dict.fromkeys(timing.name for _, timing in timings))
    several = len({file for file, _ in timings}) > 1
    canvas = Canvas(figsize=(WIDTH, 0.3 + len(shapes) * (0.45 + 0.36 * len(names))), layout="constrained")
    panels = canvas.subplots(len(shapes), 1, squeeze=False)[:, 0]
    for axes, shape in zip(panels, shapes, strict=True):
        file, batch, sequence = shape
        _draw_latency(axes, [t for f, t in timings if (f, t.batch, t.sequence) == shape], names)
        axes.set_title(f"batch {batch} x {sequence} tokens" + (f", {file}" if several else ""))
    panels[-1].set_xlabel("time of a batch, ms: median, middle half of rounds")
    clocks = sorted({timing.clock for _, timing in timings})
    description = "Bars of median milliseconds by shape and engine: " + "; ".join(
        f"{timing.name} {timing.batch}x{timing.sequence} {FORMATS['milliseconds'](timing.median)}"
        for _, timing in timings
    )
    caption = f"Engines take turns in every round, so that slow spells hit all alike. Clock: {', '.join(clocks)}."
    return picture("latency", "Latency by shape and engine", description, caption, canvas)


def _draw_latency(axes: Axes, timings: Sequence[Timing], names: Sequence[str]) -> None:
    """The bars of one shape, each below its name; an engine has the same colour at every shape."""
    for at, timing in enumerate(timings):
        axes.barh([at], [timing.median], color=SERIES[names.index(timing.name) % len(SERIES)], height=0.34)
        low, high = timing.quartiles
        axes.hlines([at], low, high, color=INK, linewidth=1.2)
        text = f"{timing.name}: {FORMATS['milliseconds'](timing.median)} ms"
        axes.annotate(text, (0, at - 0.17), xytext=(2, 2), textcoords="offset points", va="bottom", color=INK)
    axes.set(yticks=[], ylim=(len(timings) - 0.6, -0.85))
    axes.set_xlim(0, 1.05 * max(max(timing.median, *timing.quartiles) for timing in timings) or 1)


def parity(run: Run) -> Picture | None:
    """Errors of every output against what is tolerated, on a logarithmic axis."""
    outputs = [
        (f"{name}, {output.output}", errors)
        for engine in run.engines
        for name, report in engine.comparisons
        for output in report.content.outputs
        if (errors := _errors(output))
    ]
    if not outputs:
        return None
    canvas = Canvas(figsize=(WIDTH, 0.6 + 0.62 * len(outputs)), layout="constrained")
    axes = canvas.subplots()
    ticks: list[tuple[float, str]] = []
    for number, (label, errors) in enumerate(outputs):
        axes.annotate(label, (0, 3 * number + 0.2), xycoords=("axes fraction", "data"), va="center", color=INK)
        for at, (kind, actual, tolerated), color in zip((1, 2), errors, SERIES, strict=False):
            axes.hlines(3 * number + at, actual, tolerated, color=LINE, linewidth=1)
            axes.plot([actual], [3 * number + at], "o", color=color, markersize=5)
            axes.plot([tolerated], [3 * number + at], "|", color=color, markersize=10, markeredgewidth=2)
            ticks.append((3 * number + at, kind))
    axes.set_yticks([at for at, _ in ticks], [kind for _, kind in ticks])
    axes.grid(False, axis="y")
    logarithmic(axes, "x")
    axes.set(xlabel="|engine - checkpoint|, unit of the output, log scale", ylim=(3 * len(outputs) - 0.4, -0.4))
    description = "Largest and mean error of every output against its tolerance: " + "; ".join(
        f"{label} {actual:.2g} of {tolerated:.2g}" for label, ((_, actual, tolerated), _) in outputs
    )
    caption = "A dot is the error, the upright bar what is tolerated: a dot left of its bar passes."
    return picture("parity", "Parity error and tolerance by output", description, caption, canvas)


ErrorAndLimit = tuple[str, float, float]  # (kind, error, tolerated)


def _errors(output: OutputParity) -> tuple[ErrorAndLimit, ErrorAndLimit] | None:
    """The largest and the mean error, each with what is tolerated; None where a logarithmic axis has no place for
    them."""
    largest, mean = output.max_abs, output.mean_abs
    if not (largest and mean and output.max_tolerance and output.mean_tolerance):
        return None
    return ("largest", largest, output.max_tolerance), ("mean", mean, output.mean_tolerance)


def blocks(run: Run) -> Picture | None:
    """Accumulated error by block. A block without an error is not drawn: the axis is logarithmic."""
    engines = [(engine.name, [b for b in engine.blocks if b.accumulated_max_abs]) for engine in run.engines]
    engines = [(name, found) for name, found in engines if found]
    if not engines:
        return None
    names = list(dict.fromkeys(block.block for engine in run.engines for block in engine.blocks))
    canvas = Canvas(figsize=(WIDTH, 2.9), layout="constrained")
    axes = canvas.subplots()
    for number, (engine, found) in enumerate(engines):
        _draw_blocks(axes, engine, found, names, SERIES[number % len(SERIES)])
    step = -(-len(names) // 8)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=30, ha="right")
    logarithmic(axes, "y")
    axes.set(ylabel="largest |difference|, hidden state's unit", xlabel="block of the encoder")
    if engines[1:]:
        canvas.legend(loc="outside upper left", ncols=1, handletextpad=0.3)
    description = "Largest difference behind each block: " + "; ".join(
        f"{engine} {block.block} {FORMATS['error'](block.accumulated_max_abs or 0.0)}"
        for engine, found in engines
        for block in found
    )
    of = "" if engines[1:] else f" of {engines[0][0]}"
    caption = f"The error{of} behind each block; a dash is what is tolerated there."
    return picture("blocks", "Parity error by block", description, caption, canvas)


def _draw_blocks(axes: Axes, engine: str, found: Sequence[BlockParity], names: Sequence[str], color: str) -> None:
    xs = [names.index(block.block) for block in found]
    axes.plot(xs, [b.accumulated_max_abs or 0.0 for b in found], "o-", color=color, label=engine, markersize=4)
    drawn = [(x, b.accumulated_max_tolerance) for x, b in zip(xs, found, strict=True) if b.accumulated_max_tolerance]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), "_", color=color, markersize=10, markeredgewidth=1.5)
