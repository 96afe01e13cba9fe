"""More text for the teacher to answer: training samples with some tokens dropped, replaced and swapped; and texts from
elsewhere, which have no labels.

A small training set is learned by heart, and a compressed model that has done so agrees with its teacher on nothing
else. What a distorted sentence means is not known, so its label is left out; the teacher's answer and hidden states are
all it is trained on, as they are of other texts. Distilling into small models on changed sentences is TinyBERT's idea
(Jiao et al. 2020, arXiv 1909.10351), which replaces words by what a language model proposes; here they come from the
training set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import groupby
from numbers import Integral

from nxm_export.contract.tasks import Task
from nxm_export.data.features import Features, Label, inputs_of, sample_of
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.errors import DataError

DROPPED, REPLACED, SWAPPED = 0.10, 0.15, 0.10  # shares of a sample's tokens
WINDOW = 50  # batches among which samples are sorted by length


def require_augmentable(task: Task, option: str = "--augment") -> None:
    """Raise `DataError` for a task whose own loss, where it has a part in training, cannot leave a sample out; `option`
    is what brings such samples."""
    if task.own_loss and (task.output_kind != "softmax"):
        raise DataError(
            f"task {task.name} has a loss of its own that cannot leave samples without labels out; set its weight to "
            f"0, or leave {option} out"
        )


def augmented(
    features: Sequence[Features], order: Sequence[int], batch_size: int, share: float, seed: int
) -> tuple[list[Features], list[int]]:
    """(samples, order) in which about `share` of the places of `order` hold a distorted sample of their own.

    The first of every batch stays as it is, unless it is the only one, so that no batch of several is without a label:
    of all places it is share * (1 - 1 / batch_size). What was measured was measured so. The result depends on the
    arguments only.
    """
    rng = random.Random(seed)
    pool = [token for sample in features for token in sample["input_ids"][1:-1]]
    samples, places = list(features), list(order)
    for at, index in enumerate(order):
        if _may_change(at, batch_size) and rng.random() < share:
            places[at] = len(samples)
            samples.append(distorted(features[index], pool, rng))
    return samples, places


def mixed(
    samples: Sequence[Features],
    order: Sequence[int],
    more: Sequence[Features],
    batch_size: int,
    share: float,
    seed: int,
) -> tuple[list[Features], list[int]]:
    """(samples with `more` behind them, order) in which about `share` of the places of `order` hold one of `more`.

    All of `more` come once before any comes again. The first of every batch of several stays as it is, as in
    `augmented`, and in each
    stretch of `WINDOW` batches a longer text takes the place of a longer sample: batches are still of similar length.
    The result depends on the arguments only.
    """
    rng = random.Random(f"more text {seed}")
    chosen = [at for at in range(len(order)) if _may_change(at, batch_size) and rng.random() < share]
    drawn = list[int]()
    while len(drawn) < len(chosen):
        drawn += rng.sample(range(len(more)), len(more))
    places, start = list(order), 0
    for _, stretch in groupby(chosen, key=lambda at: at // (WINDOW * batch_size)):
        by_length = sorted(stretch, key=lambda at: len(samples[order[at]]["input_ids"]))
        texts = drawn[start : start + len(by_length)]
        start += len(by_length)
        for at, text in zip(by_length, sorted(texts, key=lambda i: len(more[i]["input_ids"])), strict=True):
            places[at] = len(samples) + text
    return [*samples, *more], places


def _may_change(at: int, batch_size: int) -> bool:
    """Whether a sample without a label may stand at this place of the order."""
    return batch_size == 1 or at % batch_size > 0


def without_label(label: Label | str, tokens: int) -> Label | str:
    """What stands for no label in place of this one, in a sample of so many tokens; answers (a text) stay."""
    if isinstance(label, list):
        return [math.nan] * len(label) if label and isinstance(label[0], float) else [NO_LABEL] * tokens
    if isinstance(label, float):
        return math.nan
    return NO_LABEL if isinstance(label, Integral) else label


def distorted(sample: Features, pool: Sequence[int], rng: random.Random) -> Features:
    """`sample` without its label, some tokens dropped, replaced by one of `pool`, or swapped with the next.

    The first and the last token, and others with their ids (separators), stay where they are.
    """
    ids = list(sample["input_ids"])
    fixed = {ids[0], ids[-1]}
    places = [i for i, token in enumerate(ids) if token in fixed or rng.random() >= DROPPED]
    if all(ids[i] in fixed for i in places):
        places = list(range(len(ids)))
    for a in range(len(places) - 1):
        one, other = ids[places[a]], ids[places[a + 1]]
        if one not in fixed and other not in fixed and rng.random() < SWAPPED:
            places[a], places[a + 1] = places[a + 1], places[a]
    changed = {name: [values[i] for i in places] for name, values in inputs_of(sample).items()}
    changed["input_ids"] = [
        token if token in fixed or rng.random() >= REPLACED else rng.choice(pool) for token in changed["input_ids"]
    ]
    return {**sample, **sample_of(changed), "labels": without_label(sample["labels"], len(places))}
