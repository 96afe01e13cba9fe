"""Hugging Face models in: from a directory or the hub, safetensors only, never with remote code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from compressors import distributed
from nxm_export.contract.checkpoint import PLAN_FILE, has_head, read_config, require_safetensors
from nxm_export.contract.encoder_family import GELUS, Family
from nxm_export.contract.families import family_of
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import Task, labels_of
from nxm_export.contract.token_budget import DEFAULT_MAX_LENGTH
from nxm_export.data.tokenizer_settings import apply_settings, read_tokenizer_settings
from nxm_export.errors import ArtifactError, DataError, notice
from nxm_export.hf.deberta import split_shared_projections, write_out_attention
from nxm_export.hf.model_loading import Loading, load_pretrained, quiet_transformers
from nxm_export.hf.protocols import FastTokenizer, TaskOutput

if TYPE_CHECKING:
    import tokenizers

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk. `revision` is the commit it was fetched at, None for a local directory."""

    path: Path
    config: Mapping[str, object]
    family: Family
    revision: str | None = None

    def head_fits(self, task: Task) -> bool:
        """True when the checkpoint already has this task's head, so that no dense fine-tuning is needed."""
        return has_head(self.path, self.config, task)

    def classes(self) -> list[str]:
        """Class names of the checkpoint's head, by index."""
        return list(labels_of(self.config))


class SpanOutput(TaskOutput, Protocol):
    """What a question answering model returns."""

    start_logits: torch.Tensor
    end_logits: torch.Tensor


def resolve(model: str | Path, revision: str | None = None) -> ModelSource:
    """Find a dense model's directory, or fetch a hub id; raises `ArtifactError` with the way out."""
    path = Path(model)
    if path.is_dir():
        if revision:
            raise ArtifactError(f"{model} is a local directory, and --revision is for hub models; drop one of them")
        return _dense(path, str(model), str(path / "config.json"))
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise ArtifactError(f"{model}: no such directory")
    path, commit = _fetch(str(model), revision)
    return _dense(path, str(model), str(model), commit)


def _dense(path: Path, model: str, source: str, commit: str | None = None) -> ModelSource:
    """The model in a directory; raises `ArtifactError` for a compressed checkpoint, which would teach what it has lost
    and stand as the dense model in every comparison. `source` names the configuration in errors."""
    config = read_config(path)
    if (path / PLAN_FILE).exists():
        raise ArtifactError(
            f"{model} is compressed already ({PLAN_FILE}), and would count as the dense model; give the model that it "
            "was made from"
        )
    return ModelSource(path, config, family_of(config, source=source), commit)


def _fetch(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise ArtifactError(
            f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ArtifactError(f"{name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ArtifactError(
            f"{name}: no such directory here, and no such model on the hub (or it is private: `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ArtifactError(
            f"{name}: no such directory, and the hub cannot be reached; download the model elsewhere and give its "
            "directory"
        ) from error
    except Exception as error:  # the hub client raises many kinds of network errors
        raise ArtifactError(f"{name}: no such directory, and fetching it from the hub failed ({error})") from error
    require_safetensors(path)
    return path, path.name  # the snapshot directory is named by its commit


def load_tokenizer(source: ModelSource) -> FastTokenizer:
    """The model's fast tokenizer, with its own settings in what makes its tokens; raises `ArtifactError` when it has
    none."""
    from transformers import AutoTokenizer

    if not any((source.path / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one up
        raise ArtifactError(
            f"{source.path} has no tokenizer ({', '.join(_VOCABULARIES)}); copy its files from the model that it was "
            "trained from"
        )
    try:
        with quiet_transformers():
            tokenizer = cast("FastTokenizer", AutoTokenizer.from_pretrained(source.path, trust_remote_code=False))
    except Exception as error:  # tokenizers raise many kinds for damaged files
        raise ArtifactError(f"{source.path}: its tokenizer cannot be loaded ({error})") from error
    if not tokenizer.is_fast:
        raise ArtifactError(f"{source.path}: it has no fast tokenizer (tokenizer.json), which engines need")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ArtifactError(f"{source.path}: its tokenizer knows no token but special ones; restore its vocabulary")
    apply_settings(cast("tokenizers.Tokenizer", tokenizer.backend_tokenizer), read_tokenizer_settings(source.path))
    return tokenizer


def max_length(source: ModelSource, tokenizer: FastTokenizer, task: Task, requested: int | None = None) -> int:
    """Longest input in tokens: what was requested, else `DEFAULT_MAX_LENGTH` or, of embeddings, what the model's own
    files say that they were made for; less where tokenizer or positions allow less. Beyond positions is refused."""
    limit = source.family.max_positions(source.config)
    if requested is not None:
        if not 2 <= requested <= limit:
            raise DataError(f"max length {requested} is outside 2..{limit}, the positions of {source.path}")
        return requested
    return min(limit, int(tokenizer.model_max_length), _made_for(source, task) or DEFAULT_MAX_LENGTH)


def _made_for(source: ModelSource, task: Task) -> int | None:
    """The longest input that the files of an embedding model say it was made for."""
    return read_pooling(source.path).max_length if task.auto_class is None else None


def cut_notice(source: ModelSource, tokenizer: FastTokenizer, task: Task, requested: int | None = None) -> str | None:
    """What is said where texts are cut shorter in training than the model could take, and nobody asked for that: the
    checkpoint, and whatever is made of it, takes no more either. None where nothing is lost."""
    possible = min(source.family.max_positions(source.config), int(tokenizer.model_max_length))
    if requested is not None or _made_for(source, task) or possible <= DEFAULT_MAX_LENGTH:
        return None
    return (
        f"texts are cut at {DEFAULT_MAX_LENGTH} tokens, in training and by all that is made of it, and {source.path} "
        f"can take {possible}; give --max-length {possible} (Settings.max_length in Python): it costs time and memory"
    )


PRUNED = 0.1  # of a matrix: zeros by which it counts as pruned
PADDED = -1e4  # the logit of padding, where logits compete along the sequence


Arguments = tuple[object, ...]
Keywords = dict[str, torch.Tensor]


def _as_spans(model: nn.Module) -> nn.Module:
    """Make a question answering model speak like the others: ``labels`` (batch, 2) in, ``logits`` (batch, sequence, 2)
    out, start and end, `PADDED` at padding, which has no part in the loss."""

    def split_labels(_: nn.Module, args: Arguments, inputs: Keywords) -> tuple[Arguments, Keywords]:
        labels = inputs.pop("labels", None)
        if labels is not None:
            inputs["start_positions"], inputs["end_positions"] = labels.unbind(-1)
        return args, inputs

    def join_logits(_: nn.Module, __: Arguments, inputs: Keywords, output: SpanOutput) -> SpanOutput:
        padding = ~inputs["attention_mask"].bool()[..., None]
        output.logits = torch.stack([output.start_logits, output.end_logits], -1).float().masked_fill(padding, PADDED)
        if inputs.get("start_positions") is not None:
            positions = torch.stack([inputs["start_positions"], inputs["end_positions"]], -1)
            output.loss = nn.functional.cross_entropy(output.logits, positions)  # the classes are the positions
        return output

    model.register_forward_pre_hook(split_labels, with_kwargs=True)
    model.register_forward_hook(join_logits, with_kwargs=True)
    return model


def load_model(
    source: ModelSource, task: Task, *, classes: Sequence[str] | None = None, gelu: str | None = None
) -> nn.Module:
    """The task model in float32 on this process's device, with ``labels`` in and ``logits`` out. With `classes` the
    head is new; without, it is the checkpoint's own.

    `gelu` (erf or tanh) replaces the model's own GELU, and ``config.json`` says so when the model is saved.
    """
    # On CPU the backward pass of fused attention is slower than plain matrix products at the lengths of sentences.
    fused = torch.cuda.is_available() and source.family.attention.interface
    attention = "sdpa" if fused else "eager"
    changes: dict[str, object] = {}
    if gelu is not None:
        if gelu not in GELUS or source.family.gelu(source.config) is None:
            raise DataError(f"--gelu {gelu}: choose {' or '.join(GELUS)}, for a model whose activation is a GELU")
        changes[source.family.activation_key] = GELUS[gelu]
    if classes is not None:
        names = dict(enumerate(classes))
        changes |= {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    if task.problem_type is not None:  # a head that serves several tasks is trained for this one
        changes["problem_type"] = task.problem_type
    loading = Loading(attention=attention, changes=changes, new_head=classes is not None)
    model = load_pretrained(source.path, source.config, task, loading)
    split_shared_projections(model)
    write_out_attention(model)
    if classes is None and (pruned := _pruned_notice(model, source)) is not None:
        notice(pruned)
    return (_as_spans(model) if task.output_kind == "span" else model).to(distributed.device())


def _pruned_notice(model: nn.Module, source: ModelSource) -> str | None:
    """What is said of a model that another tool has pruned; None for others, where hardly a weight is zero."""
    parameters = dict(model.named_parameters())
    matrices = [parameters[name] for name in source.family.weights(source.config) if name in parameters]
    pruned = sum(bool((matrix == 0).float().mean() >= PRUNED) for matrix in matrices)
    if not pruned:
        return None
    return (
        f"{pruned} of {len(matrices)} matrices of {source.path} are zero in at least {PRUNED:.0%} of their weights, as "
        "of a pruned model; it counts as the dense one here, and what it lost before is not measured"
    )
