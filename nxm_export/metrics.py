"""Task metrics with their uncertainty: the same numbers for a torch model, an ONNX graph and an engine.

Every metric takes outputs and labels as arrays and returns one float. Values come from scikit-learn and scipy, which are
imported when a metric is computed. Intervals are percentile bootstraps over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nxm_export.errors import DataError

RESAMPLES = 1000


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose highest logit is their label; logits (samples, classes)."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, logits.argmax(axis=-1)))


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 in a two-class task; macro F1 beyond two classes."""
    from sklearn.metrics import f1_score

    average = "binary" if logits.shape[-1] == 2 else "macro"
    return float(f1_score(labels, logits.argmax(axis=-1), average=average, zero_division=0))


def mcc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient, the metric of CoLA."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(axis=-1)))


def pearson(logits: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of the first output with the label; 0 when either is constant."""
    from scipy.stats import pearsonr

    scores = logits.reshape(len(labels), -1)[:, 0]
    return 0.0 if _constant(scores) or _constant(labels) else float(pearsonr(scores, labels).statistic)


def spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation of the first output with the label; 0 when either is constant."""
    from scipy.stats import spearmanr

    scores = logits.reshape(len(labels), -1)[:, 0]
    return 0.0 if _constant(scores) or _constant(labels) else float(spearmanr(scores, labels).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) == 0)  # not so with NaN, which then shows in the correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
}


def metric_named(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """The metric of this name, or `DataError` with the list."""
    if name not in METRICS:
        raise DataError(f"unknown metric {name!r}; choose one of {', '.join(METRICS)}")
    return METRICS[name]


def interval(name: str, outputs: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a metric over samples."""
    metric = metric_named(name)
    return _percentiles([metric(outputs[pick], labels[pick]) for pick in _resamples(len(labels), seed)])


def paired_interval(
    name: str, outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of metric(outputs) - metric(reference), both resampled together over samples."""
    metric = metric_named(name)
    return _percentiles(
        [
            metric(outputs[pick], labels[pick]) - metric(reference[pick], labels[pick])
            for pick in _resamples(len(labels), seed)
        ]
    )


def _resamples(samples: int, seed: int) -> Iterator[np.ndarray]:
    """Index arrays, one at a time: all of them together would take gigabytes for a large dev set."""
    generator = np.random.default_rng(seed)
    return (generator.integers(0, samples, size=samples) for _ in range(RESAMPLES))


def _percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
