"""Commands that write about a run for people: report, card."""

from __future__ import annotations

from pathlib import Path

import click

from nxm_export.cli.group import command
from nxm_export.cli.options import FORCE_OPTION, json_option
from nxm_export.cli.output import print_next, quoted, show_result


@command("nxm report runs/mine", "nxm report runs/mine --searched found --out page.html", name="report")
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html]")
@click.option(
    "--searched",
    "search",
    type=click.Path(path_type=Path),
    help="An `nxm search` to show, too.  [default: the run's own]",
)
@FORCE_OPTION
@json_option
def report_page(run_directory: Path, out: Path | None, search: Path | None, force: bool, json: bool) -> None:
    """Write one HTML page of a run, finished or not.

    It shows verdicts, plots, every matrix and where it all comes from, and needs no network.
    """
    from nxm_export.reporting import report

    written = report(run_directory, out, search=search, force=force)
    _show_file(written, json, f"nxm card {quoted(run_directory)} --out CARD.md")


@command("nxm card runs/mine --out CARD.md", "nxm card checkpoint --base-model ORG/NAME --license mit --out README.md")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model card, as in README.md.")
@click.option("--base-model", metavar="ID", help="Hub id of the model that was compressed, for the card's head.")
@click.option("--license", metavar="ID", help="Licence of the result as the hub writes it: apache-2.0.")
@FORCE_OPTION
@json_option
def card(path: Path, out: Path, base_model: str | None, license: str | None, force: bool, json: bool) -> None:
    """Write a Hugging Face model card, every number from the files.

    PATH is a run, a checkpoint or an engine directory.
    """
    from nxm_export.reporting import card as write_card

    written = write_card(path, out, force=force, base_model=base_model, license=license)
    _show_file(written, json, f"hf upload USER/NAME {quoted(written)} README.md")


def _show_file(file: Path, json: bool, following: str) -> None:
    def show() -> None:
        click.echo(file)
        print_next(following)

    show_result(lambda: {"path": str(file), "bytes": file.stat().st_size}, json, show)
