"""Means, spreads and bootstrap intervals over records, from the predictions that they hold.

One set of resampled dev sentences (`RESAMPLES` of them) serves every record of a task, so that any two rows are
compared on the same sentences. With several seeds a resample draws seeds as well, the same for both rows: an interval
then covers both what the sentences and what the seeds leave open. With one seed it is that of
`nxm_export.data.metrics.paired_interval`, and says nothing about other seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nxm_export.data.bootstrap_intervals import RESAMPLES
from nxm_export.data.metrics import metric_named
from tools.results.bootstrap import resampled
from tools.results.records import Classes, CompressionFacts, Interval, LabelledRecord, Record
from tools.results.tasks import Task

Scores = npt.NDArray[np.float64]  # of resamples, (RESAMPLES,)


@dataclass(frozen=True)
class Difference:
    """Mean score of a row minus that of a reference, over the seeds that both have, with the 95 % interval."""

    value: float
    interval: Interval
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Retention:
    """Ratio of the mean score of a row to the dense row's, over the seeds that both have, with the 95 % interval.

    The interval is None where a resample leaves the dense row at 0 or below (MCC can): a ratio to that means nothing.
    """

    value: float
    interval: Interval | None


class TaskStatistics:
    """Scores of every (row, seed) of a task, as measured and resampled."""

    def __init__(self, task: Task, records: Sequence[LabelledRecord]) -> None:
        self.task = task
        self.records = {(labelled.record.row, labelled.record.seed): labelled for labelled in records}
        self.values = {key: _metrics(task, record) for key, record in self.records.items()}  # metric -> value
        self._resampled: dict[tuple[str, int], Scores] = {}

    @property
    def rows(self) -> list[str]:
        """Rows with at least one seed, in the order of the records."""
        return list(dict.fromkeys(row for row, _ in self.records))

    def seeds(self, row: str) -> list[int]:
        """Seeds of a row, ascending."""
        return sorted(seed for name, seed in self.records if name == row)

    def common_seeds(self, row: str, reference: str = "dense") -> list[int]:
        """Seeds that both rows have, ascending: those that a comparison of them counts."""
        return [seed for seed in self.seeds(row) if (reference, seed) in self.records]

    def of(self, row: str) -> list[Record]:
        """Records of a row, by seed; none for a row that was not measured."""
        return [self.records[row, seed].record for seed in self.seeds(row)]

    def compressed(self, row: str) -> list[CompressionFacts]:
        """The compression in the records of a row; none for a dense row."""
        return [record.compressed for record in self.of(row) if record.compressed is not None]

    def score(self, row: str, seed: int) -> float:
        """Mean of the task's metrics."""
        return float(np.mean(list(self.values[row, seed].values())))

    def scores(self, row: str) -> list[float]:
        """Score of every seed."""
        return [self.score(row, seed) for seed in self.seeds(row)]

    def metric(self, row: str, name: str) -> list[float]:
        """One metric of every seed."""
        return [self.values[row, seed][name] for seed in self.seeds(row)]

    def interval(self, row: str) -> Interval:
        """95 % interval of the row's mean score."""
        return percentiles(self.resampled(row, self.seeds(row)))

    def difference(self, row: str, reference: str) -> Difference | None:
        """Paired difference to another row; None without a common seed."""
        common = self.common_seeds(row, reference)
        if not common or row == reference:
            return None
        value = np.mean([self.score(row, seed) - self.score(reference, seed) for seed in common])
        drawn = self.resampled(row, common) - self.resampled(reference, common)
        return Difference(float(value), percentiles(drawn), tuple(common))

    def retention(self, row: str, reference: str = "dense") -> Retention | None:
        """Ratio of mean scores to the dense row; None without a common seed, or where that row scores 0 or less."""
        common = self.common_seeds(row, reference)
        if not common:
            return None
        ours = [self.score(row, seed) for seed in common]
        theirs = [self.score(reference, seed) for seed in common]
        drawn = self.resampled(row, common), self.resampled(reference, common)
        return _ratio(float(np.mean(ours)), float(np.mean(theirs)), *drawn)

    def agreement(self, row: str, reference: str = "dense") -> float | None:
        """Share of dev sentences that both rows put in the same class, over the seeds that both have."""
        common = self.common_seeds(row, reference)
        pairs = [(_classes(self.records[row, seed])[0], _classes(self.records[reference, seed])[0]) for seed in common]
        return float(np.mean([(ours == theirs).mean() for ours, theirs in pairs])) if pairs else None

    def resampled(self, row: str, seeds: Sequence[int]) -> Scores:
        """Mean score over resampled `seeds` on resampled sentences, (RESAMPLES,); the same draws for every row."""
        scores = np.stack([self._resampled_scores(row, seed) for seed in seeds])  # (seeds, RESAMPLES)
        draws = np.random.default_rng(1).integers(0, len(seeds), size=scores.T.shape)  # (RESAMPLES, seeds)
        return np.asarray(np.take_along_axis(scores, draws.T, axis=0).mean(axis=0))

    def _resampled_scores(self, row: str, seed: int) -> Scores:
        key = (row, seed)
        if key not in self._resampled:
            record = self.records[key]
            scores = np.mean([resampled(name, *_classes(record)) for name in self.task.metrics], axis=0)
            self._resampled[key] = scores
        return self._resampled[key]


def overall(tasks: Sequence[TaskStatistics], row: str) -> tuple[Retention, float] | None:
    """Over the tasks that have the row: ratio of mean scores with its interval, and mean of the tasks' ratios."""
    chosen = [task for task in tasks if task.retention(row) is not None]
    if not chosen:
        return None
    pairs = []
    for task in chosen:
        common = task.common_seeds(row)
        means = [float(np.mean([task.score(name, seed) for seed in common])) for name in (row, "dense")]
        pairs.append((means, task.resampled(row, common), task.resampled("dense", common)))
    # Tasks are independent, but their resamples come from one generator: each is put in an order of its own.
    orders = [np.random.default_rng(100 + number).permutation(RESAMPLES) for number in range(len(pairs))]
    ours = np.sum([drawn[order] for (_, drawn, _), order in zip(pairs, orders, strict=True)], axis=0)
    theirs = np.sum([drawn[order] for (_, _, drawn), order in zip(pairs, orders, strict=True)], axis=0)
    both = _ratio(sum(means[0] for means, _, _ in pairs), sum(means[1] for means, _, _ in pairs), ours, theirs)
    ratios = [means[0] / means[1] for means, _, _ in pairs]
    return None if both is None else (both, float(np.mean(ratios)))


def _ratio(ours: float, theirs: float, drawn: Scores, drawn_theirs: Scores) -> Retention | None:
    """Retention from the two means and their resamples."""
    if theirs <= 0:
        return None
    return Retention(ours / theirs, percentiles(drawn / drawn_theirs) if (drawn_theirs > 0).all() else None)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds (n - 1); None for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def percentiles(values: Scores) -> Interval:
    """The middle 95 %."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _classes(labelled: LabelledRecord) -> tuple[Classes, Classes, int]:
    """(predictions, labels, number of classes)."""
    return labelled.predictions, labelled.labels, labelled.record.classes


def _metrics(task: Task, labelled: LabelledRecord) -> dict[str, float]:
    return {name: metric_named(name)(labelled.logits, labelled.labels) for name in task.metrics}
