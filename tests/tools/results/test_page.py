"""The page says what the predictions of the records say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nxm_export.data.metrics import metric_named, paired_interval
from tests.support.intervals import interval
from tests.support.results_book import DRAWS, LABELS, Book, compressed, flipped, searched
from tools import ROOT
from tools.results.bootstrap import resampled
from tools.results.page import render
from tools.results.readme import SHOWN, results_table
from tools.results.records import (
    Compression,
    CompressionFacts,
    Sizes,
    decode_classes,
)
from tools.results.statistics import overall
from tools.results.store import RESULTS


def test_the_numbers_of_a_fixed_set_of_records(book: Book) -> None:
    facts = replace(
        compressed(),
        compression=Compression(hw=0.9, packed=0.90, values=0.9375),
        bytes=Sizes(fp32=8_000_000, packed=800_000, engine_sparse=1_250_000, engine_dense=2_000_000, file=3_000_000),
    )
    for seed, dense, ours in ((0, (1, 2), (1, 2, 3, 4)), (1, (5, 6), (5, 6, 7, 8, 9, 10))):
        book.write("rte", "dense", seed, LABELS, flipped(LABELS, *dense), weights_sha256=f"w{seed}")
        book.write("rte", "nxm-2:4+W4", seed, LABELS, flipped(LABELS, *ours), teacher_sha256="w0", compressed=facts)
    text = book.page()
    scores = next(line for line in text.splitlines() if "(`nxm-2:4+W4`)" in line)
    # 36 and 34 of 40 right: 90 and 85, mean 87.5, sd 5/sqrt(2); dense 95 both; 87.5/95 = 92.105 %
    assert "| 87.50 |" in scores
    assert "| 3.54 | 90.00 (0), 85.00 (1) |" in scores
    assert "92.11 (" in scores
    assert "†" in scores  # seed 1 came from another dense model
    assert "| 93.75 | 90.00 | 90.00 | 8.00 | 0.80 | 1.25 | 2.00 | 3.00 |" in text
    difference = next(line for line in text.splitlines() if line.startswith("| `nxm-2:4+W4` | -7.50 ("))
    assert "; 2) | –" in difference


def test_agreement_divergence_and_rivals_stand_in_the_page(book: Book) -> None:
    def write(row: str, facts: CompressionFacts, *wrong: int, commit: str = "abc1234") -> None:
        book.write("rte", row, 0, LABELS, flipped(LABELS, *wrong), compressed=facts, versions={"commit": commit})

    book.write("rte", "dense", 0, LABELS, flipped(LABELS, 1, 2))
    write("magnitude-2:4+W4", compressed(0.90, 0.5), 1, 2, 3, 4, 5, 6)
    write("obs-2:4+W4", compressed(0.90, 0.25), 1, 2, 3, 4)
    write("nxm-2:4+W4", compressed(0.90, 0.2), 1, 2, 3)
    write("obs-W4", compressed(0.87, 0.125), 1, 2)
    write("obs-2:4+W4-layers", compressed(0.90, 0.2), 1, 2, 3)
    write("magnitude-2:4+W4-slow", compressed(0.90, 0.2), 1, 2, 3, commit="abc1234-dirty")
    write("searched-hw-87.5", compressed(0.875, 0.1, search=searched(resumed=False)), 1)
    write("paper-search-hw-87.5", compressed(0.875, 0.3, search=searched(resumed=True)), 1, 2, 3)
    page = book.page()
    ours = next(line for line in page.splitlines() if "(`obs-2:4+W4`)" in line)
    assert ours.endswith("| 95.00 | 0.250 |")  # 2 of 40 answers differ from the dense model's
    assert next(line for line in page.splitlines() if line.startswith("| dense (`dense`)")).endswith("| – | – | – |")
    rivals = page.split("### Ours against the others")[1].split("###")[0]
    pairs = {tuple(cell.strip(" `") for cell in line.split("|")[1:3]) for line in rivals.splitlines() if "`" in line}
    assert pairs == {
        ("obs-2:4+W4", "nxm-2:4+W4"),
        ("obs-2:4+W4", "magnitude-2:4+W4"),
        ("nxm-2:4+W4", "obs-2:4+W4"),
        ("nxm-2:4+W4", "magnitude-2:4+W4"),
        ("nxm-2:4+W4", "magnitude-2:4+W4-slow"),  # a baseline at its other learning rate
        ("obs-2:4+W4", "magnitude-2:4+W4-slow"),
        ("searched-hw-87.5", "obs-W4"),  # the uniform plan nearest in size, not the smaller one
        ("searched-hw-87.5", "paper-search-hw-87.5"),
    }
    costs = [line for line in page.split("### Cost")[1].split("###")[0].splitlines() if line.startswith("| `")]
    seconds = {line.split("`")[1]: line.split("|")[-3].strip() for line in costs}
    assert seconds["searched-hw-87.5"] == "7"
    assert seconds["paper-search-hw-87.5"] == "resumed", "its seconds are not all that it took"
    assert "`magnitude-2:4+W4-slow` (0)" in page.split("changes that were not committed")[1].split("\n")[0]
    line = next(line for line in rivals.splitlines() if "paper-search" in line)
    assert "| +5.00 (" in line  # 39 of 40 against 37


def test_ablations_stand_apart_behind_the_rows_that_change_nothing(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, flipped(LABELS, 1, 2))
    for row in ("nxm-2:4+W4", "nxm-2:4+W4-slow"):
        book.write("rte", row, 0, LABELS, flipped(LABELS, 1, 2, 3), compressed=compressed())
    first, second = book.page().split(": ablations, and rows with other training")
    assert "(`nxm-2:4+W4`)" in first
    assert "(`nxm-2:4+W4`)" not in second
    assert "(`nxm-2:4+W4-slow`)" not in first
    assert "(`nxm-2:4+W4-slow`)" in second


def test_intervals_of_one_seed_are_those_of_the_product(book: Book) -> None:
    rng = np.random.default_rng(0)
    labels = "".join(rng.choice(list("01"), 120))
    for row in ("dense", "magnitude-2:4+W8", "nxm-2:4+W8"):
        book.write("cola", row, 0, labels, flipped(labels, *rng.choice(120, 20, replace=False)))
    statistics = book.statistics("cola")
    logits = {row: labelled.logits for (row, _), labelled in statistics.records.items()}
    ours, right = logits["nxm-2:4+W8"], decode_classes(labels)
    for reference in ("dense", "magnitude-2:4+W8"):
        difference = statistics.difference("nxm-2:4+W8", reference)
        assert difference is not None
        # The last digits come from another order of additions.
        expected = paired_interval("mcc", ours, logits[reference], right)
        assert difference.interval == pytest.approx(expected, abs=1e-12)
    assert statistics.interval("nxm-2:4+W8") == pytest.approx(interval("mcc", ours, right), abs=1e-12)
    assert statistics.difference("dense", "dense") is None


@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 2), ("accuracy", 3), ("f1", 2), ("mcc", 2), ("mcc", 3)])
def test_resampled_metrics_are_those_of_scikit_learn(metric: str, classes: int) -> None:
    rng = np.random.default_rng(0)
    predictions, labels = (
        rng.integers(0, classes, 12),
        rng.integers(0, classes, 12),
    )  # few: some resamples are one class
    values, draws = resampled(metric, predictions, labels, classes), np.random.default_rng(0)
    for number in range(DRAWS):
        pick = draws.integers(0, 12, size=12)
        expected = metric_named(metric)(np.eye(classes)[predictions[pick]], labels[pick])
        assert values[number] == pytest.approx(expected, abs=1e-12)  # rounding of a few additions


def test_several_seeds_widen_an_interval_when_they_disagree(book: Book) -> None:
    for seed, wrong in ((0, 0), (1, 20)):
        book.write("rte", "dense", seed, LABELS, flipped(LABELS, *range(wrong)))
    low, high = book.statistics("rte").interval("dense")
    assert low < 0.6  # both draws the bad seed: 50 % right
    assert high == 1.0  # both draws the good one


def test_retention_over_tasks_is_the_ratio_of_means_with_the_mean_of_ratios_beside(book: Book) -> None:
    for name, dense, ours in (("rte", 10, 12), ("sst2", 4, 10)):  # wrong of 40
        book.write(name, "dense", 0, LABELS, flipped(LABELS, *range(dense)))
        book.write(name, "dense-longer", 0, LABELS, flipped(LABELS, *range(ours)))
    both = overall([book.statistics(name) for name in ("rte", "sst2")], "dense-longer")
    assert both is not None
    assert both[0].value == pytest.approx((28 + 30) / (30 + 36))
    assert both[1] == pytest.approx((28 / 30 + 30 / 36) / 2)
    assert both[0].interval is not None
    assert both[0].interval[0] < both[0].value < both[0].interval[1]
    book.write("rte", "magnitude-2:4+W4", 0, LABELS, LABELS)
    text = book.page()
    together = text[text.index("## GLUE tasks together") :].split("\n## ")[0]
    assert "| `dense-longer` | RTE (1), SST-2 (1) |" in together
    assert "magnitude" not in together  # one task has it: nothing is put together


def test_records_with_other_settings_are_named(book: Book) -> None:
    known: dict[str, object] = {"learning_rate": 1e-4, "output_limit": 0.005}
    for row, epochs in (("nxm-2:4+W4", 6.0), ("magnitude-2:4+W4", 6.0), ("sr-ste-2:4+W4", 9.0)):
        settings = {**known, "epochs": epochs, "recipe": row.partition("-")[0]}
        book.write("rte", row, 0, LABELS, LABELS, compressed=compressed(), settings=settings)
    before_there_was_a_limit: dict[str, object] = {"learning_rate": 1e-4}
    book.write("rte", "obs-2:4+W4", 0, LABELS, LABELS, compressed=compressed(), settings=before_there_was_a_limit)
    text = book.page()
    assert "`sr-ste-2:4+W4`, seed 0, was measured with other settings: epochs 9.0 (usual 6.0)." in text
    assert "`obs-2:4+W4`, seed 0, was measured with other settings: output_limit null (usual 0.005)." in text
    assert text.count("was measured with other settings") == 2


def test_bits_saved_are_of_the_seeds_that_count(book: Book) -> None:
    for task, seeds in (("cola", {0: 0.8, 1: 0.9}), ("rte", {0: 0.7})):
        for seed, hw in seeds.items():
            book.write(task, "obs-2:4+W4-averaged", seed, LABELS, LABELS, compressed=compressed(hw))
            book.write(task, "dense", seed, LABELS, LABELS)
    book.write("rte", "obs-2:4+W4-averaged", 5, LABELS, LABELS, compressed=compressed(0.1))  # of no dense model
    assert "| 80.0 % |" in results_table(book.results)


def test_the_readme_leaves_out_where_the_dense_model_is_not_shown_to_know_anything(book: Book) -> None:
    labels = "01" * 20
    for task, wrong in (("cola", 4), ("rte", 20)):
        book.write(task, "dense", 0, labels, flipped(labels, *range(wrong)))
        book.write(task, "obs-2:4+W4-averaged", 0, labels, labels, compressed=compressed(0.8))
    table = results_table(book.results)
    assert "| CoLA (1) |" in table
    assert "RTE" not in table


def test_no_words_of_the_readme_lean_on_a_row_that_may_be_missing() -> None:
    """Of a row without a record nothing is shown: "the same, searched" then stood below 1:4."""
    words = [(shown.encoder, shown.words) for shown in SHOWN]
    assert not [each for _, each in words if "the same" in each]
    assert len(set(words)) == len(words)


def test_the_score_of_mrpc_is_the_mean_of_f1_and_accuracy(book: Book) -> None:
    book.write("mrpc", "dense", 0, "1100", "1000")
    assert book.statistics("mrpc").score("dense", 0) == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_the_committed_page_is_that_of_the_committed_records(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # this page has all resamples
        for module in ("nxm_export.data.bootstrap_intervals", "tools.results.bootstrap", "tools.results.statistics"):
            patch.setattr(f"{module}.RESAMPLES", 1000)
        assert render(RESULTS, tmp_path / "results.md").text == (ROOT / "docs" / "results.md").read_text("utf-8")
