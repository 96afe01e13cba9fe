"""Values of a ``config.json``, read by key and refused by name where they are none."""

from __future__ import annotations

from collections.abc import Mapping

from nxm_export.errors import ArtifactError


def pad_id_of(config: Mapping[str, object]) -> int:
    """The id of padding in ``config.json``, 0 where it names none; `ArtifactError` when it is no integer."""
    value = config.get("pad_token_id")
    if value is not None and type(value) is not int:
        raise ArtifactError(f"config.json: pad_token_id must be an integer, got {value!r}; is the file complete?")
    return value or 0


def text_of(config: Mapping[str, object], key: str) -> str | None:
    """A text in ``config.json``, None where it is missing; `ArtifactError` when it is no text."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"config.json: {key} must be a text, got {value!r}; is the file complete?")
    return value


def flag_of(config: Mapping[str, object], key: str) -> bool:
    """A truth value in ``config.json``, False where it is missing; `ArtifactError` when it is none."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ArtifactError(f"config.json: {key} must be true or false, got {value!r}; is the file complete?")
    return bool(value)


def size_of(config: Mapping[str, object], key: str) -> int:
    """A size in ``config.json``; `ArtifactError` when it is missing or no positive integer."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ArtifactError(f"config.json: {key} must be a positive integer, got {value!r}; is the file complete?")
    return value
