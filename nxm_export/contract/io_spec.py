"""``spec.json``: what goes into a graph or engine and what comes out, so that its directory works when copied alone.

A graph directory holds model.onnx, spec.json, tokenizer.json; an engine directory the same two beside the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nxm_export.contract.families import Family
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import TASKS, Task, labels_of
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import read_json, require_schema

SCHEMA = "nxm-spec/1"
SPEC_FILE = "spec.json"
TOKENIZER_FILE = "tokenizer.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class IOSpec:
    """Inputs are int64 (batch, sequence), outputs float32 with the axes given; `labels` name the last axis of the first
    output where it holds classes or labels. `max_length` is in tokens. `limits` bound an input's values from above (exclusive), for
    inputs that have a table or a meaning behind them: a runtime does not check what it looks up."""

    model_type: str
    task: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    max_length: int
    pad_id: int
    limits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path, config: Mapping[str, Any], family: Family, task: Task) -> IOSpec:
        """The spec of a checkpoint directory; the tokenizer's own maximum length wins where it is shorter."""
        limit = family.max_positions(config)
        tokenizer_config = directory / "tokenizer_config.json"
        if tokenizer_config.is_file():
            settings = read_json(tokenizer_config, "restore it from the model")
            asked = settings.get("model_max_length") if isinstance(settings, dict) else None
            if isinstance(asked, (int, float)) and asked >= 1:  # transformers writes 1e30 for "no limit"
                limit = min(limit, int(asked))
        if task.auto_class is None:
            limit = min(limit, read_pooling(directory).max_length or limit)
        limits = {
            "input_ids": config.get("vocab_size"),
            "attention_mask": 2,
            "token_type_ids": config.get("type_vocab_size"),
        }
        return cls(
            config["model_type"],
            task.name,
            family.inputs,
            dict(task.outputs),
            labels_of(config) if task.names_labels else (),
            limit,
            int(config.get("pad_token_id") or 0),
            {name: int(limit) for name, limit in limits.items() if limit and name in family.inputs},
        )

    def save(self, directory: Path) -> None:
        """Write ``spec.json``."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        (directory / SPEC_FILE).write_text(text + "\n", encoding="utf-8")


def load_spec(directory: str | Path) -> IOSpec:
    """Read ``spec.json`` of a graph or engine directory; raises `ArtifactError`."""
    file = Path(directory) / SPEC_FILE
    if not file.is_file():
        raise ArtifactError(f"{directory} has no {SPEC_FILE}: it is not a graph or engine directory of nxm-export")
    data = read_json(file, "export or build again")
    require_schema(data, SCHEMA, str(file), ArtifactError)
    try:
        spec = IOSpec(
            str(data["model_type"]),
            str(data["task"]),
            tuple(data["inputs"]),
            {str(name): tuple(axes) for name, axes in data["outputs"].items()},
            tuple(str(label) for label in data["labels"]),
            int(data["max_length"]),
            int(data["pad_id"]),
            {name: int(limit) for name, limit in data.get("limits", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: malformed ({error!r}); export or build again") from error
    if spec.task not in TASKS or not spec.inputs or not set(spec.inputs) <= set(INPUTS) or spec.max_length < 1:
        raise ArtifactError(
            f"{file}: task {spec.task!r} with inputs {spec.inputs} is nothing that this version knows; export or build again"
        )
    return spec
