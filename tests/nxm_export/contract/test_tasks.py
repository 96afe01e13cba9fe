"""The task and the class names that a configuration tells."""

from __future__ import annotations

from typing import Any

import pytest

from nxm_export.contract.tasks import TASKS, labels_of, task_named, task_of
from nxm_export.data.label_kinds import LABELS
from nxm_export.data.metrics import (
    METRICS,
    ROW_METRICS,
)
from nxm_export.errors import ArtifactError, PlanError


def test_two_classes_without_names_are_what_transformers_calls_them() -> None:
    """transformers leaves id2label out of config.json when the names are its own."""
    assert labels_of({}) == ("LABEL_0", "LABEL_1")
    assert labels_of({"id2label": {"1": "pos", "0": "neg"}}) == ("neg", "pos")
    assert labels_of({"id2label": {str(i): str(i) for i in range(11)}}) == tuple(str(i) for i in range(11))


@pytest.mark.parametrize("names", [[], "ab", {"a": "b"}, {"1": "a"}, {"0": "a", "2": "b"}])
def test_class_names_that_are_no_map_are_refused(names: object) -> None:
    with pytest.raises(ArtifactError, match="id2label must map"):
        labels_of({"id2label": names})


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "classification"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}}, "regression"),
        ({"architectures": ["BertModel"]}, None),
        ({"architectures": []}, None),
        ({"architectures": None}, None),
        ({}, None),
    ],
)
def test_the_task_of_a_head(config: dict[str, Any], task: str | None) -> None:
    assert task_of(config) == task


@pytest.mark.parametrize("name", [None, 0.5, True, ["a"]])
def test_a_class_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json: id2label: the name of class 1 must be a text, got"):
        labels_of({"id2label": {"0": "a", "1": name}})
    assert labels_of({"id2label": {"0": 0, "1": 1}}) == ("0", "1"), "as some write them"


@pytest.mark.parametrize("names", ["BertForSequenceClassification", [1], {"0": "BertModel"}], ids=str)
def test_architectures_that_are_no_list_of_names_are_refused(names: object) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json: architectures must be a list of class names"):
        task_of({"architectures": names})


def test_an_unknown_task_is_refused_with_the_list() -> None:
    with pytest.raises(PlanError, match=f"choose one of {', '.join(TASKS)}"):
        task_named("translation")


def test_every_task_names_things_that_exist() -> None:
    for task in TASKS.values():
        assert task.metric in {**METRICS, **ROW_METRICS}
        assert task.label in LABELS
