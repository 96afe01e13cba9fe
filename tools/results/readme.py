"""The table of results in the README, from the records: what compression kept, pooled over tasks and seeds.

Retention is that of docs/comparison.md: accuracy relative to the dense model of the same seed, mean over seeds, then
over tasks. Which rows stand here was decided once; one that loses is among them. Cells whose dense model is not shown
to beat one answer for all count in docs/results.md alone: what is kept there is no accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.rendering import table
from tools.results.pooled import Cell, Pool
from tools.results.statistics import TaskStatistics
from tools.results.store import stores
from tools.results.tasks import TASKS

SECTION = "tools.results render"


@dataclass(frozen=True)
class Shown:
    """A row of the README: of which encoder, which row of the results, and its words, which refer to no other row: that
    may not be there."""

    encoder: str
    row: str
    words: str


SHOWN = (
    Shown("MiniLM-L6", "admm-2:4+W8-averaged", "2:4, 8-bit weights: what `nxm compress` does by itself"),
    Shown("MiniLM-L6", "admm-2:4+W4-averaged", "2:4, 4-bit weights (`--weight-bits 4`)"),
    Shown("MiniLM-L6", "obs-2:4+W4-averaged", "2:4, 4-bit weights, by `--recipe obs`"),
    Shown("MiniLM-L6", "admm-2:4+W4-untrained", "2:4, 4-bit weights, without training (`--steps 0`)"),
    Shown("MiniLM-L6", "paper-2:4+W4", "2:4, 4-bit weights, by the paper's recipe"),
    Shown("MiniLM-L6", "admm-1:4+W4-averaged", "1:4, 4-bit weights"),
    Shown(
        "MiniLM-L6",
        "searched-hw-87.5-by-admm-judged-by-64-averaged",
        "a pattern and width per matrix, searched for 87.5 % (`--search 0.875`)",
    ),
    Shown(
        "MiniLM-L6",
        "searched-hw-87.5",
        "a pattern and width per matrix, searched for 87.5 % by `obs`, with the last step's weights",
    ),
    Shown("MPNet-base", "admm-2:4+W4-averaged", "2:4, 4-bit weights"),
    Shown("MPNet-base", "paper-2:4+W4", "2:4, 4-bit weights, by the paper's recipe"),
    Shown("MPNet-base", "admm-2:4+W4-untrained", "2:4, 4-bit weights, without training"),
    Shown("MPNet-base", "admm-2:4+W8-untrained", "2:4, 8-bit weights, without training"),
    Shown(
        "MPNet-base",
        "searched-hw-87.5-by-admm-judged-by-64-averaged",
        "a pattern and width per matrix, searched for 87.5 %",
    ),
    Shown("MPNet-base", "obs-2:4+W8", "2:4, 8-bit weights, by `obs`, with the last step's weights"),
)


def results_table(results: Path) -> str:
    """The Markdown table; a row without a record is left out."""
    pools = {
        encoder: Pool([TaskStatistics(s.task, s.labelled_records()) for s in stores(results, encoder)])
        for encoder in dict.fromkeys(shown.encoder for shown in SHOWN)
    }
    rows = []
    for shown in SHOWN:
        pool = pools[shown.encoder]
        cells = pool.telling(pool.cells(shown.row, "dense"))
        kept = pool.retention(shown.row, cells)
        if kept is None or kept.interval is None:
            continue
        low, high = (100 * bound for bound in kept.interval)
        saved = _bits_saved(pool, shown.row, cells)
        span = f"{100 * kept.value:.1f} % ({low:.1f} to {high:.1f})"
        epochs = _epochs(pool, shown.row, cells)
        floor = f"{100 * pool.one_answer(cells):.0f} %"
        rows.append([shown.encoder, shown.words, f"{100 * saved:.1f} %", span, floor, epochs, _where(cells)])
    head = ["encoder", "compression", "bits saved", "accuracy kept (95 %)", "one class", "epochs", "tasks (seeds)"]
    return table(rows, head, "llrlrrl")


def _bits_saved(pool: Pool, row: str, cells: tuple[Cell, ...]) -> float:
    """Mean compression by the counting of sparse tensor cores, over the cells."""
    facts = [pool.tasks[task].records[row, seed].record.compressed for task, seed in cells]
    return float(np.mean([fact.compression.by("hw") for fact in facts if fact is not None]))


def _epochs(pool: Pool, row: str, cells: tuple[Cell, ...]) -> str:
    """Epochs that compression trained for, without those of the dense model."""
    trained = {f"{pool.tasks[task].records[row, seed].record.epochs:.0f}" for task, seed in cells}
    return " or ".join(sorted(trained))


def _where(cells: tuple[Cell, ...]) -> str:
    """Tasks with the number of their seeds."""
    names = [task for task, _ in cells]
    return ", ".join(f"{TASKS[name].title} ({names.count(name)})" for name in dict.fromkeys(names))
