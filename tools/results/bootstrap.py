"""The resampled metrics of `nxm_export.data.metrics` from confusion matrices, a thousand resamples in milliseconds.

The draws are those of `nxm_export.data.metrics.ScoredOutputs.interval`, so the numbers are the same up to rounding of
the last digit; only the way there is shorter: all metrics of a classification are functions of its confusion matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nxm_export.data.bootstrap_intervals import RESAMPLES, resamples
from nxm_export.errors import DataError
from tools.results.records import Classes

Matrices = npt.NDArray[np.int64]  # (RESAMPLES, label, prediction)


def resampled(metric: str, predictions: Classes, labels: Classes, classes: int) -> npt.NDArray[np.float64]:
    """The metric on every resample of the sentences, (RESAMPLES,), from classes (samples,)."""
    if metric not in _METRICS:
        raise DataError(f"no resampling for the metric {metric!r}; choose one of {', '.join(_METRICS)}")
    return _METRICS[metric](confusions(predictions, labels, classes))


def confusions(predictions: Classes, labels: Classes, classes: int) -> Matrices:
    """Confusion matrix of every resample, int64 (RESAMPLES, label, prediction)."""
    cells, samples = labels * classes + predictions, len(labels)
    counts = [np.bincount(cells[picks], minlength=classes**2) for picks in resamples(samples)]
    return np.stack(counts).reshape(RESAMPLES, classes, classes)


def _accuracy(matrices: Matrices) -> npt.NDArray[np.float64]:
    return np.asarray(np.trace(matrices, axis1=1, axis2=2) / matrices.sum(axis=(1, 2)))


def _f1(matrices: Matrices) -> npt.NDArray[np.float64]:
    """Of class 1; tasks measured by F1 have two classes."""
    if matrices.shape[1] != 2:
        raise DataError(f"F1 is resampled for two classes, not for {matrices.shape[1]}")
    hits = 2 * matrices[:, 1, 1]
    return _ratio(hits, hits + matrices[:, 0, 1] + matrices[:, 1, 0])


def _mcc(matrices: Matrices) -> npt.NDArray[np.float64]:
    """Gorodkin 2004: the correlation of predictions and labels; 0 where one of them is constant."""
    counts = matrices.astype(np.float64)
    total, right = counts.sum(axis=(1, 2)), np.trace(counts, axis1=1, axis2=2)
    labels, predictions = counts.sum(axis=2), counts.sum(axis=1)  # (RESAMPLES, classes)
    covariance = right * total - (labels * predictions).sum(axis=1)
    spread = (total**2 - (predictions**2).sum(axis=1)) * (total**2 - (labels**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def _ratio(above: npt.ArrayLike, below: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """above / below, and 0 where below is 0."""
    return np.asarray(np.divide(above, below, out=np.zeros(len(below)), where=below > 0))


_METRICS: dict[str, Callable[[Matrices], npt.NDArray[np.float64]]] = {"accuracy": _accuracy, "f1": _f1, "mcc": _mcc}
