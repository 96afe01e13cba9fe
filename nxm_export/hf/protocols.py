"""What this project uses of transformers' objects, where their own types say less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from nxm_export.data.tokenization import Tokenizer


class AttentionConfig(Protocol):
    """A configuration of transformers, as far as attention goes."""

    _attn_implementation: str


class HasAttention(Protocol):
    """A model of transformers whose attention can be chosen by a registered name."""

    config: AttentionConfig

    def set_attn_implementation(self, name: str) -> None:
        """Use it in every layer; a family without that choice logs a warning and keeps its own."""
        ...

    def _can_set_attn_implementation(self) -> bool:
        """Whether its layers look the function up, as its source says."""
        ...


class TaskOutput(Protocol):
    """What a task model returns for a batch."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: Sequence[torch.Tensor] | None


class Saved(Protocol):
    """A model or tokenizer that writes itself as a Hugging Face directory."""

    def save_pretrained(self, save_directory: Path) -> object:
        """Write its files to a directory."""


class SavedModel(Protocol):
    """A model that writes itself as a Hugging Face directory."""

    def save_pretrained(self, save_directory: Path, *, save_original_format: bool) -> object:
        """Write its files to a directory; with the original format, under the names that the file it came from had."""


class FastTokenizer(Saved, Protocol):
    """A fast tokenizer. `backend_tokenizer` is its `tokenizers.Tokenizer`."""

    is_fast: bool
    model_max_length: int
    pad_token_id: int | None
    all_special_ids: list[int]
    backend_tokenizer: Tokenizer

    def __len__(self) -> int:
        """How many tokens it knows."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The token of an id."""


class ModelClass(Protocol):
    """A class of transformers' models."""

    def from_pretrained(self, path: Path, **options: object) -> tuple[PreTrainedModel, Mapping[str, object]]:
        """The model of a directory and, with ``output_loading_info``, what was missing in it."""

    def __call__(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model with random weights."""


class AutoClass(Protocol):
    """One of transformers' ``AutoModel...``, which choose the class of a model by its configuration."""

    def from_config(self, config: PreTrainedConfig, **options: object) -> PreTrainedModel:
        """A model with random weights."""
