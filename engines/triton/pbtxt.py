"""Protobuf text format, written: the little of it that a ``config.pbtxt`` needs.

A message is a dict, a repeated field a list, an enum a `Word`. The text is parsed against Triton's own message
definition in the tests, and by the real server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias


class Word(str):
    """An enum value, written without quotes."""

    __slots__ = ()


Value: TypeAlias = "bool | int | str | Mapping[str, Value] | Sequence[Value] | None"
Message: TypeAlias = "dict[str, Value]"


def dump(message: Mapping[str, Value], indent: int = 0) -> str:
    """The text of a message; None and empty lists are left out."""
    lines = []
    for key, value in message.items():
        for item in value if isinstance(value, list) and not _is_scalars(value) else [value]:
            lines.extend(_field(key, item, indent))
    return "".join(lines)


def _field(key: str, value: Value, indent: int) -> list[str]:
    margin = "  " * indent
    if value is None or value == []:
        return []
    if isinstance(value, Mapping):
        return [f"{margin}{key} {{\n", dump(value, indent + 1), f"{margin}}}\n"]
    if isinstance(value, list):
        return [f"{margin}{key}: [ {', '.join(map(_scalar, value))} ]\n"]
    return [f"{margin}{key}: {_scalar(value)}\n"]


def _is_scalars(values: Sequence[Value]) -> bool:
    return not any(isinstance(value, Mapping) for value in values)


def _scalar(value: Value) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return '"' + "".join(_character(byte) for byte in str(value).encode("utf-8")) + '"'


def _character(byte: int) -> str:
    plain = 32 <= byte < 127 and byte not in (34, 92)  # the quote and the backslash
    return chr(byte) if plain else f"\\{byte:03o}"
