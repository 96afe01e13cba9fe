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


def print_parity(reports: Sequence[Any], skipped: Sequence[Any] = ()) -> None:
    """Tables of parity reports: outputs, probes, gates and changed classes of every engine, then the engines in pairs, and
    those that could not run here."""
    for report in reports:
        for output in report.outputs:
            steps = "" if output.max_steps is None else f", {output.max_steps:.2f} steps"
            mean_steps = "" if output.mean_steps is None else f", {output.mean_steps:.3f} steps"
            rows = [
                ("largest |difference|", f"{_error(output.max_abs)}{steps}", f"at most {output.max_tolerance:.4g}"),
                ("mean |difference|", f"{_error(output.mean_abs)}{mean_steps}", f"at most {output.mean_tolerance:.4g}"),
                ("equal samples", f"{output.unchanged_share:.1%}", f"at least {output.unchanged_required:.1%}"),
                ("cosine", "-" if output.cosine is None else f"{output.cosine:.8f}", ""),
                ("NaN or infinity", output.nonfinite, "none"),
                ("equal argmax", _share(output.agreement), ""),
                ("classes changed beyond the tolerance", output.unexcused_flips, "none"),
                *[
                    (
                        "changed class",
                        f"sample {flip.sample}: {flip.reference} to {flip.engine}",
                        f"margin {flip.margin:.4g}, {'excused' if flip.excused else 'NOT excused'}",
                    )
                    for flip in output.worst_flips
                ],
                ("worst sample", output.worst_sample, ""),
                (
                    f"{report.metric} of the engine, 95 % interval",
                    f"{_score(report.engine_value)}{_bounds(report.engine_interval)}",
                    f"checkpoint {report.reference_value:.4f}",
                ),
                *[
                    (f"{name} of the engine", _score(ours), f"checkpoint {_score(theirs)}")
                    for name, (theirs, ours) in report.secondary_metrics.items()
                ],
                ("engine - checkpoint, 95 %, paired", _difference(report), ""),
                ("verdict", "pass" if output.passed else "FAIL", ""),
            ]
            title = f"{report.engine}: {output.output} of {report.samples} samples against the checkpoint in PyTorch"
            print_table(title, ("what", "found", "required"), rows)
        verdict = {True: "pass", False: "FAIL", None: "does not apply"}
        checks = [
            (
                row.name,
                verdict[row.passed],
                "" if row.actual is None else f"{row.actual:.4g}, at most {row.tolerated:.4g}",
                row.reason,
            )
            for row in report.probes
        ]
        checks += [(f"gate {gate.gate}", verdict[gate.passed], "", gate.reason) for gate in report.gates]
        print_table(f"{report.engine}: probes and gates", ("what", "verdict", "found", "about"), checks)
        print(f"tolerance: {report.reason}")
    pairs = [
        (
            report.engine,
            pair.other,
            pair.output,
            _error(pair.max_abs),
            _error(pair.mean_abs),
            "-" if pair.cosine is None else f"{pair.cosine:.6f}",
            _share(pair.agreement),
            _difference(pair),
        )
        for number, report in enumerate(reports)
        for pair in report.pairs
        if pair.other in [later.engine for later in reports[number + 1 :]]
    ]
    if pairs:
        columns = ("engine", "and", "output", "max", "mean", "cosine", "equal argmax", "metric difference, 95 %")
        print_table("engines against each other", columns, pairs)
    if skipped:
        rows = [(engine.engine, engine.backend, engine.reason) for engine in skipped]
        print_table("skipped: not run here, so not compared", ("engine", "backend", "why"), rows)


def _share(value: float | None) -> str:
    """Of scores and embeddings there is no argmax."""
    return "-" if value is None else f"{value:.2%}"


def _error(value: float | None) -> str:
    """NaN and infinity leave no number."""
    return "not finite" if value is None else f"{value:.4g}"


def _difference(of: Any) -> str:
    """A metric's difference with its interval."""
    return "NaN" if of.difference is None else f"{of.difference:+.4f}{_bounds(of.difference_interval, '+.4f')}"


def _bounds(interval: tuple[float, float] | None, form: str = ".4f") -> str:
    """A single sample has no interval."""
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def _score(value: float | None) -> str:
    """JSON's null is what a file holds for NaN."""
    return "NaN" if value is None else f"{value:.4f}"


def print_bisects(reports: Sequence[Any]) -> None:
    """The table of every bisect report, and what it says about the cut."""
    for report in reports:
        _print_bisect(report)


def _print_bisect(report: Any) -> None:
    def steps(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        (
            row.block,
            _error(row.accumulated_max_abs),
            steps(row.accumulated_steps),
            _error(row.isolated_max_abs),
            steps(row.isolated_steps),
            f"{row.isolated_unchanged_share:.1%}",
            {True: "pass", False: "PARTS", None: "not judged"}[row.passed],
            "" if row.passed else row.reason,
        )
        for row in report.blocks
    ]
    columns = ("behind", "accumulated max", "steps", "isolated max", "steps", "tokens equal", "verdict", "why")
    print_table(f"{report.engine}: {report.tokens} tokens against the checkpoint, block by block", columns, rows)
    print(f"tolerance: {report.reason}")
    print(f"first block that parts: {report.first_diverging or 'none'}")
    if report.kernels is None:
        print("whether the cut changed kernels is not known for this backend")
    else:
        changed = ", ".join(f"{name} {before} to {after}" for name, (before, after) in report.kernels.items())
        print(f"kernels changed by the cut: {changed or 'none'}")
    print(f"outputs of the cut engine equal the engine's bit for bit: {'yes' if report.outputs_equal else 'NO'}")


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
    """What a run would do, from `nxm_export.pipeline.estimate.estimate`."""
    rows = [
        ("training samples", str(estimate["train_samples"])),
        ("held-out samples", str(estimate["dev_samples"])),
        ("plan", _counts(estimate["plan"], estimate["embedding"])),
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


def _counts(plan: Mapping[str, int], embedding: str | None = None) -> str:
    counts = [f"{count} x {name}" for name, count in plan.items()]
    return ", ".join([*counts, *(["INT8 embedding table"] if embedding == "int8" else [])])


def print_search(found: Mapping[str, Any]) -> None:
    """The finalists of a search, its Pareto front and its cost."""
    countings = ("hw", "packed", "values")
    timed = ("ms",) if "milliseconds" in found["best"] else ()
    tied = [{**row, "origin": f"{tie}: {row['origin']}"} for tie, row in found["tied"].items()]
    for title, rows in (("finalists", found["finalists"]), ("tied", tied), ("at other compressions", found["pareto"])):
        if rows:
            print_table(
                title,
                ("plan", "divergence one-shot", *countings, *timed, "options"),
                [
                    (
                        row["origin"],
                        row["joint"],
                        *(f"{row[counting]:.2%}" for counting in countings),
                        *(f"{row['milliseconds']:.4g}" for _ in timed),
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
    known = low is not None and high is not None  # not for a single sample, nor with NaN in the outputs
    metric = summary["metric"]
    alike = summary.get("cosine_to_dense")  # of embedding models
    print_table(
        f"{metric} on {summary['dev_samples']} held-out samples",
        ("model", metric, "note"),
        [
            ("dense, FP32", _score(summary["dense"]), ""),
            ("compressed, PyTorch", _score(summary["checkpoint"]), _counts(summary["plan"], summary.get("embedding"))),
            (
                "compressed, ONNX Runtime",
                _score(summary["compressed"]),
                f"difference to dense: {low:+.4f} to {high:+.4f} (95 %)" if known else "no interval",
            ),
            *(
                [("its cosine to the dense embeddings", f"{alike['mean']:.4f}", f"the least {alike['least']:.4f}")]
                if alike
                else []
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
                _share(report["agreement"]),
                "NaN" if report["max_abs"] is None else f"{report['max_abs']:.2g}",
                _score(report["value"]),
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
