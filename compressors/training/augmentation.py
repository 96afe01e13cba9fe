"""More text for the teacher to answer: training samples with some tokens dropped, replaced and swapped.

A small training set is learned by heart, and a compressed model that has done so agrees with its teacher on nothing
else. What a distorted sentence means is not known, so its label is left out; the teacher's answer and hidden states are
all it is trained on. Distilling into small models on changed sentences is TinyBERT's idea (Jiao et al. 2020, arXiv
1909.10351), which replaces words by what a language model proposes; here they come from the training set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from numbers import Integral

from nxm_export.contract.tasks import Task
from nxm_export.data.examples import Features, inputs_of, sample_of
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.errors import DataError

DROPPED, REPLACED, SWAPPED = 0.10, 0.15, 0.10  # shares of a sample's tokens


def require_augmentable(task: Task) -> None:
    """Raise `DataError` for a task whose own loss, where it has a part in training, cannot leave a sample out."""
    if task.own_loss and (task.output_kind != "softmax"):
        raise DataError(
            f"task {task.name} has a loss of its own that cannot leave samples without labels out; set its weight to "
            "0, or leave --augment out"
        )


def augmented(
    features: Sequence[Features], order: Sequence[int], batch_size: int, share: float, seed: int
) -> tuple[list[Features], list[int]]:
    """(samples, order) in which about `share` of the places of `order` hold a distorted sample of their own.

    The first of every batch stays as it is, so that no batch is without a label. The result depends on the arguments
    only.
    """
    rng = random.Random(seed)
    pool = [token for sample in features for token in sample["input_ids"][1:-1]]
    samples, places = list(features), list(order)
    for at, index in enumerate(order):
        if at % batch_size and rng.random() < share:
            places[at] = len(samples)
            samples.append(distorted(features[index], pool, rng))
    return samples, places


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
    labels = sample["labels"]
    if isinstance(labels, list):
        labels = [NO_LABEL] * len(places)
    elif isinstance(labels, Integral):
        labels = NO_LABEL
    return {**sample, **sample_of(changed), "labels": labels}
