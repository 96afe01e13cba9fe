"""``metrics.json``: what is written is read back, old files are read, and damaged ones are refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nxm_export.contract.records.checkpoint_metrics import (
    CompressionMetrics,
    DenseMetrics,
    DistanceToDense,
    PermutationFacts,
    Scores,
    TrainingFacts,
    finite,
    finite_interval,
    read_metrics,
)
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import encode

DENSE = DenseMetrics(
    metric="accuracy", value=0.5, interval=(0.25, 0.75), dev_samples=4, secondary_metrics={"f1": 0.5}, steps=12
)
COMPRESSED = CompressionMetrics(
    metric="accuracy",
    value=0.5,
    interval=None,
    dev_samples=1,
    recipe="nxm",
    steps=20,
    train_samples=19,
    held_out_samples=1,
    qat_steps=12,
    mask_hash="ab",
    outputs_in_float={"w.weight": 0.25},
    permutation=PermutationFacts(2, 0.75, 0.875),
    admm="mask",
    admm_steps=8,
    residual=0.125,
    residual_gate_passed=False,
    embedding_table_drop=-0.5,
    embedding_table_drop_interval=(-1.0, 0.0),
    dense_value=0.75,
    distance_to_dense=0.125,
    distance_measure="kl",
    same_answers=0.5,
)


@pytest.mark.parametrize(
    "metrics", [DENSE, COMPRESSED, replace(DENSE, value=None)], ids=["dense", "compressed", "none"]
)
def test_metrics_are_read_back_as_they_were(metrics: DenseMetrics | CompressionMetrics, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(encode(metrics.to_dict()), encoding="utf-8")
    assert read_metrics(tmp_path) == metrics


def fields_of(record: Scores | TrainingFacts | DistanceToDense) -> dict[str, object]:
    return {entry.name: getattr(record, entry.name) for entry in fields(record)}


def test_metrics_have_every_field_of_what_they_are_made_of() -> None:
    """Every value differs from its field's default."""
    scores = Scores(metric="f1", value=0.5, interval=(0.25, 0.75), dev_samples=4, secondary_metrics={"mcc": 0.5})
    facts = TrainingFacts(
        recipe="nxm",
        steps=20,
        train_samples=19,
        held_out_samples=1,
        qat_steps=12,
        mask_hash="ab",
        outputs_in_float={"w.weight": 0.25},
        permutation=PermutationFacts(2, 0.75, 0.875),
        admm="mask",
        admm_steps=8,
        residual=0.125,
        residual_gate_passed=False,
        sr_ste_steps=7,
    )
    dense = DenseMetrics.of(scores, steps=12, revision="main")
    assert fields_of(dense) == {**fields_of(scores), "kind": "dense", "steps": 12, "revision": "main"}
    to_dense = DistanceToDense(dense_value=0.5, distance_to_dense=0.25, distance_measure="kl", same_answers=0.75)
    compressed = CompressionMetrics.of(
        scores, facts, to_dense, embedding_table_drop=-0.5, embedding_table_drop_interval=(-1.0, 0.0)
    )
    table = {"embedding_table_drop": -0.5, "embedding_table_drop_interval": (-1.0, 0.0)}
    assert fields_of(compressed) == {
        **fields_of(scores),
        **fields_of(facts),
        **fields_of(to_dense),
        "kind": "compressed",
        **table,
    }


def test_metrics_from_before_the_distance_to_the_dense_model_was_measured_have_none(tmp_path: Path) -> None:
    unknown = replace(COMPRESSED, dense_value=None, distance_to_dense=None, distance_measure=None, same_answers=None)
    old = {name: value for name, value in COMPRESSED.to_dict().items() if name not in fields_of(DistanceToDense())}
    assert metrics_in(tmp_path, json.dumps(old)) == unknown


def metrics_in(directory: Path, text: str) -> DenseMetrics | CompressionMetrics:
    """What `read_metrics` makes of a file with this text."""
    (directory / "metrics.json").write_text(text, encoding="utf-8")
    return read_metrics(directory)


def test_metrics_without_a_schema_are_those_of_former_versions(tmp_path: Path) -> None:
    old = {"metric": "accuracy", "value": 0.5, "f1": 0.5, "interval": [0.25, 0.75], "dev_samples": 4, "steps": 12}
    assert metrics_in(tmp_path, json.dumps({**old, "revision": None})) == DENSE
    training = {"recipe": "obs", "train_samples": 9, "held_out_samples": 0, "qat_steps": 12, "mask_hash": "ab"}
    actual = metrics_in(tmp_path, json.dumps({**old, **training}))
    assert isinstance(actual, CompressionMetrics)
    assert (actual.recipe, actual.secondary_metrics, actual.admm_steps) == ("obs", {"f1": 0.5}, None)


def test_nan_of_a_former_version_is_none_and_nan_of_this_one_is_refused(tmp_path: Path) -> None:
    old = '{"metric":"accuracy","value":1.0,"interval":[NaN,NaN],"dev_samples":1,"steps":3,"revision":null}'
    actual = metrics_in(tmp_path, old)
    assert actual == DenseMetrics(metric="accuracy", value=1.0, interval=None, dev_samples=1, steps=3)
    assert metrics_in(tmp_path, old.replace("1.0", "NaN").replace("[NaN", "[0.5")) == replace(actual, value=None)
    new = json.dumps({**actual.to_dict(), "interval": [math.nan, math.nan]})
    with pytest.raises(ArtifactError, match=r"metrics\.json: not valid JSON \(NaN is not a JSON number\)"):
        metrics_in(tmp_path, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "nxm-metrics/9"}, "schema nxm-metrics/9 is not the nxm-metrics/2"),
        ({"value": "high"}, "metrics.json: value: Expected `float | null`, got `str`"),
        ({"steps": 1.5}, "metrics.json: steps: Expected `int`"),
        ({"bias": 1}, "metrics.json: unknown field bias"),
        (
            {"permutation": {"matrices": 1, "retained_before": 0.5, "retained_after": 0.5, "rows": 1}},
            "unknown field permutation.rows",
        ),
        ({"value": float("nan")}, "NaN is not a JSON number"),
        ({"kind": "small"}, "metrics.json: kind: Invalid enum value 'small'"),
    ],
)  # fmt: skip
def test_damaged_metrics_are_refused_by_file_and_field(change: dict[str, object], message: str, tmp_path: Path) -> None:
    text = json.dumps({**COMPRESSED.to_dict(), **change})
    with pytest.raises(ArtifactError) as error:
        metrics_in(tmp_path, text)
    assert message in str(error.value)


def test_the_first_schema_is_read_under_todays_names(tmp_path: Path) -> None:
    facts = PermutationFacts(matrices=2, retained_before=0.5, retained_after=0.75)
    metrics = replace(COMPRESSED, permutation=facts)
    text = json.dumps({**metrics.to_dict(), "schema": "nxm-metrics/1"})
    for now, then in (("embedding_table_drop", "table_drop"), ("retained_", "kept_")):
        assert now in text
        text = text.replace(now, then)
    assert metrics_in(tmp_path, text) == metrics


def test_a_directory_without_metrics_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_metrics(tmp_path)


def test_what_cannot_be_computed_is_none_and_never_written_as_null_behind_ones_back() -> None:
    assert (finite(0.5), finite(float("nan")), finite(float("inf"))) == (0.5, None, None)
    assert (finite_interval(0.0, 1.0), finite_interval(0.0, float("nan"))) == ((0.0, 1.0), None)
    with pytest.raises(ValueError, match=r"DenseMetrics\.value is nan"):
        replace(DENSE, value=float("nan")).to_dict()
