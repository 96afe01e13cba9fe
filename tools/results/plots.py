"""Pictures of the results as SVG: accuracy against compression, and where compression hurts. Needs matplotlib."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nxm_export.errors import ArtifactError
from tools.results.rows import row_named
from tools.results.statistics import TaskStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "obs": "#17becf",
    "admm": "#8c564b",
    "obs-refit": "#e377c2",
    "nxm": "#1f77b4",
    "magnitude": "#ff7f0e",
    "sr-ste": "#2ca02c",
    "one-shot": "#7f7f7f",
    "paper": "#d62728",
}
SEARCHED = "#9467bd"


def accuracy_against_compression(statistics: TaskStatistics, counting: str, file: Path) -> bool:
    """Mean score of every compressed row but ablations over its compression, with the 95 % interval.

    The dense row is a line. Draws nothing, and says so by False, for fewer than two different compressions.
    """
    points = []
    for row in (row for row in statistics.rows if not row_named(row).changes):
        facts = statistics.compressed(row)
        if facts:
            sizes = [fact.compression.by(counting) for fact in facts]
            points.append((100 * float(np.mean(sizes)), row, facts[0].recipe))
    if len({round(size, 1) for size, _, _ in points}) < 2:
        return False
    figure, axes = _figure(7.2, 4.4)
    if "dense" in statistics.rows:
        low, high = (100 * bound for bound in statistics.interval("dense"))
        mean = 100 * float(np.mean(statistics.scores("dense")))
        axes.axhline(mean, color="black", linewidth=1, label="dense")
        axes.axhspan(low, high, color="black", alpha=0.06, linewidth=0)
    for number, (size, row, recipe) in enumerate(points):
        mean = 100 * float(np.mean(statistics.scores(row)))
        low, high = (100 * bound for bound in statistics.interval(row))
        color = SEARCHED if "search" in row else COLORS.get(recipe, "black")
        shift = 0.12 * ((number % 5) - 2)  # rows of one size would hide each other
        axes.errorbar(size + shift, mean, yerr=[[max(0, mean - low)], [max(0, high - mean)]], fmt="o", color=color)
        axes.annotate(row, (size + shift, mean), textcoords="offset points", xytext=(5, 4), fontsize=7, color=color)
    axes.margins(x=0.16)  # names stand to the right of their points
    axes.set_xlabel(f"encoder compression by `{counting}`, %")
    axes.set_ylabel(f"{statistics.task.metric_title} x 100, dev")
    axes.set_title(f"{statistics.task.title}: mean over seeds, 95 % intervals")
    axes.grid(alpha=0.25)
    _save(figure, file)
    return True


def sensitivity_map(sensitivities: Path, file: Path) -> None:
    """Heat map of a search's sensitivities: one line per weight, one column per option, log10 of the KL to the dense
    model."""
    with sensitivities.open(encoding="utf-8", newline="") as stream:
        rows = [(row["weight"], row["option"], float(row["kl"])) for row in csv.DictReader(stream)]
    if not rows:
        raise ArtifactError(f"{sensitivities}: no rows in it; remove it")
    weights = list(dict.fromkeys(weight for weight, _, _ in rows))
    options = list(dict.fromkeys(option for _, option, _ in rows))
    values = np.full((len(weights), len(options)), np.nan)
    for weight, option, kl in rows:
        values[weights.index(weight), options.index(option)] = np.log10(max(kl, 1e-9))
    figure, axes = _figure(2.6 + 0.8 * len(options), 1.2 + 0.17 * len(weights))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(options)), options)
    axes.set_yticks(range(len(weights)), _short(weights), fontsize=6)
    figure.colorbar(image, label="log10 KL(dense || one weight compressed)")
    _save(figure, file)


def _short(weights: Sequence[str]) -> list[str]:
    """Weight names without what all of them share."""
    parts = [weight.removesuffix(".weight").split(".") for weight in weights]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "nxm"  # the same picture is the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})
