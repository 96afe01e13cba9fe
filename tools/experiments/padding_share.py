"""The share of padding in the batches of training: what packing sentences could win at most.

    python -m tools.experiments.padding_share DENSE rotten/train.tsv CoLA/train.tsv

DENSE is a classifier. One line per file: samples, their mean and longest length in tokens, and the share of tokens that
are padding over three epochs in batches of 32, as training makes them and in random order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from compressors.models import load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.task_data import TaskDataRequest, read_task_data
from compressors.training.trainer import schedule
from nxm_export.contract.tasks import task_named

BATCH, EPOCHS = 32, 3


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("train", nargs="+")
    chosen = parser.parse_args()
    source, task = resolve(chosen.dense), task_named("classification")
    for file in chosen.train:
        request = TaskDataRequest(task, file, file)
        features = read_task_data(source, request, load_tokenizer(source), Settings()).train
        lengths = np.array([len(sample["input_ids"]) for sample in features])
        steps = EPOCHS * len(features) // BATCH
        made = padding(lengths, schedule(features, steps, BATCH, seed=0))
        rng = np.random.default_rng(0)
        arrival = padding(lengths, [i for _ in range(EPOCHS) for i in rng.permutation(len(lengths))[: steps * BATCH]])
        print(
            f"{file}: {len(features)} samples of {lengths.mean():.1f} tokens, {lengths.max()} at most; "
            f"padding {made:.1%}, in random order {arrival:.1%}",
            flush=True,
        )


def padding(lengths: np.ndarray, order: Sequence[int]) -> float:
    """The share of tokens that are padding where samples of these lengths run in this order."""
    batches = [lengths[list(order[at : at + BATCH])] for at in range(0, len(order), BATCH)]
    return 1.0 - float(sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches))


if __name__ == "__main__":
    main()
