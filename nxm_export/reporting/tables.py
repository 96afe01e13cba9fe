"""What a table of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nxm_export.reporting.figures import Figure
from nxm_export.reporting.verdicts import Piece


@dataclass(frozen=True)
class Code:
    """Text to be set as code: a name, a path, a hash, a command."""

    text: str


Cell = Piece | Code | tuple[Piece | Code, ...]


@dataclass(frozen=True)
class PageTable:
    """A table of the page: its caption, column titles (a leading ``#`` aligns to the right) and rows; the first cell
    heads its row. With `folded`, the line that a reader sees, it is closed until it is asked for."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    folded: str = ""


def pair(low: Figure | None, high: Figure | None, kind: str) -> Cell:
    """Two figures with "to" between them, a dash without them."""
    return (low.shown(kind), " to ", high.shown(kind)) if low and high else "-"


def or_dash(figure: Figure | None, kind: str) -> Piece:
    """The figure, a dash where there is none."""
    return figure.shown(kind) if figure else "-"


def of(actual: Figure | None, tolerated: Figure | None, kind: str) -> Cell:
    """A figure and the most that it may be."""
    return (or_dash(actual, kind), " of ", or_dash(tolerated, kind))
