"""Commands that write about a run for people: report, card."""

from __future__ import annotations

from pathlib import Path

import click

from nxm_export.cli.group import main
from nxm_export.cli.options import json_option
from nxm_export.cli.output import show_result

_force_option = click.option("--force", is_flag=True, help="Overwrite what is at --out.")


@main.command("report")
@click.argument("run_directory", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: RUN_DIRECTORY/report.html]")
@click.option(
    "--search", type=click.Path(path_type=Path), help="An `nxm search` to show, too.  [default: the run's own]"
)
@_force_option
@json_option
def report_page(run_directory: Path, out: Path | None, search: Path | None, force: bool, json: bool) -> None:
    """Write one HTML page of a run, finished or not: verdicts, plots, every matrix, provenance; needs no network."""
    from nxm_export.reporting import report

    _show_file(report(run_directory, out, search=search, force=force), json)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model card, as in README.md.")
@_force_option
@json_option
def card(path: Path, out: Path, force: bool, json: bool) -> None:
    """Write a Hugging Face model card of an engine directory or a run at PATH, every number from its files."""
    from nxm_export.reporting import card as write_card

    _show_file(write_card(path, out, force=force), json)


def _show_file(file: Path, json: bool) -> None:
    show_result(lambda: {"path": str(file), "bytes": file.stat().st_size}, json, lambda: click.echo(file))
