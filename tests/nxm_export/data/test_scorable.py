"""Data that no metric can score is refused before training, and data that one can score is not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.label_kinds import classes_of, labelled, load_labelled
from nxm_export.data.metrics import metric_named, one_class, require_scorable
from nxm_export.data.scorable import require_scorable_examples
from nxm_export.errors import DataError
from tests.support import tiny

ROWS = {
    "regression": (
        "text\tlabel\na\t{}\nb\t{}\n",
        ("0.5", "0.5"),
        ("0.5", "0.75"),
        "every label is 0.5, so there is no correlation",
    ),
    "embedding": (
        "text\ttext_pair\tlabel\na\tb\t{}\nc\td\t{}\n",
        ("3", "3"),
        ("3", "1"),
        "every label is 3, so there is no correlation",
    ),
    "reranking": (
        "text\ttext_pair\tlabel\n{}\td\t1\n{}\te\t0\n",
        ("q", "r"),
        ("q", "q"),
        "every query has one candidate, so there is nothing to rank",
    ),
    "multi-label": ("text\tlabel\na\t{}\nb\t{}\n", ("", ""), ("x", ""), "no sample has a label"),
}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused_with_the_reason_and_taken_where_labels_vary(name: str, tmp_path: Path) -> None:
    text, bad, good, reason = ROWS[name]
    task, file = TASKS[name], tmp_path / "dev.tsv"
    columns = Columns("text", "text_pair" if "text_pair" in text else None, "label")
    classes = ["x", "y"] if name == "multi-label" else None
    file.write_text(text.format(*good))
    raw = load_labelled(str(file), "dev", columns, task)
    require_scorable_examples(task, labelled(raw, task, classes_of(raw, task, classes)), classes)
    file.write_text(text.format(*bad))
    raw = load_labelled(str(file), "dev", columns, task)
    with pytest.raises(DataError, match=rf"dev\.tsv: {reason}"):
        require_scorable_examples(task, labelled(raw, task, classes_of(raw, task, classes)), classes)


def test_candidates_that_are_all_alike_are_nothing_to_rank(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text("text\ttext_pair\tlabel\nq\td\t1\nq\te\t1\n")
    task = TASKS["reranking"]
    examples = labelled(load_labelled(str(file), "dev", Columns("text", "text_pair", "label"), task), task, None)
    with pytest.raises(DataError, match="candidates of one relevance alone"):
        require_scorable_examples(task, examples, None)


@pytest.mark.parametrize(("tags", "refused"), [("O O", True), ("O B-X", False)])
def test_sentences_without_an_entity_have_no_entity_f1(tags: str, refused: bool, tmp_path: Path) -> None:
    file = tmp_path / "dev.conll"
    file.write_text("".join(f"w {tag}\n" for tag in tags.split()) + "\n")
    task = TASKS["token-classification"]
    raw = load_labelled(str(file), "dev", Columns(), task)
    examples = labelled(raw, task, classes_of(raw, task, ["O", "B-X"]))
    if refused:
        with pytest.raises(DataError, match="no token belongs to an entity"):
            require_scorable_examples(task, examples, ["O", "B-X"])
    else:
        require_scorable_examples(task, examples, ["O", "B-X"])


def test_scores_that_are_not_there_are_left_to_the_metric(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text("text\ttext_pair\na\tb\nc\td\n")
    task = TASKS["embedding"]
    raw = load_labelled(str(file), "train", Columns("text", "text_pair"), task)
    examples = labelled(raw, task, None)
    assert all(isinstance(label, float) and math.isnan(label) for label in examples.labels)
    require_scorable_examples(task, examples, None)


@pytest.mark.parametrize("task", TASKS)
def test_the_usual_data_of_every_task_can_be_scored(task: str, tmp_path: Path) -> None:
    _, dev = tiny.write_data(tmp_path, task)
    kind = TASKS[task]
    raw = load_labelled(str(dev), "dev", Columns(), kind)
    classes = classes_of(raw, kind, None)
    require_scorable_examples(kind, labelled(raw, kind, classes), None if classes is None else classes.names)


@pytest.mark.parametrize(
    ("name", "classes", "bad", "good"),
    [
        ("mcc", ("a", "b"), (1, 1), (0, 1)),
        ("mcc", ("a", "b", "c"), (2, 2), (0, 2)),
        ("f1", ("a", "b"), (0, 0), (1, 1)),
    ],
)
def test_a_metric_that_is_the_same_for_every_model_is_refused(
    name: str, classes: tuple[str, ...], bad: tuple[int, int], good: tuple[int, int]
) -> None:
    """By trying all predictions: the refused labels give one value, the others give several."""

    def values(labels: tuple[int, int]) -> set[float]:
        logits = np.eye(len(classes))
        predictions = itertools.product(range(len(classes)), repeat=2)
        return {metric_named(name)(logits[list(predicted)], np.array(labels)) for predicted in predictions}

    assert len(values(bad)) == 1
    assert len(values(good)) > 1
    require_scorable(name, np.array(good), classes)
    with pytest.raises(DataError, match="is 0 whatever is predicted"):
        require_scorable(name, np.array(bad), classes)


@pytest.mark.parametrize(
    ("name", "labels", "label", "value"),
    [
        ("accuracy", [0, 1, 1, 2, 1, 0], 1, 3 / 6),
        ("f1", [0, 0, 0, 0, 1, 0], 1, 2 / 7),  # the rare class: one right of six answers, none missed
        ("mcc", [0, 0, 1, 1, 1, 0], 0, 0.0),
    ],
)
def test_one_class_for_all_is_the_one_that_the_metric_likes_best(
    name: str, labels: list[int], label: int, value: float
) -> None:
    outputs = one_class(name, np.array(labels), max(labels) + 1)
    assert outputs.shape == (6, max(labels) + 1)
    assert set(outputs.argmax(axis=-1)) == {label}
    assert metric_named(name)(outputs, np.array(labels)) == pytest.approx(value)
