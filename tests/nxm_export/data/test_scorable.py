"""Data that no metric can score is refused before training, and data that one can score is not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import Window
from nxm_export.data.columns import Columns
from nxm_export.data.label_kinds import classes_of, labelled, load_labelled
from nxm_export.data.metrics import blind_answer, metric_named, one_class, require_scorable
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


def test_the_same_answer_for_all_is_scored_in_every_task() -> None:
    """Against all answers of the kind, where they can be listed."""
    rng = np.random.default_rng(0)
    sets = (rng.random((12, 3)) < (0.2, 0.5, 0.7)).astype(float)
    made = blind_answer(TASKS["multi-label"], np.zeros((12, 3)), sets, ("a", "b", "c"))
    assert made is not None
    micro = metric_named("micro_f1")
    every = [np.tile([1.0 if pick >> i & 1 else -1.0 for i in range(3)], (12, 1)) for pick in range(8)]
    assert micro(made.outputs, sets) == max(micro(outputs, sets) for outputs in every) > 0.5
    assert made.label == ", ".join(name for name, logit in zip("abc", made.outputs[0], strict=True) if logit > 0)

    tags, names = np.array([[-100, 1, 1, 0], [-100, 0, 1, -100]]), ("O", "B-X")
    made = blind_answer(TASKS["token-classification"], np.zeros((2, 4, 2)), tags, names)
    assert made is not None
    assert (made.what, made.label) == ("one tag", "B-X")
    assert metric_named("entity_f1", names)(made.outputs, tags) == 2 * 3 / (5 + 3)

    groups = np.array([0, 0, 1, 1])
    for task, labels in (("regression", np.arange(4.0)), ("embedding", np.array([0.0, 0.0, 1.0, 1.0]))):
        made = blind_answer(TASKS[task], rng.random((4, 2)), labels, (), groups)
        assert made is not None
        assert metric_named(TASKS[task].metric, (), groups if task == "embedding" else None)(made.outputs, labels) == 0
    relevance = np.array([[1.0], [0.0], [0.0], [1.0]])
    made = blind_answer(TASKS["reranking"], np.zeros((4, 1)), relevance, (), groups)
    assert made is not None
    shuffled = (1 + 1 / np.log2(3)) / 2  # the relevant one is first or second
    assert metric_named("ndcg_at_10", (), groups)(made.outputs, relevance) == pytest.approx(shuffled)


def test_no_answer_to_any_question_is_right_where_there_is_none() -> None:
    packed = [
        Window(1, "film b", [0, 5], [4, 6], answers, 0, True, 0.5).pack().encode() for answers in ([], ["film"], [])
    ]
    labels = np.zeros((3, max(map(len, packed))), np.uint8)
    for row, label in zip(labels, packed, strict=True):
        row[: len(label)] = np.frombuffer(label, np.uint8)
    task, outputs = TASKS["question-answering"], np.zeros((3, 4, 2))
    made = blind_answer(task, outputs, labels, ())
    assert made is not None
    assert metric_named("squad_f1")(made.outputs, labels) == pytest.approx(2 / 3)
    answered = np.frombuffer(Window(1, "film b", [0, 5], [4, 6], ["film"]).pack().encode(), np.uint8)[None]
    assert blind_answer(task, outputs[:1], answered, ()) is None
