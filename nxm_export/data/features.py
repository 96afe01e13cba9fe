"""A sample as the tokens that a model reads: its inputs, its label as a number, and batches of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, rows_within
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.data.tokenization import TokenLists

# A label as a number: class, score, a row of 0 and 1 or of shares, tags by token; answers stay as they are.
Label = int | float | list[int] | list[float] | tuple[tuple[str, int], ...]


class _TokenIds(TypedDict):
    input_ids: list[int]


class Features(_TokenIds, total=False):
    """One sample: the tokens that a model reads, and what else is known of it.

    `labels` is its label (a text for answers, see `nxm_export.data.question_answering`), `group` the number of the
    group that it is scored with, `span` its answer's first and last token, `pad_to` the length of its whole batch, of
    which this process may have a part.
    """

    attention_mask: list[int]
    token_type_ids: list[int]
    labels: Label | str
    group: int
    span: list[int]
    pad_to: int


def members(groups: Iterable[int] | None, samples: int) -> list[list[int]]:
    """The indices of the samples of each group, in order of its first; without groups every sample is one of its
    own."""
    if groups is None:
        return [[i] for i in range(samples)]
    indices: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        indices.setdefault(int(group), []).append(i)
    return list(indices.values())


def group_array(features: Sequence[Features]) -> np.ndarray | None:
    """The group of every sample (samples,) int64, or None where samples are scored by themselves."""
    return np.array([sample["group"] for sample in features], np.int64) if "group" in features[0] else None


def split_indices(features: Sequence[Features], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices in an order drawn by `seed`: (`count` of them and the rest of their last group, all others)."""
    units = members(group_array(features), len(features)) if features else []
    order, picked = list(np.random.default_rng(seed).permutation(len(units))), list[int]()
    while order and len(picked) < count:
        picked += units[order.pop(0)]
    return picked, [i for unit in order for i in units[unit]]


def tokens_of(encoding: TokenLists, inputs: Sequence[str]) -> Features:
    """A sample of the `inputs` of an encoding, without a label."""
    named = {
        "input_ids": encoding.ids,
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
    }
    return sample_of({name: named[name] for name in inputs})


def sample_of(inputs: Mapping[str, list[int]]) -> Features:
    """A sample of what a model reads, by the names of its inputs, without a label."""
    sample: Features = {"input_ids": inputs["input_ids"]}
    if "attention_mask" in inputs:
        sample["attention_mask"] = inputs["attention_mask"]
    if "token_type_ids" in inputs:
        sample["token_type_ids"] = inputs["token_type_ids"]
    return sample


def inputs_of(sample: Features) -> dict[str, list[int]]:
    """What a model reads of a sample, by the names of its inputs."""
    inputs = {"input_ids": sample["input_ids"]}
    if "attention_mask" in sample:
        inputs["attention_mask"] = sample["attention_mask"]
    if "token_type_ids" in sample:
        inputs["token_type_ids"] = sample["token_type_ids"]
    return inputs


def label_array(features: Sequence[Features]) -> np.ndarray:
    """The labels of samples in one array (samples, ...); those of tokens are filled up with `NO_LABEL`, and texts are
    bytes filled up with 0."""
    labels = [sample["labels"] for sample in features]
    if isinstance(labels[0], str):
        return filled([np.frombuffer(str(text).encode(), np.uint8) for text in labels], 0)
    return filled([np.asarray(label) for label in labels], NO_LABEL)


def filled(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays stacked to one (samples, ...), the shorter ones filled up along their first axis."""
    if not arrays or arrays[0].ndim == 0 or len({len(array) for array in arrays}) == 1:
        return np.stack(arrays)
    made = np.full((len(arrays), max(len(array) for array in arrays), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, array in zip(made, arrays, strict=True):
        row[: len(array)] = array
    return made


def pad(samples: Sequence[Features], pad_id: int, length: int | None = None) -> dict[str, np.ndarray]:
    """One batch: every input as int64 (batch, sequence), padded on the right to the longest sample or to `length`."""
    longest = length or max(len(sample["input_ids"]) for sample in samples)
    inputs = [inputs_of(sample) for sample in samples]
    batch = {}
    for name in inputs[0]:
        array = np.full((len(samples), longest), pad_id if name == "input_ids" else 0, np.int64)
        for row, values in zip(array, inputs, strict=True):
            row[: len(values[name])] = values[name]
        batch[name] = array
    return batch


def sorted_batches(
    features: Sequence[Features], batch_size: int, batch_tokens: int = MAX_BATCH_TOKENS
) -> list[list[int]]:
    """Index batches by length, longest first: little padding, and running out of memory happens at once. Each has at
    most `batch_size` samples, and as many of its longest as `batch_tokens` hold."""
    return length_batches([len(sample["input_ids"]) for sample in features], batch_size, batch_tokens)


def length_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """`sorted_batches` of samples of these lengths in tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        rows = rows_within(max(1, lengths[order[start]]), batch_tokens, batch_size)
        batches.append(order[start : start + rows])
        start += rows
    return batches
