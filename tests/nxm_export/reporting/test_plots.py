"""The pictures of a page, by what matplotlib draws: the line at zero, units, and text that a telephone shows."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from engines.benchmark.latency import BenchReport, Timing
from engines.parity.bisect_reports import BisectReport, BlockParity
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.train_log import TrainLogLine
from nxm_export.reporting import drawing, engine_plots, plots
from nxm_export.reporting.figures import RunFile
from nxm_export.reporting.matrices import Sample
from nxm_export.reporting.run_facts import Run
from tests.support.made_runs import engine, made_run, matrix, parity
from tests.support.records import SUMMARY

FIGURE_AT_390 = 390 - 2 * 20 - 2 * 17  # CSS pixels: the page's and the figure's padding, and its border
LEAST_TEXT = 8.0  # CSS pixels of the smallest text on a telephone


def whole_run() -> Run:
    """A run with the numbers for every picture but those of a search."""
    block = BlockParity(
        block="layer.0",
        accumulated_max_abs=1e-6,
        accumulated_mean_abs=1e-7,
        accumulated_max_tolerance=1e-3,
        accumulated_steps=None,
        isolated_max_abs=2e-7,
        isolated_mean_abs=1e-7,
        isolated_steps=None,
        isolated_max_tolerance=0.0078125,
        isolated_mean_tolerance=0.0078125,
        isolated_unchanged_share=1.0,
        isolated_unchanged_required=0.0,
        passed=True,
        reason="",
    )
    found = BisectReport(
        passed=True,
        engine="engine",
        engine_sha256="0" * 64,
        backend="ort",
        samples=2,
        tokens=20,
        first_diverging=None,
        kernels_changed=None,
        kernels=None,
        outputs_equal=True,
        blocks=(block, replace(block, block="layer.1")),
        reason="",
    )
    bench = BenchReport(timings=(Timing("ort-cpu-int8", 1, 32, 0.25, (0.2, 0.3), 9),), ratios=())
    entry = replace(engine(compared=parity()), bisection=RunFile("compare/ort-cpu-int8/bisect.json", found, {}))
    log = (TrainLogLine("admm", 1, 0.5, residual=0.25, flips=0.1), TrainLogLine("qat", 2, 0.25))
    return replace(
        made_run(entry),
        matrices=tuple(matrix(number, role) for number in range(6) for role in ("query", "key", "value")),
        benches=(RunFile("bench/latency.json", bench, {}),),
        logs={"checkpoint": log},
        sample=Sample("a", np.array([[1, 0, 0, -3] * 4] * 8, np.int8), WeightSpec.parse("2:4+W8")),
    )


def draw(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, Canvas]:
    """What every picture of a run is drawn on, by key."""
    drawn: dict[str, Canvas] = {}

    def keep(key: str, title: str, description: str, caption: str, canvas: Canvas) -> drawing.Picture:
        drawn[key] = canvas
        return drawing.Picture(key, title, description, caption, "<svg/>")

    monkeypatch.setattr(plots, "picture", keep)
    monkeypatch.setattr(engine_plots, "picture", keep)
    plots.pictures(run)
    return drawn


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Canvas]:
    """The pictures of `whole_run`."""
    return draw(whole_run(), monkeypatch)


def uprights(canvas: Canvas) -> list[float]:
    """Where lines stand that cross a panel from top to bottom."""
    (axes,) = canvas.axes
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    return [float(line[0, 0]) for line in lines if line[:, 1].tolist() == [0, 1]]


def test_differences_stand_against_a_line_at_zero_within_the_axis(canvases: dict[str, Canvas]) -> None:
    canvas = canvases["difference"]
    assert uprights(canvas) == [0.0]
    low, high = canvas.axes[0].get_xlim()
    assert low == -high < -0.5, "the interval of the summary begins at -0.5"
    texts = [text.get_text() for text in canvas.axes[0].texts]
    assert texts == ["ort-cpu-int8 minus the dense model: -0.2500", "ort-cpu-int8 minus its checkpoint: +0.0000"]


def test_a_run_without_paired_intervals_has_no_picture_of_differences() -> None:
    summary = replace(SUMMARY, difference_interval=(None, None))
    assert engine_plots.differences(made_run(engine(), summary=summary)) is None


def test_differences_that_are_all_zero_have_an_axis() -> None:
    canvas = engine_plots.draw_differences(made_run(engine()), [("a minus b", 0.0, (0.0, 0.0))])
    low, high = canvas.axes[0].get_xlim()
    assert low < 0 < high


UNITS = {
    "difference": {"x": "difference in accuracy (no unit); right of 0 is better"},
    "tradeoff": {"x": "compression of the matrices (hw), %", "y": "accuracy (no unit)"},
    "sensitivity": {"x": "number and colour: squared weights lost, %", "y": "block"},
    "latency": {"x": "time of a batch, ms: median, middle half of rounds"},
    "parity": {"x": "|engine - checkpoint|, unit of the output, log scale"},
    "blocks": {"x": "block of the encoder", "y": "largest |difference|, hidden state's unit"},
    "plan": {"x": "N:M pattern and bits of the weights", "y": "block"},
}


def test_every_axis_says_its_unit(canvases: dict[str, Canvas]) -> None:
    assert canvases.keys() == {*UNITS, "sample", "curves"}
    for key, labels in UNITS.items():
        (axes,) = canvases[key].axes
        assert {"x": axes.get_xlabel(), "y": axes.get_ylabel()} == {"x": "", "y": ""} | labels
    curves = [axes.get_ylabel() for axes in canvases["curves"].axes]
    assert curves == ["loss (no unit)", "|W - Z| / |W|", "mask flips, %"]
    assert canvases["curves"].axes[-1].get_xlabel() == "optimizer steps, all phases in a row"
    above, below, bar = canvases["sample"].axes
    assert (above.get_ylabel(), below.get_xlabel()) == ("output, index", "input along K, index")
    assert bar.get_ylabel() == "integer code"


@pytest.mark.parametrize(("task", "unit"), [("classification", "nats"), ("regression", "score^2")])
def test_a_sensitivity_is_in_the_unit_of_its_task(task: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"logits": ("batch", "labels")}
    spec = IOSpec("bert", task, inputs=("input_ids",), outputs=outputs, labels=("0", "1"), max_length=8, pad_id=0)
    run = replace(made_run(), spec=spec, matrices=(replace(matrix(0), sensitivity=0.5, projection=None),))
    label = draw(run, monkeypatch)["sensitivity"].axes[0].get_xlabel()
    assert label == f"number and colour: divergence, {unit}"


def test_text_is_legible_on_a_telephone() -> None:
    for picture in plots.pictures(whole_run()).values():
        box = re.search(r'viewBox="0 0 ([\d.]+) ', picture.svg)
        assert box is not None
        scale = FIGURE_AT_390 / float(box[1])
        sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)', picture.svg)]
        assert sizes
        assert min(sizes) * scale >= LEAST_TEXT, picture.key
