"""Commands that train or search: run, show, compress, search; and pack, unpack of what they made."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from click.core import ParameterSource

from nxm_export.cli.group import main
from nxm_export.cli.options import (
    DATA_OPTIONS,
    PLAN_OPTIONS,
    RECIPES,
    TRAINING_OPTIONS,
    Positive,
    columns_of,
    json_option,
    pattern_of,
)
from nxm_export.cli.output import show_result
from nxm_export.cli.tables import print_estimate, print_facts, print_search, print_summary, print_table, progress_bars
from nxm_export.contract.plan import COUNTINGS, PLACEMENTS, WeightSpec
from nxm_export.contract.tasks import TASKS


@main.command()
@click.option("--demo", is_flag=True, help="MiniLM-L6 on rotten tomatoes, out of installed packages.")
@click.option("--model", metavar="DIR_OR_HUB_ID")
@DATA_OPTIONS
@PLAN_OPTIONS
@TRAINING_OPTIONS
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/demo with --demo]")
@click.option("--dry-run", is_flag=True, help="Say what would be done, how long it takes and how large it gets.")
@json_option
def run(demo: bool, model: str | None, out: Path | None, dry_run: bool, json: bool, **options: Any) -> None:
    """Compress, export, build, compare and time a model, into one run directory; up-to-date stages are skipped.

    Exits with 3 when an engine differs from its checkpoint.
    """
    from nxm_export.pipeline.run import run as run_all
    from nxm_export.pipeline.summary import require_passed

    given = {
        name
        for name, option in (("--model", model), ("--train", options["train"]), ("--dev", options["dev"]))
        if option
    }
    if demo and given:
        raise click.UsageError(f"--demo brings its own model and data; drop {', '.join(sorted(given))}")
    missing = sorted({"--model", "--train", "--dev"} - given) + (["--out"] if out is None else [])
    if not demo and missing:
        raise click.UsageError(f"missing {', '.join(missing)} (or use --demo)")
    with TemporaryDirectory() if demo and dry_run else nullcontext(None) as scratch:  # a dry run writes nothing
        out = out or Path("runs/demo")
        request = _demo_request(out, options, scratch) if demo else _request(str(model), options)
        if dry_run:
            from nxm_export.pipeline.estimate import estimate

            show_result(estimate(request), json, print_estimate)
            return
    with progress_bars(enabled=not json) as progress:
        summary = run_all(request, out, progress=progress)
    show_result(summary, json, print_summary)
    require_passed(summary)


@main.command()
@click.argument("run_directory", type=click.Path(path_type=Path))
@json_option
def show(run_directory: Path, json: bool) -> None:
    """Print the final table of a run again."""
    from nxm_export.pipeline.summary import read_summary

    show_result(read_summary(run_directory), json, print_summary)


@main.command()
@click.argument("model")
@DATA_OPTIONS
@PLAN_OPTIONS
@TRAINING_OPTIONS
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file; wins over --pattern to --keep-dense."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the compressed checkpoint.")
@json_option
def compress(model: str, plan_file: Path | None, out: Path, json: bool, **options: Any) -> None:
    """Compress MODEL (a directory or hub id), fine-tuning it first where it has no head for the task."""
    from nxm_export.pipeline.run import compress_model

    if not options["train"] or not options["dev"]:
        raise click.UsageError("missing --train or --dev")
    request = _request(model, options)
    with progress_bars(enabled=not json) as progress:
        metrics = compress_model(request, out, plan_file=plan_file, progress=progress)
    show_result({**metrics, "path": str(out)}, json, lambda result: print_facts("compressed", result))


@main.command()
@click.argument("model")
@click.option("--task", type=click.Choice(list(TASKS)), default="classification", show_default=True)
@click.option("--train", required=True, metavar="FILE", help="Training data; the search never reads dev data.")
@click.option("--text")
@click.option("--text-pair")
@click.option("--label")
@click.option(
    "--menu", default="2:4+W4,W4,2:4+W8,W8,dense", show_default=True, help="Options per weight, separated by commas."
)
@click.option("--compression", type=float, help="1 - compressed/FP32 of the weights.  [default: 0.875]")
@click.option("--bytes", "bytes_", type=click.IntRange(min=1), help="Budget in bytes instead of --compression.")
@click.option(
    "--count", type=click.Choice(COUNTINGS), default="hw", show_default=True, help="How the budget is counted."
)
@click.option("--method", type=click.Choice(["nxm", "paper"]), default="nxm", show_default=True)
@click.option("--placement", type=click.Choice(PLACEMENTS), default="inputs-outputs", show_default=True)
@click.option(
    "--embedding",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="How every plan stores the word-embedding table; no budget counts it.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Calibration samples.  [default: 16 to 256, for a tenth of a compression run's time]",
)
@click.option("--held-out", type=click.IntRange(min=1), help="Samples of train that judge.  [default: as many]")
@click.option("--swaps", type=click.IntRange(min=0), default=40, show_default=True)
@click.option(
    "--halving", default="", metavar="STEPS,...", help="Optimizer steps of each round of short runs.  [default: none]"
)
@click.option("--finalists", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--pareto", default="", metavar="C,...", help="Further compressions to report from the same table.")
@click.option("--latency-table", type=click.Path(path_type=Path), help="JSON: {role: {option: milliseconds}}.")
@click.option("--latency-ms", type=Positive(), help="Limit on the sum of the table's milliseconds.")
@click.option(
    "--max-length", type=click.IntRange(min=2), help="Longest input in tokens.  [default: what the model allows]"
)
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    default="obs",
    show_default=True,
    help="Of the short runs, and of the compression run that the cost is compared with; nxm is ADMM.",
)
@click.option("--epochs", type=Positive(), default=6.0, show_default=True, help="Of that compression run.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of plan.json and the evidence.")
@json_option
def search(model: str, task: str, train: str, out: Path, json: bool, **options: Any) -> None:
    """Search a different (pattern, bits) per weight of MODEL, which must have its task head, under a budget."""
    from nxm_export.pipeline.run import search_plan

    with progress_bars(enabled=not json) as progress:
        found = search_plan(model, task, train, out, options, progress)
    show_result(found, json, print_search)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The packed file.")
@json_option
def pack(checkpoint: Path, out: Path, json: bool) -> None:
    """Write CHECKPOINT as one file at its true size: packed bits, N:M indices, scales."""
    from nxm_export.contract.packed_checkpoint import pack as pack_checkpoint

    show_result(
        pack_checkpoint(checkpoint, out).to_dict(),
        json,
        lambda sizes: print_table(str(out), ("what", "bytes"), list(sizes.items())),
    )


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
def unpack(file: Path, out: Path) -> None:
    """Write a packed FILE back as the checkpoint directory it was, bit by bit."""
    from nxm_export.contract.packed_checkpoint import unpack as unpack_file

    click.echo(unpack_file(file, out))


def _spec(pattern: str, bits: str) -> WeightSpec:
    if bits != "none" and not (bits.isascii() and bits.isdecimal() and 2 <= int(bits) <= 8):
        raise click.BadParameter(
            f"{bits!r} is neither a number of bits from 2 to 8 nor 'none'", param_hint="--weight-bits"
        )
    found = WeightSpec(
        None if pattern == "none" else pattern_of(pattern),
        None if bits == "none" else int(bits),
        None if bits == "none" else 8,
    )
    if found.is_dense:
        raise click.UsageError("--pattern none and --weight-bits none leave nothing to compress")
    return found


def _request(model: str, options: dict[str, Any], **changes: Any) -> Any:
    from compressors.settings import Settings
    from nxm_export.pipeline.run import Request

    settings = {
        key: options[key]
        for key in (
            "recipe", "admm", "mask_scores", "permute", "augment", "output_limit", "epochs", "steps", "dense_epochs", "dense_steps", "learning_rate", "dense_learning_rate", "batch_size",
            "max_length", "distill", "precision", "seed", "threads", "gelu",
        )
    }  # fmt: skip
    placement = options["placement"] if options["weight_bits"] != "none" else "inputs"
    return Request(
        model=model,
        task=options["task"],
        train=changes.get("train", options["train"]),
        dev=changes.get("dev", options["dev"]),
        spec=_spec(options["pattern"], options["weight_bits"]),
        settings=Settings(
            **{**settings, "freeze_embeddings": not options["train_embeddings"], **changes.get("settings", {})}
        ),
        columns=columns_of(options["text"], options["text_pair"], options["label"]),
        placement=placement,
        residual=options["residual"] if options["weight_bits"] != "none" else "float",
        embedding=options["embedding"],
        keep_dense=options["keep_dense"],
        revision=options["revision"],
        train_limit=options["train_limit"],
    )


def _demo_request(out: Path, options: dict[str, Any], scratch: str | None) -> Any:
    """The demo's request; its data go into the run, or into `scratch`. Options that were given win over the demo's own."""
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
    settings = {**chosen, "dense_freeze_embeddings": True}
    return _request(str(model), options, train=str(data / "train.tsv"), dev=str(data / "dev.tsv"), settings=settings)
