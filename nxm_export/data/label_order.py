"""Whether the numbers that a data file has for labels are those of the model's classes: only the score can tell.

A model that has learned its task is seldom wrong more often than one that guesses. Where it is, by an exact binomial
test, the data count the classes in another order than the head does, and every number computed from them is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nxm_export.data.token_labels import OUTSIDE
from nxm_export.errors import DataError

ROWS = 200  # the first of a data file, which are looked at
_SURE = 0.001


def require_label_order(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], source: str) -> None:
    """Raise `DataError` where a model's logits (samples, [sequence,] classes) hit the labels (samples, [sequence]) of
    samples less often than guessing does, with a probability below 0.001; of tokens, also among those that are in an
    entity both by label and by model."""
    from scipy.stats import binomtest

    if labels.ndim != logits.ndim - 1:
        return  # several labels a sample: most do not hold, in whichever order
    labels = labels[..., : logits.shape[-2]] if labels.ndim == 2 else labels
    predicted, scored = logits.argmax(axis=-1), labels >= 0
    outside = [i for i, name in enumerate(classes) if name == OUTSIDE and labels.ndim == 2]
    inside = scored & ~np.isin(labels, outside) & ~np.isin(predicted, outside)  # most tokens are outside of entities
    for looked_at, choices in ((scored, len(classes)), (inside, len(classes) - len(outside))):
        hits, count = int((predicted == labels)[looked_at].sum()), int(looked_at.sum())
        if count and choices > 1 and binomtest(hits, count, 1 / choices, alternative="less").pvalue < _SURE:
            break
    else:
        return
    asked = ",".join(f"{i}={name}" for i, name in enumerate(classes[:3])) + ",..." * (len(classes) > 3)
    raise DataError(
        f"{source}: its labels are numbers, and taken for those of the model's classes ({asked}) they are right for "
        f"{hits} of the first {count}, fewer than by guessing: the data count the classes in another order. Say what "
        "each number stands for: --label-map 0=NAME,1=NAME"
    )
