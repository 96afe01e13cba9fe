"""Charts of the documents: for both themes, with a line at zero, units, and names that do not overlap."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tools import ROOT
from tools.benchmarks.measuring import load_record
from tools.benchmarks.scaling import FILE, STAGES, Record
from tools.benchmarks.scaling_chart import draw, figure_of, spread
from tools.charts import THEMES, Chart
from tools.results.plots import Bar, draw_bars, sensitivity_map
from tools.results.statistics import Difference

LIGHT = THEMES["light"]
BARS = [
    Bar("obs-2:4+W8", 0.84, Difference(0.01, (-0.02, 0.04), (0, 1))),
    Bar("paper-2:4+W4", 0.904, Difference(-0.09, (-0.15, -0.02), (0,))),
    Bar("nxm-2:4+W4", 0.904, Difference(0.05, (0.01, 0.09), (0,))),
]


def boxes_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is seen, but for numbers on axes, and its box in pixels."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    named = [text for text in texts if re.search("[a-z]", text.get_text())]
    return [(text.get_text(), text.get_window_extent()) for text in named]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share a point."""
    return [(a, b) for (a, one), (b, other) in combinations(boxes_of(figure), 2) if one.overlaps(other)]


def cut(figure: Figure) -> list[str]:
    """Texts that the edge cuts."""
    width, height = figure.bbox.width + 1, figure.bbox.height + 1
    found = boxes_of(figure)
    return [text for text, box in found if box.x0 < -1 or box.x1 > width or box.y0 < -1 or box.y1 > height]


def test_differences_stand_against_a_line_at_zero_and_are_coloured_by_what_was_found() -> None:
    axes = draw_bars(BARS, "CoLA", "MCC x 100", LIGHT).axes[0]
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    assert [line[0, 0] for line in lines if line[:, 1].tolist() == [0, 1]] == [0.0]
    points = [line.get_color() for line in axes.lines if line.get_marker() == "o"]
    assert points == [LIGHT.series[5], LIGHT.series[1], LIGHT.series[2]], "no difference found, worse, better"
    assert axes.get_xlabel() == "difference in MCC x 100"
    assert axes.get_yticklabels()[0].get_text() == "obs-2:4+W8, 84.0%"


def test_no_two_names_of_a_chart_overlap_and_none_is_cut() -> None:
    many = [Bar(f"a-rather-long-row-{i}", 0.9, Difference(0, (-0.1, 0.1), (0,))) for i in range(20)]
    for figure in (
        draw_bars(BARS, "CoLA", "F1 and accuracy x 100", LIGHT),
        draw_bars(many, "rotten tomatoes", "accuracy x 100", LIGHT),
        figure_of(load_record(FILE, Record), STAGES, LIGHT),
    ):
        assert overlapping(figure) == []
        assert cut(figure) == []


def test_names_at_the_end_of_lines_are_spread() -> None:
    spread_out = spread([2.0, 1.0, 1.01, 9.0], 1.5)
    assert all(upper >= 1.5 * lower for lower, upper in pairwise(sorted(spread_out)))
    assert spread_out[1] == 1.0
    assert spread_out[3] == 9.0


def test_a_chart_is_there_for_both_themes_without_a_background(tmp_path: Path) -> None:
    chart = Chart("seconds", 'a "chart"')
    draw_chart = load_record(FILE, Record)
    draw(draw_chart, STAGES, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "performance-scaling-dark.svg",
        "performance-scaling-light.svg",
    ]
    for name, theme in THEMES.items():
        text = (tmp_path / f"performance-scaling-{name}.svg").read_text(encoding="utf-8")
        assert theme.text in text
        assert not re.search(r"fill: #f{6}|fill: black|stroke: #0{6}", text), "nothing is white or black by default"
    assert chart.markup() == (
        '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="images/seconds-dark.svg">\n'
        '  <img alt="a &quot;chart&quot;" src="images/seconds-light.svg">\n</picture>'
    )


def test_the_colour_bar_of_sensitivities_has_a_unit(tmp_path: Path) -> None:
    table = tmp_path / "sensitivity.csv"
    table.write_text("weight,option,kl\nlayer.0.a.weight,W8,0.001\nlayer.0.b.weight,W8,0.1\n", encoding="utf-8")
    sensitivity_map(table, Chart("map", "a map"), tmp_path)
    assert "divergence from the dense model, nats, log scale" in (tmp_path / "map-dark.svg").read_text(encoding="utf-8")


def test_every_chart_in_the_documents_is_there_for_both_themes() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        text = document.read_text(encoding="utf-8")
        names = re.findall(r'(?:srcset|src)="(images/[^"]+)"', text)
        assert all((ROOT / "docs" / name).is_file() for name in names)
        assert sum("-dark" in name for name in names) == sum("-light" in name for name in names)
