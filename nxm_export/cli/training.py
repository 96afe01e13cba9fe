"""Commands that train or search: run, show, compress, search; and pack, unpack of what they made."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from compressors.search.settings import SearchSettings, read_latencies
from compressors.settings import Settings
from nxm_export.cli.group import main
from nxm_export.cli.options import (
    DATA_OPTIONS,
    LABEL_MAP_OPTION,
    PLAN_OPTIONS,
    SEARCH_OPTIONS,
    SEARCH_TRAINING_OPTIONS,
    TRAINING_OPTIONS,
    columns_of,
    json_option,
    pattern_of,
    settings_of,
    typed,
)
from nxm_export.cli.output import show_result
from nxm_export.cli.progress_bars import progress_bars
from nxm_export.cli.run_tables import print_estimate, print_search, print_summary
from nxm_export.cli.tables import print_facts, print_table
from nxm_export.contract.choices import TASK, WEIGHT_STORAGE, WEIGHT_STORAGES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS

if TYPE_CHECKING:
    from nxm_export.pipeline.run import Request


@dataclass(frozen=True)
class _PlanAndData:
    """The options of ``nxm run`` and ``nxm compress`` that say what is compressed: `PLAN_OPTIONS`, `DATA_OPTIONS`."""

    pattern: str
    weight_bits: str
    placement: str
    residual: str
    embedding: str
    keep_dense: tuple[str, ...]
    task: str
    train: str | None
    dev: str | None
    text: str | None
    text_pair: str | None
    label: str | None
    label_map: str | None
    train_limit: int | None
    revision: str | None


@dataclass(frozen=True)
class _SearchOptions:
    """The options of ``nxm search`` that are no settings as they are."""

    bytes: int | None
    latency_table: Path | None
    text: str | None
    text_pair: str | None
    label: str | None
    label_map: str | None


@main.command()
@click.option("--demo", is_flag=True, help="MiniLM-L6 on rotten tomatoes, out of installed packages.")
@click.option("--model", metavar="DIR_OR_HUB_ID")
@DATA_OPTIONS
@PLAN_OPTIONS
@TRAINING_OPTIONS
@click.option(
    "--weights-stored",
    type=click.Choice(WEIGHT_STORAGES),
    default=WEIGHT_STORAGE,
    show_default=True,
    help="int4: graphs that can store weights of 4 bits or fewer in half a byte each do; see `nxm export`.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/demo with --demo]")
@click.option("--dry-run", is_flag=True, help="Say what would be done, how long it takes and how large it gets.")
@json_option
def run(  # one parameter an option that is read here
    demo: bool, model: str | None, weights_stored: str, out: Path | None, dry_run: bool, json: bool, **values: object
) -> None:
    """Compress, export, build, compare and time a model, into one run directory; up-to-date stages are skipped.

    Exits with 3 when an engine differs from its checkpoint.
    """
    from nxm_export.pipeline.run import run as run_all

    options = typed(_PlanAndData, values)
    given = {
        name for name, option in (("--model", model), ("--train", options.train), ("--dev", options.dev)) if option
    }
    if demo and given:
        raise click.UsageError(f"--demo brings its own model and data; drop {', '.join(sorted(given))}")
    missing = sorted({"--model", "--train", "--dev"} - given) + (["--out"] if out is None else [])
    if not demo and missing:
        raise click.UsageError(f"missing {', '.join(missing)} (or use --demo)")
    with TemporaryDirectory() if demo and dry_run else nullcontext(None) as scratch:  # a dry run writes nothing
        out = out or Path("runs/demo")
        if demo:
            request = _demo_request(out, options, values, scratch)
        else:
            request = _request(str(model), options, settings_of(Settings, values))
        request = replace(request, weights_stored=weights_stored)
        if dry_run:
            from nxm_export.pipeline.estimate import estimate

            result = estimate(request)
            show_result(result.to_dict, json, lambda: print_estimate(result))
            return
    with progress_bars(enabled=not json) as progress:
        summary = run_all(request, out, progress=progress)
    show_result(summary.to_dict, json, lambda: print_summary(summary))
    summary.require_passed()


@main.command()
@click.argument("run_directory", type=click.Path(path_type=Path))
@json_option
def show(run_directory: Path, json: bool) -> None:
    """Print the final table of a run again."""
    from nxm_export.contract.records.run_summary import read_summary

    summary = read_summary(run_directory)
    show_result(summary.to_dict, json, lambda: print_summary(summary))


@main.command()
@click.argument("model")
@DATA_OPTIONS
@PLAN_OPTIONS
@TRAINING_OPTIONS
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="A plan file: it says what --pattern to --keep-dense say, and stands in their place.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the compressed checkpoint.")
@json_option
def compress(model: str, plan_file: Path | None, out: Path, json: bool, **values: object) -> None:
    """Compress MODEL (a directory or hub id), fine-tuning it first where it has no head for the task."""
    from nxm_export.pipeline.run import compress_model, require_plan_alone

    options = typed(_PlanAndData, values)
    if not options.train or not options.dev:
        raise click.UsageError("missing --train or --dev")
    require_plan_alone(plan_file, _given_plan_options())
    request = _request(model, options, settings_of(Settings, values))
    head = _head_of(request)
    with progress_bars(enabled=not json) as progress:
        metrics = compress_model(request, out, plan=plan_file, progress=progress)
    facts = {**metrics.to_dict(), "head": head, "path": str(out)}
    show_result(lambda: facts, json, lambda: print_facts("compressed", facts))


@main.command()
@click.argument("model")
@click.option("--task", type=click.Choice(list(TASKS)), default=TASK, show_default=True)
@click.option("--train", required=True, metavar="FILE", help="Training data; the search never reads dev data.")
@click.option("--text")
@click.option("--text-pair")
@click.option("--label")
@LABEL_MAP_OPTION
@SEARCH_OPTIONS
@click.option("--latency-table", type=click.Path(path_type=Path), help="JSON: {role: {option: milliseconds}}.")
@SEARCH_TRAINING_OPTIONS
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of plan.json and the evidence.")
@json_option
def search(model: str, task: str, train: str, out: Path, json: bool, **values: object) -> None:
    """Search a different (pattern, bits) per weight of MODEL, which must have its task head, under a budget."""
    from compressors.search.plan_search import search as search_plan

    options = typed(_SearchOptions, values)
    table = options.latency_table
    changes: dict[str, object] = {} if table is None else {"latencies": read_latencies(table)}
    of_compression = click.get_current_context().get_parameter_source("compression")
    if options.bytes is not None and of_compression is ParameterSource.DEFAULT:
        changes["compression"] = None  # either of them is the budget
    with progress_bars(enabled=not json) as progress:
        result = search_plan(
            model,
            task=task,
            train=train,
            out=out,
            settings=settings_of(SearchSettings, values, **changes),
            training=settings_of(Settings, values),
            columns=columns_of(options.text, options.text_pair, options.label, options.label_map),
            progress=progress,
        )
    show_result(result.to_dict, json, lambda: print_search(result))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The packed file.")
@json_option
def pack(checkpoint: Path, out: Path, json: bool) -> None:
    """Write CHECKPOINT as one file at its true size: packed bits, N:M indices, scales."""
    from nxm_export.contract.packed_checkpoint import pack as pack_checkpoint

    sizes = pack_checkpoint(checkpoint, out).to_dict()
    show_result(lambda: sizes, json, lambda: print_table(str(out), ("what", "bytes"), list(sizes.items())))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
def unpack(file: Path, out: Path) -> None:
    """Write a packed FILE back as the checkpoint directory it was, bit by bit."""
    from nxm_export.contract.packed_checkpoint import unpack as unpack_file

    click.echo(unpack_file(file, out))


def _head_of(request: Request) -> str:
    """What ``--json`` says of the head: ``kept``, or ``new`` where one is trained first."""
    from nxm_export.pipeline.run import head_notice

    return "kept" if head_notice(request) is None else "new"


def _spec(pattern: str, bits: str) -> WeightSpec:
    if bits != "none" and not (bits.isascii() and bits.isdecimal() and 2 <= int(bits) <= 8):
        raise click.BadParameter(
            f"{bits!r} is neither a number of bits from 2 to 8 nor 'none'", param_hint="--weight-bits"
        )
    spec = WeightSpec(
        None if pattern == "none" else pattern_of(pattern),
        None if bits == "none" else int(bits),
        None if bits == "none" else 8,
    )
    if spec.is_dense:
        raise click.UsageError("--pattern none and --weight-bits none leave nothing to compress")
    return spec


def _given_plan_options() -> list[str]:
    """Those of `PLAN_OPTIONS` that the command line gives, as it writes them."""
    context = click.get_current_context()
    names = ("pattern", "weight_bits", "placement", "residual", "embedding", "keep_dense")
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    ]


def _request(model: str, options: _PlanAndData, settings: Settings) -> Request:
    """What ``nxm run`` and ``nxm compress`` were asked; both have made sure of train and dev data."""
    from nxm_export.pipeline.run import Request

    assert options.train
    assert options.dev
    of_placement = click.get_current_context().get_parameter_source("placement")
    return Request(
        model=model,
        task=options.task,
        train=options.train,
        dev=options.dev,
        spec=_spec(options.pattern, options.weight_bits),
        settings=settings,
        columns=columns_of(options.text, options.text_pair, options.label, options.label_map),
        placement=None if of_placement is ParameterSource.DEFAULT else options.placement,
        residual=options.residual,
        embedding=options.embedding,
        keep_dense=options.keep_dense,
        revision=options.revision,
        train_limit=options.train_limit,
    )


def _demo_request(out: Path, options: _PlanAndData, values: Mapping[str, object], scratch: str | None) -> Request:
    """The demo's request; its data go into the run, or into `scratch`. Options on the command line win."""
    from nxm_export.pipeline import demo
    from nxm_export.storage.run_dir import RunDir

    model, data = demo.model_directory(), Path(scratch or out / "data")
    if scratch:
        demo.write_data(data)
    else:
        RunDir(out).stage("data", "data", demo.write_data)
    context = click.get_current_context()
    same = {"steps": ("steps", "epochs"), "dense_steps": ("dense_steps", "dense_epochs")}
    chosen = {
        name: value
        for name, value in demo.SETTINGS.items()
        if all(
            context.get_parameter_source(option) is not ParameterSource.COMMANDLINE
            for option in same.get(name, (name,))
        )
    }
    settings = settings_of(Settings, values, **chosen, dense_freeze_embeddings=True)
    options = replace(options, train=str(data / "train.tsv"), dev=str(data / "dev.tsv"))
    return _request(str(model), options, settings)
