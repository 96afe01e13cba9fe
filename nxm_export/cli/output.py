"""The result of a command on stdout: JSON for machines, tables for people."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

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


def print_next(command: str, about: str = "") -> None:
    """The command to type next: the last line for people, on stderr, so that stdout holds the result alone."""
    click.echo(f"next: {command}{f'   # {about}' if about else ''}", err=True)


def quoted(path: object) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def serving_of(engines: Sequence[Path]) -> tuple[str, str]:
    """The command that serves an engine, and a word about it; of several nobody has said yet which one to keep."""
    if len(engines) == 1:
        return f"nxm serve {quoted(engines[0])} --text", ""
    return "nxm serve ENGINE --text", "the one that you keep"


def one_line(text: str) -> str:
    """A message as one line that a terminal shows as it is: runtimes write several, and files hold any character."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in line
    )
