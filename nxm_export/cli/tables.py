"""Tables on stdout, and how numbers are written in them. Imports rich when a table is printed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

BUSY = 1.25  # how wide the middle half of rounds is, one end by the other: 1.01 to 1.15 were seen when idle
GAP = 2  # between the columns of rows
_NUMBER = re.compile(r"[+-]?\d[\d.e+-]*%?|")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """One table on stdout, as wide as the terminal (120 columns in a pipe, unless COLUMNS says otherwise).

    Columns of numbers are aligned to the right, the others to the left.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(_NUMBER.fullmatch(cell_text(row[number])) for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[escape(cell_text(cell)) for cell in row])
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 120
    Console(width=width, highlight=False).print(table)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table without title and without lines around it, for rows that fit in a line."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*[escape(cell_text(cell)) for cell in row])
    Console(width=terminal_width(), highlight=False).print(table)


def terminal_width() -> int:
    """Columns of the terminal; 80 in a pipe, unless COLUMNS says otherwise."""
    return shutil.get_terminal_size((80, 24)).columns


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Names and values; nested values are written as ``a.b``."""
    print_table(title, ("what", "value"), list(_flat(facts)))


def _flat(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(cell_text(item) for item in value)
        else:
            yield f"{prefix}{key}", cell_text(value)


def cell_text(cell: object) -> str:
    """A cell as text: numbers with four digits, nothing for None."""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, Mapping):
        return ", ".join(f"{key} {cell_text(value)}" for key, value in cell.items())
    return "" if cell is None else str(cell)


def share_text(value: float | None) -> str:
    """A share in percent; a dash where there is none, as the argmax of scores and embeddings."""
    return "-" if value is None else f"{value:.2%}"


def score_text(value: float | None) -> str:
    """A metric; None stands for NaN."""
    return "NaN" if value is None else f"{value:.4f}"


def speed_text(ratio: float, interval: tuple[float, float]) -> str:
    """How many times faster, by the medians that stand beside it, and the 95 % interval of paired rounds."""
    return f"{ratio:.2f}x (paired {interval[0]:.2f} to {interval[1]:.2f})"


def busy_note(quartiles: Sequence[tuple[float, float]]) -> str:
    """A warning if timings show that other work ran beside them, else nothing. `quartiles` are milliseconds, the
    middle half of the rounds of each engine and shape.

    Half of them must be wide: a single wide one is common where nothing else runs. Intervals of ratios are no sign, as
    both engines of a round are slowed alike.
    """
    widths = [high / low for low, high in quartiles if low > 0]
    busy = bool(widths) and median(widths) > BUSY
    return "the machine was busy: time again when it is idle" if busy else ""
