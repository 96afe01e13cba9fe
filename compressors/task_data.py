"""The data of one task, tokenized, with the classes that belong to the model's head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressors.models import Source, max_length
from compressors.settings import Settings
from nxm_export.data import (
    Columns,
    Examples,
    Features,
    RawExamples,
    class_names,
    encode,
    load_raw,
    with_classes,
    with_scores,
)
from nxm_export.errors import DataError
from nxm_export.families import Task


@dataclass(frozen=True)
class TaskData:
    """Training and evaluation data of one task, tokenized."""

    task: Task
    train: list[Features]
    dev: list[Features]
    pad_id: int
    classes: list[str] | None


def read_task_data(
    source: Source,
    task: Task,
    train: str,
    dev: str | None,
    settings: Settings,
    columns: Columns,
    tokenizer: Any,
    train_limit: int | None = None,
) -> TaskData:
    """Read and tokenize train and, if given, dev; class names come from the model's head where it fits, else from train.

    Sets the tokenizer's maximum length, which is saved with the model.
    """
    raw = load_raw(train, "train", columns)
    classes = None
    if task.name == "classification":
        classes = _head_classes(source, raw) if source.head_fits(task) else class_names(raw)
    label: Callable[[RawExamples], Examples] = (lambda found: with_classes(found, classes)) if classes else with_scores
    length = tokenizer.model_max_length = max_length(source, tokenizer, settings.max_length)

    def tokens(examples: Examples) -> list[Features]:
        return encode(tokenizer.backend_tokenizer, examples, length, source.family.inputs)

    examples = label(raw)
    if train_limit:
        examples = examples.sample(train_limit, settings.seed)
    held_out: list[Features] = []
    if dev is not None:
        raw_dev = load_raw(dev, "dev", columns)
        if (raw.pairs is None) != (raw_dev.pairs is None):
            raise DataError(
                f"{raw.source} and {raw_dev.source} differ: only one of them has a second text; "
                "name the columns with --text and --text-pair"
            )
        held_out = tokens(label(raw_dev))
    return TaskData(task, tokens(examples), held_out, int(tokenizer.pad_token_id or 0), classes)


def _head_classes(source: Source, raw: RawExamples) -> list[str]:
    """The head's class names, or their indices when the data labels classes by number."""
    names = source.classes()
    if set(raw.labels) <= set(names):
        return names
    return [str(i) for i in range(len(names))]
