"""What the command line shows: progress on stderr, tables on stdout. Imports rich when something is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Progress]:
    """A progress callback that draws one bar per kind of work on stderr; without a terminal, a line per finished kind."""
    if not enabled:
        yield lambda what, done, total: None
        return
    if not sys.stderr.isatty():
        yield _plain
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _plain(what: str, done: int, total: int) -> None:
    step = max(1, total // 4)
    if done == total or (done and done % step == 0):
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One table on stdout; the first column is left-aligned, numbers right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[_text(cell) for cell in row])
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)


def _text(cell: Any) -> str:
    from rich.markup import escape

    if isinstance(cell, float):
        return f"{cell:.4g}"
    return escape("" if cell is None else str(cell))


def print_search(found: Mapping[str, Any]) -> None:
    """The finalists of a search, its Pareto front and its cost."""
    columns = ("plan", "divergence one-shot", "hw", "packed", "values", "options")
    for title, rows in (("finalists", found["finalists"]), ("at other compressions", found["pareto"])):
        if rows:
            print_table(
                title,
                columns,
                [
                    (
                        row["origin"],
                        row["joint"],
                        *(f"{row[counting]:.2%}" for counting in columns[2:5]),
                        row["options"],
                    )
                    for row in rows
                ],
            )
    print_table("seconds", ("step", "seconds"), list(found["seconds"].items()))


def print_summary(summary: Mapping[str, Any]) -> None:
    """The final table of a run, from its summary."""
    low, high = summary["difference_interval"]
    print_table(
        f"accuracy on {summary['dev_samples']} held-out samples ({summary['metric']})",
        ("model", summary["metric"], "note"),
        [
            ("dense, FP32", summary["dense"], ""),
            (
                "compressed checkpoint, PyTorch",
                summary["checkpoint"],
                ", ".join(f"{count} x {name}" for name, count in summary["plan"].items()),
            ),
            (
                "compressed, INT8 engine",
                summary["compressed"],
                f"difference to dense: 95 % interval {low:+.4f} to {high:+.4f}",
            ),
        ],
    )
    compression = summary["compression"]
    print_table(
        "compression of the encoder's matrices, against FP32",
        ("counting", "compression", "what is counted"),
        [
            ("hw", f"{compression['hw']:.2%}", "2:4 as tensor cores store it, index and scales included"),
            ("packed", f"{compression['packed']:.2%}", "smallest lossless file, index and scales included"),
            ("values", f"{compression['values']:.2%}", "kept values alone, as papers count"),
        ],
    )
    print_table(
        "graphs", ("graph", "MB"), [(name, f"{size / 1e6:.1f}") for name, size in summary["onnx_bytes"].items()]
    )
    print_table(
        "parity: engine against its own checkpoint in PyTorch, same samples",
        ("engine", "equal argmax", "max |difference|", summary["metric"], "verdict"),
        [
            (
                name,
                f"{report['agreement']:.2%}",
                report["max_abs"],
                report["value"],
                "pass" if report["passed"] else "FAIL",
            )
            for name, report in summary["parity"].items()
        ],
    )
    speedups = {(ratio["name"], ratio["batch"], ratio["sequence"]): ratio for ratio in summary["speedup"]}
    rows = []
    for name, timing in summary["latency_ms"].items():
        ratio = speedups.get((name.rpartition(" ")[0], timing["batch"], timing["seq"]))
        note = (
            f"{ratio['speedup']:.2f}x ({ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f})"
            if ratio
            else "reference"
        )
        rows.append((name, timing["median"], note))
    print_table(
        "latency on this CPU, interleaved", ("engine, batch x sequence", "median ms", "speed against FP32"), rows
    )
    print_table("TensorRT-RTX", ("what", "found"), _rtx_rows(summary))
    print_table("where everything lies", ("what", "path"), list(summary["artifacts"].items()))


def _rtx_rows(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rtx = summary.get("trt_rtx")
    if not rtx:
        return [
            (
                "engine",
                next((why for name, why in summary["missing"].items() if name.startswith("trt_rtx")), "not built"),
            )
        ]
    return [
        ("engine", "built ahead of time"),
        ("INT8 matrix products", f"{rtx['integer_products']} of {rtx['planned_products']} planned"),
        ("2:4 kernels", rtx["sparse_kernels"]),
        *[("run here", why) for name, why in summary["missing"].items() if name.startswith("trt_rtx")],
    ]
