"""Numbers as they stand in a page: each with the file that it was read from, and written as `nxm show` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Generic, TypeVar

from nxm_export.storage.json_files import entry_at

Value = float | int | str | bool | None
Key = str | int
T_co = TypeVar("T_co", covariant=True)

# kind -> text of a number; the same digits as `nxm show` prints (tests/nxm_export/reporting/test_page.py)
FORMATS: dict[str, Callable[[float], str]] = {
    "score": lambda value: f"{value:.4f}",
    "signed": lambda value: f"{value:+.4f}",
    "share": lambda value: f"{value:.2%}",
    "megabytes": lambda value: f"{value / 1e6:.1f}",
    "error": lambda value: f"{value:.2g}",
    "milliseconds": lambda value: f"{value:.2f}",
    "ratio": lambda value: f"{value:.2f}",
    "general": lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
}


@dataclass(frozen=True)
class Figure:
    """A value and where it stands: `file`, relative to the run, and an RFC 6901 `pointer` into its JSON.

    Without a pointer it is the size of the file, or was computed from it.
    """

    value: Value
    file: str
    pointer: str | None = None

    @property
    def number(self) -> float | None:
        """The value as a number; None where it is none, as for a NaN."""
        value = self.value
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def shown(self, kind: str) -> Shown:
        """The figure as text of a kind (a key of `FORMATS`)."""
        return Shown(self, kind)


@dataclass(frozen=True)
class Shown:
    """A figure and how it is written."""

    figure: Figure
    kind: str

    @property
    def text(self) -> str:
        """The digits; JSON's null is what a file holds for NaN. A value that is no number stands there as it is."""
        value = self.figure.value
        if value is None:
            return "NaN" if self.kind == "error" else "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return value if isinstance(value, str) else FORMATS[self.kind](value)

    @property
    def json(self) -> str:
        """The value in full, as JSON."""
        return json.dumps(self.figure.value)


@dataclass(frozen=True)
class RunFile(Generic[T_co]):
    """A JSON file of a run: its name, relative to the run, what it holds, and its JSON as it stands there."""

    file: str
    content: T_co
    json: object

    def figure(self, *keys: Key) -> Figure | None:
        """The value at a path of field names, keys and indices; None where a key, or what holds it, is missing.

        A file of a former schema may hold the value elsewhere or not at all: then the figure has no pointer.
        """
        node: object = self.content
        for key in keys:
            if node is None or (isinstance(node, Mapping) and key not in node):
                return None
            node = _child(node, key)
        return self._figure_of(node, keys)

    def figures(self) -> Iterator[tuple[tuple[Key, ...], Figure]]:
        """Every value in the file with its path; those that are None are left out."""
        for keys, value in _leaves(self.content, ()):
            yield keys, self._figure_of(value, keys)

    def _figure_of(self, value: object, keys: tuple[Key, ...]) -> Figure:
        if not (value is None or isinstance(value, (float, int, str))):
            raise TypeError(f"{self.file}: {pointer(*keys)} is no single value")
        return Figure(value, self.file, pointer(*keys) if _stands_at(self.json, keys, value) else None)


def _child(node: object, key: Key) -> object:
    if isinstance(node, Mapping):
        return node[key]
    if isinstance(key, int):
        assert isinstance(node, Sequence)
        return node[key]
    return getattr(node, key)


def _leaves(node: object, keys: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], object]]:
    if is_dataclass(node):
        for field in fields(node):
            yield from _leaves(getattr(node, field.name), (*keys, field.name))
    elif isinstance(node, Mapping):
        for key, item in node.items():
            yield from _leaves(item, (*keys, key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for number, item in enumerate(node):
            yield from _leaves(item, (*keys, number))
    elif node is not None:
        yield keys, node


def _stands_at(data: object, keys: tuple[Key, ...], value: Value) -> bool:
    try:
        return entry_at(data, *keys) == value
    except LookupError:
        return False


def pointer(*keys: Key) -> str:
    """An RFC 6901 JSON pointer."""
    return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)
