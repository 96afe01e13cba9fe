"""Hugging Face models of a task, loaded from a directory with every weight in place. Safetensors only, no remote
code."""

from __future__ import annotations

import contextlib
import logging
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nxm_export.contract.checkpoint import WEIGHTS_FILE, has_head, read_config, task_at
from nxm_export.contract.families import family_of
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import Task
from nxm_export.errors import ArtifactError, ExportError
from nxm_export.hf.protocols import ModelClass
from nxm_export.hf.sentence_embedding import embedding_model

if TYPE_CHECKING:
    import torch


# First parts of the names of weights, inside the encoder: heads that pretraining trains, and poolers, which a task may
# lack; and the parts of an encoder that compute its output.
_PRETRAINING = frozenset(
    {
        "cls",
        "lm_head",
        "pooler",
        "pooler_activation",
        "predictions",
        "sop_classifier",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        "discriminator_predictions",
        "generator_predictions",
        "generator_lm_head",
        "lm_predictions",
        "mask_predictions",
        "decoder",
        "head",
    }
)
_ENCODER = frozenset({"embeddings", "encoder", "transformer", "embeddings_project", "layers", "final_norm"})


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

    family = family_of(config, source=str(path))
    if task.name in family.missing_heads:
        raise ArtifactError(f"{path}: transformers has no head for {task.name} in the {family.model_type} family")
    if task.auto_class is None:
        return embedding_model(family.model_type, read_pooling(path))
    return cast(ModelClass, getattr(transformers, task.auto_class))


def load_pretrained(
    path: Path, config: Mapping[str, object], task: Task, loading: Loading = Loading()
) -> torch.nn.Module:
    """The transformers model of a directory on the CPU, with all of its weights.

    Where a weight is missing, transformers would go on with random numbers, and one that the model does not take it
    would drop; this raises `ArtifactError`, but for a new head and the pooler in front of it.
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
                # A configuration may ask for tuples, which change no result; outputs are read by name here.
                **{"return_dict": True, **loading.changes},
            )
        except Exception as error:  # transformers and safetensors raise many kinds for damaged or foreign files
            damaged = type(error).__name__ == "SafetensorError"
            reason = f"its weights cannot be read ({error}); the file is truncated or damaged"
            raise ArtifactError(f"{path}: {reason if damaged else f'transformers cannot load it ({error})'}") from error
    _require_weights(path, config, task, report, new_head=loading.new_head)
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


def _require_weights(
    path: Path, config: Mapping[str, object], task: Task, report: Mapping[str, object], *, new_head: bool
) -> None:
    """Raise `ArtifactError` unless the model has all of its weights, and the file none that the model leaves out.

    What pretraining leaves behind may be left out, and with a new head any other head.
    """
    missing, unexpected = _names(report["missing_keys"]), _names(report["unexpected_keys"])
    absent, base = sorted(missing | _names(report["mismatched_keys"])), family_of(config, source=str(path)).base
    if new_head or task.auto_class is None:
        absent = [name for name in absent if name.startswith(f"{base}.") and not name.startswith(f"{base}.pooler.")]
    if any("lora_" in name for name in unexpected):
        raise ArtifactError(
            f"{path}: its weights hold the parts of a PEFT adapter (lora_...), which are not merged; merge them in "
            "Python with `merge_and_unload()` of the PEFT model, and save what it returns"
        )
    _require_no_prefix(path, absent, unexpected)
    if absent:
        raise ArtifactError(
            f"{path}: {len(absent)} weights are missing or of another shape, such as {absent[0]}; the file is "
            "truncated or from another model"
        )
    unused = sorted(name for name in unexpected if not _may_be_left_out(name.removeprefix(f"{base}."), new_head))
    if unused:
        raise ArtifactError(
            f"{path}: the file has {len(unused)} weights that the model does not take, such as {unused[0]}: "
            "config.json describes another model (fewer layers, another kind of attention or positions, another head), "
            "or this version of transformers does not know its kind. Restore config.json from the model"
        )


def _names(keys: object) -> set[str]:
    return {key if isinstance(key, str) else key[0] for key in cast("Iterable[str | tuple[str, ...]]", keys)}


def _require_no_prefix(path: Path, missing: Sequence[str], unexpected: set[str]) -> None:
    """Raise `ArtifactError` where missing weights are there under longer names, as wrappers of a model save them."""
    inside = [name.partition(".")[2] for name in missing]  # of a file that holds the encoder alone
    for names in (missing, inside):
        ends = [name for name in unexpected if names and name.endswith(f".{names[0]}")]
        for prefix in sorted((name.removesuffix(names[0]) for name in ends), key=len):
            if all(f"{prefix}{name}" in unexpected for name in names):
                raise _wrapped(path, prefix, names[0])


def _wrapped(path: Path, prefix: str, name: str) -> ArtifactError:
    """The error for weights whose names begin with a wrapper's, with the command that mends them."""
    files = sorted(str(file) for file in path.glob("model*.safetensors"))
    script = (
        f"import safetensors.torch as s; w = {{k.removeprefix({prefix!r}): v.clone() for f in {files} "
        f"for k, v in s.load_file(f).items()}}; s.save_file(w, {str(path / WEIGHTS_FILE)!r}, {{'format': 'pt'}})"
    )
    return ArtifactError(
        f"{path}: its weights are named {prefix}{name} instead of {name}: the model was saved in a wrapper "
        "(DataParallel's module., torch.compile's _orig_mod.). Save it without, or rename them: "
        f"python -c {shlex.quote(script)}"
    )


def _may_be_left_out(name: str, new_head: bool) -> bool:
    """True for a weight (named as inside the encoder) that no result depends on: heads of pretraining, the pooler of a
    task that has none, and numbers that are counted anew."""
    first = name.partition(".")[0]
    if first in _PRETRAINING or name in ("embeddings.position_ids", "embeddings.token_type_ids"):
        return True
    return new_head and first not in _ENCODER


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block, transformers shows no progress bars, load reports or warnings: what matters of them becomes an
    error."""
    with quiet_log(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """`quiet_transformers`, and Python's own warnings stay: for training, where they may come from elsewhere."""
    from transformers.utils import logging as transformers_logging

    show_bars = cast("Callable[[], None]", transformers_logging.enable_progress_bar)
    hide_bars = cast("Callable[[], None]", transformers_logging.disable_progress_bar)
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hide_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            show_bars()
