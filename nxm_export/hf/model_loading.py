"""Hugging Face models of a task, loaded from a directory with every weight in place. Safetensors only, no remote
code."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nxm_export.contract.checkpoint import has_head, read_config, task_at
from nxm_export.contract.families import family_of
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import Task
from nxm_export.errors import ArtifactError, ExportError
from nxm_export.hf.protocols import ModelClass
from nxm_export.hf.sentence_embedding import embedding_model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: the type of its weights, transformers' kind of attention, changes of its configuration.

    With `new_head` the head is made anew for the changed configuration, with random weights; nothing else may be
    missing.
    """

    dtype: str = "float32"
    attention: str = "eager"
    changes: Mapping[str, object] = field(default_factory=dict)
    new_head: bool = False


def model_class(path: Path, config: Mapping[str, object], task: Task) -> ModelClass:
    """The transformers class that loads a model directory for `task`; `ArtifactError` for an unknown pooling."""
    import transformers

    if task.auto_class is None:
        return embedding_model(family_of(config, source=str(path)).model_type, read_pooling(path))
    return cast(ModelClass, getattr(transformers, task.auto_class))


def load_pretrained(
    path: Path, config: Mapping[str, object], task: Task, loading: Loading = Loading()
) -> torch.nn.Module:
    """The transformers model of a directory on the CPU, with all of its weights.

    Where a weight is missing, transformers would go on with random numbers; this raises `ArtifactError`, but for a new
    head and the pooler in front of it.
    """
    import torch

    chosen = model_class(path, config, task)
    with quiet_transformers():
        try:
            model, report = chosen.from_pretrained(
                path,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=getattr(torch, loading.dtype),
                attn_implementation=loading.attention,
                ignore_mismatched_sizes=loading.new_head,
                output_loading_info=True,
                **loading.changes,
            )
        except Exception as error:  # transformers and safetensors raise many kinds for damaged or foreign files
            damaged = type(error).__name__ == "SafetensorError"
            reason = f"its weights cannot be read ({error}); the file is truncated or damaged"
            raise ArtifactError(f"{path}: {reason if damaged else f'transformers cannot load it ({error})'}") from error
    _require_weights(path, config, report, new_head=loading.new_head or task.auto_class is None)
    return model


def load_task_model(path: Path, task: Task, *, dtype: str = "float32") -> torch.nn.Module:
    """The transformers model of a directory on the CPU, in eval mode, with the head of `task` and all of its weights.

    Raises `ArtifactError` where weights are missing, and `ExportError` where the head is not that of `task`. Attention
    is the plain kind, whose arithmetic the plan describes.
    """
    config = read_config(path)
    if not has_head(path, config, task):
        raise ExportError(
            f"{path}: its head is {task_at(path, config) or 'none of a supported kind'}, not {task.name}; fine-tune it "
            "for "
            "this task first"
        )
    return load_pretrained(path, config, task, Loading(dtype=dtype)).eval()


def _require_weights(path: Path, config: Mapping[str, object], report: Mapping[str, object], *, new_head: bool) -> None:
    missing, mismatched = (
        cast("list[str | tuple[str, ...]]", report[f"{kind}_keys"]) for kind in ("missing", "mismatched")
    )
    names = sorted({key if isinstance(key, str) else key[0] for key in (*missing, *mismatched)})
    if new_head:
        encoder = f"{family_of(config, source=str(path)).base}."
        names = [name for name in names if name.startswith(encoder) and not name.startswith(f"{encoder}pooler.")]
    if names:
        raise ArtifactError(
            f"{path}: {len(names)} weights are missing or of another shape, such as {names[0]}; the file is truncated "
            "or from "
            "another model"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block, transformers shows no progress bars, load reports or warnings: what matters of them becomes an
    error."""
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
