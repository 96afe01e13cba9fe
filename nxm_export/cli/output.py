"""The result of a command on stdout: JSON for machines, tables for people."""

from __future__ import annotations

import os
from collections.abc import Callable

import click

from nxm_export.storage.json_files import encode


def show_result(to_json: Callable[[], object], json: bool, show: Callable[[], object]) -> None:
    """Print what `to_json` returns, or call `show`, which prints tables; under torchrun only the first process does."""
    if int(os.environ.get("RANK", "0")):
        return
    if json:
        click.echo(encode(to_json()), nl=False)
    else:
        show()
