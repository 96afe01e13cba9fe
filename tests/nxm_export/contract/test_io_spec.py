"""``spec.json``: what is written is read back, and what no model of the task could have is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nxm_export.contract.families import FAMILIES
from nxm_export.contract.io_spec import INPUTS, IOSpec, load_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError

SPEC = IOSpec("bert", "classification", INPUTS, {"logits": ("batch", "classes")}, ("a", "b"), 8, 0)


def test_a_spec_is_read_back_as_it_was(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    assert load_spec(tmp_path) == SPEC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": {}}, "outputs: classification gives logits"),
        ({"outputs": {"logits": ["batch"]}}, "outputs: classification gives logits"),
        ({"outputs": {"scores": ["batch", "classes"]}}, "outputs: classification gives logits"),
        ({"labels": []}, "labels: classification has at least 2, here are 0"),
        ({"labels": ["a"]}, "labels: classification has at least 2, here are 1"),
        ({"task": "regression", "outputs": {"logits": ["batch", "scores"]}, "labels": []}, "at least 1, here are 0"),
        ({"limits": {"input_ids": 0}}, "limits: 0 values of 'input_ids' are none of a model"),
        ({"limits": {"input_ids": 2**31}}, "limits: 2147483648 values of 'input_ids'"),
        ({"limits": {"attention_mask": 1}}, "limits: 1 values of 'attention_mask'"),
        ({"limits": {"positions": 9}}, "limits: 9 values of 'positions'"),
        ({"limits": {"input_ids": 9}, "pad_id": 9}, "pad_id: 9 is no token of the model"),
        ({"pad_id": -1}, "pad_id: -1 is no token of the model"),
        ({"max_length": 2**31}, "max_length: 2147483648 tokens"),
        ({"no_answer_threshold": 0.5}, "no_answer_threshold: classification answers no questions"),
        ({"no_answer_threshold": "0.5"}, "no_answer_threshold: Expected `float"),
    ],
)
def test_a_spec_that_does_not_fit_its_task_is_refused_by_field(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    SPEC.save(tmp_path)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"spec\.json: .*{message}.*export or build again"):
        load_spec(tmp_path)


def test_a_spec_of_a_former_version_has_no_threshold(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    file = tmp_path / "spec.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    assert fields.pop("no_answer_threshold") is None
    file.write_text(json.dumps(fields), encoding="utf-8")
    assert load_spec(tmp_path) == SPEC


@pytest.mark.parametrize(("limit", "expected"), [("Infinity", 16), ("1e400", 16), ("NaN", 16), ("1e30", 16), ("8", 8)])
def test_a_tokenizer_without_a_limit_leaves_that_of_the_model(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {limit}}}', encoding="utf-8")
    config = {"model_type": "bert", "vocab_size": 9, "max_position_embeddings": 16, "pad_token_id": 0}
    spec = IOSpec.of(tmp_path, config, FAMILIES["bert"], TASKS["classification"])
    limits = {"input_ids": 9, "attention_mask": 2}
    assert spec == replace(SPEC, max_length=expected, labels=("LABEL_0", "LABEL_1"), limits=limits)


@pytest.mark.parametrize("key", ["vocab_size", "pad_token_id", "max_position_embeddings"])
def test_a_size_that_is_infinite_is_refused_by_its_key(tmp_path: Path, key: str) -> None:
    config = {"model_type": "bert", "vocab_size": 9, "max_position_embeddings": 16, key: float("inf")}
    with pytest.raises(ArtifactError, match=rf"config\.json: {key} must be"):
        IOSpec.of(tmp_path, config, FAMILIES["bert"], TASKS["classification"])
