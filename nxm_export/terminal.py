"""What the command line shows: progress on stderr, tables on stdout. Imports rich when something is shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
_NUMBER = re.compile(r"[+-]?\d[\d.e+-]*%?|")


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Progress]:
    """A progress callback that draws one bar per kind of work on stderr; without a terminal, a line per finished kind."""
    if not enabled or int(os.environ.get("RANK", "0")):  # under torchrun the first process reports
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
    """One table on stdout, as wide as the terminal (120 columns in a pipe, unless COLUMNS says otherwise).

    Columns of numbers are aligned to the right, the others to the left.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(_NUMBER.fullmatch(_text(row[number])) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[escape(_text(cell)) for cell in row])
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 120
    Console(width=width, highlight=False).print(table)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Names and values; nested values are written as ``a.b``."""
    print_table(title, ("what", "value"), list(_flat(facts)))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(_text(item) for item in value)
        else:
            yield f"{prefix}{key}", _text(value)


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell)


def print_estimate(estimate: Mapping[str, Any]) -> None:
    """What a run would do, from `nxm_export.estimate.estimate`."""
    rows = [
        ("training samples", str(estimate["train_samples"])),
        ("held-out samples", str(estimate["dev_samples"])),
        ("plan", _counts(estimate["plan"])),
        ("compression", ", ".join(f"{counting} {value:.2%}" for counting, value in estimate["compression"].items())),
        ("dense fine-tuning", _steps(estimate["dense_steps"], estimate["dense_seconds"])),
        ("compression training", _steps(estimate["steps"], estimate["seconds"])),
        ("export, build, compare, time", f"about {_duration(estimate['other_seconds'])}"),
        ("dense model and checkpoint", f"about {estimate['checkpoint_bytes'] / 1e6:.0f} MB"),
        ("FP32 graph", f"about {estimate['fp32_onnx_bytes'] / 1e6:.0f} MB"),
        ("compressed graph", f"about {estimate['onnx_bytes'] / 1e6:.0f} MB"),
    ]
    print_table("what `nxm run` would do", ("stage", "estimate"), rows)


def _steps(steps: int, seconds: float) -> str:
    return f"{steps} steps, about {_duration(seconds)}" if steps else "none: the model has a head for this task"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _counts(plan: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in plan.items())


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
                        _counts(row["options"]),
                    )
                    for row in rows
                ],
            )
    cost = found["cost"]
    full = cost["full_run"]
    print_table("cost", ("step", "seconds"), list(cost["seconds"].items()))
    share = "an unknown part (resumed)" if cost["resumed"] else f"{cost['share_of_full_run']:.1%}"
    steps, seconds = full["steps"], full["estimated_seconds"]
    print(f"that is {share} of a compression run of {steps} steps, which takes about {seconds:.0f} seconds here")


def print_summary(summary: Mapping[str, Any]) -> None:
    """The final tables of a run, from its summary."""
    low, high = summary["difference_interval"]
    metric = summary["metric"]
    print_table(
        f"{metric} on {summary['dev_samples']} held-out samples",
        ("model", metric, "note"),
        [
            ("dense, FP32", f"{summary['dense']:.4f}", ""),
            ("compressed, PyTorch", f"{summary['checkpoint']:.4f}", _counts(summary["plan"])),
            (
                "compressed, ONNX Runtime",
                f"{summary['compressed']:.4f}",
                f"difference to dense: {low:+.4f} to {high:+.4f} (95 %)",
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
        ("engine", "equal argmax", "max |diff|", metric, "verdict"),
        [
            (
                name,
                f"{report['agreement']:.2%}",
                "NaN" if report["max_abs"] is None else f"{report['max_abs']:.2g}",
                f"{report['value']:.4f}",
                "pass" if report["passed"] else "FAIL",
            )
            for name, report in summary["parity"].items()
        ],
    )
    speedups = {(ratio["name"], ratio["batch"], ratio["sequence"]): ratio for ratio in summary["speedup"]}
    rows = []
    for name, timing in summary["latency_ms"].items():
        engine, _, shape = name.rpartition(" ")
        ratio = speedups.get((engine, timing["batch"], timing["seq"]))
        note = (
            f"{ratio['speedup']:.2f}x ({ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f})"
            if ratio
            else "reference"
        )
        rows.append((engine, shape, f"{timing['median']:.2f}", note))
    print_table(
        "latency on this CPU, interleaved", ("engine", "batch x seq", "median ms", "speed against FP32 (95 %)"), rows
    )
    print_table("TensorRT-RTX", ("what", "found"), _rtx_rows(summary))
    root = os.path.commonpath(summary["artifacts"].values())
    paths = [(name, os.path.relpath(path, root)) for name, path in summary["artifacts"].items()]
    print_table(f"where everything lies, in {root}", ("what", "path"), paths)


def _rtx_rows(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rtx, absent = summary.get("trt_rtx"), {**summary["missing"], **summary["failed"]}
    why = [reason for name, reason in absent.items() if name.startswith("trt_rtx")]
    if not rtx:
        return [("engine", why[0] if why else "not built")]
    return [
        ("engine", "built ahead of time, without a GPU"),
        ("INT8 matrix products", f"{rtx['integer_products']} of {rtx['planned_products']} planned"),
        ("2:4 kernels", rtx["sparse_kernels"]),
        *[("run here", reason) for reason in why],
    ]
