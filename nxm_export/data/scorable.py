"""Can the task's metric tell good answers from bad ones on these samples? Asked before training, not after.

A correlation with a constant is not defined, and where every query has one candidate, every ranking is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nxm_export.contract.tasks import Task
from nxm_export.data.examples import Examples
from nxm_export.data.features import members
from nxm_export.data.metrics import require_scorable
from nxm_export.errors import DataError


def require_scorable_examples(task: Task, examples: Examples, classes: Sequence[str] | None) -> None:
    """Raise `DataError` where the metric of `task` has no value on these samples, or has the same whatever a model
    says; `classes` are the names that the labels count."""
    if task.label not in ("relevance", "score", "pair-score", "classes", "tags"):
        return  # classes and answers: any of them can be right or wrong
    numbers = np.array([float(number) for label in examples.labels for number in np.asarray(label).reshape(-1)])
    if task.label == "relevance":
        _require_something_to_rank(numbers, examples)
        return
    known = numbers[np.isfinite(numbers)]
    if known.size:
        require_scorable(task.metric, known, classes or (), examples.source)


def _require_something_to_rank(relevance: np.ndarray, examples: Examples) -> None:
    queries = members(None if examples.groups is None else np.array(examples.groups), len(relevance))
    if not any(np.ptp(relevance[query]) > 0 for query in queries):
        what = "one candidate" if max(map(len, queries)) == 1 else "candidates of one relevance alone"
        raise DataError(
            f"{examples.source}: every query has {what}, so there is nothing to rank; the candidates of a query are "
            "rows of equal text"
        )
