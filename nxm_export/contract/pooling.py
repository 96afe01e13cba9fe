"""Sentence embeddings: how a model pools its tokens into one vector, read from sentence-transformers' files and written
back.

A sentence-transformers directory says in ``modules.json`` what follows the encoder. `POOLINGS` and a normalisation to
length 1 become part of the model here, and so of the graph; any other module is refused, because leaving it out would
give other vectors. The saved files are such that ``SentenceTransformer(directory)`` gives what the engine gives, but
for quantization.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import convert, encode, read_foreign_json

MODULES_FILE = "modules.json"
POOLINGS = ("mean", "cls")
_TRANSFORMER_FILE, _SETTINGS_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
_POOLING, _NORMALIZE = "1_Pooling", "2_Normalize"
# What older versions of sentence-transformers call the poolings: one boolean for each.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


T = TypeVar("T")


@dataclass(frozen=True)
class _Module:
    """An entry of ``modules.json``: the class, and the directory of its settings."""

    type: str
    path: str


@dataclass(frozen=True)
class _PoolingSettings:
    """What is read of ``1_Pooling/config.json``: newer files name the pooling, older ones have a boolean for each."""

    pooling_mode: str | list[str] | None = None
    include_prompt: bool | None = None
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


@dataclass(frozen=True)
class _TextSettings:
    """What is read of ``config_sentence_transformers.json``."""

    default_prompt_name: str | None = None


@dataclass(frozen=True)
class _TransformerSettings:
    """What is read of ``sentence_bert_config.json``."""

    max_seq_length: int | None = None
    do_lower_case: bool | None = None


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: `mode` is one of `POOLINGS`, with `normalize` the vector is scaled to length 1.

    `max_length` is the longest input, in tokens, that the embeddings were made for; None where nobody says.
    """

    mode: str
    normalize: bool
    max_length: int | None = None

    def __str__(self) -> str:
        return f"{self.mode}, normalized" if self.normalize else self.mode


def is_embedding(directory: Path) -> bool:
    """True for the directory of a sentence-transformers model, be it one that `read_pooling` takes or not."""
    return (directory / MODULES_FILE).is_file()


def module_folders(directory: Path) -> list[str]:
    """Where the modules behind the encoder have their settings: folders below the directory, those without any file
    among them. None where it is no sentence-transformers model."""
    if not is_embedding(directory):
        return []
    return [module.path for module in _read(directory / MODULES_FILE, list[_Module]) if module.path]


def read_pooling(directory: Path) -> Pooling:
    """The pooling that a sentence-transformers directory describes; `ArtifactError` for what cannot be computed
    here."""
    file = directory / MODULES_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{directory} has no {MODULES_FILE}: it does not say how its tokens become one embedding. Train or save "
            "the "
            "model with sentence-transformers first; a plain encoder's vectors mean little"
        )
    kinds = [(module.type.rpartition(".")[2], module.path) for module in _read(file, list[_Module])]
    names = [kind for kind, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ArtifactError(
            f"{file}: modules {', '.join(names) or 'none'}; supported are Transformer, Pooling and then at most "
            "Normalize"
        )
    if kinds[0][1]:
        raise ArtifactError(
            f"{file}: the encoder lies in {kinds[0][1]!r}; save the model with a newer sentence-transformers"
        )
    limit = _require_plain_text(directory)
    return Pooling(_mode(directory / kinds[1][1] / "config.json"), "Normalize" in names, limit)


def write_pooling(directory: Path, pooling: Pooling, hidden: int, max_length: int, source: Path) -> None:
    """Make a saved encoder of size `hidden` a sentence-transformers model of at most `max_length` tokens; what
    `source`, the model it came from, says of prompts and similarity is kept."""
    kinds = [("Transformer", ""), ("Pooling", _POOLING), *([("Normalize", _NORMALIZE)] if pooling.normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    for _, path in kinds[1:]:
        (directory / path).mkdir()
    flags = {flag: mode == pooling.mode for flag, mode in _FLAGS.items()}
    _write(directory / MODULES_FILE, modules)
    _write(directory / _POOLING / "config.json", {"word_embedding_dimension": hidden, **flags, "include_prompt": True})
    _write(directory / _TRANSFORMER_FILE, {"max_seq_length": max_length, "do_lower_case": False})
    if (source / _SETTINGS_FILE).is_file():
        shutil.copyfile(source / _SETTINGS_FILE, directory / _SETTINGS_FILE)


def _mode(file: Path) -> str:
    settings = _read(file, _PoolingSettings)
    flagged = [mode for flag, mode in _FLAGS.items() if getattr(settings, flag)]
    asked = settings.pooling_mode or flagged or ["mean"]
    modes = [asked] if isinstance(asked, str) else asked
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ArtifactError(
            f"{file}: pooling {' with '.join(map(str, modes))}; choose a model with one of {', '.join(POOLINGS)}"
        )
    if settings.include_prompt is False:
        raise ArtifactError(
            f"{file}: it leaves the prompt's tokens out of the pooling, which a graph of tokens cannot know"
        )
    return modes[0]


def _require_plain_text(directory: Path) -> int | None:
    """Refuse what changes a text in front of the tokenizer; returns the longest input in tokens, where it is said."""
    settings_file, file = directory / _SETTINGS_FILE, directory / _TRANSFORMER_FILE
    prompt = _read(settings_file, _TextSettings).default_prompt_name if settings_file.is_file() else None
    if prompt:
        raise ArtifactError(
            f"{settings_file}: it puts the prompt {prompt!r} before every text by itself, which engines do not; "
            "remove default_prompt_name, and write the prompt into your texts"
        )
    if not file.is_file():
        return None
    transformer = _read(file, _TransformerSettings)
    if transformer.do_lower_case:
        raise ArtifactError(
            f"{file}: it lower-cases texts in front of the tokenizer, which engines do not; if the tokenizer does so "
            "itself, set do_lower_case to false"
        )
    limit = transformer.max_seq_length
    return limit if limit is not None and limit >= 2 else None


def _read(file: Path, kind: type[T]) -> T:
    way_out = "restore it from the model"
    return convert(read_foreign_json(file, way_out), kind, source=str(file), way_out=way_out, foreign=True)


def _write(file: Path, data: object) -> None:
    file.write_text(encode(data), encoding="utf-8")
