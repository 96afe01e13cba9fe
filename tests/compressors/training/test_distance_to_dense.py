"""What a compression says of how far it is from the dense model, against loops over samples, tokens and spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compressors.models import load_model, load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.distance_to_dense import distance_to_dense
from compressors.training.task_data import TaskData, TaskDataRequest, read_task_data
from compressors.training.trainer import predict
from nxm_export.contract.records.checkpoint_metrics import read_metrics
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import MAX_ANSWER, Window
from nxm_export.data.features import label_array
from nxm_export.data.token_labels import NO_LABEL
from tests.support import tiny
from tests.support.trained import run


def outputs_on_dev(task: str, directory: Path) -> tuple[TaskData, np.ndarray, np.ndarray]:
    """The data of a task, what a tiny model says on its dev part, and the same with noise, none of it on padding."""
    source = resolve(tiny.write_model("bert", directory / "model", head=task))
    train, dev = tiny.write_data(directory, task)
    request = TaskDataRequest(TASKS[task], str(train), str(dev))
    data = read_task_data(source, request, load_tokenizer(source), Settings())
    dense = predict(load_model(source, TASKS[task]), data.dev, data.pad_id)
    noise = np.random.default_rng(0).normal(size=dense.shape).astype(np.float32) * dense.std()
    for row, sample in zip(noise, data.dev, strict=True):
        if dense.ndim == 3:
            row[len(sample["input_ids"]) :] = 0
    return data, dense, dense + noise


def kl(dense: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """KL of two distributions that logits give, term by term."""
    of_dense, of_other = (math.log(sum(math.exp(z) for z in logits)) for logits in (dense, other))
    pairs = zip(dense, other, strict=True)
    return math.fsum(math.exp(z - of_dense) * ((z - of_dense) - (w - of_other)) for z, w in pairs)


def expected(kind: str, data: TaskData, dense: np.ndarray, other: np.ndarray) -> tuple[list[float], list[bool]]:
    """(distances, whether answers are equal), each by whatever it is a mean over."""
    labels, distances, same = label_array(data.dev), list[float](), list[bool]()
    one, two = dense.astype(float), other.astype(float)
    for i, sample in enumerate(data.dev):
        length = len(sample["input_ids"])
        if kind == "vector":
            distances.append(((one[i] - two[i]) ** 2).sum() / (one[i] ** 2).sum())
        elif kind == "identity":
            distances.append(((one[i] - two[i]) ** 2).sum())
        elif kind == "sigmoid":
            distances.append(sum(kl([z, 0], [w, 0]) for z, w in zip(one[i], two[i], strict=True)))
            same.append({*np.flatnonzero(one[i] > 0)} == {*np.flatnonzero(two[i] > 0)})
        elif kind == "span":
            distances.append(sum(kl(one[i, :length, side], two[i, :length, side]) for side in (0, 1)))
        elif one.ndim == 3:
            distances += [kl(one[i, t], two[i, t]) for t in range(length)]
            same += [one[i, t].argmax() == two[i, t].argmax() for t in range(length) if labels[i, t] != NO_LABEL]
        else:
            distances.append(kl(one[i], two[i]))
            same.append(one[i].argmax() == two[i].argmax())
    if kind == "span":
        same = [answer(data, one, group) == answer(data, two, group) for group in {s["group"] for s in data.dev}]
    return distances, same


def answer(data: TaskData, logits: np.ndarray, group: int) -> tuple[int, int]:
    """The characters of the best span of a question, of all that there are in all its windows."""
    spans = []
    for sample, rows, label in zip(data.dev, logits, label_array(data.dev), strict=True):
        if sample["group"] == group:
            window = Window.unpack(label)
            for start in range(len(window.starts)):
                for end in range(start, min(start + MAX_ANSWER, len(window.starts))):
                    total = rows[window.first + start, 0] + rows[window.first + end, 1]
                    spans.append((total, window.offset + window.starts[start], window.offset + window.ends[end]))
    return max(spans)[1:]


@pytest.mark.parametrize("task", TASKS)
def test_it_is_what_loops_find(task: str, tmp_path: Path) -> None:
    data, dense, other = outputs_on_dev(task, tmp_path)
    kind = TASKS[task].output_kind
    found = distance_to_dense(dense, other, data)
    distances, same = expected(kind, data, dense, other)
    assert found.distance_to_dense == pytest.approx(np.mean(distances), rel=1e-6)  # double, summed in another order
    assert found.distance_to_dense is not None
    assert found.distance_to_dense > 0
    assert found.same_answers == (pytest.approx(np.mean(same), abs=1e-12) if same else None)
    assert not same or 0 < np.mean(same) < 1, "both kinds of answers occur"
    measures = {"identity": "squared-error", "vector": "relative-squared-distance"}
    assert found.distance_measure == measures.get(kind, "kl")


def test_a_model_is_at_no_distance_from_itself_and_what_is_no_number_is_none(tmp_path: Path) -> None:
    data, dense, _ = outputs_on_dev("classification", tmp_path)
    found = distance_to_dense(dense, dense, data)
    assert (found.distance_to_dense, found.same_answers) == (0.0, 1.0)
    broken = dense.copy()
    broken[3] = np.nan
    found = distance_to_dense(broken, dense, data)
    assert (found.dense_value, found.distance_to_dense, found.same_answers) == (None, None, None)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_checkpoint_says_how_far_it_is_from_the_dense_model(prepared: Path, tmp_path: Path, steps: int) -> None:
    metrics = run(prepared, tmp_path / "checkpoint", "2:4+W4", steps=steps)
    assert metrics.dense_value == read_metrics(prepared / "dense").value
    assert metrics.distance_measure == "kl"
    assert metrics.distance_to_dense is not None
    assert metrics.distance_to_dense > 0
    assert metrics.same_answers is not None
    assert metrics.same_answers <= 1
    assert read_metrics(tmp_path / "checkpoint") == metrics
