"""Rows compared over all tasks at once (docs/comparison.md has the protocol): pooled retention and pooled divergence.

A cell is a task and a seed. Retention of a cell is the accuracy of a row relative to that of the dense model of the
same cell; it is averaged over the seeds of a task, then over tasks, every task weighing the same. Divergence, KL(dense
|| row), is averaged in the same way. A resample draws sentences of every task, the same for all rows and seeds, and
seeds of every task, the same for all rows; so every comparison is paired. Only cells that have all rows of a comparison
count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nxm_export.data import bootstrap_intervals
from tools.results.records import Interval, LabelledRecord
from tools.results.statistics import TaskStatistics, percentiles

Cell = tuple[str, int]  # task, seed
Values = npt.NDArray[np.float64]
CHOSEN_ON: frozenset[Cell] = frozenset({("cola", 0), ("rotten_tomatoes", 0)})  # by these defaults were chosen
MARGIN = 0.995  # of the dense model's accuracy


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; None where a record keeps no divergence by sentence, and where a resample has no
    such number: it leaves the dense model nothing right, or the other row no divergence."""

    value: float
    interval: Interval | None

    @property
    def half_width(self) -> float | None:
        """Half of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    def side(self, level: float) -> int:
        """-1 where the whole interval is below `level`, 1 where it is above, 0 where that is not decided."""
        if self.interval is None:
            return 0
        return int(self.interval[0] > level) - int(self.interval[1] < level)


@dataclass(frozen=True)
class Comparison:
    """A row against another in the cells that both and the dense row have.

    `retention` is the pooled one of the row, `difference` that minus the other's, `ratio` the pooled divergence of the
    row over the other's (None where one of them has none).
    """

    row: str
    other: str
    cells: tuple[Cell, ...]
    retention: Estimate
    difference: Estimate
    ratio: Estimate | None


class Pool:
    """The cells of several tasks, but for those `without`, and what is drawn of them."""

    def __init__(self, tasks: Sequence[TaskStatistics], without: frozenset[Cell] = frozenset()) -> None:
        self.tasks = {statistics.task.name: statistics for statistics in tasks}
        self.without = without
        self._counts: dict[str, Values] = {}  # by task

    def cells(self, *rows: str) -> tuple[Cell, ...]:
        """The cells that have all of these rows."""
        return tuple(
            (name, seed)
            for name, statistics in self.tasks.items()
            for seed in statistics.seeds(rows[0])
            if (name, seed) not in self.without and all((row, seed) in statistics.records for row in rows)
        )

    def retention(self, row: str, cells: Sequence[Cell] | None = None) -> Estimate | None:
        """Pooled retention of a row; None where no cell has it and a dense model that gets something right."""
        cells = self.cells(row, "dense") if cells is None else cells
        if not cells or not all(self._accuracy("dense", cell) > 0 for cell in cells):
            return None
        drawn = self._drawn(cells, lambda cell, counts: self._resampled_retention(row, cell, counts))
        return Estimate(_pooled(cells, lambda cell: self._retention(row, cell)), _interval(drawn))

    def one_answer(self, cells: Sequence[Cell]) -> float:
        """Pooled retention of what gives every text the most frequent class of dev: what needs no model at all."""
        return _pooled(cells, lambda cell: float(self._by_one_answer(cell).mean()) / self._accuracy("dense", cell))

    def telling(self, cells: Sequence[Cell]) -> tuple[Cell, ...]:
        """Those of the cells whose dense model is shown to beat one answer for all: in others there is no accuracy that
        could be lost, and a model that knows nothing may keep more than all of it."""
        return tuple(cell for cell in cells if self._margin(cell).side(0.0) > 0)

    def _margin(self, cell: Cell) -> Estimate:
        """Accuracy of the dense model minus that of one answer for all."""
        ahead = self._right("dense", cell) - self._by_one_answer(cell)
        drawn = self._drawn([cell], lambda _, counts: np.asarray(counts @ ahead / len(ahead)))
        return Estimate(float(ahead.mean()), _interval(drawn))

    def _by_one_answer(self, cell: Cell) -> Values:
        """1 for every text of dev that is of its most frequent class."""
        labels = self._record("dense", cell).labels
        return np.asarray(labels == np.bincount(labels).argmax(), np.float64)

    def compare(self, row: str, other: str) -> Comparison | None:
        """A row against another; None without a common cell."""
        cells = self.cells(row, other, "dense")
        retention = self.retention(row, cells)
        if retention is None:
            return None
        value = _pooled(cells, lambda cell: self._retention(row, cell) - self._retention(other, cell))
        drawn = self._drawn(
            cells,
            lambda cell, counts: (
                self._resampled_retention(row, cell, counts) - self._resampled_retention(other, cell, counts)
            ),
        )
        ratio = self._ratio(row, other, cells)
        return Comparison(row, other, cells, retention, Estimate(value, _interval(drawn)), ratio)

    def _ratio(self, row: str, other: str, cells: Sequence[Cell]) -> Estimate | None:
        """Pooled divergence of a row over that of another."""
        means = [self._pooled_kl(name, cells) for name in (row, other)]
        if means[0] is None or not means[1]:
            return None
        ours, theirs = (self._resampled_kl(name, cells) for name in (row, other))
        if ours is None or theirs is None:
            return Estimate(means[0] / means[1], None)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(means[0] / means[1], _interval(ours / theirs))

    def _resampled_kl(self, row: str, cells: Sequence[Cell]) -> Values | None:
        """Pooled divergence of a row in every resample; None where a record keeps none by sentence."""
        known: dict[Cell, Values] = {}
        for cell in cells:
            facts = self._record(row, cell).record.compressed
            if facts is None or facts.kl_by_sentence is None:
                return None
            known[cell] = np.array(facts.kl_by_sentence)
        return self._drawn(cells, lambda cell, counts: np.asarray(counts @ known[cell] / len(known[cell])))

    def _drawn(self, cells: Sequence[Cell], of: Callable[[Cell, Values], Values]) -> Values:
        """`of` every cell, given how often each sentence was drawn (resamples, sentences), pooled; (resamples,)."""
        pooled = []
        for task in dict.fromkeys(name for name, _ in cells):
            seeds = [seed for name, seed in cells if name == task]
            number = list(self.tasks).index(task)
            if task not in self._counts:
                self._counts[task] = _counts(len(self._record("dense", (task, seeds[0])).labels), number)
            counts = self._counts[task]
            values = np.stack([of((task, seed), counts) for seed in seeds])  # (seeds, resamples)
            picks = seed_draws(len(seeds), number)  # (resamples, seeds)
            pooled.append(np.take_along_axis(values, picks.T, axis=0).mean(axis=0))
        return np.asarray(np.mean(pooled, axis=0))

    def _record(self, row: str, cell: Cell) -> LabelledRecord:
        return self.tasks[cell[0]].records[row, cell[1]]

    def _right(self, row: str, cell: Cell) -> Values:
        record = self._record(row, cell)
        return np.asarray(record.predictions == record.labels, np.float64)

    def _accuracy(self, row: str, cell: Cell) -> float:
        return float(self._right(row, cell).mean())

    def _retention(self, row: str, cell: Cell) -> float:
        return self._accuracy(row, cell) / self._accuracy("dense", cell)

    def _resampled_retention(self, row: str, cell: Cell, counts: Values) -> Values:
        """NaN where nothing is right that the dense model said."""
        dense = counts @ self._right("dense", cell)
        return np.asarray(counts @ self._right(row, cell) / np.where(dense > 0, dense, np.nan))

    def _pooled_kl(self, row: str, cells: Sequence[Cell]) -> float | None:
        """None where a record has no divergence."""
        known: dict[Cell, float] = {}
        for cell in cells:
            facts = self._record(row, cell).record.compressed
            if facts is None or facts.kl_to_dense is None:
                return None
            known[cell] = facts.kl_to_dense
        return _pooled(cells, known.__getitem__)


def _interval(drawn: Values) -> Interval | None:
    """None where a resample has no number."""
    return percentiles(drawn) if np.isfinite(drawn).all() else None


def _pooled(cells: Sequence[Cell], of: Callable[[Cell], float]) -> float:
    """Mean over seeds, then over tasks."""
    by_task: dict[str, list[float]] = {}
    for cell in cells:
        by_task.setdefault(cell[0], []).append(of(cell))
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def sentence_draws(sentences: int, number: int) -> npt.NDArray[np.int64]:
    """Sentences of every resample of the task at this place, (resamples, sentences)."""
    return np.stack(list(bootstrap_intervals.resamples(sentences, seed=1000 + number)))


def seed_draws(seeds: int, number: int) -> npt.NDArray[np.int64]:
    """Places of seeds of every resample of the task at this place, (resamples, seeds)."""
    size = (bootstrap_intervals.RESAMPLES, seeds)
    return np.asarray(np.random.default_rng(2000 + number).integers(0, seeds, size=size))


def _counts(sentences: int, number: int) -> Values:
    """How often every sentence was drawn in every resample, (resamples, sentences)."""
    draws = sentence_draws(sentences, number)
    return np.stack([np.bincount(picks, minlength=sentences) for picks in draws]).astype(np.float64)
