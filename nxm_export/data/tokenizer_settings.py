"""What a model says about its tokenizer beside ``tokenizer.json``: at which side texts are cut, and whether the model
reads token types.

``tokenizer_config.json`` has both, and only transformers reads it. `apply_settings` writes them into the tokenizer
itself, so that training, comparison and serving, which take ``tokenizer.json`` alone, make the same tokens as
transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import as_object, as_objects, convert, entry_at, parse_json, read_foreign_json

if TYPE_CHECKING:
    import tokenizers

CONFIG_FILE = "tokenizer_config.json"
_TYPES = "token_type_ids"
_WAY_OUT = "restore it from the model"


@dataclass(frozen=True)
class TokenizerSettings:
    """What is read of ``tokenizer_config.json``; None where it says nothing."""

    truncation_side: str | None = None
    model_input_names: list[str] | None = None

    @property
    def cuts_left(self) -> bool:
        """True when a text that is too long loses its beginning."""
        return self.truncation_side == "left"

    @property
    def types(self) -> bool:
        """True when the model is given the types of tokens, where it has any. Not said, it is: versions of
        transformers differ in what they then do."""
        return self.model_input_names is None or _TYPES in self.model_input_names


def read_tokenizer_settings(directory: Path) -> TokenizerSettings:
    """The settings in a model directory, those of transformers where it has none; raises `ArtifactError`."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        return TokenizerSettings()
    data = read_foreign_json(file, _WAY_OUT)
    settings: TokenizerSettings = convert(data, TokenizerSettings, source=str(file), way_out=_WAY_OUT, foreign=True)
    if settings.truncation_side not in (None, "left", "right"):
        raise ArtifactError(f"{file}: truncation_side {settings.truncation_side!r} is neither left nor right")
    return settings


def apply_settings(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> bool:
    """Make a tokenizer do by itself what the settings say; returns whether that changed it."""
    changed = False
    if settings.cuts_left and direction_of(tokenizer) != "left":
        tokenizer.enable_truncation((tokenizer.truncation or {}).get("max_length", 2**31), direction="left")
        changed = True
    if not settings.types:
        import tokenizers

        data = as_object(parse_json(tokenizer.to_str(), "tokenizer.json", _WAY_OUT, ArtifactError, foreign=True))
        untyped = _untyped(data["post_processor"])
        if untyped != data["post_processor"]:
            made = tokenizers.Tokenizer.from_str(json.dumps({**data, "post_processor": untyped}))
            tokenizer.post_processor = made.post_processor
            changed = True
    return changed


class TruncatingTokenizer(Protocol):
    """What is read of a `tokenizers.Tokenizer`."""

    @property
    def truncation(self) -> Mapping[str, object] | None:
        """How it cuts, or None where it does not."""


def direction_of(tokenizer: TruncatingTokenizer) -> str:
    """At which side a tokenizer cuts: left or right."""
    return str((tokenizer.truncation or {}).get("direction", "right"))


def _untyped(processor: object) -> dict[str, object]:
    """A post-processor that gives every token type 0."""
    if processor is None:
        return _template([], [])
    fields = as_object(processor)
    if fields["type"] == "Sequence":
        return {**fields, "processors": [_untyped(part) for part in as_objects(fields["processors"])]}
    if fields["type"] == "TemplateProcessing":
        forms = {form: [_first_type(piece) for piece in as_objects(fields[form])] for form in ("single", "pair")}
        return {**fields, **forms}
    return _template([fields["cls"]], [fields["sep"]]) if fields["type"] == "BertProcessing" else fields


def _first_type(piece: Mapping[str, object]) -> dict[str, object]:
    return {name: {**as_object(entry), "type_id": 0} for name, entry in piece.items()}


def _template(before: Sequence[object], behind: Sequence[object]) -> dict[str, object]:
    """A template that puts special tokens, (text, id) each, around a text and behind each of two."""
    first, last = ([(str(entry_at(token, 0)), entry_at(token, 1)) for token in tokens] for tokens in (before, behind))

    def special(tokens: Sequence[tuple[str, object]]) -> list[object]:
        return [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in tokens]

    single = [*special(first), {"Sequence": {"id": "A", "type_id": 0}}, *special(last)]
    known = {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in (*first, *last)}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, *special(last)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
