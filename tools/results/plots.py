"""Pictures of the results as SVG: what compression costs, and where it hurts. Needs matplotlib."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nxm_export.errors import ArtifactError
from tools.charts import Chart, Theme
from tools.results.rows import row_named
from tools.results.statistics import Difference, TaskStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bar:
    """A row of the picture: its compression, and its paired difference to the dense row."""

    row: str
    compression: float
    difference: Difference


def bars(statistics: TaskStatistics, counting: str) -> list[Bar]:
    """Every compressed row but ablations that shares a seed with the dense row, the least compressed first."""
    found = []
    for row in (row for row in statistics.rows if not row_named(row).changes):
        facts = statistics.compressed(row)
        difference = statistics.difference(row, "dense") if facts else None
        if difference:
            found.append(Bar(row, float(np.mean([fact.compression.by(counting) for fact in facts])), difference))
    return sorted(found, key=lambda bar: (bar.compression, bar.row))


def cost_of_compression(statistics: TaskStatistics, counting: str, title: str, chart: Chart, directory: Path) -> bool:
    """Paired difference of every row to the dense one, with its 95 % interval, against a line at zero.

    Draws nothing, and says so by False, for fewer than two different compressions.
    """
    rows = bars(statistics, counting)
    if len({round(bar.compression, 3) for bar in rows}) < 2:
        return False
    unit = f"{statistics.task.metric_title} x 100"
    chart.write(directory, lambda theme: draw_bars(rows, title, unit, theme))
    return True


def draw_bars(rows: Sequence[Bar], title: str, unit: str, theme: Theme) -> Figure:
    """A line for each row with its name and compression at the left; what crosses the line at zero is grey."""
    figure = _figure(7.6, 1.3 + 0.27 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color=theme.text, linewidth=1.2)
    for at, bar in enumerate(rows):
        low, high = (100 * bound for bound in bar.difference.interval)
        color = theme.series[1] if high < 0 else theme.series[2] if low > 0 else theme.series[5]
        axes.hlines([at], low, high, color=color, linewidth=2.4)
        axes.plot([100 * bar.difference.value], [at], "o", color=color, markersize=6)
    axes.set_yticks(range(len(rows)), [f"{bar.row}, {bar.compression:.1%}" for bar in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"difference in {unit}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    figure.suptitle(
        f"{title}, dev: score minus that of the dense model, mean over seeds, 95 % interval\n"
        "by compression; orange: worse, green: better, grey: no difference found",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def sensitivity_map(sensitivities: Path, chart: Chart, directory: Path) -> None:
    """Heat map of a search's sensitivities: one line per weight, one column per option."""
    with sensitivities.open(encoding="utf-8", newline="") as stream:
        rows = [(row["weight"], row["option"], float(row["kl"])) for row in csv.DictReader(stream)]
    if not rows:
        raise ArtifactError(f"{sensitivities}: no rows in it; remove it")
    weights = list(dict.fromkeys(weight for weight, _, _ in rows))
    options = list(dict.fromkeys(option for _, option, _ in rows))
    values = np.full((len(weights), len(options)), np.nan)
    for weight, option, kl in rows:
        values[weights.index(weight), options.index(option)] = max(kl, 1e-9)

    def draw(_: Theme) -> Figure:  # the map is readable on either ground
        from matplotlib.colors import LogNorm

        figure = _figure(2.8 + 0.9 * len(options), 1.2 + 0.2 * len(weights))
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap="viridis", norm=LogNorm(np.nanmin(values), np.nanmax(values)))
        axes.set_xticks(range(len(options)), options)
        axes.set_yticks(range(len(weights)), _short(weights), fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("this weight's N:M pattern and bits, all others dense")
        bar = figure.colorbar(image, format=lambda value, _: f"{value:.0e}")
        bar.ax.minorticks_off()
        bar.set_label("divergence from the dense model, nats, log scale")
        return figure

    chart.write(directory, draw)


def _short(weights: Sequence[str]) -> list[str]:
    """Weight names without what all of them share."""
    parts = [weight.removesuffix(".weight").split(".") for weight in weights]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
