"""``spec.json``: what goes into a graph or engine and what comes out, so that its directory works when copied alone.

A graph directory holds model.onnx, spec.json, tokenizer.json; an engine directory the same two beside the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nxm_export.contract.config_values import pad_id_of, size_of
from nxm_export.contract.encoder_family import Family
from nxm_export.contract.no_answer import no_answer_threshold
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import TASKS, Task, labels_of
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import convert, decode, encode, read_foreign_json, read_text

SCHEMA = "nxm-spec/1"
SPEC_FILE = "spec.json"
TOKENIZER_FILE = "tokenizer.json"
_MOST_ROWS = 2**31  # of a table: more than any has
_WAY_OUT = "export or build again"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class IOSpec:
    """Inputs are int64 (batch, sequence), outputs float32 with the axes given; `labels` name the last axis of the first
    output where it holds classes or labels. `max_length` is in tokens. `limits` bound an input's values from above
    (exclusive), for inputs that have a table or a meaning behind them: a runtime does not check what it looks up.
    `no_answer_threshold` is of question answering (`nxm_export.contract.no_answer`); None: there is always an answer.
    """

    model_type: str
    task: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    max_length: int
    pad_id: int
    limits: Mapping[str, int] = field(default_factory=dict)
    no_answer_threshold: float | None = None

    @classmethod
    def of(cls, directory: Path, config: Mapping[str, object], family: Family, task: Task) -> IOSpec:
        """The spec of a checkpoint directory; the tokenizer's own maximum length wins where it is shorter."""
        limit = family.max_positions(config)
        tokenizer_config = directory / "tokenizer_config.json"
        if tokenizer_config.is_file():
            way_out = "restore it from the model"
            data = read_foreign_json(tokenizer_config, way_out)
            settings = convert(data, _TokenizerSettings, source=str(tokenizer_config), way_out=way_out, foreign=True)
            if settings.model_max_length and settings.model_max_length >= 1:  # transformers writes 1e30 for "no limit"
                limit = int(min(limit, settings.model_max_length))
        if task.auto_class is None:
            limit = min(limit, read_pooling(directory).max_length or limit)
        limits = {"attention_mask": 2}
        for name, key in (("input_ids", "vocab_size"), ("token_type_ids", "type_vocab_size")):
            if config.get(key):
                limits[name] = size_of(config, key)
        return cls(
            family.model_type,
            task.name,
            family.inputs,
            dict(task.outputs),
            labels_of(config) if task.names_labels else (),
            limit,
            pad_id_of(config),
            {name: limits[name] for name in INPUTS if name in limits and name in family.inputs},
            no_answer_threshold(config, str(directory / "config.json")) if task.output_kind == "span" else None,
        )

    def save(self, directory: Path) -> None:
        """Write ``spec.json``."""
        (directory / SPEC_FILE).write_text(encode(self, SCHEMA), encoding="utf-8")


@dataclass(frozen=True)
class _TokenizerSettings:
    """What is read of transformers' ``tokenizer_config.json``."""

    model_max_length: float | None = None  # tokens


def load_spec(directory: str | Path) -> IOSpec:
    """Read ``spec.json`` of a graph or engine directory; raises `ArtifactError`."""
    file = Path(directory) / SPEC_FILE
    if not file.is_file():
        raise ArtifactError(f"{directory} has no {SPEC_FILE}: it is not a graph or engine directory of nxm-export")
    return parse_spec(read_text(file, _WAY_OUT), file)


def parse_spec(text: str, file: Path) -> IOSpec:
    """The spec that `text`, read from `file`, holds; raises `ArtifactError`."""
    spec = decode(text, IOSpec, schema=SCHEMA, source=str(file), way_out=_WAY_OUT)
    if spec.task not in TASKS or not spec.inputs or not set(spec.inputs) <= set(INPUTS) or spec.max_length < 1:
        raise ArtifactError(
            f"{file}: task {spec.task!r} with inputs {spec.inputs} is nothing that this version knows; export or build "
            "again"
        )
    _require_limits(spec, file)
    task = TASKS[spec.task]
    if any(spec.outputs.get(name) != axes for name, axes in task.outputs.items()):
        raise ArtifactError(
            f"{file}: outputs: {spec.task} gives {_shown(task.outputs)}, here are {_shown(spec.outputs)}; export or "
            "build again"
        )
    if spec.no_answer_threshold is not None and task.output_kind != "span":
        raise ArtifactError(f"{file}: no_answer_threshold: {spec.task} answers no questions; export or build again")
    fewest = 2 if task.output_kind == "softmax" else 1
    if task.names_labels and len(spec.labels) < fewest:
        raise ArtifactError(
            f"{file}: labels: {spec.task} has at least {fewest}, here are {len(spec.labels)}; export or build again"
        )
    return spec


def _require_limits(spec: IOSpec, file: Path) -> None:
    for name, limit in spec.limits.items():
        if name not in spec.inputs or not (2 if name == "attention_mask" else 1) <= limit < _MOST_ROWS:
            raise ArtifactError(f"{file}: limits: {limit} values of {name!r} are none of a model; {_WAY_OUT}")
    if not 0 <= spec.pad_id < spec.limits.get("input_ids", _MOST_ROWS):
        raise ArtifactError(f"{file}: pad_id: {spec.pad_id} is no token of the model; {_WAY_OUT}")
    if spec.max_length >= _MOST_ROWS:
        raise ArtifactError(f"{file}: max_length: {spec.max_length} tokens are none of a model; {_WAY_OUT}")


def _shown(outputs: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{name} ({', '.join(axes)})" for name, axes in outputs.items()) or "none"
