"""Task metrics with their uncertainty: the same numbers for a torch model, an ONNX graph and an engine.

Every metric takes outputs and labels as arrays and returns one float. Values but accuracy come from scikit-learn, scipy
and seqeval, which are imported when a metric is computed. Intervals are percentile bootstraps over what is scored
together: samples, or groups of them, such as the candidates of one query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nxm_export.contract.tasks import Task
from nxm_export.data.answer_spans import NO_ANSWER, Window
from nxm_export.data.bootstrap_intervals import bootstrap_interval
from nxm_export.data.features import members
from nxm_export.data.question_answering import answer_scores
from nxm_export.data.token_labels import OUTSIDE, scored_tags
from nxm_export.errors import DataError

RANKS = 10  # of a ranking that count
# Fewer samples have no 95 % interval: of five that differ, all lie on one side by chance alone once in 16.
LEAST_UNITS = 6
# The group of every sample (samples,), see `nxm_export.data.features.group_array`; None: each its own.
Groups = np.ndarray | None


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose highest logit is their label; logits (samples, classes)."""
    return float((logits.argmax(axis=-1) == labels).mean())  # bootstraps call this thousands of times


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 in a two-class task; macro F1 beyond two classes."""
    from sklearn.metrics import f1_score

    average = "binary" if logits.shape[-1] == 2 else "macro"
    return float(f1_score(labels, logits.argmax(axis=-1), average=average, zero_division=0))


def mcc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient, the metric of CoLA; 0 when there is one class, or one is predicted."""
    from sklearn.metrics import matthews_corrcoef

    predicted = logits.argmax(axis=-1)
    if _constant(predicted) and _constant(labels):
        return 0.0  # scikit-learn says so, too, with a warning on every draw of a bootstrap
    return float(matthews_corrcoef(labels, predicted))


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


def label_counts(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), groups: Groups = None
) -> np.ndarray:
    """(samples, 3): right, predicted and true labels of every sample; a label is predicted where its logit is above 0,
    which is a probability above 0.5. Logits and labels (0 or 1) are (samples, labels)."""
    from sklearn.metrics import multilabel_confusion_matrix

    counts = multilabel_confusion_matrix(labels > 0, logits > 0, samplewise=True)  # (samples, 2, 2)
    right = counts[:, 1, 1]
    return np.stack([right, right + counts[:, 0, 1], right + counts[:, 1, 0]], axis=1)


def entity_counts(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), groups: Groups = None
) -> np.ndarray:
    """(samples, 3): right, predicted and true entities of every sample, as CoNLL counts them (seqeval): an entity is
    right when its type and both ends are.

    Logits are (samples, sequence, classes), labels (samples, at least sequence) as `token_labels.piece_labels` makes
    them; `classes` are the tags by index.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    if len(classes) != logits.shape[-1]:
        raise DataError(f"entity F1 needs the {logits.shape[-1]} tag names of the model, got {len(classes)}")
    rows = []
    for predicted, true in zip(logits.argmax(axis=-1), labels, strict=True):
        actual, expected = (set(get_entities(tags)) for tags in scored_tags(predicted, true, classes))
        rows.append((len(actual & expected), len(actual), len(expected)))
    return np.array(rows)


def pair_cosines(
    embeddings: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), groups: Groups = None
) -> np.ndarray:
    """(pairs, 2): cosine of the two embeddings of every group, and its score; embeddings (samples, features)."""
    order = None if groups is None else np.argsort(groups, kind="stable")
    if groups is None or order is None or set(np.unique(groups, return_counts=True)[1].tolist()) != {2}:
        raise DataError("the cosine of pairs needs groups of exactly two samples; give data with two texts a row")
    first, second = embeddings.astype(np.float64)[order[0::2]], embeddings.astype(np.float64)[order[1::2]]
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.stack([(first * second).sum(axis=1) / np.maximum(lengths, 1e-12), labels[order[0::2]]], axis=1)


def _rank_correlation(rows: np.ndarray) -> float:
    """Spearman correlation of two columns."""
    return spearman(rows[:, 0], rows[:, 1])


def ndcg_of_queries(
    scores: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), groups: Groups = None
) -> np.ndarray:
    """(queries, 1): nDCG@10 of the candidates of every group, with gains as they are (not 2**gain); scores and
    relevance are (samples, 1). A query with nothing to rank, one candidate or candidates that are all equally relevant,
    is left out."""
    from sklearn.metrics import ndcg_score

    rows = []
    for query in members(groups, len(labels)):
        relevance, given = labels[query].reshape(1, -1), scores[query].reshape(1, -1)
        if np.ptp(relevance) > 0:
            rows.append([float(ndcg_score(relevance, given, k=RANKS)) if np.isfinite(given).all() else np.nan])
    if not rows:
        raise DataError("no query has two candidates of different relevance, so there is no ranking to score")
    return np.array(rows)


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean())


def _counted_f1(counts: np.ndarray) -> float:
    """F1 of summed counts; 0 where nothing is predicted and nothing true, as in scikit-learn."""
    right, predicted, true = counts.sum(axis=0)
    return float(2 * right / (predicted + true)) if predicted + true else 0.0


Metric = Callable[[np.ndarray, np.ndarray], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
}


@dataclass(frozen=True)
class RowMetric:
    """A metric in two parts: `rows` (outputs, labels, classes, groups) gives a row of numbers for each unit that is
    scored, a sample or a group, and `value` makes one number of them. A bootstrap only has to draw rows."""

    rows: Callable[[np.ndarray, np.ndarray, Sequence[str], Groups], np.ndarray]
    value: Callable[[np.ndarray], float]


ROW_METRICS: dict[str, RowMetric] = {
    "micro_f1": RowMetric(label_counts, _counted_f1),  # over all samples together
    "entity_f1": RowMetric(entity_counts, _counted_f1),
    "cosine_spearman": RowMetric(pair_cosines, _rank_correlation),
    "ndcg_at_10": RowMetric(ndcg_of_queries, _mean),
    "squad_f1": RowMetric(answer_scores, lambda rows: float(rows[:, 1].mean())),
    "exact_match": RowMetric(answer_scores, lambda rows: float(rows[:, 0].mean())),
}


def scored_outputs(task: Task, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the metrics of a task read, of the graph's outputs by name: the first, or start and end logits as (...,
    2)."""
    if task.output_kind == "span":
        return np.stack([outputs[name] for name in task.outputs], axis=-1)
    return outputs[next(iter(task.outputs))]


def metric_named(name: str, classes: Sequence[str] = (), groups: Groups = None) -> Metric:
    """The metric of this name, or `DataError` with the list; `classes` are the names of the last axis and `groups` the
    groups of the samples, where it needs them. Of outputs with a NaN it is NaN: the largest of NaN is whichever comes
    first."""
    if name not in METRICS and name not in ROW_METRICS:
        raise DataError(f"unknown metric {name!r}; choose one of {', '.join([*METRICS, *ROW_METRICS])}")

    return lambda outputs, labels: ScoredOutputs(outputs, labels, classes, groups).value(name)


def paired_interval(
    name: str,
    outputs: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
    classes: Sequence[str] = (),
    groups: Groups = None,
) -> tuple[float, float]:
    """95 % bootstrap interval of metric(outputs) - metric(reference), both resampled together over samples, or over
    `groups`; NaN for fewer than `LEAST_UNITS`."""
    ours, theirs = (ScoredOutputs(each, labels, classes, groups) for each in (outputs, reference))
    return ours.interval_against(theirs, name, seed)


@dataclass(frozen=True, eq=False)
class ScoredOutputs:
    """Outputs (samples, ...) of a model with all that its metrics need.

    What a metric makes of the samples is made once, for its value, its interval and its count, and for other metrics
    that read the same: of answers, it takes a while.
    """

    outputs: np.ndarray
    labels: np.ndarray
    classes: Sequence[str] = ()
    groups: Groups = None

    def value(self, name: str) -> float:
        """A metric by its name; NaN for outputs with a NaN."""
        if self._undefined:
            return math.nan
        if name in METRICS:
            return METRICS[name](self.outputs, self.labels)
        return ROW_METRICS[name].value(self._rows(name))

    def units(self, name: str) -> int:
        """How many samples, or groups of them, a metric scores: without the queries that have nothing to rank."""
        return self._resampled(name)[0]

    def interval(self, name: str, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of a metric over samples, or over groups of them; NaN for fewer than
        `LEAST_UNITS`, and for outputs with a NaN."""
        if self._undefined:
            return math.nan, math.nan
        return _interval(*self._resampled(name), seed)

    def interval_against(self, reference: ScoredOutputs, name: str, seed: int = 0) -> tuple[float, float]:
        """The same of the difference to the metric of `reference`, outputs for the same samples."""
        if self._undefined or reference._undefined:
            return math.nan, math.nan
        (units, ours), (_, theirs) = self._resampled(name), reference._resampled(name)
        return _interval(units, lambda pick: ours(pick) - theirs(pick), seed)

    @cached_property
    def _undefined(self) -> bool:
        return bool(np.isnan(self.outputs).any())

    @cached_property
    def _made(self) -> dict[object, np.ndarray]:
        return {}

    def _rows(self, name: str) -> np.ndarray:
        make = ROW_METRICS[name].rows
        if make not in self._made:
            self._made[make] = make(self.outputs, self.labels, self.classes, self.groups)
        return self._made[make]

    def _resampled(self, name: str) -> tuple[int, Callable[[np.ndarray], float]]:
        """(how many units are scored, the metric of the units at given indices)."""
        if name in ROW_METRICS:
            rows, value = self._rows(name), ROW_METRICS[name].value
            return len(rows), lambda pick: value(rows[pick])
        metric, outputs, labels = metric_named(name), self.outputs, self.labels
        if self.groups is None:
            return len(labels), lambda pick: metric(outputs[pick], labels[pick])
        units = [np.array(unit) for unit in members(list(self.groups), len(labels))]

        def of_units(pick: np.ndarray) -> float:
            samples = np.concatenate([units[i] for i in pick])
            return metric(outputs[samples], labels[samples])

        return len(units), of_units


def one_class(name: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """The outputs (samples, classes) that give every sample the same class, of all such the ones with the highest
    metric: what a model that reads nothing can reach. Labels (samples,) are classes by index."""
    metric = metric_named(name)
    constant = [np.broadcast_to(row, (len(labels), classes)) for row in np.eye(classes)]
    return max(constant, key=lambda outputs: metric(outputs, labels))


@dataclass(frozen=True, eq=False)
class BlindAnswer:
    """The outputs of a model that reads nothing: the same for every sample. `what` says what, such as ``one class``,
    and `label` which; it is empty where the metric is the same for all."""

    what: str
    label: str
    outputs: np.ndarray


def blind_answer(
    task: Task, outputs: np.ndarray, labels: np.ndarray, classes: Sequence[str], groups: Groups = None
) -> BlindAnswer | None:
    """The same answer for every sample, of all such the one with the highest metric: what a model that reads nothing
    can reach. It is shaped like the `outputs` of a model, as `scored_outputs` gives them. None for questions that all
    have an answer, of which none is the same for all."""
    if task.label == "answers":
        if not Window.unpack(labels[0]).nullable:
            return None
        empty = np.zeros(outputs.shape)
        empty[:, NO_ANSWER] = 2.0**20  # more than any threshold
        return BlindAnswer("an empty answer", "", empty)
    if task.label in ("score", "relevance", "pair-score"):
        return BlindAnswer("one vector" if task.label == "pair-score" else "one score", "", np.ones(outputs.shape))
    if task.label == "class":
        made = one_class(task.metric, labels, outputs.shape[-1])
        return BlindAnswer("one class", classes[int(made[0].argmax())], made)
    metric, count = metric_named(task.metric, classes, groups), outputs.shape[-1]
    if task.label == "tags":
        rows, what = [np.eye(count)[i] for i in range(count)], "one tag"
    else:  # of so many labels, no others have more that are right than those that occur most often
        often = np.argsort(-(labels > 0).sum(axis=0), kind="stable")
        rows, what = (
            [np.where(np.isin(np.arange(count), often[: i + 1]), 1.0, -1.0) for i in range(count)],
            "one answer",
        )
    best = max(rows, key=lambda row: metric(np.broadcast_to(row, outputs.shape), labels))
    label = ", ".join(name for name, logit in zip(classes, best, strict=True) if logit > 0)
    return BlindAnswer(what, label, np.broadcast_to(best, outputs.shape))


def require_scorable(name: str, labels: np.ndarray, classes: Sequence[str] = (), source: str = "the data") -> None:
    """Raise `DataError` where a metric is the same for every model, right or wrong: it tells nothing, and would gate
    nothing."""
    if name in ("pearson", "spearman", "cosine_spearman") and _constant(labels):
        raise DataError(f"{source}: every label is {labels.flat[0]:g}, so there is no correlation to score")
    if name == "mcc" and _constant(labels):
        raise DataError(f"{source}: every label is the same class, so MCC is 0 whatever is predicted")
    if name == "f1" and len(classes) == 2 and not (labels == 1).any():
        raise DataError(f"{source}: no label is {classes[1]!r}, so its F1 is 0 whatever is predicted")
    if name == "micro_f1" and not (labels > 0).any():
        raise DataError(f"{source}: no sample has a label, so micro F1 is 0 whatever is predicted")
    outside = classes.index(OUTSIDE) if OUTSIDE in classes else -1
    if name == "entity_f1" and not ((labels >= 0) & (labels != outside)).any():
        raise DataError(f"{source}: no token belongs to an entity, so entity F1 is 0 whatever is predicted")


def _interval(units: int, value: Callable[[np.ndarray], float], seed: int) -> tuple[float, float]:
    return bootstrap_interval(units, value, seed) if units >= LEAST_UNITS else (math.nan, math.nan)
