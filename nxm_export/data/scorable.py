"""Can the task's metric tell good answers from bad ones on these samples? Asked before training, not after.

A correlation with a constant is not defined, and where every query has one candidate, every ranking is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from nxm_export.contract.tasks import Task
from nxm_export.data.examples import Examples, members
from nxm_export.errors import DataError


def require_scorable(task: Task, examples: Examples, classes: Sequence[str] | None) -> None:
    """Raise `DataError` where the metric of `task` has no value on these samples, or has the same whatever a model
    says; `classes` are the names that the labels count."""
    reason = _unscorable(task, examples, classes or ())
    if reason is not None:
        raise DataError(f"{examples.source}: no metric can score it: {reason}")


def _unscorable(task: Task, examples: Examples, classes: Sequence[str]) -> str | None:
    labels = examples.labels
    if task.label in ("score", "pair-score"):
        scores = np.array([float(np.asarray(label).reshape(-1)[0]) for label in labels])
        known = scores[np.isfinite(scores)]
        if known.size and np.ptp(known) == 0:
            return f"every score is {known[0]:g}, and {task.metric} measures how scores vary together"
    elif task.label == "relevance":
        relevance = np.array([float(np.asarray(label).reshape(-1)[0]) for label in labels])
        queries = members(None if examples.groups is None else np.array(examples.groups), len(relevance))
        if not any(np.ptp(relevance[query]) > 0 for query in queries):
            what = "one candidate" if max(map(len, queries)) == 1 else "candidates of one relevance alone"
            return f"every query has {what}: nothing to rank; the candidates of a query are rows of equal text"
    elif task.label == "tags":
        outside = {at for at, name in enumerate(classes) if name == "O"}
        if all(tag < 0 or tag in outside for tags in labels for tag in _numbers(tags)):
            return "no token belongs to an entity: every tag is O"
    elif task.label == "classes" and not any(number > 0 for label in labels for number in _numbers(label)):
        return "no sample has a label"
    return None


def _numbers(label: object) -> Iterable[float]:
    return (float(number) for number in np.asarray(label).reshape(-1))
