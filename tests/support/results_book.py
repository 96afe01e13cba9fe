"""A results directory that records with given predictions are put into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from nxm_export.contract.records.search_result import FullRun, PlanScore, SampleCounts, SearchBudget, SearchCost
from tools.results import tasks
from tools.results.page import render
from tools.results.records import (
    Compression,
    CompressionFacts,
    Machine,
    PlanFacts,
    Record,
    Samples,
    SearchFacts,
    Sizes,
    TrainingFacts,
    digest,
)
from tools.results.rows import row_named
from tools.results.statistics import TaskStatistics
from tools.results.store import TaskStore

DRAWS = 100  # resamples in these tests: scikit-learn needs a millisecond for each


class Made(TypedDict, total=False):
    """Fields of a `Record` that a test sets."""

    settings: dict[str, object]
    versions: dict[str, str]
    weights_sha256: str
    teacher_sha256: str
    compressed: CompressionFacts


class Book:
    """A results directory that records with given predictions are put into."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def write(self, task: str, row: str, seed: int, labels: str, predictions: str, **more: Unpack[Made]) -> None:
        record = Record(
            task=task,
            row=row_named(row).name,
            seed=seed,
            model="a model",
            data_sha256="d",
            settings={"dense_learning_rate": 1e-4},
            metrics={},
            samples=Samples(100, len(labels)),
            steps=10,
            epochs=1.0,
            seconds=5.0,
            dev_reads=1,
            versions={"commit": "abc1234"},
            machine=Machine("a CPU", "", 2),
            classes=2,
            labels_sha256=digest(labels),
            predictions=predictions,
        )
        self.store(task).add(replace(record, **more), labels)

    def store(self, task: str) -> TaskStore:
        return TaskStore(self.results, tasks.task_named(task))

    def statistics(self, task: str) -> TaskStatistics:
        return TaskStatistics(tasks.task_named(task), self.store(task).labelled_records())

    def page(self) -> str:
        return render(self.results, self.results / "docs" / "results.md").text


def compressed(hw: float = 0.9, kl: float | None = None, search: SearchFacts | None = None) -> CompressionFacts:
    """What a compressed row's record holds, every counting and size alike."""
    facts = CompressionFacts(
        recipe="nxm",
        kl_to_dense=kl,
        training=TrainingFacts(qat_steps=1, held_out_samples=1),
        mask_sha256="m",
        compression=Compression(hw, hw, hw),
        bytes=Sizes(1, 1, 1, 1, 1),
        plan=PlanFacts({"W4": 3}, {}),
    )
    return replace(facts, search=search)


def searched(resumed: bool) -> SearchFacts:
    best = PlanScore(origin="knapsack", predicted=None, joint=None, hw=0.9, packed=0.9, values=0.9, options={"W4": 3})
    cost = SearchCost({"all": 7.0}, FullRun(10, 5.0), resumed, None)
    return SearchFacts("nxm", SearchBudget("hw", 0.875, None, None), best, SampleCounts(32, 32), cost)


def flipped(labels: str, *positions: int) -> str:
    return "".join(str(1 - int(label)) if i in positions else label for i, label in enumerate(labels))


LABELS = "0110101101" * 4


def facts_of(record: Record) -> CompressionFacts:
    assert record.compressed is not None
    return record.compressed
