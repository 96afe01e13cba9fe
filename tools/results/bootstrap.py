"""The resampled metrics of `nxm_export.data.metrics` from confusion matrices, a thousand resamples in milliseconds.

The draws are those of `nxm_export.data.metrics.interval`, so the numbers are the same up to rounding of the last digit; only
the way there is shorter: all metrics of a classification are functions of its confusion matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nxm_export.data.bootstrap import RESAMPLES, resamples
from nxm_export.errors import DataError


def resampled(metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The metric on every resample of the sentences, (RESAMPLES,); `predictions` and `labels` are classes (samples,)."""
    if metric not in _METRICS:
        raise DataError(f"no resampling for the metric {metric!r}; choose one of {', '.join(_METRICS)}")
    return _METRICS[metric](confusions(predictions, labels, classes))


def confusions(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrix of every resample, int64 (RESAMPLES, label, prediction)."""
    cells, samples = labels * classes + predictions, len(labels)
    counts = [np.bincount(cells[picks], minlength=classes**2) for picks in resamples(samples)]
    return np.stack(counts).reshape(RESAMPLES, classes, classes)


def _accuracy(matrices: np.ndarray) -> np.ndarray:
    return np.asarray(np.trace(matrices, axis1=1, axis2=2) / matrices.sum(axis=(1, 2)))


def _f1(matrices: np.ndarray) -> np.ndarray:
    """Of class 1; tasks measured by F1 have two classes."""
    if matrices.shape[1] != 2:
        raise DataError(f"F1 is resampled for two classes, not for {matrices.shape[1]}")
    hits = 2 * matrices[:, 1, 1]
    return _ratio(hits, hits + matrices[:, 0, 1] + matrices[:, 1, 0])


def _mcc(matrices: np.ndarray) -> np.ndarray:
    """Gorodkin 2004: the correlation of predictions and labels; 0 where one of them is constant."""
    matrices = matrices.astype(np.float64)
    total, right = matrices.sum(axis=(1, 2)), np.trace(matrices, axis1=1, axis2=2)
    wanted, found = matrices.sum(axis=2), matrices.sum(axis=1)  # (RESAMPLES, classes)
    covariance = right * total - (wanted * found).sum(axis=1)
    spread = (total**2 - (found**2).sum(axis=1)) * (total**2 - (wanted**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    return np.divide(above, below, out=np.zeros(len(below)), where=below > 0)


_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"accuracy": _accuracy, "f1": _f1, "mcc": _mcc}
