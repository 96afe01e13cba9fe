"""``metrics.json`` of a checkpoint: what `finetune` and `compress` measured on the dev data, and how they came there.

There are two kinds of it, `DenseMetrics` and `CompressionMetrics`; the field ``kind`` says which. A number that could
not be computed is None: an interval of a few samples, say, or a metric of outputs that hold a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import (
    as_object,
    convert,
    nonfinite_as_none,
    parse_json,
    read_text,
    require_schema,
    to_json_object,
)

METRICS_FILE = "metrics.json"
METRICS_SCHEMA = "nxm-metrics/2"
_FIRST_SCHEMA = "nxm-metrics/1"
_RENAMED = {  # since the first schema
    "table_drop": "embedding_table_drop",
    "table_drop_interval": "embedding_table_drop_interval",
    "kept_before": "retained_before",
    "kept_after": "retained_after",
}
_WAY_OUT = "make the checkpoint again"
# Files without a schema hold these metrics beside the task's own, among all other fields.
_UNVERSIONED_SECONDARY = ("f1", "mcc", "spearman", "exact_match")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The task's metric on all dev samples.

    `value` with its 95 % bootstrap `interval`, the task's `secondary_metrics` by name, and the number of dev samples,
    or of groups of them where groups are what is scored. Not `dev_labelled` are texts that were held out of
    calibration, where nothing is trained and there are no dev data: nothing is scored on them.
    """

    metric: str
    value: float | None
    interval: tuple[float, float] | None
    dev_samples: int
    secondary_metrics: Mapping[str, float | None] = field(default_factory=dict)
    dev_labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class DenseMetrics(Scores):
    """Of a dense task model: `steps` of fine-tuning (0 where the model's head fitted), and the commit of a hub
    model."""

    kind: Literal["dense"] = "dense"
    steps: int
    revision: str | None = None

    @classmethod
    def of(cls, scores: Scores, *, steps: int, revision: str | None) -> DenseMetrics:
        """The metrics with these scores."""
        return cls(**vars(scores), steps=steps, revision=revision)

    def to_dict(self) -> dict[str, object]:
        """What ``metrics.json`` holds."""
        return {"schema": METRICS_SCHEMA, **to_json_object(self)}


@dataclass(frozen=True)
class PermutationFacts:
    """What reordering channels did: how many matrices have columns in a new order, and which share of the sum of their
    mask scores the patterns keep without and with it."""

    matrices: int
    retained_before: float
    retained_after: float


@dataclass(frozen=True)
class MoreTextFacts:
    """Texts without labels that were trained on, too: how many, which share of all samples, sha256 over them."""

    texts: int
    share: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """How a checkpoint was compressed.

    `steps` are all optimizer steps, `qat_steps` those with fixed masks. `average` is the share of these over which the
    saved weights are averaged; None where there are none, and in files from before there was one. `admm`, `admm_steps`,
    `residual` (||W - Z|| / ||W|| before masks were fixed) and `residual_gate_passed` are of recipes with ADMM;
    `sr_ste_steps` is of SR-STE.
    `outputs_in_float` has the divergence that each output quantizer would have cost which was left out for it, by
    weight. `mask_hash` is the sha256 over all masks. `more_text` is None where only `train_samples` were trained on.
    """

    recipe: str
    steps: int
    train_samples: int
    held_out_samples: int
    qat_steps: int
    mask_hash: str
    average: float | None = None
    outputs_in_float: Mapping[str, float] = field(default_factory=dict)
    permutation: PermutationFacts | None = None
    admm: str | None = None
    admm_steps: int | None = None
    residual: float | None = None
    residual_gate_passed: bool | None = None
    sr_ste_steps: int | None = None
    more_text: MoreTextFacts | None = None


Measure = Literal["kl", "squared-error", "relative-squared-distance"]


@dataclass(frozen=True, kw_only=True)
class DistanceToDense:
    """How far a compressed model's answers to the dev samples are from the dense model's; all None in files from before
    it was measured.

    `dense_value` is the metric of the dense model. `distance_to_dense` is a mean over samples, over tokens where those
    have tags, and over windows of questions: by `distance_measure` KL(dense || compressed) in nats (of multi-label
    summed over labels, of questions over start and end), the squared difference of scores, or the squared distance of
    vectors relative to the dense one's squared length. `same_answers` is the share, 0 to 1, of samples with the same
    class or the same set of labels, of labelled tokens (of all, without labels) with the same tag, or of questions with
    the same answer; None for scores and vectors.
    """

    dense_value: float | None = None
    distance_to_dense: float | None = None
    distance_measure: Measure | None = None
    same_answers: float | None = None


@dataclass(frozen=True, kw_only=True)
class CompressionMetrics(DistanceToDense, TrainingFacts, Scores):
    """Of a compressed checkpoint: its scores, how it was compressed, how far it is from the dense model, and what its
    INT8 embedding table costs.

    `embedding_table_drop` is what rounding the embedding table to INT8 costs by itself, in points of the metric, with
    its 95 % paired interval; None where the table is in float.
    """

    kind: Literal["compressed"] = "compressed"
    embedding_table_drop: float | None = None
    embedding_table_drop_interval: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        scores: Scores,
        facts: TrainingFacts,
        to_dense: DistanceToDense,
        *,
        embedding_table_drop: float | None,
        embedding_table_drop_interval: tuple[float, float] | None,
    ) -> CompressionMetrics:
        """The metrics with these scores, these facts of the training and this distance."""
        return cls(
            **vars(scores),
            **vars(facts),
            **vars(to_dense),
            embedding_table_drop=embedding_table_drop,
            embedding_table_drop_interval=embedding_table_drop_interval,
        )

    def to_dict(self) -> dict[str, object]:
        """What ``metrics.json`` holds."""
        return {"schema": METRICS_SCHEMA, **to_json_object(self)}


Kind = TypeVar("Kind", DenseMetrics, CompressionMetrics)


def finite(number: float) -> float | None:
    """The number, or None where it is NaN or infinite: it could not be computed."""
    return float(number) if math.isfinite(number) else None


def finite_interval(low: float, high: float) -> tuple[float, float] | None:
    """The interval, or None where one of its ends could not be computed."""
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def read_metrics(directory: str | Path) -> DenseMetrics | CompressionMetrics:
    """The metrics of a checkpoint directory; raises `ArtifactError` that names file, field and what is wrong with
    it."""
    file = Path(directory) / METRICS_FILE
    fields = _fields_at(file)
    if fields.get("kind") == "dense":
        return convert(fields, DenseMetrics, source=str(file), way_out=_WAY_OUT)
    return convert(fields, CompressionMetrics, source=str(file), way_out=_WAY_OUT)


def read_metrics_of(kind: type[Kind], directory: str | Path) -> Kind:
    """`read_metrics` of a directory that must hold one kind of them; raises `ArtifactError` for the other."""
    metrics = read_metrics(directory)
    if not isinstance(metrics, kind):
        raise ArtifactError(
            f"{Path(directory) / METRICS_FILE}: kind: these are metrics of a {metrics.kind} model; {_WAY_OUT}"
        )
    return metrics


def _fields_at(file: Path) -> dict[str, object]:
    """The fields of a ``metrics.json``. Files without a schema are of former versions, which wrote NaN for a number
    that could not be computed: it is None here. Files with one are refused for it."""
    text = read_text(file, _WAY_OUT)
    value = parse_json(text, str(file), _WAY_OUT, ArtifactError, foreign=True)
    if isinstance(value, dict) and "schema" not in value and "metric" in value:
        return _upgraded(as_object(nonfinite_as_none(value)))
    value = parse_json(text, str(file), _WAY_OUT, ArtifactError)
    if isinstance(value, dict) and value.get("schema") == _FIRST_SCHEMA:
        return _renamed(require_schema(value, _FIRST_SCHEMA, str(file), ArtifactError))
    return require_schema(value, METRICS_SCHEMA, str(file), ArtifactError)


def _renamed(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of the first schema, and of files without one, under today's names."""
    renamed = {_RENAMED.get(key, key): entry for key, entry in fields.items()}
    permutation = renamed.get("permutation")
    if isinstance(permutation, dict):
        renamed["permutation"] = {_RENAMED.get(key, key): entry for key, entry in permutation.items()}
    return renamed


def _upgraded(value: Mapping[str, object]) -> dict[str, object]:
    """The fields of a file that was written before the file had a schema."""
    fields = {key: entry for key, entry in value.items() if key not in _UNVERSIONED_SECONDARY}
    secondary = {name: value[name] for name in _UNVERSIONED_SECONDARY if name in value}
    for name, bounds in fields.items():
        if name.endswith("interval") and isinstance(bounds, list) and None in bounds:
            fields[name] = None
    kind = "compressed" if "recipe" in value else "dense"
    return {**_renamed(fields), "kind": kind, "secondary_metrics": secondary}
