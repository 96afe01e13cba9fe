"""Whether the numbers that a data file has for labels are those of the model's classes: only the score can tell.

A model that has learned its task is seldom wrong more often than one that guesses, and where it is, it is not sure.
Where it is both, by an exact binomial test, the data count the classes in another order than the head does, and every
number computed from them is wrong. A head that was never trained may be wrong as often, most of all where it gives one
class to everything; it says nothing about any order, and is not accused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nxm_export.data.token_labels import OUTSIDE
from nxm_export.errors import DataError

ROWS = 200  # of a data file, which are looked at
_SURE = 0.001
_UNEVEN = 0.15  # nats: a head with its first random weights gives about even probabilities


def rows_to_look_at(count: int) -> list[int]:
    """At most `ROWS` of `count` rows, from the whole file: it may be sorted by label."""
    return [int(row) for row in np.linspace(0, count - 1, min(count, ROWS)).round()]


def require_label_order(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], source: str) -> None:
    """Raise `DataError` where a model's logits (samples, [sequence,] classes) hit the labels (samples, [sequence]) of
    samples less often than guessing does, with a probability below 0.001; of tokens, also among those that are in an
    entity both by label and by model."""
    if labels.ndim != logits.ndim - 1:
        return  # several labels a sample: most do not hold, in whichever order
    labels = labels[..., : logits.shape[-2]] if labels.ndim == 2 else labels
    predicted, scored = logits.argmax(axis=-1), labels >= 0
    if not scored.any() or (_alike(predicted[scored]) and not _alike(labels[scored])):
        return  # one class for everything, in whichever order
    outside = [i for i, name in enumerate(classes) if name == OUTSIDE and labels.ndim == 2]
    inside = scored & ~np.isin(labels, outside) & ~np.isin(predicted, outside)  # most tokens are outside of entities
    for looked_at, choices in ((scored, len(classes)), (inside, len(classes) - len(outside))):
        if looked_at.any() and choices > 1 and _is_sure(logits[looked_at], labels[looked_at]):
            given, meant = predicted[looked_at], labels[looked_at]
            chance = 1.0 if _alike(meant) else _by_chance(given, meant)
            if _is_below(given, meant, min(chance, 1 / choices)):
                break
    else:
        return
    asked = ",".join(f"{i}={name}" for i, name in enumerate(classes[:3])) + ",..." * (len(classes) > 3)
    raise DataError(
        f"{source}: its labels are numbers, and taken for those of the model's classes ({asked}) they are right for "
        f"{int((given == meant).sum())} of {len(meant)} that were looked at, fewer than by guessing: the data count "
        "the classes in another order. Say what each number stands for: --label-map 0=NAME,1=NAME"
    )


def _alike(numbers: npt.NDArray[np.integer]) -> bool:
    return bool((numbers == numbers[0]).all())


def _is_below(given: np.ndarray, meant: np.ndarray, share: float) -> bool:
    """True when fewer are equal than a `share` of them would be by accident."""
    from scipy.stats import binomtest

    hits = int((given == meant).sum())
    return bool(binomtest(hits, len(meant), share, alternative="less").pvalue < _SURE)


def _by_chance(given: np.ndarray, meant: np.ndarray) -> float:
    """The share of hits of a model that gives each class as often as this one, in no relation to the labels."""
    return sum(float((given == label).mean() * (meant == label).mean()) for label in np.unique(meant))


def _is_sure(logits: np.ndarray, labels: np.ndarray) -> bool:
    """True when the probabilities (rows, classes) of the labels are on average clearly below even ones."""
    values = logits.astype(np.float64)
    highest = values.max(axis=-1)
    total = highest + np.log(np.exp(values - highest[:, None]).sum(axis=-1))
    lost = total - np.take_along_axis(values, labels[:, None], axis=-1)[:, 0]
    return float(lost.mean()) > math.log(values.shape[-1]) + _UNEVEN
