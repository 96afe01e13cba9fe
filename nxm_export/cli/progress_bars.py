"""Progress on stderr: bars on a terminal, lines elsewhere. Imports rich when bars are drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nxm_export.progress import Progress, silent

if TYPE_CHECKING:
    from rich.progress import TaskID


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Progress]:
    """A progress callback that draws a bar per kind of work; without a terminal it prints lines."""
    if not enabled or int(os.environ.get("RANK", "0")):  # under torchrun the first process reports
        yield silent
        return
    if not sys.stderr.isatty():
        yield _plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _plain(what: str, done: int, total: int) -> None:
    quarter = max(1, total // 4)
    if done == total or (done and done % quarter == 0):
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
