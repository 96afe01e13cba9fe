"""What is averaged over which seeds, and where there is no number to give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nxm_export.errors import DataError
from tests.support.results_book import LABELS, Book, compressed, flipped
from tools.results.bootstrap import resampled
from tools.results.pooled import Estimate, Pool
from tools.results.statistics import TaskStatistics, deviation, overall

ROW = "obs-2:4+W4"


@pytest.fixture
def uneven(book: Book) -> Book:
    """A task whose row has the seeds 1, 2 and 5, and whose dense model has 0, 1 and 2."""
    for seed, wrong in ((0, 9), (1, 4), (2, 8)):
        book.write("rte", "dense", seed, LABELS, flipped(LABELS, *range(wrong)))
    for seed, wrong in ((1, 6), (2, 12), (5, 40)):
        book.write("rte", ROW, seed, LABELS, flipped(LABELS, *range(wrong)), compressed=compressed())
    return book


def test_a_comparison_counts_the_seeds_that_both_rows_have(uneven: Book) -> None:
    statistics = uneven.statistics("rte")
    assert statistics.seeds(ROW) == [1, 2, 5]
    assert statistics.common_seeds(ROW) == [1, 2]
    assert statistics.agreement(ROW) == pytest.approx((38 + 36) / 80)  # two and four of 40 differ
    difference, retention = statistics.difference(ROW, "dense"), statistics.retention(ROW)
    assert difference is not None
    assert difference.seeds == (1, 2)
    assert difference.value == pytest.approx(-(2 + 4) / 80)
    assert retention is not None
    assert retention.value == pytest.approx((34 + 28) / (36 + 32))
    together = overall([statistics], ROW)
    assert together is not None
    assert together[0].value == together[1] == pytest.approx(retention.value)


def test_without_a_common_seed_nothing_is_compared(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    book.write("rte", ROW, 1, LABELS, LABELS, compressed=compressed())
    statistics = book.statistics("rte")
    assert statistics.difference(ROW, "dense") is None
    assert (statistics.retention(ROW), statistics.agreement(ROW), overall([statistics], ROW)) == (None, None, None)
    assert statistics.difference("dense", "dense") is None
    assert Pool([statistics]).retention(ROW) is None


def test_the_order_of_records_changes_nothing(uneven: Book) -> None:
    statistics = uneven.statistics("rte")
    turned = TaskStatistics(statistics.task, list(statistics.records.values())[::-1])
    assert turned.seeds(ROW) == [1, 2, 5]
    assert turned.scores(ROW) == statistics.scores(ROW)
    assert turned.retention(ROW) == statistics.retention(ROW)


def test_a_task_without_a_dense_row_is_not_named_among_those_that_count(uneven: Book) -> None:
    """The page named it, with all of its seeds: a number of one task stood there as that of two."""
    uneven.write("sst2", ROW, 0, LABELS, LABELS, compressed=compressed())
    text = uneven.page()
    assert (
        "GLUE tasks together" not in text
        or f"| `{ROW}` |" not in text.split("## GLUE tasks together")[1].split("\n## ")[0]
    )
    uneven.write("sst2", "dense", 0, LABELS, flipped(LABELS, 1))
    together = uneven.page().split("## GLUE tasks together")[1].split("\n## ")[0]
    assert f"| `{ROW}` | RTE (2), SST-2 (1) |" in together


def test_a_spread_takes_two_seeds() -> None:
    assert deviation([0.5]) is None
    assert deviation([0.5, 0.75]) == pytest.approx(0.25 / 2**0.5)


def test_metrics_that_cannot_be_resampled_are_refused() -> None:
    classes = np.array([0, 1, 2, 0])
    with pytest.raises(DataError, match=r"no resampling for the metric 'rouge'; choose one of accuracy, f1, mcc"):
        resampled("rouge", classes, classes, 3)
    with pytest.raises(DataError, match="F1 is resampled for two classes, not for 3"):
        resampled("f1", classes, classes, 3)


@pytest.mark.parametrize(
    ("low", "high", "side"), [(1.0, 1.1, 0), (0.9, 1.0, 0), (1.0, 1.0, 0), (1.0 + 1e-9, 1.1, 1), (0.9, 1.0 - 1e-9, -1)]
)
def test_an_interval_that_touches_the_level_decides_nothing(low: float, high: float, side: int) -> None:
    assert Estimate(1.0, (low, high)).side(1.0) == side
    assert Estimate(1.0, None).half_width is None


def cells_of(page: str, *first: str) -> list[str]:
    """The cells of the first line of the comparison of starts that begins with these."""
    section = page[page.index("## Starts of training compared") :].split("\n## ")[0]
    lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines())
    return next(cells for cells in lines if cells[: len(first)] == [f"`{row}`" for row in first])


@pytest.mark.parametrize(
    ("wrong", "divergence", "words"),
    [
        ((0, 20), (0.02, 0.08), ("better", "nearer")),
        ((20, 0), (0.08, 0.02), ("worse", "farther")),
        ((3, 3), (0.05, 0.05), ("no difference found", "no difference found")),
        ((3, 4), (0.02, None), ("no difference found", "–")),
    ],
)
def test_the_page_says_which_start_is_better_and_which_is_nearer(
    book: Book, wrong: tuple[int, int], divergence: tuple[float, float | None], words: tuple[str, str]
) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    for row, count, kl in zip(("admm-2:4+W4", ROW), wrong, divergence, strict=True):
        facts = compressed(kl=0.1)
        if kl is not None:
            facts = replace(compressed(kl=kl), kl_by_sentence=(kl,) * len(LABELS))
        book.write("rte", row, 0, LABELS, flipped(LABELS, *range(count)), compressed=facts)
    cells = cells_of(book.page(), "admm-2:4+W4", ROW)
    assert (cells[4], cells[6]) == words
    comparison = Pool([book.statistics("rte")]).compare("admm-2:4+W4", ROW)
    assert comparison is not None
    assert comparison.difference.interval is not None
    low, high = comparison.difference.interval
    assert cells[3] == f"{100 * (wrong[1] - wrong[0]) / 40:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def test_the_page_says_nothing_where_there_is_no_number(book: Book) -> None:
    """No divergence at all, and a dense model of which a resample finds no right answer."""
    book.write("rte", "dense", 0, LABELS, flipped(LABELS, *range(39)))
    for row in ("admm-2:4+W4", ROW):
        book.write("rte", row, 0, LABELS, LABELS, compressed=compressed(kl=None))
    page = book.page()
    assert cells_of(page, "admm-2:4+W4", ROW)[3:] == ["+0.00", "no difference found", "–", "–"]
    assert cells_of(page, ROW)[2:5] == ["4000.00", "–", "undecided"]
    assert "nan" not in page.split("## Starts of training compared")[1].split("\n## ")[0]


@pytest.mark.parametrize(("wrong", "below"), [(20, "yes"), (0, "no"), (1, "undecided")])
def test_the_page_says_whether_a_row_is_below_the_margin(book: Book, wrong: int, below: str) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    for row in ("admm-2:4+W4", ROW):
        book.write("rte", row, 0, LABELS, flipped(LABELS, *range(wrong)), compressed=compressed(kl=0.1))
    cells = cells_of(book.page(), ROW)
    assert cells[1] == "RTE (0)"
    assert cells[2].startswith(f"{100 - 2.5 * wrong:.2f} (")
    assert cells[4] == below
    assert cells[5] == "60.0"  # 24 of 40 texts have the most frequent class


class TestPool:
    def compared(self, book: Book, *facts: object) -> Estimate | None:
        book.write("rte", "dense", 0, LABELS, LABELS)
        for row, fact in zip(("admm-2:4+W4", ROW), facts, strict=True):
            book.write("rte", row, 0, LABELS, flipped(LABELS, 1), compressed=fact)  # type: ignore[arg-type]
        comparison = Pool([book.statistics("rte")]).compare("admm-2:4+W4", ROW)
        assert comparison is not None
        return comparison.ratio

    @pytest.mark.parametrize(("ours", "theirs"), [(None, 0.1), (0.1, None), (0.1, 0.0), (None, None)])
    def test_without_a_divergence_on_both_sides_there_is_no_ratio(
        self, book: Book, ours: float | None, theirs: float | None
    ) -> None:
        assert self.compared(book, compressed(kl=ours), compressed(kl=theirs)) is None

    def test_a_row_that_never_differs_has_the_ratio_0(self, book: Book) -> None:
        assert self.compared(book, compressed(kl=0.0), compressed(kl=0.1)) == Estimate(0.0, None)

    @pytest.mark.parametrize("by_sentence", [(True, False), (False, True)])
    def test_a_ratio_has_an_interval_where_both_keep_divergences_by_sentence(
        self, book: Book, by_sentence: tuple[bool, bool]
    ) -> None:
        known = replace(compressed(kl=0.1), kl_by_sentence=(0.1,) * len(LABELS))
        facts = [known if kept else compressed(kl=0.1) for kept in by_sentence]
        assert self.compared(book, *facts) == Estimate(1.0, None)

    def test_a_ratio_to_no_divergence_in_a_resample_has_no_interval(self, book: Book) -> None:
        far = replace(compressed(kl=0.1), kl_by_sentence=(0.1,) * len(LABELS))
        near = replace(compressed(kl=0.05), kl_by_sentence=(2.0, *(0.0,) * (len(LABELS) - 1)))
        assert self.compared(book, far, near) == Estimate(2.0, None)

    def test_dense_rows_have_no_divergence(self, book: Book) -> None:
        for row in ("dense", "dense-longer"):
            book.write("rte", row, 0, LABELS, LABELS)
        book.write("rte", ROW, 0, LABELS, LABELS, compressed=compressed(kl=0.1))
        comparison = Pool([book.statistics("rte")]).compare(ROW, "dense-longer")
        assert comparison is not None
        assert comparison.ratio is None

    def test_nothing_is_kept_of_a_dense_model_that_gets_nothing_right(self, book: Book) -> None:
        """In one cell, or in a resample: that has no retention, where 1 stood for 0 right answers."""
        book.write("rte", "dense", 0, LABELS, LABELS)
        book.write("sst2", "dense", 0, LABELS, flipped(LABELS, *range(len(LABELS))))
        for task in ("rte", "sst2"):
            book.write(task, ROW, 0, LABELS, LABELS, compressed=compressed())
        statistics = [book.statistics(task) for task in ("rte", "sst2")]
        assert Pool(statistics).retention(ROW) is None
        assert Pool(statistics).compare(ROW, ROW) is None

    def test_a_resample_without_a_right_answer_leaves_no_interval(self, book: Book) -> None:
        book.write("rte", "dense", 0, LABELS, flipped(LABELS, *range(len(LABELS) - 1)))  # one answer of 40 is right
        book.write("rte", ROW, 0, LABELS, flipped(LABELS, 1), compressed=compressed())
        kept = Pool([book.statistics("rte")]).retention(ROW)
        assert kept == Estimate(39.0, None)
        comparison = Pool([book.statistics("rte")]).compare(ROW, ROW)
        assert comparison is not None
        assert comparison.difference == Estimate(0.0, None)
