"""``spec.json``: what goes into a graph or engine and what comes out, so that its directory works when copied alone.

A graph directory holds model.onnx, spec.json, tokenizer.json; an engine directory the same two beside the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nxm_export.errors import ArtifactError
from nxm_export.families import Family, Task
from nxm_export.plan import require_schema

SCHEMA = "nxm-spec/1"
SPEC_FILE = "spec.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class IOSpec:
    """Inputs are int64 (batch, sequence), outputs float32 with the axes given; `labels` name the last axis of the first
    output where there are classes. `max_length` is in tokens. `limits` bound an input's values from above (exclusive), for
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
        names = config.get("id2label") or {}
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        limit = family.max_positions(config)
        tokenizer_config = directory / "tokenizer_config.json"
        if tokenizer_config.is_file():
            limit = min(
                limit, int(json.loads(tokenizer_config.read_text(encoding="utf-8")).get("model_max_length", limit))
            )
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
            labels,
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
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        require_schema(data, SCHEMA, str(file), ArtifactError)
        return IOSpec(
            data["model_type"],
            data["task"],
            tuple(data["inputs"]),
            {name: tuple(axes) for name, axes in data["outputs"].items()},
            tuple(data["labels"]),
            int(data["max_length"]),
            int(data["pad_id"]),
            {name: int(limit) for name, limit in data.get("limits", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: malformed ({error!r}); export or build again") from error
