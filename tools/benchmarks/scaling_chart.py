"""The chart of docs/performance.md on scaling. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tools.charts import Chart, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tools.benchmarks.scaling import Record

CHART = Chart(
    "performance-scaling",
    "Seconds of each stage over parameters, and of calibration over sequences; all axes logarithmic.",
)


def draw(record: Record, stages: Sequence[str], directory: Path) -> None:
    """The log-log plot, for both themes."""
    CHART.write(directory, lambda theme: figure_of(record, stages, theme))


def figure_of(record: Record, stages: Sequence[str], theme: Theme) -> Figure:
    """Every line with its name and exponent at its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    parameters = [row["parameters"] / 1e6 for row in record["sizes"]]
    ends = {stage: record["sizes"][-1]["stages"][stage]["seconds"] for stage in stages}
    for stage, color in zip(stages, theme.series, strict=False):
        seconds = [row["stages"][stage]["seconds"] for row in record["sizes"]]
        left.plot(parameters, seconds, "o-", color=color)
    heights = spread([ends[stage] for stage in stages])
    for stage, height, color in zip(stages, heights, theme.series, strict=False):
        text = f"{stage}, exponent {record['exponents'][stage]:.2f}"
        left.annotate(text, (1.02, height), xycoords=("axes fraction", "data"), va="center", color=color)
    counts = [row["sequences"] for row in record["calibration"]]
    right.plot(counts, [row["seconds"] for row in record["calibration"]], "o-", color=theme.series[0])
    right.set_title(f"calibration, exponent {record['exponents']['calibration']:.2f}", color=theme.series[0])
    left.set(xlabel="parameters, millions, log scale", ylabel="seconds, log scale")
    right.set(xlabel="sequences, log scale", ylabel="seconds, log scale")
    for axes, sizes in ((left, parameters), (right, counts)):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(visible=True)
    return figure


def spread(values: Sequence[float], factor: float = 1.45) -> list[float]:
    """The values, in their order, moved up to where each is `factor` above the next lower one: names do not overlap."""
    heights = list(values)
    order = sorted(range(len(values)), key=lambda place: values[place])
    for lower, upper in pairwise(order):
        heights[upper] = max(heights[upper], factor * heights[lower])
    return heights
