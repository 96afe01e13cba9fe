"""How far the compressed model's answers to the dev samples are from the dense model's: what `nxm compress` says beside
the score, which on few samples moves too little to show it."""

from __future__ import annotations

import math

import numpy as np
import torch

from compressors.training.output_divergence import divergence
from compressors.training.task_data import TaskData
from nxm_export.contract.records.checkpoint_metrics import DistanceToDense, Measure, finite
from nxm_export.data.answer_spans import Window
from nxm_export.data.features import filled, group_array, label_array, members
from nxm_export.data.metrics import ScoredOutputs
from nxm_export.data.predictions import of_spans
from nxm_export.data.token_labels import NO_LABEL

_MEASURES: dict[str, Measure] = {"identity": "squared-error", "vector": "relative-squared-distance"}


def distance_to_dense(dense: np.ndarray, compressed: np.ndarray, data: TaskData) -> DistanceToDense:
    """The distance of `compressed` to `dense`, both float32 outputs for all dev samples (samples, ...), as
    `compressors.training.trainer.predict` gives them. What a NaN or an infinity leaves no number for is None."""
    kind, labels, groups = data.task.output_kind, label_array(data.dev), group_array(data.dev)
    lengths = [len(sample["input_ids"]) if dense.ndim == 3 else None for sample in data.dev]  # without padding
    pairs = [(one[:length], other[:length]) for one, other, length in zip(dense, compressed, lengths, strict=True)]
    total = sum(divergence(torch.from_numpy(one)[None], torch.from_numpy(other)[None], kind) for one, other in pairs)
    count = sum(len(one) for one, _ in pairs) if dense.ndim == 3 and kind != "span" else len(pairs)
    comparable = bool(np.isfinite(dense).all() and np.isfinite(compressed).all())
    score = math.nan
    if data.dev_labelled:
        score = ScoredOutputs(dense, labels, data.classes or (), groups).value(data.task.metric)
    elif dense.ndim == 3 and kind != "span":  # of tokens without labels, all that are there count
        labels = filled([np.zeros(length, np.int64) for length in lengths if length is not None], NO_LABEL)
    return DistanceToDense(
        dense_value=finite(score),
        distance_to_dense=finite(total / count),
        distance_measure=_MEASURES.get(kind, "kl"),
        same_answers=_same_answers(dense, compressed, kind, labels, groups) if comparable else None,
    )


def _same_answers(
    dense: np.ndarray, compressed: np.ndarray, kind: str, labels: np.ndarray, groups: np.ndarray | None
) -> float | None:
    """The share of equal answers; None where answers are no choice between any."""
    if kind in ("identity", "vector"):
        return None
    if kind == "span":
        windows = [Window.unpack(label) for label in labels]
        units = members(groups, len(windows))
        ours, theirs = (
            [of_spans([outputs[i] for i in unit], [windows[i] for i in unit]) for unit in units]
            for outputs in (compressed, dense)
        )
        same = np.array(
            [(one.start, one.end) == (other.start, other.end) for one, other in zip(ours, theirs, strict=True)]
        )
    elif kind == "sigmoid":
        same = ((dense > 0) == (compressed > 0)).all(axis=-1)
    else:
        same = dense.argmax(axis=-1) == compressed.argmax(axis=-1)
        same = same[labels != NO_LABEL] if same.ndim == 2 else same
    return float(same.mean()) if same.size else None
