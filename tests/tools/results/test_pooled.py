"""Rows compared over all tasks at once: retention and divergence, with intervals of whole resamples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.results_book import DRAWS, LABELS, Book, compressed, facts_of, flipped
from tools.results.pooled import Estimate, Pool, seed_draws, sentence_draws


def noisy(labels: str, rng: np.random.Generator, wrong: int) -> str:
    return flipped(labels, *rng.choice(len(labels), wrong, replace=False))


def write_starts(book: Book, rng: np.random.Generator) -> None:
    """Two tasks of different sizes, two seeds of one and one of the other, a dense row and two starts."""
    for task, size, seeds in (("rte", 30, (0, 1)), ("sst2", 50, (2,))):
        labels = "".join(rng.choice(list("01"), size))
        for seed in seeds:
            book.write(task, "dense", seed, labels, noisy(labels, rng, 6))
            for row, wrong, scale in (("admm-2:4+W4", 7, 0.02), ("obs-2:4+W4", 9, 0.03)):
                kl = tuple(float(value) for value in rng.exponential(scale, size))
                facts = replace(compressed(kl=float(np.mean(kl))), kl_by_sentence=kl)
                book.write(task, row, seed, labels, noisy(labels, rng, wrong), compressed=facts)


def slow_pool(book: Book, row: str, other: str) -> tuple[list[float], list[float], list[float]]:
    """(retention, difference, ratio of KL): the whole, then every resample, written out with lists."""
    cells = {"rte": (0, 1), "sst2": (2,)}
    statistics = {task: book.statistics(task).records for task in cells}

    def right(task: str, name: str, seed: int, picks: list[int]) -> float:
        record = statistics[task][name, seed]
        return sum(record.record.predictions[i] == str(record.labels[i]) for i in picks) / len(picks)

    def kl(task: str, name: str, seed: int, picks: list[int]) -> float:
        values = facts_of(statistics[task][name, seed].record).kl_by_sentence
        assert values is not None
        return sum(values[i] for i in picks) / len(picks)

    def once(picks: dict[str, list[int]], seeds: dict[str, list[int]]) -> tuple[float, float, float]:
        retained: dict[str, list[float]] = {row: [], other: []}
        far: dict[str, list[float]] = {row: [], other: []}
        for task in cells:
            for name in (row, other):
                read = picks[task]
                ratios = [right(task, name, seed, read) / right(task, "dense", seed, read) for seed in seeds[task]]
                retained[name].append(sum(ratios) / len(ratios))
                far[name].append(sum(kl(task, name, seed, read) for seed in seeds[task]) / len(seeds[task]))
        ours, theirs = (sum(retained[name]) / 2 for name in (row, other))
        return ours, ours - theirs, sum(far[row]) / sum(far[other])

    whole = {task: list(range(len(statistics[task]["dense", seeds[0]].labels))) for task, seeds in cells.items()}
    found = [once(whole, {task: list(seeds) for task, seeds in cells.items()})]
    sentences = [sentence_draws(len(whole[task]), number) for number, task in enumerate(cells)]
    drawn = [seed_draws(len(seeds), number) for number, seeds in enumerate(cells.values())]
    for resample in range(DRAWS):
        picks = {task: [int(i) for i in sentences[number][resample]] for number, task in enumerate(cells)}
        chosen = {
            task: [seeds[int(i)] for i in drawn[number][resample]] for number, (task, seeds) in enumerate(cells.items())
        }
        found.append(once(picks, chosen))
    retention, difference, ratio = (list(column) for column in zip(*found, strict=True))
    return retention, difference, ratio


def test_pooled_comparisons_are_those_of_sums_written_out(book: Book) -> None:
    write_starts(book, np.random.default_rng(3))
    pool = Pool([book.statistics("rte"), book.statistics("sst2")])
    comparison = pool.compare("admm-2:4+W4", "obs-2:4+W4")
    assert comparison is not None
    assert comparison.cells == (("rte", 0), ("rte", 1), ("sst2", 2))
    assert comparison.ratio is not None
    expected = slow_pool(book, "admm-2:4+W4", "obs-2:4+W4")
    for estimate, (value, *drawn) in zip(
        (comparison.retention, comparison.difference, comparison.ratio), expected, strict=True
    ):
        assert estimate.value == pytest.approx(value, abs=1e-12)  # additions in another order
        assert estimate.interval == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-12)
    assert pool.retention("admm-2:4+W4") == comparison.retention


def test_only_cells_that_have_every_row_count_and_those_for_choosing_can_be_left_out(book: Book) -> None:
    write_starts(book, np.random.default_rng(3))
    labels = book.store("rte").labels()
    book.write("rte", "dense", 5, labels, labels)
    book.write("rte", "admm-2:4+W4", 5, labels, labels, compressed=compressed(kl=0.5))
    statistics = [book.statistics("rte"), book.statistics("sst2")]
    comparison = Pool(statistics).compare("admm-2:4+W4", "obs-2:4+W4")
    assert comparison is not None
    assert ("rte", 5) not in comparison.cells
    assert ("rte", 5) in Pool(statistics).cells("admm-2:4+W4", "dense")
    left = Pool(statistics, frozenset({("rte", 0), ("sst2", 2)})).compare("admm-2:4+W4", "obs-2:4+W4")
    assert left is not None
    assert left.cells == (("rte", 1),)
    assert Pool(statistics).compare("admm-2:4+W4", "magnitude-2:4+W4") is None


def test_rows_without_training_are_compared_among_themselves(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    for row in ("admm-2:4+W4", "obs-2:4+W4", "admm-2:4+W4-untrained", "obs-2:4+W4-untrained"):
        book.write("rte", row, 0, LABELS, flipped(LABELS, 1), compressed=compressed(kl=0.1))
    text = book.page()
    section = text[text.index("## Starts of training compared") :].split("\n## ")[0]
    assert "| `admm-2:4+W4-untrained` | `obs-2:4+W4-untrained` | RTE (0) |" in section
    assert "| `admm-2:4+W4` | `obs-2:4+W4` | RTE (0) |" in section
    assert "| `admm-2:4+W4` | `obs-2:4+W4-untrained` |" not in section


def test_a_record_without_divergences_by_sentence_gives_a_ratio_without_an_interval(book: Book) -> None:
    for row, kl in (("admm-2:4+W4", 0.02), ("obs-2:4+W4", 0.08)):
        book.write("rte", row, 0, LABELS, flipped(LABELS, 1), compressed=compressed(kl=kl))
    book.write("rte", "dense", 0, LABELS, LABELS)
    comparison = Pool([book.statistics("rte")]).compare("admm-2:4+W4", "obs-2:4+W4")
    assert comparison is not None
    assert comparison.ratio == Estimate(0.25, None)
    assert "| 0.250 | – |" in book.page()


@pytest.mark.parametrize(("low", "high", "side"), [(0.96, 0.994, -1), (0.98, 1.01, 0), (0.996, 1.02, 1)])
def test_an_interval_decides_where_it_lies_on_one_side(low: float, high: float, side: int) -> None:
    estimate = Estimate(1.0, (low, high))
    assert estimate.side(0.995) == side
    assert estimate.half_width == pytest.approx((high - low) / 2)
    assert Estimate(1.0, None).side(0.995) == 0


def test_no_retention_of_a_dense_model_that_knows_nothing(book: Book) -> None:
    book.write("cola", "dense", 0, LABELS, "1" * 40)  # MCC 0
    book.write("cola", "dense-longer", 0, LABELS, LABELS)
    assert book.statistics("cola").retention("dense-longer") is None
    book.write("cola", "dense", 0, LABELS, flipped(LABELS, *range(17)))  # little above 0, and below in some resamples
    retention = book.statistics("cola").retention("dense-longer")
    assert retention is not None
    assert retention.value > 1
    assert retention.interval is None


def test_one_answer_for_all_is_scored_as_any_row(book: Book) -> None:
    """By a row that gives the most frequent class of each task, which differs between the two."""
    for task, labels, dense in (("rte", "0011000110", "0011000101"), ("sst2", "1101110111", "1101110110")):
        for seed, wrong in ((0, 0), (1, 1)):
            book.write(task, "dense", seed, labels, flipped(dense, *range(wrong)))
            book.write(task, "obs-2:4+W4", seed, labels, {"rte": "0", "sst2": "1"}[task] * 10, compressed=compressed())
    pool = Pool([book.statistics("rte"), book.statistics("sst2")])
    kept = pool.retention("obs-2:4+W4")
    assert kept is not None
    assert pool.one_answer(pool.cells("obs-2:4+W4", "dense")) == pytest.approx(kept.value, abs=1e-12)


def test_cells_tell_something_where_the_dense_model_is_shown_to_beat_one_answer(book: Book) -> None:
    """Twenty texts of each class: one answer is right in half of them."""
    labels = "01" * 20
    for seed, wrong in ((0, 4), (1, 20), (2, 18), (3, 40)):
        book.write("rte", "dense", seed, labels, flipped(labels, *range(wrong)))
    pool = Pool([book.statistics("rte")])
    assert pool.telling(pool.cells("dense")) == (("rte", 0),)
    book.write("sst2", "dense", 0, labels, "0" * 40)  # it is that answer
    assert Pool([book.statistics("sst2")]).telling([("sst2", 0)]) == ()
