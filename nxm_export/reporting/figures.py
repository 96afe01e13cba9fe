"""Numbers as they stand in a page: each with the file that it was read from, and written as `nxm show` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# kind -> text; the same digits as in `nxm_export.cli.tables`, which tests/nxm_export/reporting/test_report.py holds
FORMATS: dict[str, Callable[[Any], str]] = {
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

    value: Any
    file: str
    pointer: str | None = None

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
        try:
            return FORMATS[self.kind](value)
        except (TypeError, ValueError):
            return str(value)

    @property
    def json(self) -> str:
        """The value in full, as JSON."""
        return json.dumps(self.figure.value)


@dataclass(frozen=True)
class Source:
    """A JSON file of a run: its name, relative to the run, and what it holds."""

    file: str
    data: Any

    def at(self, *keys: str | int) -> Figure | None:
        """The value at a path of keys and indices, None where it is not there."""
        found = self.data
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                return None
        return Figure(found, self.file, pointer(*keys))


def pointer(*keys: str | int) -> str:
    """An RFC 6901 JSON pointer."""
    return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)
