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

from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from nxm_export.cli import first_lines
from nxm_export.cli.config_file import CONFIG_FILE, config_text, load_config
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    DATA_OPTIONS,
    FORCE_OPTION,
    LABELLED_COLUMN_OPTIONS,
    PLAN_FILE_OPTION,
    PLAN_OPTIONS,
    SEARCH_OPTIONS,
    SEARCH_TRAINING_OPTIONS,
    TASK_OPTION,
    TRAIN_LIMIT_OPTION,
    TRAINING_OPTIONS,
    Backends,
    Real,
    all_option,
    columns_of,
    given_options,
    json_option,
    more_text_of,
    pattern_of,
    settings_of,
    typed,
)
from nxm_export.cli.output import print_next, quoted, show_result
from nxm_export.cli.progress_bars import progress_bars
from nxm_export.cli.run_tables import print_compression, print_estimate, print_search, print_summary
from nxm_export.cli.tables import print_table
from nxm_export.contract.choices import AUTO_BACKEND, BACKEND, BACKEND_NAMES, WEIGHT_STORAGE, WEIGHT_STORAGES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.latency_table import read_latencies

if TYPE_CHECKING:
    from nxm_export.pipeline.plan_choice import PlanChoice
    from nxm_export.pipeline.request import Request

_OF_PLANS = ("pattern", "weight_bits", "placement", "residual", "embedding", "keep_dense")  # `PLAN_OPTIONS`


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
    more_text: tuple[str, ...]
    more_text_share: float | None
    revision: str | None


@dataclass(frozen=True)
class _RunOptions:
    """What else ``nxm run`` is told: `model` and `out` are None where ``--demo`` has its own."""

    model: str | None
    plan_file: Path | None
    search: float | None
    weights_stored: str
    backend: str | None
    out: Path | None

    def plan_choice(self, request: Request) -> PlanChoice:
        """Which plan the run is told to use."""
        from nxm_export.pipeline.plan_choice import PlanChoice, search_for

        if self.search is None:
            return PlanChoice(file=self.plan_file)
        return PlanChoice(search=search_for(request, self.search))


@dataclass(frozen=True)
class _SearchOptions:
    """The options of ``nxm search`` that are no settings as they are."""

    bytes: int | None
    latency_table: Path | None
    train_limit: int | None
    text: str | None
    text_pair: str | None
    label: str | None
    label_map: str | None
    everything: bool


@command(
    "nxm run my-model --train train.tsv --dev dev.tsv --out runs/mine",
    "nxm run --demo --dry-run",
    common=(
        *("demo", "config", "train", "dev", "out", "task", "pattern", "weight_bits", "plan_file", "search"),
        *("recipe", "epochs", "steps", "backend", "dry_run"),
    ),
)
@click.argument("model", required=False)
@click.option("--demo", is_flag=True, help="MiniLM-L6 on rotten tomatoes, out of packages.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=load_config,
    help="Options from this file, which `nxm init` writes.",
)
@DATA_OPTIONS
@PLAN_OPTIONS
@PLAN_FILE_OPTION
@click.option(
    "--search",
    type=Real(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Search a plan that saves this share: 0.875.",
)
@TRAINING_OPTIONS
@click.option(
    "--weights-stored",
    type=click.Choice(WEIGHT_STORAGES),
    default=WEIGHT_STORAGE,
    show_default=True,
    help="int4: graphs that can store weights of 4 bits or fewer in half a byte each do; see `nxm export`.",
)
@click.option(
    "--backend",
    type=Backends(),
    metavar="NAME,...",
    help=f"{AUTO_BACKEND}, or of {', '.join(BACKEND_NAMES)}: keeps the fastest that passes.  "
    f"[default: keeps {BACKEND}]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/demo with --demo]")
@click.option("--dry-run", is_flag=True, help="Say what would be done, in what time and size.")
@json_option
def run(demo: bool, dry_run: bool, json: bool, **values: object) -> None:
    """Do everything: compress, export, build, compare and time.

    MODEL is a directory or hub id. Stages that are up to date are skipped. Exits with 3 when an engine differs from its
    checkpoint.
    """
    from nxm_export.pipeline.run import run as run_all

    options = typed(_RunOptions, values)
    data = typed(_PlanAndData, values)
    _require_run_usage(demo, options, data)
    with TemporaryDirectory() if demo and dry_run else nullcontext(None) as scratch:  # a dry run writes nothing
        out = options.out or Path("runs/demo")
        if demo:
            request = _demo_request(out, data, values, scratch)
        else:
            request = _request(str(options.model), data, settings_of(Settings, values))
        chosen = options.plan_choice(request)
        backends = tuple(options.backend.split(",")) if options.backend else ()
        request = replace(request, weights_stored=options.weights_stored, planned=chosen.given, backends=backends)
        if dry_run:
            from nxm_export.pipeline.estimate import estimate
            from nxm_export.storage.run_dir import require_run_directory

            require_run_directory(out)
            result = estimate(request, chosen)
            show_result(result.to_dict, json, lambda: print_estimate(result))
            if not json:
                print_next("the same command without --dry-run")
            return
    with progress_bars(enabled=not json) as progress:
        summary = run_all(request, out, chosen, progress=progress)
    show_result(summary.to_dict, json, lambda: print_summary(summary))
    summary.require_passed()


@command("nxm init my-model", "nxm init my-model --out film.toml")
@click.argument("model", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), default=CONFIG_FILE, show_default=True, help="The file to write."
)
@FORCE_OPTION
@json_option
def init(model: str | None, out: Path, force: bool, json: bool) -> None:
    """Write nxm.toml: every option of `nxm run`, with its default.

    MODEL is a directory or hub id. `nxm run --config nxm.toml` reads the file.
    """
    from nxm_export.storage.atomic import require_new, write_atomic

    require_new(out, force=force)
    given = {"model": model or "my-model", "train": "train.tsv", "dev": "dev.tsv", "out": "runs/mine"}
    write_atomic(out, config_text(run, given))

    def show() -> None:
        click.echo(out)
        print_next(f"nxm run --config {quoted(out)} --dry-run", "after you have named your model and data in it")

    show_result(lambda: {"path": str(out)}, json, show)


@command("nxm show runs/mine", "nxm show runs/mine --json > summary.json")
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@all_option
@json_option
def show(run_directory: Path, everything: bool, json: bool) -> None:
    """Print the final tables of a run again."""
    from nxm_export.pipeline.later_comparisons import summary_now

    summary = summary_now(run_directory)
    show_result(summary.to_dict, json, lambda: print_summary(summary, everything))


@command(
    "nxm compress my-model --train train.tsv --dev dev.tsv --out checkpoint",
    "nxm compress film --train train.tsv --dev dev.tsv --plan plan.json --out mixed",
    common=("train", "dev", "out", "task", "pattern", "weight_bits", "plan_file", "recipe", "epochs", "steps", "seed"),
)
@click.argument("model")
@DATA_OPTIONS
@PLAN_OPTIONS
@TRAINING_OPTIONS
@PLAN_FILE_OPTION
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the compressed checkpoint.")
@json_option
def compress(model: str, plan_file: Path | None, out: Path, json: bool, **values: object) -> None:
    """Compress a model, fine-tuning it first where that is needed.

    MODEL is a directory or hub id. It is fine-tuned where it has no head for the task. With --steps 0, --train needs no
    labels, and without --dev nothing is scored.
    """
    from nxm_export.pipeline.plan_choice import require_plan_alone
    from nxm_export.pipeline.run import compress_model

    options = typed(_PlanAndData, values)
    settings = settings_of(Settings, values)
    if not options.train or (settings.trains and not options.dev):
        raise click.UsageError("missing --train or --dev; only --steps 0 and --recipe one-shot do without --dev")
    require_plan_alone(plan_file, given_options(_OF_PLANS))
    request = _request(model, options, settings)
    head = _head_of(request)
    with progress_bars(enabled=not json) as progress:
        metrics = compress_model(request, out, plan=plan_file, progress=progress)
    facts = {**metrics.to_dict(), "head": head, "path": str(out)}

    def show() -> None:
        click.echo(first_lines.of_compression(metrics))
        print_compression(str(out), metrics, head)
        print_next(f"nxm export {quoted(out)} --target cpu --out graph")

    show_result(lambda: facts, json, show)


@command(
    "nxm search my-model --train train.tsv --compression 0.875 --out searched",
    "nxm search my-model --train train.tsv --candidates 2:4+W8,W8,dense --out found",
    common=(
        "train",
        "out",
        "task",
        "compression",
        "bytes",
        "counting",
        "candidate_specs",
        "recipe",
        "epochs",
        "steps",
        "seed",
    ),
)
@click.argument("model")
@TASK_OPTION
@click.option("--train", required=True, metavar="FILE", help="Training data; the search never reads dev data.")
@LABELLED_COLUMN_OPTIONS
@TRAIN_LIMIT_OPTION
@SEARCH_OPTIONS
@click.option(
    "--latency-table",
    type=click.Path(path_type=Path),
    help="What `nxm latency` writes, or JSON: {role: {option: milliseconds}}.",
)
@SEARCH_TRAINING_OPTIONS
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of plan.json and the evidence.")
@all_option
@json_option
def search(model: str, task: str, train: str, out: Path, json: bool, **values: object) -> None:
    """Find a pattern and a width for every matrix, under a budget.

    MODEL is a directory or hub id, with a head for its task. The result is a plan for `nxm compress --plan`.
    """
    from compressors.search.plan_search import search as search_plan

    options = typed(_SearchOptions, values)
    changes: dict[str, object] = {}
    if options.latency_table is not None:
        table = read_latencies(options.latency_table)
        changes = {"latencies": table.milliseconds, "latency_source": table.source}
    training = settings_of(Settings, values)
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
            training=training,
            columns=columns_of(options.text, options.text_pair, options.label, options.label_map),
            train_limit=options.train_limit,
            progress=progress,
        )

    def show() -> None:
        click.echo(first_lines.of_search(result))
        print_search(result, out, everything=options.everything)
        asked = "" if training.recipe == Settings.recipe else f" --recipe {training.recipe}"
        asked += "" if training.steps is None else f" --steps {training.steps}"
        plan = quoted(out / "plan.json")
        print_next(f"nxm run {quoted(model)} --plan {plan} --train {quoted(train)} --dev DEV --out RUN{asked}")

    show_result(result.to_dict, json, show)


@command("nxm pack checkpoint --out checkpoint.safetensors", "nxm pack mixed --out mixed.safetensors --json")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The packed file.")
@json_option
def pack(checkpoint: Path, out: Path, json: bool) -> None:
    """Write a checkpoint as one file at its true size.

    The file holds packed bits, N:M indices and scales of CHECKPOINT, and what is beside them.
    """
    from nxm_export.contract.packed_checkpoint import pack as pack_checkpoint

    sizes = pack_checkpoint(checkpoint, out)

    def show() -> None:
        click.echo(first_lines.of_packing(sizes, checkpoint))
        print_table(str(out), ("what", "bytes"), list(sizes.to_dict().items()))
        print_next(f"nxm unpack {quoted(out)} --out DIR", "the checkpoint again, bit by bit")

    show_result(sizes.to_dict, json, show)


@command("nxm unpack checkpoint.safetensors --out checkpoint", "nxm unpack mixed.safetensors --out mixed --json")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
@json_option
def unpack(file: Path, out: Path, json: bool) -> None:
    """Write a packed file back as the checkpoint that it was.

    The checkpoint of FILE is the same bit by bit.
    """
    from nxm_export.contract.packed_checkpoint import unpack as unpack_file

    written = unpack_file(file, out)

    def show() -> None:
        click.echo(f"Unpacked, bit by bit the checkpoint that was packed: {written}")
        print_next(f"nxm export {quoted(written)} --out DIR", "its ONNX graph")

    show_result(lambda: {"path": str(written)}, json, show)


def _head_of(request: Request) -> str:
    """The head in ``--json``: ``kept``, or ``new`` where one is trained first."""
    from nxm_export.pipeline.run import head_notice

    return "kept" if head_notice(request) is None else "new"


def _spec(pattern: str, bits: str) -> WeightSpec:
    spec = WeightSpec(
        None if pattern == "none" else pattern_of(pattern),
        None if bits == "none" else int(bits),
        None if bits == "none" else 8,
    )
    if spec.is_dense:
        raise click.UsageError("--pattern none and --weight-bits none leave nothing to compress")
    return spec


def _require_run_usage(demo: bool, options: _RunOptions, data: _PlanAndData) -> None:
    """Raise wrong usage where ``nxm run`` lacks what it needs, or is told two things that are one."""
    from nxm_export.pipeline.plan_choice import require_plan_alone

    named = {"MODEL": options.model, "--train": data.train, "--dev": data.dev}
    given = [name for name, value in named.items() if value]
    if demo and given:
        raise click.UsageError(f"--demo brings its own model and data; drop {', '.join(given)}")
    missing = [name for name in named if name not in given] + (["--out"] if options.out is None else [])
    if not demo and missing:
        raise click.UsageError(f"missing {', '.join(missing)} (or use --demo, or --config)")
    if options.plan_file is not None and options.search is not None:
        raise click.UsageError("--plan and --search both say what every weight gets; give one of them")
    require_plan_alone(options.plan_file, given_options(_OF_PLANS))
    if options.search is not None:  # which takes the places and the table as they are asked for
        require_plan_alone(options.search, given_options(("pattern", "weight_bits", "residual", "keep_dense")))


def _request(model: str, options: _PlanAndData, settings: Settings) -> Request:
    """What ``nxm run`` and ``nxm compress`` were asked; both have made sure of train data."""
    from nxm_export.pipeline.request import Request

    assert options.train
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
        more_text=more_text_of(options.more_text, options.more_text_share),
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
        if all(context.get_parameter_source(option) is ParameterSource.DEFAULT for option in same.get(name, (name,)))
    }
    settings = settings_of(Settings, values, **chosen, dense_freeze_embeddings=True)
    options = replace(options, train=str(data / "train.tsv"), dev=str(data / "dev.tsv"))
    return _request(str(model), options, settings)
