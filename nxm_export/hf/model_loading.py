"""Hugging Face models of a task, loaded from a directory with every weight in place."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nxm_export.contract.checkpoint import has_head, read_config, task_at
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import Task
from nxm_export.errors import ArtifactError, ExportError
from nxm_export.hf.sentence_embedding import embedding_model


def model_class(path: Path, config: Mapping[str, Any], task: Task) -> Any:
    """The transformers class that loads a model directory for `task`; `ArtifactError` for an unknown pooling."""
    import transformers

    if task.auto_class is None:
        return embedding_model(str(config["model_type"]), read_pooling(path))
    return getattr(transformers, task.auto_class)


def load_task_model(path: Path, task: Task, *, dtype: str = "float32") -> Any:
    """The transformers model of a directory on the CPU, in eval mode, with the head of `task` and all of its weights.

    Where a weight is missing, transformers would go on with random numbers; this raises `ArtifactError`, and
    `ExportError` where the head is not that of `task`. Attention is the plain kind, whose arithmetic the plan describes.
    """
    config = read_config(path)
    if not has_head(path, config, task):
        raise ExportError(
            f"{path}: its head is {task_at(path, config) or 'none of a supported kind'}, not {task.name}; fine-tune it for this task first"
        )
    import torch

    chosen = model_class(path, config, task)
    with _quiet_transformers():
        try:
            model, report = chosen.from_pretrained(
                path,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:  # transformers and safetensors raise many kinds for damaged or foreign files
            raise ArtifactError(f"{path}: transformers cannot load it ({error})") from error
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise ArtifactError(
            f"{path}: {len(lacking)} weights are missing or of another shape, such as {lacking[0]}; the file is truncated or from another model"
        )
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, load reports or warnings: what matters of them becomes an error."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
