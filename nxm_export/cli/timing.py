"""The commands that time engines, and load servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from compressors.search.settings import DEFAULT_CANDIDATES
from nxm_export.cli.engine_tables import (
    print_latency,
    print_latency_table,
    print_load,
    print_text_throughput,
)
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    FORCE_OPTION,
    Real,
    Whole,
    given_options,
    json_option,
    numbers_of,
    shape_of,
    typed,
)
from nxm_export.cli.output import print_next, quoted, serving_of, show_result
from nxm_export.contract.choices import (
    BENCH_ROUNDS,
    BENCH_SHAPES,
    LOAD_ROUNDS,
    TASK,
    TEXT_BATCH,
    TEXT_ROUNDS,
    TOKEN_ENCODING,
    TOKEN_ENCODINGS,
)
from nxm_export.contract.tasks import TASKS


@dataclass(frozen=True)
class _BenchOptions:
    """The options of ``nxm bench`` beside the engines."""

    shapes: tuple[str, ...]
    rounds: int | None
    threads: int | None
    urls: tuple[str, ...]
    name: str | None
    data: str | None
    task: str
    batch: int | None
    clients: str
    seconds: float
    encoding: str


@command(
    "nxm bench engines/fp32 engines/int8 --shape 1x32 --shape 8x64",
    "nxm bench --serve http://127.0.0.1:8000 --name engine_text --data dev.tsv",
)
@click.argument("engines", metavar="[ENGINE]...", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="BATCHxLENGTH",
    help="May be repeated.  "
    f"[default: {', '.join(f'{batch}x{sequence}' for batch, sequence in BENCH_SHAPES)}, or what ENGINEs have fixed]",
)
@click.option(
    "--rounds",
    type=Whole(min=1),
    help=f"[default: {BENCH_ROUNDS}; {TEXT_ROUNDS} with --data, {LOAD_ROUNDS} with --serve]",
)
@click.option("--threads", type=Whole(min=1), help="CPU threads.  [default: as built]")
@click.option("--serve", "urls", multiple=True, metavar="URL", help="Load running servers instead; may be repeated.")
@click.option("--name", help="With --serve: the model's name there.")
@click.option(
    "--data",
    metavar="FILE",
    help="Time ENGINEs over this text, tokenisation included, loaded for latency and for throughput. With --serve: "
    "samples to send, as tokens of ENGINE's tokenizer, else as text.",
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    metavar="TASK",
    default=TASK,
    show_default=True,
    help="With --serve and no ENGINE: what the data is for.",
)
@click.option("--batch", type=Whole(min=1), help=f"With --data: sentences a batch.  [default: {TEXT_BATCH}]")
@click.option(
    "--clients", default="1,8,32", show_default=True, metavar="N,N,...", help="With --serve: clients at once."
)
@click.option("--seconds", type=Real(min=0.1), default=5.0, show_default=True, help="With --serve: length of a round.")
@click.option(
    "--encoding",
    type=click.Choice(TOKEN_ENCODINGS),
    default=TOKEN_ENCODING,
    show_default=True,
    help="With --serve: how tokens are sent.",
)
@json_option
def bench(engines: tuple[Path, ...], json: bool, **values: object) -> None:
    """Time engines against each other, or load running servers.

    ENGINEs are timed in turns; speeds are against the first. With --serve running servers are loaded instead.
    """
    from nxm_export.pipeline.engine_timing import bench_engines, bench_text
    from nxm_export.pipeline.sparsity_twins import is_twins

    options = typed(_BenchOptions, values)
    _require_bench_usage(options, with_engine=bool(engines))
    if options.urls:
        _bench_servers(engines, options, json)
        return
    if not engines:
        raise click.UsageError("missing ENGINE (or --serve URL)")
    if options.data:
        text = bench_text(engines, options.data, batch=options.batch, rounds=options.rounds, threads=options.threads)
        show_result(text.to_dict, json, lambda: print_text_throughput(text))
        if not json:
            print_next(*serving_of(engines))
        return
    shapes = [shape_of(text) for text in options.shapes] or None
    report = bench_engines(engines, shapes, options.rounds or BENCH_ROUNDS, options.threads)
    show_result(report.to_dict, json, lambda: print_latency(report))
    if not json and is_twins(engines[0]):
        print_next(f"nxm inspect {quoted(engines[0])} --measure", "which matrices run sparse")
    elif not json:
        print_next(*serving_of(engines))


def _require_bench_usage(options: _BenchOptions, *, with_engine: bool) -> None:
    """Raise wrong usage for options that this kind of timing does not read."""
    if options.urls:
        told = dict.fromkeys(("shapes", "threads", "batch"), "is for ENGINEs that are timed here, not for --serve")
        told["task" if with_engine else "encoding"] = (
            "is that of ENGINE; leave it out"
            if with_engine
            else "is for tokens, which need an ENGINE for its tokenizer"
        )
    else:
        told = dict.fromkeys(("name", "task", "clients", "seconds", "encoding"), "is for --serve")
        told |= {"shapes": "is not for --data: texts have lengths of their own"} if options.data else {}
        told |= {} if options.data else {"batch": "is for --data"}
    for name, why in told.items():
        if given := given_options((name,)):
            raise click.UsageError(f"{given[0]} {why}")


def _bench_servers(engines: tuple[Path, ...], options: _BenchOptions, json: bool) -> None:
    from nxm_export.pipeline.engine_timing import LoadRequests, LoadRounds, load_servers

    name, data, rounds = options.name, options.data, options.rounds or LOAD_ROUNDS
    if not name or not data or len(engines) > 1:
        raise click.UsageError("--serve needs --name and --data, and at most one engine directory (for its tokenizer)")
    clients = numbers_of(options.clients, "--clients", "numbers of clients")
    requests = LoadRequests(data, engines[0] if engines else None, options.encoding, options.task)
    report = load_servers(options.urls, name, requests, LoadRounds(clients, options.seconds, rounds))
    show_result(report.to_dict, json, lambda: print_load(report, name, rounds))
    if not json:
        print_next(f"curl {options.urls[0].rstrip('/')}/metrics", "what the server counted")


@command(
    "nxm latency fp32 int8 --shape 1x32 --out latency.json",
    "nxm latency engine --shape 32x128 --candidates 2:4+W8,W8 --out ms.json",
)
@click.argument("engines", metavar="ENGINE...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--shape", required=True, metavar="BATCHxLENGTH", help="The shape that a limit is for, such as 1x32.")
@click.option(
    "--candidates",
    default=",".join(DEFAULT_CANDIDATES),
    show_default=True,
    help="Options of `nxm search`; those that ENGINEs have no time of are left out.",
)
@click.option("--rounds", type=Whole(min=1), help="Runs of each engine on a CPU.  [default: 20]")
@click.option("--threads", type=Whole(min=1), help="CPU threads.  [default: as built]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
@FORCE_OPTION
@json_option
def latency(
    engines: tuple[Path, ...],
    shape: str,
    candidates: str,
    rounds: int | None,
    threads: int | None,
    out: Path,
    force: bool,
    json: bool,
) -> None:
    """Write what matrices take in engines, for `nxm search`.

    ENGINEs are of one model: of ort, which are profiled now, such as an FP32 and an INT8 one; or of cusparselt, whose
    products were timed when they were built.
    """
    from nxm_export.pipeline.latency_table import latency_table
    from nxm_export.storage.atomic import require_new, write_atomic

    require_new(out, force=force)
    table = latency_table(engines, shape_of(shape), candidates.split(","), rounds, threads)
    write_atomic(out, table.to_text())

    def show() -> None:
        print_latency_table(table, str(out))
        rows = list(table.milliseconds.values())
        timed = [option for option in rows[0] if all(option in row for row in rows)]
        print_next(
            f"nxm search MODEL --train TRAIN --latency-table {quoted(out)} --latency-ms MS "
            f"--candidates {','.join(timed)} --out DIR"
        )

    show_result(table.to_dict, json, show)
